//! Maps that snapshots share: only what changes is copied.

use crate::model::shared::Shared;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Inserts a value unless an equal one is there, so that a map that does not change is not copied.
pub(super) fn put<K: Ord + Clone, V: Clone>(
    map: &mut Shared<BTreeMap<K, V>>,
    key: K,
    value: V,
    same: impl Fn(&V, &V) -> bool,
) -> bool {
    let changed = !map.get(&key).is_some_and(|before| same(before, &value));
    if changed {
        map.insert(key, value);
    }
    changed
}

/// Like [`put`]. Most values that are put again are the very same.
pub(super) fn put_shared<K: Ord + Clone, V: PartialEq>(
    map: &mut Shared<BTreeMap<K, Arc<V>>>,
    key: K,
    value: Arc<V>,
) -> bool {
    put(map, key, value, |a, b| Arc::ptr_eq(a, b) || a == b)
}

/// Removes a value. A map without it is not copied.
pub(super) fn remove<K: Ord + Clone, V: Clone>(map: &mut Shared<BTreeMap<K, V>>, key: &K) -> bool {
    map.contains_key(key) && map.remove(key).is_some()
}
