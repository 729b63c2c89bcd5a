//! The maps by which new connections are divided among several egress IPs, with `spread: Connection`.
//!
//! Like the sets of destinations they are constant and named after their content.

use super::value;
use crate::model::marks::{EgressId, Marks};
use egret_nft::table::{DataType, Set, SetKind, SetName};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The name of the map of these allocations.
pub(super) fn name(allocations: &[EgressId]) -> String {
    allocations.iter().fold("choices".to_owned(), |name, id| format!("{name}-{id}"))
}

/// Adds the map of these allocations: a number, from 0, to the connection mark.
pub(super) fn add_map(
    allocations: &[EgressId],
    marks: Marks,
    before: Option<&BTreeMap<SetName, Set>>,
    sets: &mut BTreeMap<SetName, Set>,
) {
    let name = name(allocations);
    if allocations.is_empty() || sets.contains_key(&*name) {
        return;
    }
    let set = before.and_then(|before| before.get(&*name)).cloned().unwrap_or_else(|| Set {
        kind: SetKind::plain(DataType::Mark, Some(DataType::Mark)).constant(),
        elements: Arc::new((0u32..).zip(allocations).map(|(n, id)| (n.into(), value(marks.connection(*id)))).collect()),
    });
    sets.insert(name.into(), set);
}
