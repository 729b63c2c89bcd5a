//! Routing rules for the packets of one source address.

use egret_nft::Family;
use egret_nft::netlink::{Attributes, Error, NLM_F_CREATE, NLM_F_EXCL, Socket, attributes, string};
use nix::libc;
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The protocol number of Egret's routes, rules and addresses (`RTA_PROTOCOL`, `FRA_PROTOCOL`, `IFA_PROTO`), by which
/// Egret recognises them. iproute2's `rt_protos` does not assign it.
pub const PROTOCOL: u8 = 71;

/// Attributes of a rule, include/uapi/linux/fib_rules.h.
const FRA_SRC: u16 = 2;
const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FRA_PROTOCOL: u16 = 21;
/// The rule's action, in the same file: look the route up in a table.
const FR_ACT_TO_TBL: u8 = 1;
/// `sizeof(struct fib_rule_hdr)`.
const HEADER: usize = 12;
/// The largest number of equal rules that are deleted. A rule can exist more than once if it was added by hand. If
/// there are more, another program adds them again and again.
const MAX_COPIES: usize = 16;

/// The interface of a look-up for a packet that leaves without having come in: the host's own, and those that an eBPF
/// program redirects to an interface.
pub const OUTGOING: &str = "lo";

/// What one rule matches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// The packet's source.
    pub address: IpAddr,
    /// The interface by which it came in, or [`OUTGOING`]; `None`: whichever.
    pub interface: Option<Box<str>>,
}

/// Rules that differ in the source alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceRules {
    /// Their priority.
    pub priority: u32,
    /// The routing table to which they lead.
    pub table: u32,
    /// Whether they hold only for packets without a mark.
    pub unmarked: bool,
}

/// The sources with a rule of each of these kinds.
///
/// # Errors
/// The rules cannot be read.
pub fn sources<const N: usize>(all: [SourceRules; N], socket: &mut Socket) -> Result<[BTreeSet<Source>; N], Error> {
    let mut sources = [const { BTreeSet::new() }; N];
    for family in Family::BOTH {
        let mut request = vec![0; HEADER];
        request[0] = family.number();
        let found = socket.dump(libc::RTM_GETRULE, &request, Vec::new, |found, rule| {
            found.extend(all.iter().enumerate().filter_map(|(of, rules)| Some((of, rules.source(rule)?))));
        });
        match found {
            Err(e) if matches!(e.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
            other => other?.into_iter().for_each(|(of, source)| sources[of].extend([source])),
        }
    }
    Ok(sources)
}

impl SourceRules {
    /// Adds the rule of a source. It succeeds if it is there already.
    ///
    /// # Errors
    /// The rule cannot be added.
    pub fn add(self, socket: &mut Socket, source: &Source) -> Result<(), Error> {
        match socket.request(libc::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, &self.encode(source)) {
            Err(e) if e.errno() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Deletes the rule of a source. It succeeds if there is none.
    ///
    /// # Errors
    /// A rule cannot be deleted.
    pub fn delete(self, socket: &mut Socket, source: &Source) -> Result<(), Error> {
        for _ in 0..MAX_COPIES {
            match socket.request(libc::RTM_DELRULE, 0, &self.encode(source)) {
                Ok(()) => {}
                Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT)) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn encode(self, source: &Source) -> Vec<u8> {
        let family = Family::of(&source.address);
        let mut rule = vec![0; HEADER];
        rule[0] = family.number();
        rule[2] = family.bits();
        rule[7] = FR_ACT_TO_TBL;
        match source.address {
            IpAddr::V4(a) => rule.attribute(FRA_SRC, &a.octets()),
            IpAddr::V6(a) => rule.attribute(FRA_SRC, &a.octets()),
        }
        if let Some(name) = &source.interface {
            rule.text(FRA_IIFNAME, name);
        }
        rule.attribute(FRA_PRIORITY, &self.priority.to_ne_bytes());
        if self.unmarked {
            rule.attribute(FRA_FWMARK, &0_u32.to_ne_bytes());
            rule.attribute(FRA_FWMASK, &u32::MAX.to_ne_bytes());
        }
        rule.attribute(FRA_TABLE, &self.table.to_ne_bytes());
        rule.attribute(FRA_PROTOCOL, &[PROTOCOL]);
        rule
    }

    /// The source in one of these rules; `None` for other rules.
    fn source(self, rule: &[u8]) -> Option<Source> {
        let all = rule.get(HEADER..)?;
        let value = |wanted| attributes(all).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let number = |kind| value(kind)?.try_into().ok().map(u32::from_ne_bytes);
        let mask = self.unmarked.then_some(u32::MAX);
        let is_ours = rule[7] == FR_ACT_TO_TBL
            && number(FRA_PRIORITY) == Some(self.priority)
            && number(FRA_TABLE) == Some(self.table)
            && number(FRA_FWMASK) == mask
            && value(FRA_PROTOCOL) == Some(&[PROTOCOL]);
        let source = value(FRA_SRC).filter(|_| is_ours)?;
        let address = match source.len() {
            4 => IpAddr::from(<[u8; 4]>::try_from(source).ok()?),
            _ => IpAddr::from(<[u8; 16]>::try_from(source).ok()?),
        };
        let interface = value(FRA_IIFNAME).map(|name| string(name).into());
        (rule[2] == Family::of(&address).bits()).then_some(Source { address, interface })
    }
}
