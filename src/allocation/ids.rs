//! Egress IDs.

use crate::model::fnv::fnv1a;
use crate::model::marks::MAX_EGRESS_ID;

/// The ids in use and in cooldown.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    live: Vec<bool>,
    in_cooldown: Vec<bool>,
}

impl Ids {
    pub(super) fn new() -> Self {
        let none = vec![false; usize::from(MAX_EGRESS_ID) + 1];
        Ids { live: none.clone(), in_cooldown: none }
    }

    /// Takes an id, whether in cooldown or not. Returns false if the id is in use or invalid.
    pub(super) fn take(&mut self, id: u16) -> bool {
        let free = (1..=MAX_EGRESS_ID).contains(&id) && !self.live[usize::from(id)];
        if free {
            self.live[usize::from(id)] = true;
        }
        free
    }

    pub(super) fn is_live(&self, id: u16) -> bool {
        self.live.get(usize::from(id)).copied().unwrap_or_default()
    }

    /// Marks an id as in cooldown: [`Ids::find`] does not return it.
    pub(super) fn start_cooldown(&mut self, id: u16) {
        if let Some(in_cooldown) = self.in_cooldown.get_mut(usize::from(id)) {
            *in_cooldown = true;
        }
    }

    /// Takes the first free id after the hash of `name`. The cooldowns of a deleted gateway are lost with it. Because
    /// each allocation starts from its own hash, a new one rarely gets such an id.
    pub(super) fn find(&mut self, name: &str) -> Option<u16> {
        let start = (fnv1a(name.bytes()) % u64::from(MAX_EGRESS_ID)) as u16;
        let found = (0..MAX_EGRESS_ID).map(|step| (start + step) % MAX_EGRESS_ID + 1).find(|id| {
            let index = usize::from(*id);
            !self.live[index] && !self.in_cooldown[index]
        })?;
        self.live[usize::from(found)] = true;
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_id_is_found_once() {
        let mut ids = Ids::new();
        ids.start_cooldown(7);
        assert!(ids.take(9) && !ids.take(9) && !ids.take(0) && !ids.take(MAX_EGRESS_ID + 1));
        let mut found: Vec<u16> = std::iter::from_fn(|| ids.find("same")).collect();
        found.sort_unstable();
        assert_eq!(found, (1..=MAX_EGRESS_ID).filter(|id| *id != 7 && *id != 9).collect::<Vec<_>>());
        assert!(ids.take(7), "its former policies get it back");
    }
}
