//! Whether a gateway forwards the connections that it admits. A firewall of the host's at the hook `forward` drops them
//! where nothing of Egret's stands; what is counted before and after it tells.

use crate::datapath::names::DEVICE;

/// As many first packets must be lost before somebody is told: single ones have no route, or too few hops left.
const LOST: u64 = 3;

/// First packets of connections, of one family. A connection whose first packet is dropped has another first packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FirstPackets {
    /// So many were admitted from the tunnel.
    pub entered: u64,
    /// So many of them came by the hook `forward`.
    pub forwarded: u64,
}

/// See the module. Both families, IPv4 first.
#[derive(Debug, Default)]
pub struct Forwarding {
    seen: Option<[FirstPackets; 2]>,
    /// How many were lost since some came through.
    lost: [u64; 2],
}

impl Forwarding {
    /// Takes in what has been counted until now. Returns whether that changes what is [`closed`](Self::closed).
    pub fn look(&mut self, now: [FirstPackets; 2]) -> bool {
        let before = self.closed();
        if let Some(seen) = self.seen.replace(now) {
            self.lost = [0, 1].map(|at| after(self.lost[at], seen[at], now[at]));
        }
        before != self.closed()
    }

    /// Which families' new connections are dropped.
    pub fn closed(&self) -> [bool; 2] {
        self.lost.map(|lost| lost >= LOST)
    }
}

/// What is lost after `now`, when `lost` were before it.
fn after(lost: u64, seen: FirstPackets, now: FirstPackets) -> u64 {
    let entered = now.entered.checked_sub(seen.entered);
    let forwarded = now.forwarded.checked_sub(seen.forwarded);
    // The tables were made anew, and count from zero.
    let Some((entered, forwarded)) = entered.zip(forwarded) else { return lost };
    // Who has some dropped and not others has said so in a rule.
    let most = forwarded > 0 && 2 * forwarded >= entered;
    if most { 0 } else { lost + entered.saturating_sub(forwarded) }
}

/// What is told of a family, IPv4 being 0, whose connections are dropped.
pub fn told(at: usize) -> String {
    let (family, program) = [("IPv4", "iptables"), ("IPv6", "ip6tables")][at];
    format!(
        "new {family} connections are dropped between {DEVICE} and the uplink, by the host's firewall (hook forward) or for \
         want of a route: let pass what is forwarded from and to {DEVICE}: {program} -I FORWARD -i {DEVICE} -j ACCEPT, \
         {program} -I FORWARD -o {DEVICE} -j ACCEPT"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets(entered: u64, forwarded: u64) -> [FirstPackets; 2] {
        [FirstPackets { entered, forwarded }, FirstPackets::default()]
    }

    #[test]
    fn what_enters_and_never_leaves_is_told_until_something_leaves() {
        let mut forwarding = Forwarding::default();
        // Whatever was before the first look.
        assert!(!forwarding.look(packets(1000, 10)));
        assert!(!forwarding.look(packets(1002, 10)));
        assert!(forwarding.look(packets(1003, 10)));
        assert_eq!(forwarding.closed(), [true, false]);
        assert!(!forwarding.look(packets(1003, 10)), "silence changes nothing");
        assert!(forwarding.look(packets(1004, 11)));
        assert_eq!(forwarding.closed(), [false, false]);
    }

    #[test]
    fn single_losses_and_tables_that_are_made_anew_are_no_firewall() {
        let mut forwarding = Forwarding::default();
        forwarding.look(packets(0, 0));
        for n in 1..100 {
            assert!(!forwarding.look(packets(5 * n, 4 * n)));
        }
        assert!(!forwarding.look(packets(2, 2)));
        assert!(!forwarding.look(packets(4, 4)));
        assert_eq!(forwarding.closed(), [false, false]);
    }
}
