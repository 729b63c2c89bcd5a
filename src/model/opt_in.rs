//! Gateways that pods and namespaces may ask for (`spec.optIn`), by the annotation [`ASKED_GATEWAY`].
//!
//! Two policies stand for the permission, as an administrator could write them: one for pods that ask, and one for the
//! pods of namespaces that ask, which gives way to a pod's own word. Both the controller and the nodes make them of the
//! gateway. They are no objects; no object can have their names.

use super::selector::{Name, Selector};
use super::{
    ASKED_GATEWAY, AddressRequest, ForController, Gateway, Guessed, Namespaces, PodMatch, Policy, PolicyKey, Tier,
};
use crate::api::{Allocate, Allocation, AllocationKind, ExistingConnections, Fallback, Spread};

/// The names of the policies, before the gateway's name.
const OF_PODS: &str = "opt-in:";
const OF_NAMESPACES: &str = "opt-in-namespaces:";

/// The keys of a gateway's policies: for pods that ask, and for namespaces that ask.
pub fn keys(gateway: &str) -> [PolicyKey; 2] {
    [OF_PODS, OF_NAMESPACES].map(|prefix| PolicyKey { namespace: None, name: format!("{prefix}{gateway}").into() })
}

/// The gateway whose policy this is; `None`: it is an ordinary policy.
pub fn gateway_of(key: &PolicyKey) -> Option<&str> {
    let name = key.namespace.is_none().then_some(&*key.name)?;
    name.strip_prefix(OF_PODS).or_else(|| name.strip_prefix(OF_NAMESPACES))
}

/// The policies of a gateway that may be asked for. It may have been asked for already and not be readable now.
pub fn of_gateway(name: &Name, gateway: &Gateway) -> Option<[(PolicyKey, Policy); 2]> {
    let keys = keys(name);
    // A gateway that cannot be read keeps what it has given out.
    let is_listed = |of: &&Allocation| of.policies.iter().any(|key| keys.contains(key));
    let had = if gateway.frozen { gateway.status.allocations.iter().find(is_listed) } else { None };
    if !gateway.opt_in && had.is_none() {
        return None;
    }
    let had_default = had.is_some_and(|allocation| allocation.kind == AllocationKind::Explicit);
    let address = match had_default || !gateway.default_address.is_empty() {
        true => AddressRequest::Unspecified,
        false => AddressRequest::Allocate(Allocate::Shared, 1),
    };
    let generation = ForController { generation: gateway.generation, ..ForController::default() };
    let [pods, namespaces] = policies(name, &gateway.namespaces);
    let with = |(key, policy)| {
        (key, Policy { address: address.clone(), for_controller: Some(Box::new(generation.clone())), ..policy })
    };
    Some([with(pods), with(namespaces)])
}

/// The policies of a gateway for whose pods nothing else is known: they are blocked until it is.
pub fn policies(gateway: &Name, allowed: &Selector) -> [(PolicyKey, Policy); 2] {
    let [of_pods, of_namespaces] = keys(gateway);
    let asks = |selector: Selector| selector.with(ASKED_GATEWAY.into(), gateway.clone());
    let policy = |namespaces: Selector, pods: Selector, priority| Policy {
        namespaces: Namespaces::Selected(Box::new(namespaces)),
        pods: PodMatch::Labels(pods),
        gateway: Some(gateway.clone()),
        egress: None,
        address: AddressRequest::Allocate(Allocate::Shared, 1),
        spread: Spread::default(),
        preference: Box::default(),
        dscp: None,
        bandwidth: None,
        fallback: Fallback::Block,
        existing_connections: ExistingConnections::Keep,
        // Every EgressPolicy decides first, and an administrator's own policy of this tier and priority.
        tier: Tier::Baseline,
        priority,
        created: i64::MAX,
        guessed: Guessed::default(),
        for_controller: None,
    };
    [
        (of_pods, policy(allowed.clone(), asks(Selector::default()), 1)),
        (of_namespaces, policy(asks(allowed.clone()), Selector::default(), 0)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{World, selector};
    use crate::model::precedence::PolicyIndex;
    use crate::model::selector::Labels;

    #[test]
    fn pods_and_namespaces_that_ask_are_selected_where_the_gateway_allows_it() {
        let mut world = World::default();
        let labels = |pairs: &[(&str, &str)]| pairs.iter().copied().collect::<Labels>();
        world.cluster.namespaces.insert("shop".into(), labels(&[("team", "sales")]));
        world.cluster.namespaces.insert("asks".into(), labels(&[("team", "sales"), (ASKED_GATEWAY, "g")]));
        world.cluster.namespaces.insert("other".into(), labels(&[(ASKED_GATEWAY, "g")]));
        for name in ["g", "h"] {
            world.gateway(name, &["192.0.2.50"], |spec| {
                (spec.opt_in, spec.namespace_selector) = (true, Some(selector(&[("team", "sales")])));
            });
            let made = of_gateway(&name.into(), &world.cluster.gateways[name]).unwrap();
            world.cluster.policies.extend(made.map(|(key, policy)| (key, policy.into())));
        }
        let index = PolicyIndex::new(&world.cluster);
        let gateways = |namespace: &str, asked: &[(&str, &str)]| -> Vec<String> {
            let found = index.policies_for(namespace, &labels(asked));
            found.iter().map(|ranked| ranked.key.to_string()).collect()
        };
        assert!(gateways("shop", &[]).is_empty());
        assert_eq!(gateways("shop", &[(ASKED_GATEWAY, "g")]), ["opt-in:g"]);
        assert_eq!(gateways("asks", &[]), ["opt-in-namespaces:g"]);
        assert_eq!(
            gateways("asks", &[(ASKED_GATEWAY, "h")]),
            ["opt-in:h", "opt-in-namespaces:g"],
            "the pod's word first"
        );
        assert!(gateways("other", &[(ASKED_GATEWAY, "g")]).is_empty(), "it is not allowed there");
        assert!(keys("g").iter().all(|key| gateway_of(key) == Some("g")));
        assert_eq!(gateway_of(&"opt-in".into()), None);
        assert_eq!(gateway_of(&"ns/opt-in:g".into()), None);
    }
}
