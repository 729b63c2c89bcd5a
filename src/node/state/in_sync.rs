//! Since when the node's kernel has been in sync, for the status of its EgressNode.

use std::time::{Duration, Instant};

/// A shorter time out of sync is not reported: each change of the status is a write, which every node reads.
const REPORTED: Duration = Duration::from_secs(10);

/// Since when the kernel has been in sync.
#[derive(Debug, Default)]
pub(super) struct InSync {
    /// Seconds since the Unix epoch; `None` before the first time, and while it is not.
    since: Option<i64>,
    /// Since when the last passes have failed.
    failing: Option<Instant>,
}

impl InSync {
    /// Notes the result of a pass that ended `now`, at `seconds` since the Unix epoch.
    pub(super) fn note(&mut self, in_sync: bool, now: Instant, seconds: i64) {
        if !in_sync {
            let failing = *self.failing.get_or_insert(now);
            self.since = self.since.filter(|_| now.duration_since(failing) < REPORTED);
            return;
        }
        self.failing = None;
        self.since.get_or_insert(seconds);
    }

    /// Since when, in seconds since the Unix epoch; `None` if it is not in sync.
    pub(super) fn since(&self) -> Option<i64> {
        self.since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_time_out_of_sync_is_not_reported() {
        let (mut in_sync, start) = (InSync::default(), Instant::now());
        let mut note = |seconds: u64, good: bool| {
            in_sync.note(good, start + Duration::from_secs(seconds), 1_000 + seconds.cast_signed());
            in_sync.since()
        };
        assert_eq!(note(0, false), None);
        assert_eq!(note(1, true), Some(1_001));
        assert_eq!(note(2, true), Some(1_001));
        assert_eq!((note(3, false), note(12, false), note(12, true)), (Some(1_001), Some(1_001), Some(1_001)));
        assert_eq!((note(20, false), note(30, false)), (Some(1_001), None));
        assert_eq!((note(31, true), note(40, true)), (Some(1_031), Some(1_031)));
    }
}
