//! Policy-routing rules, which choose a routing table by the packet mark.

use crate::datapath::names::{
    PROTOCOL, RULE_FLUSH_GUARD, RULE_FROM_VRF, RULE_REPLY, RULE_REQUEST, RULE_TO_VRF, RULE_UPLINK,
};
use crate::datapath::route_socket::{Change, RouteSocket};
use crate::datapath::sysctl;
use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ENOENT};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The priorities of Egret's rules, without the quarantine's.
const OWN: [u32; 6] = [RULE_REQUEST, RULE_REPLY, RULE_UPLINK, RULE_FLUSH_GUARD, RULE_FROM_VRF, RULE_TO_VRF];
/// The family, in the error about a rule of IPv6.
pub const IPV6: &str = "IPv6";
/// How often the rules are read again after an inverted rule was deleted.
const ROUNDS: usize = 4;

/// A rule that sends packets with a mark to a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its priority: one of [`RULE_REQUEST`], [`RULE_REPLY`], [`RULE_UPLINK`], [`RULE_FLUSH_GUARD`],
    /// [`RULE_FROM_VRF`], [`RULE_TO_VRF`].
    pub priority: u32,
    /// The mark that packets must have in the bits of `mask`.
    pub mark: u32,
    /// The bits of the mark that the rule compares.
    pub mask: u32,
    /// The routing table for these packets.
    pub table: u32,
    /// Whether the table's default routes do not count (`suppress_prefixlength 0`).
    pub without_default: bool,
    /// The only packets that it is for; `None`: all, of both families.
    pub only: Option<Only>,
}

/// Packets that come in by an interface and go to a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Only {
    /// The name of the interface.
    pub iif: Arc<str>,
    /// The network.
    pub to: IpNetwork,
}

impl Rule {
    fn is_of(&self, family: AddressFamily) -> bool {
        self.only.as_ref().is_none_or(|only| only.to.is_ipv4() == (family == AddressFamily::Inet))
    }
}

/// Brings the rules at Egret's priorities in sync with `rules`, for both families. Returns the number of changes. It
/// does not change the quarantine's rules, nor rules without Egret's protocol number. A host without IPv6 has no IPv6
/// rules.
///
/// # Errors
/// The rules cannot be read, or the kernel rejects a change.
pub async fn sync(socket: &RouteSocket, rules: &BTreeSet<Rule>) -> Result<usize> {
    let mut made = 0;
    for family in families()? {
        for _ in 0..ROUNDS {
            let mut missing: BTreeSet<&Rule> = rules.iter().filter(|rule| rule.is_of(family)).collect();
            let (mut inverted, mut wrong) = (Vec::new(), Vec::new());
            for message in read(socket, family).await? {
                if !OWN.contains(&priority(&message)) || !is_ours(&message) {
                    continue;
                }
                if message.header.flags.contains(RuleFlags::Invert) {
                    inverted.push(message);
                } else if !parse(&message).is_some_and(|rule| missing.remove(&rule)) {
                    // Of two equal rules, the second one is deleted.
                    wrong.push(message);
                }
            }
            // When the kernel adds or deletes a rule, it does not compare whether the rule is inverted
            // (`rule_exists`, net/core/fib_rules.c). So the inverted rule is deleted first, and the rules are read
            // again, because the kernel may have deleted the other one.
            let again = !inverted.is_empty();
            let mut changes: Vec<Change> = inverted.into_iter().map(delete).collect();
            changes.extend(missing.into_iter().map(|rule| add(family, rule)));
            changes.extend(wrong.into_iter().map(delete));
            made += socket.apply(changes).await?;
            if !again {
                break;
            }
        }
    }
    Ok(made)
}

fn families() -> Result<Vec<AddressFamily>> {
    let mut families = vec![AddressFamily::Inet];
    if sysctl::ipv6()? {
        families.push(AddressFamily::Inet6);
    }
    Ok(families)
}

async fn read(socket: &RouteSocket, family: AddressFamily) -> Result<Vec<RuleMessage>> {
    let mut filter = RuleMessage::default();
    filter.header.family = family;
    socket
        .dump(RouteNetlinkMessage::GetRule(filter), |m| match m {
            RouteNetlinkMessage::NewRule(rule) if rule.header.family == family => Some(rule),
            _ => None,
        })
        .await
        .context("cannot read the routing rules")
}

fn priority(message: &RuleMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|a| if let RuleAttribute::Priority(p) = a { Some(*p) } else { None })
        .unwrap_or(0)
}

fn is_ours(message: &RuleMessage) -> bool {
    message.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::from(PROTOCOL)))
}

fn table(message: &RuleMessage) -> u32 {
    let table = message.attributes.iter().find_map(|a| if let RuleAttribute::Table(t) = a { Some(*t) } else { None });
    table.unwrap_or(message.header.table.into())
}

/// The rule in the message; `None` if the message has other attributes, too.
fn parse(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    if header.action != RuleAction::ToTable || (header.src_len, header.tos) != (0, 0) {
        return None;
    }
    let (mut iif, mut to) = (None, None);
    let mut rule = Rule {
        priority: priority(message),
        mark: 0,
        mask: u32::MAX,
        table: table(message),
        without_default: false,
        only: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            // -1: nothing is suppressed. The kernel always sends this attribute.
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            RuleAttribute::SuppressPrefixLen(0) => rule.without_default = true,
            RuleAttribute::Iifname(name) => iif = Some(name.as_str().into()),
            RuleAttribute::Destination(address) => to = IpNetwork::new(*address, header.dst_len).ok(),
            RuleAttribute::Priority(_) | RuleAttribute::Table(_) | RuleAttribute::Protocol(_) => {}
            _ => return None,
        }
    }
    rule.only = match (iif, to) {
        (Some(iif), Some(to)) => Some(Only { iif, to }),
        (None, None) => None,
        _ => return None,
    };
    Some(rule)
}

fn add(family: AddressFamily, rule: &Rule) -> Change {
    let mut message = RuleMessage::default();
    message.header.family = family;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::FwMask(rule.mask),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(PROTOCOL.into()),
    ];
    if let Some(Only { iif, to }) = &rule.only {
        message.header.dst_len = to.prefix();
        message.attributes.push(RuleAttribute::Iifname(iif.to_string()));
        message.attributes.push(RuleAttribute::Destination(to.network()));
    }
    if rule.without_default {
        message.attributes.push(RuleAttribute::SuppressPrefixLen(0));
    }
    Change {
        message: RouteNetlinkMessage::NewRule(message),
        // Without EXCL the kernel adds a second rule.
        flags: NLM_F_CREATE | NLM_F_EXCL,
        done_already: &[EEXIST],
        about: format!(
            "add the {} routing rule {}: mark {:#x}/{:#x} to table {}",
            if family == AddressFamily::Inet6 { IPV6 } else { "IPv4" },
            rule.priority,
            rule.mark,
            rule.mask,
            rule.table
        ),
    }
}

fn delete(message: RuleMessage) -> Change {
    let about = format!("remove the routing rule {} to table {}", priority(&message), table(&message));
    Change { message: RouteNetlinkMessage::DelRule(message), flags: 0, done_already: &[ENOENT], about }
}
