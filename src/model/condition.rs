//! Conditions of a status. The transition time of a condition changes only when its status changes.

use crate::api::Condition;
use jiff::Timestamp;

/// Collects the new conditions of one object.
pub(crate) struct Conditions<'a> {
    previous: &'a [Condition],
    generation: Option<i64>,
    now: i64,
    made: Vec<Condition>,
}

impl<'a> Conditions<'a> {
    /// `previous` are the conditions that the object has now. `now` is in seconds since the Unix epoch.
    pub(crate) fn new(previous: &'a [Condition], generation: Option<i64>, now: i64) -> Self {
        Conditions { previous, generation, now, made: Vec::new() }
    }

    /// Adds a condition. It keeps the time of the previous condition of its type if the status is the same.
    pub(crate) fn add(&mut self, type_: &str, is_true: bool, reason: impl ToString, message: impl Into<String>) {
        self.add_as(type_, if is_true { "True" } else { "False" }, reason, message);
    }

    /// Adds a condition with the status `Unknown`.
    pub(crate) fn add_unknown(&mut self, type_: &str, reason: impl ToString, message: impl Into<String>) {
        self.add_as(type_, "Unknown", reason, message);
    }

    fn add_as(&mut self, type_: &str, status: &str, reason: impl ToString, message: impl Into<String>) {
        let same = self.previous.iter().find(|c| c.type_ == type_ && c.status == status);
        self.made.push(Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_string(),
            message: message.into(),
            last_transition_time: same.map_or_else(|| time(self.now), |c| c.last_transition_time.clone()),
            observed_generation: self.generation,
        });
    }

    /// All conditions, in the order in which they were added.
    pub(crate) fn finish(self) -> Vec<Condition> {
        self.made
    }
}

/// Seconds since the Unix epoch as RFC 3339.
pub(crate) fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(previous: &[Condition], is_true: bool, message: &str, now: i64) -> Vec<Condition> {
        let mut conditions = Conditions::new(previous, Some(3), now);
        conditions.add("Ready", is_true, "Reason", message);
        conditions.finish()
    }

    #[test]
    fn the_time_changes_with_the_status_only() {
        let first = made(&[], true, "one", 0);
        assert_eq!(first[0].last_transition_time, "1970-01-01T00:00:00Z");
        let second = made(&first, true, "two", 60);
        assert_eq!(second[0].last_transition_time, "1970-01-01T00:00:00Z");
        assert_eq!(second[0].message, "two");
        assert_eq!(made(&second, false, "three", 90)[0].last_transition_time, "1970-01-01T00:01:30Z");
    }
}
