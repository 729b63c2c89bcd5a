//! Assignment of pod marks to pods' interfaces. A pod mark is its index here: `Marks::pod_mark` makes the whole mark.

use crate::model::marks::MAX_INDEX;
use std::collections::{HashMap, HashSet};

/// The pod mark that pods share when no other is free. Its policy chain isolates them.
pub const OVERFLOW_MARK: u16 = MAX_INDEX;

/// The pod marks in use, by interface index. A freed pod mark is used again as late as possible.
#[derive(Debug, Default)]
pub struct PodMarks {
    of: HashMap<u32, u16>,
    last: u16,
}

impl PodMarks {
    /// Starts with the pod marks that the kernel has.
    pub fn new(held: impl IntoIterator<Item = (u16, u32)>) -> Self {
        let of: HashMap<u32, u16> = held.into_iter().map(|(pod_mark, index)| (index, pod_mark)).collect();
        let last = of.values().copied().filter(|t| *t < OVERFLOW_MARK).max().unwrap_or(0);
        PodMarks { of, last }
    }

    /// The pod mark of the interface, or [`OVERFLOW_MARK`] if none is free.
    pub fn get(&mut self, index: u32) -> u16 {
        if let Some(pod_mark) = self.of.get(&index).filter(|pod_mark| **pod_mark != OVERFLOW_MARK) {
            return *pod_mark;
        }
        let taken: HashSet<u16> = self.of.values().copied().collect();
        let after = (1..OVERFLOW_MARK).map(|n| (self.last + n - 1) % (OVERFLOW_MARK - 1) + 1);
        let pod_mark = after.into_iter().find(|t| !taken.contains(t)).unwrap_or(OVERFLOW_MARK);
        if pod_mark != OVERFLOW_MARK {
            self.last = pod_mark;
        }
        self.of.insert(index, pod_mark);
        pod_mark
    }

    /// Frees the pod marks of all other interfaces.
    pub fn retain(&mut self, indexes: &HashSet<u32>) {
        self.of.retain(|index, _| indexes.contains(index));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_pod_mark_gets_one_when_another_is_freed() {
        let mut pod_marks = PodMarks::default();
        let all: HashSet<u16> = (1..=510).map(|index| pod_marks.get(index)).collect();
        assert_eq!(all, (1..OVERFLOW_MARK).collect());
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [OVERFLOW_MARK; 2]);
        // A restarted daemon reads the pod marks from the kernel.
        let mut pod_marks = PodMarks::new(pod_marks.of.iter().map(|(index, pod_mark)| (*pod_mark, *index)));
        let freed = pod_marks.get(7);
        pod_marks.retain(&(1..=512).filter(|index| *index != 7).collect());
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [freed, OVERFLOW_MARK]);
        assert_eq!([511, 512].map(|index| pod_marks.get(index)), [freed, OVERFLOW_MARK]);
    }
}
