//! The quarantine. A quarantined pod reaches the cluster's networks only, until the daemon has programmed it.
//!
//! Each address of the pod has a routing rule. The rule leads to a table in which the daemon has left the cluster's
//! networks and an `unreachable` default route.

use egret_nft::Family;
use egret_nft::netlink::{Attributes, Error, NETLINK_ROUTE, NLM_F_CREATE, NLM_F_EXCL, Socket, attributes};
use nix::libc;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

/// Routing table of quarantined pods: it contains the cluster's networks alone.
pub const TABLE_QUARANTINE: u32 = 7873;
/// Priority of the quarantine's routing rules. All of Egret's rules come before those of common CNIs.
pub const RULE_QUARANTINE: u32 = 71;
/// The protocol number of Egret's routes, rules and addresses (`RTA_PROTOCOL`, `FRA_PROTOCOL`, `IFA_PROTO`), by which
/// Egret recognises them. iproute2's `rt_protos` does not assign it.
pub const PROTOCOL: u8 = 71;

/// Attributes of a rule, include/uapi/linux/fib_rules.h.
const FRA_SRC: u16 = 2;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
/// The rule's action, in the same file: look the route up in a table.
const FR_ACT_TO_TBL: u8 = 1;
/// `sizeof(struct fib_rule_hdr)` and `sizeof(struct rtmsg)`.
const HEADER: usize = 12;
/// The largest number of equal rules that are deleted. A rule can exist more than once if it was added by hand. If
/// there are more, another program adds them again and again.
const MAX_COPIES: usize = 16;

/// The quarantine of the network namespace in which it was opened.
pub struct Quarantine(Socket);

impl Quarantine {
    /// Opens the quarantine of this network namespace.
    ///
    /// # Errors
    /// A netlink socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        Socket::open(NETLINK_ROUTE).map(Quarantine)
    }

    /// The socket's netlink port, which is in the kernel's notifications about changes made with this socket.
    pub fn port(&self) -> u32 {
        self.0.port()
    }

    /// Whether the table isolates a pod, that is, it has the `unreachable` default route. A rule that leads to an
    /// empty table has no effect.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn is_ready(&mut self, family: Family) -> Result<bool, Error> {
        let mut request = vec![0; HEADER];
        request[0] = family.number();
        request[7] = libc::RTN_UNREACHABLE;
        request.attribute(libc::RTA_TABLE, &TABLE_QUARANTINE.to_ne_bytes());
        let found = self.0.dump(
            libc::RTM_GETROUTE,
            &request,
            || false,
            |found, route| {
                // Old kernels do not filter.
                *found |= route.len() >= HEADER
                    && (route[0], route[1], route[7]) == (family.number(), 0, libc::RTN_UNREACHABLE)
                    && number(&route[HEADER..], libc::RTA_TABLE) == Some(TABLE_QUARANTINE);
            },
        );
        match found {
            // The table or the family does not exist.
            Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(false),
            other => other,
        }
    }

    /// Puts an address into quarantine. It succeeds if the address is there already.
    ///
    /// # Errors
    /// The rule cannot be added.
    pub fn add(&mut self, address: &IpAddr) -> Result<(), Error> {
        match self.0.request(libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &rule(address)) {
            Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes an address out of quarantine. It succeeds if the address is not there.
    ///
    /// # Errors
    /// A rule cannot be deleted.
    pub fn lift(&mut self, address: &IpAddr) -> Result<(), Error> {
        for _ in 0..MAX_COPIES {
            match self.0.request(libc::RTM_DELRULE, 0, &rule(address)) {
                Ok(()) => {}
                Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT)) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The addresses in quarantine.
    ///
    /// # Errors
    /// The rules cannot be read.
    pub fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, Error> {
        let mut all = BTreeSet::new();
        for family in Family::BOTH {
            let mut request = vec![0; HEADER];
            request[0] = family.number();
            let found = self.0.dump(libc::RTM_GETRULE, &request, Vec::new, |found, rule| found.extend(source(rule)));
            match found {
                Err(e) if matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
                other => all.extend(other?),
            }
        }
        Ok(all)
    }
}

fn rule(address: &IpAddr) -> Vec<u8> {
    let family = Family::of(address);
    let mut rule = vec![0; HEADER];
    rule[0] = family.number();
    rule[2] = family.bits();
    rule[7] = FR_ACT_TO_TBL;
    match address {
        IpAddr::V4(a) => rule.attribute(FRA_SRC, &a.octets()),
        IpAddr::V6(a) => rule.attribute(FRA_SRC, &a.octets()),
    }
    rule.attribute(FRA_PRIORITY, &RULE_QUARANTINE.to_ne_bytes());
    rule.attribute(FRA_TABLE, &TABLE_QUARANTINE.to_ne_bytes());
    rule.attribute(FRA_PROTOCOL, &[PROTOCOL]);
    rule
}

/// The address in a rule of the quarantine; `None` for other rules.
fn source(rule: &[u8]) -> Option<IpAddr> {
    let attributes_of = rule.get(HEADER..)?;
    let is_ours = rule[7] == FR_ACT_TO_TBL
        && number(attributes_of, FRA_PRIORITY) == Some(RULE_QUARANTINE)
        && number(attributes_of, FRA_TABLE) == Some(TABLE_QUARANTINE)
        && attributes(attributes_of).any(|(kind, value)| kind == FRA_PROTOCOL && value == [PROTOCOL]);
    let (_, value) = attributes(attributes_of).find(|(kind, _)| *kind == FRA_SRC).filter(|_| is_ours)?;
    let address = match value.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(value).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(value).ok()?),
    };
    (rule[2] == Family::of(&address).bits()).then_some(address)
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    let (_, value) = attributes(bytes).find(|(k, _)| *k == kind)?;
    value.try_into().ok().map(u32::from_ne_bytes)
}
