//! Values that snapshots share until they change.
//!
//! A change of the cluster mostly concerns one object of ten thousand. What is computed from the other kinds of
//! objects need not be computed again: whether a value is the same is a comparison of two pointers.

use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};

/// A shared value. A change in place copies the value if others share it.
pub struct Shared<T>(Arc<T>);

/// Identifies a value without keeping it alive.
#[derive(Debug)]
pub struct Mark<T>(Weak<T>);

impl<T> Shared<T> {
    /// Whether both are the same value. Different values may be equal.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The mark that identifies this value.
    pub fn mark(&self) -> Mark<T> {
        Mark(Arc::downgrade(&self.0))
    }

    /// Whether `mark` identifies this value.
    pub fn has(&self, mark: &Mark<T>) -> bool {
        // This holds also after the marked value is gone: a `Weak` keeps its allocation, so the address is not
        // reused.
        mark.0.as_ptr() == Arc::as_ptr(&self.0)
    }
}

impl<T> Default for Mark<T> {
    /// The mark of no value.
    fn default() -> Self {
        Mark(Weak::new())
    }
}

impl<T> Clone for Mark<T> {
    fn clone(&self) -> Self {
        Mark(self.0.clone())
    }
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Shared(self.0.clone())
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Clone> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::make_mut(&mut self.0)
    }
}

impl<T: Default> Default for Shared<T> {
    fn default() -> Self {
        Shared::from(T::default())
    }
}

impl<T> From<T> for Shared<T> {
    fn from(value: T) -> Self {
        Shared(Arc::new(value))
    }
}

impl<T: fmt::Debug> fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: PartialEq> PartialEq for Shared<T> {
    fn eq(&self, other: &Self) -> bool {
        self.is(other) || *self.0 == *other.0
    }
}

impl<A, T: FromIterator<A>> FromIterator<A> for Shared<T> {
    fn from_iter<I: IntoIterator<Item = A>>(items: I) -> Self {
        Shared::from(T::from_iter(items))
    }
}

impl<'a, K, V> IntoIterator for &'a Shared<BTreeMap<K, V>> {
    type Item = (&'a K, &'a V);
    type IntoIter = btree_map::Iter<'a, K, V>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_made_when_a_shared_value_changes() {
        let before = Shared::from(vec![1]);
        let mut after = before.clone();
        assert!(after.is(&before));
        after.push(2);
        assert!(!after.is(&before));
        assert_eq!((&*before, &*after), (&vec![1], &vec![1, 2]));
    }

    #[test]
    fn a_mark_identifies_its_value_only() {
        let value = Shared::from(1);
        let mark = value.mark();
        assert!(value.clone().has(&mark));
        assert!(!Shared::from(1).has(&mark));
        drop(value);
        assert!(!Shared::from(1).has(&mark));
        assert!(!Shared::from(1).has(&Mark::default()));
    }
}
