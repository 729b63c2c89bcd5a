//! How many of a gateway's egress IPs a node holds.

use super::metadata::Invalid;
use super::selector::Selector;
use super::{Gateway, Node};
use crate::api::{EgressGatewaySpec, MAX_CAPACITIES, MAX_WEIGHT};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// Annotation of a Node: the largest number of egress IPs of each gateway on it.
pub const MAX_EGRESS_IPS: &str = "egret.dev/max-egress-ips";
/// Annotation of a Node: its weight in each gateway, 1 to 100.
pub const WEIGHT: &str = "egret.dev/weight";
/// The annotations of Nodes that count.
pub const ANNOTATIONS: [&str; 2] = [MAX_EGRESS_IPS, WEIGHT];

/// How many of a gateway's egress IPs a node holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Its share, compared with other nodes' weights.
    pub weight: u16,
    /// The largest number; `None`: no limit.
    pub most: Option<u32>,
}

impl Default for Capacity {
    fn default() -> Self {
        Capacity { weight: 1, most: None }
    }
}

impl Capacity {
    /// The capacity of a node of the gateway.
    pub fn of(gateway: &Gateway, node: &Node) -> Self {
        let selected = gateway.capacity.iter().find(|selected| selected.nodes.matches(&node.labels));
        let of_gateway = selected.map(|selected| selected.capacity).unwrap_or_default();
        Capacity {
            weight: node.capacity.weight.unwrap_or(of_gateway.weight),
            most: node.capacity.most.or(of_gateway.most),
        }
    }

    /// Whether there is room for one more beside so many.
    pub fn has_room(&self, count: u32) -> bool {
        self.most.is_none_or(|most| count < most)
    }

    /// Where the node stands for one more egress IP beside so many. The lowest one gets it.
    pub fn next(&self, count: u32) -> Quotient {
        Quotient { halves: 2 * u64::from(count) + 1, weight: u64::from(self.weight.max(1)) }
    }
}

/// An egress IP of a node, divided by the node's weight (the method of Webster and Sainte-Laguë): with these, counts are
/// nearest to what the weights say.
#[derive(Clone, Copy, Debug)]
pub struct Quotient {
    /// Twice the number of egress IPs before it, and one.
    halves: u64,
    weight: u64,
}

impl Ord for Quotient {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.halves * other.weight).cmp(&(other.halves * self.weight))
    }
}

impl PartialOrd for Quotient {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Quotient {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Quotient {}

/// The capacity of the nodes that a gateway selects.
#[derive(Clone, Debug, PartialEq)]
pub struct SelectedCapacity {
    /// The nodes.
    pub nodes: Selector,
    /// Their capacity.
    pub capacity: Capacity,
}

/// What a Node's annotations say of its capacity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AnnotatedCapacity {
    /// [`WEIGHT`].
    pub weight: Option<u16>,
    /// [`MAX_EGRESS_IPS`].
    pub most: Option<u32>,
    /// The annotation that has no valid value, and is ignored.
    pub invalid: Option<&'static str>,
}

impl AnnotatedCapacity {
    /// Reads the annotations of a Node.
    pub fn new(annotations: Option<&BTreeMap<String, String>>) -> Self {
        let text = |key| annotations.and_then(|all| all.get(key));
        let weight = text(WEIGHT).map(|text| text.parse().ok().filter(|w| (1..=MAX_WEIGHT).contains(w)));
        let most = text(MAX_EGRESS_IPS).map(|text| text.parse().ok());
        let invalid = match (weight, most) {
            (Some(None), _) => Some(WEIGHT),
            (_, Some(None)) => Some(MAX_EGRESS_IPS),
            _ => None,
        };
        AnnotatedCapacity { weight: weight.flatten(), most: most.flatten(), invalid }
    }
}

/// Validates `spec.capacity`.
pub(super) fn capacities(spec: &EgressGatewaySpec) -> Result<Box<[SelectedCapacity]>, Invalid> {
    if spec.capacity.len() > MAX_CAPACITIES {
        let message = format!("has {} entries, and at most {MAX_CAPACITIES} are possible", spec.capacity.len());
        return Err(Invalid::new("spec.capacity", message));
    }
    let each = spec.capacity.iter().enumerate().map(|(i, entry)| {
        let field = |name: &str| format!("spec.capacity[{i}].{name}");
        let nodes = Selector::checked(&entry.node_selector).map_err(|e| Invalid::new(field("nodeSelector"), e))?;
        let weight = entry.weight.unwrap_or(1);
        if !(1..=MAX_WEIGHT).contains(&weight) {
            return Err(Invalid::new(field("weight"), format!("is {weight}; give 1 to {MAX_WEIGHT}")));
        }
        Ok(SelectedCapacity { nodes, capacity: Capacity { weight, most: entry.max_egress_ips } })
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::NodeCapacity;
    use crate::fixture::selector;
    use crate::model::Metadata;

    fn annotated(pairs: &[(&str, &str)]) -> AnnotatedCapacity {
        let all = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        AnnotatedCapacity::new(Some(&all))
    }

    #[test]
    fn the_first_entry_counts_and_annotations_replace_it() {
        let entry = |labels: &[(&str, &str)], weight, max_egress_ips| NodeCapacity {
            node_selector: selector(labels),
            weight,
            max_egress_ips,
        };
        let capacity = vec![entry(&[("size", "big")], Some(3), None), entry(&[], None, Some(8))];
        let spec = EgressGatewaySpec { capacity, ..EgressGatewaySpec::default() };
        let gateway = Gateway::new(&spec, Metadata::default()).unwrap();
        let node = |size: &str, capacity| {
            let node = Node { labels: [("size", size)].into_iter().collect(), capacity, ..Node::default() };
            let Capacity { weight, most } = Capacity::of(&gateway, &node);
            (weight, most)
        };
        assert_eq!(node("big", AnnotatedCapacity::default()), (3, None));
        assert_eq!(node("small", AnnotatedCapacity::default()), (1, Some(8)));
        assert_eq!(node("small", annotated(&[(MAX_EGRESS_IPS, "2"), (WEIGHT, "5")])), (5, Some(2)));
        let wrong = annotated(&[(MAX_EGRESS_IPS, "many"), (WEIGHT, "5")]);
        assert_eq!((node("small", wrong), wrong.invalid), ((5, Some(8)), Some(MAX_EGRESS_IPS)));
        assert_eq!(annotated(&[(WEIGHT, "0")]).invalid, Some(WEIGHT));
    }

    #[test]
    fn a_weight_is_in_its_bounds() {
        let capacity = vec![NodeCapacity { weight: Some(101), ..NodeCapacity::default() }];
        let spec = EgressGatewaySpec { capacity, ..EgressGatewaySpec::default() };
        let refusal = Gateway::new(&spec, Metadata::default()).unwrap_err().to_string();
        assert!(refusal.contains("spec.capacity[0].weight: is 101"), "{refusal}");
    }
}
