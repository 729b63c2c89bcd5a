//! Detection of a host firewall that drops forwarded packets. Egret has no chain at the hook `forward`, so it compares
//! counters before and after that hook.

use crate::datapath::names::DEVICE;

/// Forwarding counts as blocked after this many lost first packets. Single ones may have no route, or too low a hop
/// limit.
const LOST: u64 = 3;

/// Counters of connections' first packets, of one family. If a first packet is dropped, the next one counts again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstPackets {
    /// Packets admitted from the tunnel.
    pub entered: u64,
    /// Packets that passed the hook `forward`.
    pub forwarded: u64,
}

/// The state of the detection, for both families, IPv4 first.
#[derive(Debug, Default)]
pub struct Forwarding {
    seen: Option<[FirstPackets; 2]>,
    /// Packets lost since the last one that passed.
    lost: [u64; 2],
}

impl Forwarding {
    /// Takes the present counters. Returns whether the result of [`closed`](Self::closed) has changed.
    pub fn update(&mut self, now: [FirstPackets; 2]) -> bool {
        let before = self.closed();
        if let Some(seen) = self.seen.replace(now) {
            self.lost = [0, 1].map(|at| after(self.lost[at], seen[at], now[at]));
        }
        before != self.closed()
    }

    /// For each family, whether new connections are dropped.
    pub fn closed(&self) -> [bool; 2] {
        self.lost.map(|lost| lost >= LOST)
    }
}

/// The number of lost packets after `now`, if it was `lost` before.
fn after(lost: u64, seen: FirstPackets, now: FirstPackets) -> u64 {
    let entered = now.entered.checked_sub(seen.entered);
    let forwarded = now.forwarded.checked_sub(seen.forwarded);
    // The tables were created anew, and their counters start at zero.
    let Some((entered, forwarded)) = entered.zip(forwarded) else { return lost };
    // If most packets pass, the firewall drops some of them on purpose.
    let most = forwarded > 0 && 2 * forwarded >= entered;
    if most { 0 } else { lost + entered.saturating_sub(forwarded) }
}

/// The message about a family, 0 for IPv4, whose new connections are dropped.
pub fn message(at: usize) -> String {
    let (family, program) = [("IPv4", "iptables"), ("IPv6", "ip6tables")][at];
    format!(
        "new {family} connections are dropped between {DEVICE} and the uplink, by the host's firewall (hook forward) or \
         because there is no route; allow forwarding from and to {DEVICE}: {program} -I FORWARD -i {DEVICE} -j ACCEPT, \
         {program} -I FORWARD -o {DEVICE}+ -j ACCEPT"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(entered: u64, forwarded: u64) -> [FirstPackets; 2] {
        [FirstPackets { entered, forwarded }, FirstPackets::default()]
    }

    #[test]
    fn a_family_is_closed_from_three_lost_packets_until_one_passes() {
        let mut forwarding = Forwarding::default();
        // Whatever was before the first look.
        assert!(!forwarding.update(packets(1000, 10)));
        assert!(!forwarding.update(packets(1002, 10)));
        assert!(forwarding.update(packets(1003, 10)));
        assert_eq!(forwarding.closed(), [true, false]);
        assert!(!forwarding.update(packets(1003, 10)), "silence changes nothing");
        assert!(forwarding.update(packets(1004, 11)));
        assert_eq!(forwarding.closed(), [false, false]);
    }

    #[test]
    fn single_losses_and_reset_counters_are_no_firewall() {
        let mut forwarding = Forwarding::default();
        forwarding.update(packets(0, 0));
        for n in 1..100 {
            assert!(!forwarding.update(packets(5 * n, 4 * n)));
        }
        assert!(!forwarding.update(packets(2, 2)));
        assert!(!forwarding.update(packets(4, 4)));
        assert_eq!(forwarding.closed(), [false, false]);
    }
}
