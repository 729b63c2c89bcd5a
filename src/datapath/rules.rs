//! Policy-routing rules: marks to tables.

use crate::datapath::names::{PROTOCOL, RULE_FLUSH_GUARD, RULE_REPLY, RULE_REQUEST, RULE_UPLINK};
use crate::datapath::route_socket::{Change, RouteSocket};
use crate::datapath::sysctl;
use anyhow::{Context, Result};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{EEXIST, ENOENT};
use std::collections::BTreeSet;

/// The priorities of Egret's rules, but for the quarantine's.
const OWN: [u32; 4] = [RULE_REQUEST, RULE_REPLY, RULE_UPLINK, RULE_FLUSH_GUARD];
/// How often the rules are read again if one stood in the way of another.
const ROUNDS: usize = 4;
/// A rule that sends packets with a mark to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its place: one of [`RULE_REQUEST`], [`RULE_REPLY`], [`RULE_UPLINK`], [`RULE_FLUSH_GUARD`].
    pub priority: u32,
    /// The mark that packets must have,
    pub mark: u32,
    /// in these bits.
    pub mask: u32,
    /// The table in which they are looked up.
    pub table: u32,
}

/// Makes these the rules of Egret's priorities, for both families, each once, and returns how many changes it made.
/// The quarantine's rules and those that do not carry Egret's protocol number are left alone. Where the host has no
/// IPv6, there are no rules for it.
pub async fn sync(socket: &RouteSocket, rules: &BTreeSet<Rule>) -> Result<usize> {
    let mut made = 0;
    for family in families()? {
        for _ in 0..ROUNDS {
            let mut missing = rules.clone();
            let (mut inverted, mut wrong) = (Vec::new(), Vec::new());
            for message in read(socket, family).await? {
                if !OWN.contains(&priority(&message)) || !is_ours(&message) {
                    continue;
                }
                if message.header.flags.contains(RuleFlags::Invert) {
                    inverted.push(message);
                } else if !parse(&message).is_some_and(|rule| missing.remove(&rule)) {
                    // The second of two that are the same is one too many.
                    wrong.push(message);
                }
            }
            // The kernel takes "not this mark" and "this mark" for the same rule, when it adds and when it deletes
            // (`rule_exists`, net/core/fib_rules.c). So the one goes first, and it may have been the other that went.
            let again = !inverted.is_empty();
            let mut changes: Vec<Change> = inverted.into_iter().map(delete).collect();
            changes.extend(missing.iter().map(|rule| add(family, rule)));
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

/// The message as one of our rules; `None` if it says more than that.
fn parse(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    if header.action != RuleAction::ToTable || (header.src_len, header.dst_len, header.tos) != (0, 0, 0) {
        return None;
    }
    let mut rule = Rule { priority: priority(message), mark: 0, mask: u32::MAX, table: table(message) };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::FwMark(mark) => rule.mark = *mark,
            RuleAttribute::FwMask(mask) => rule.mask = *mask,
            // -1: nothing is suppressed. The kernel always says so.
            RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            RuleAttribute::Priority(_) | RuleAttribute::Table(_) | RuleAttribute::Protocol(_) => {}
            _ => return None,
        }
    }
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
    Change {
        message: RouteNetlinkMessage::NewRule(message),
        // Without EXCL the kernel adds a second one.
        flags: NLM_F_CREATE | NLM_F_EXCL,
        done_already: &[EEXIST],
        about: format!(
            "add the routing rule {}: mark {:#x}/{:#x} to table {}",
            rule.priority, rule.mark, rule.mask, rule.table
        ),
    }
}

fn delete(message: RuleMessage) -> Change {
    let about = format!("remove the routing rule {} to table {}", priority(&message), table(&message));
    Change { message: RouteNetlinkMessage::DelRule(message), flags: 0, done_already: &[ENOENT], about }
}
