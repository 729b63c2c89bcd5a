//! How many probes a line loses, and so how many in a row say that a node is dead.

/// The share of lost round trips for which [`Settings::probes`](super::Settings::probes) is enough: 5 % in each
/// direction. With these, a node that lives is found dead once in a thousand hours.
const USUAL: f64 = 1.0 - 0.95 * 0.95;
/// How many times as many probes a line can demand. It is enough for a share of 46 %, 27 % in each direction.
const MOST: f64 = 3.0;
/// The number of probes after which an old one counts for a third.
const MEMORY: f64 = 64.0;

/// The share of probes without a reply in time, among those of which it is certain that the node lived: a later probe
/// was answered. So a node's death does not count, however long it takes to be detected.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    share: f64,
    seen: f64,
}

impl Default for Loss {
    /// A line that loses nothing, until some probes say otherwise.
    fn default() -> Self {
        Loss { share: 0.0, seen: MEMORY / 2.0 }
    }
}

impl Loss {
    /// Counts a probe.
    pub fn count(&mut self, lost: bool) {
        self.seen = (self.seen + 1.0).min(MEMORY);
        self.share += (f64::from(u8::from(lost)) - self.share) / self.seen;
    }

    /// The number of consecutive probes without a reply after which the node is dead, so that chance does not lose all
    /// of them more often than it loses `least` of them on a line with the [`USUAL`] loss.
    pub fn probes(&self, least: u32) -> u32 {
        // The estimate is from some 64 probes, so the share may be larger by a standard deviation.
        let share = self.share + (self.share * (1.0 - self.share) / (2.0 * MEMORY)).sqrt();
        let factor = USUAL.ln() / share.clamp(USUAL, 0.9).ln();
        // A small number of probes: nothing is cut off.
        (f64::from(least) * factor.min(MOST)).ceil() as u32
    }
}
