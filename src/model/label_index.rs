//! An index that finds the few of many selectors that can match an object's labels.

use crate::model::selector::Name;
use std::collections::HashMap;

/// Up to this many items a linear scan is faster than a map. Ten thousand namespaces with one policy each then need
/// no ten thousand maps.
const MAX_SCANNED: usize = 8;

/// Items, each stored under one label that everything it selects must have.
#[derive(Clone, Debug, Default)]
pub(super) struct LabelIndex {
    /// By key: values with their items, sorted. Ten thousand lists of one item each would take four times the memory.
    labelled: HashMap<Name, Box<[(Name, u32)]>>,
    /// Items that objects without a required label might match.
    rest: Vec<u32>,
}

impl LabelIndex {
    /// Stores each item under the rarest of the labels it requires: of ten thousand policies that all ask for `tier:
    /// web`, only their other labels tell them apart.
    pub(super) fn new(items: &[(u32, Vec<(&Name, &Name)>)]) -> Self {
        let mut index = LabelIndex::default();
        if items.len() <= MAX_SCANNED {
            index.rest = items.iter().map(|(item, _)| *item).collect();
            return index;
        }
        let mut frequency: HashMap<(&Name, &Name), usize> = HashMap::new();
        for label in items.iter().flat_map(|(_, labels)| labels) {
            *frequency.entry(*label).or_default() += 1;
        }
        let mut labelled: HashMap<&Name, Vec<(Name, u32)>> = HashMap::new();
        for (item, labels) in items {
            match labels.iter().min_by_key(|label| frequency[*label]) {
                Some((key, value)) => labelled.entry(key).or_default().push((Name::clone(value), *item)),
                None => index.rest.push(*item),
            }
        }
        let sorted = |(key, mut values): (&Name, Vec<_>)| {
            values.sort();
            (key.clone(), values.into())
        };
        index.labelled = labelled.into_iter().map(sorted).collect();
        index
    }

    fn with(&self, key: &Name, value: &Name) -> &[(Name, u32)] {
        let values = self.labelled.get(key).map_or(&[][..], |values| values);
        let from = &values[values.partition_point(|(v, _)| v < value)..];
        &from[..from.partition_point(|(v, _)| v == value)]
    }

    /// The items that could match an object with these labels. The caller checks their selectors. An item is repeated
    /// if a label is.
    pub(super) fn candidates<'a>(
        &self,
        labels: impl Iterator<Item = (&'a Name, &'a Name)>,
    ) -> impl Iterator<Item = u32> {
        let labelled = labels.flat_map(|(key, value)| self.with(key, value)).map(|(_, item)| item);
        self.rest.iter().chain(labelled).copied()
    }
}
