//! Many allocations as text, one line for each. As objects, 10,000 allocations are longer than etcd takes, and the API
//! server merges them one by one in a server-side apply.
//!
//! ```text
//! node g1
//! node g2
//! 7 D 192.0.2.50,2001:db8::50 0 1763718000 - shop/visitors
//! 8 E 192.0.2.51 1 1763718060 0 shop/a,shop/b
//! 9 L 192.0.2.60 1 1763718060 - shop/c shop/frontend
//! 10 D2 192.0.2.53 1 1763718060 - shop/several
//! -9 192.0.2.52 1763718090 shop/gone
//! -12 192.0.2.61 1763718090 shop/c shop/frontend
//! ```
//!
//! First the nodes, which later lines name by number. Then the allocations: id, kind (with the ordinal behind it, unless
//! that is 0), addresses, `node`, `since`, `leaving`, policies, and the Service if the address is a Service's. Then, with a
//! `-`, the released ones: id, addresses, `at`, policies, and the Service if the address was a Service's. An absent value is
//! `-`.
//! Names in Kubernetes have neither spaces nor commas. Of an allocation whose kind is of a later version, id, addresses and
//! policies are read. Further words of a line, and lines that begin with another word, are a later version's.

use crate::api::{
    AddressPair, Allocation, AllocationKind, EgressGatewayStatus, Name, PolicyKey, ReleasedAllocation, Users,
};
use std::collections::HashMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::str::{FromStr, SplitWhitespace};

const ABSENT: &str = "-";
const KINDS: [(AllocationKind, &str); 6] = [
    (AllocationKind::Dedicated, "D"),
    (AllocationKind::Explicit, "E"),
    (AllocationKind::Node, "N"),
    (AllocationKind::Shared, "S"),
    (AllocationKind::Pooled, "P"),
    (AllocationKind::Service, "L"),
];

/// The status with its allocations and released allocations as text.
pub fn write(status: &EgressGatewayStatus) -> EgressGatewayStatus {
    let EgressGatewayStatus { allocations, released, .. } = status;
    let mut nodes: HashMap<&str, usize> = HashMap::new();
    let mut text = String::new();
    for name in allocations.iter().flat_map(|allocation| [&allocation.node, &allocation.leaving]).flatten() {
        let number = nodes.len();
        nodes.entry(name).or_insert_with(|| {
            line(&mut text, format_args!("node {name}"));
            number
        });
    }
    let number = |name: &Option<Name>| match name {
        Some(name) => nodes[&**name].to_string(),
        None => ABSENT.to_owned(),
    };
    for allocation in allocations {
        let Allocation { id, kind, ordinal, address, node, since, leaving, service, policies } = allocation;
        let kind = KINDS.iter().find(|(k, _)| k == kind).map_or(ABSENT, |(_, letter)| *letter);
        let ordinal = if *ordinal == 0 { String::new() } else { ordinal.to_string() };
        let (address, policies) = (pair(address), list(policies));
        let (node, leaving) = (number(node), number(leaving));
        let service = last(service);
        line(&mut text, format_args!("{id} {kind}{ordinal} {address} {node} {since} {leaving} {policies}{service}"));
    }
    for ReleasedAllocation { id, address, policies, at, service } in released {
        line(&mut text, format_args!("-{id} {} {at} {}{}", pair(address), list(policies), last(service)));
    }
    EgressGatewayStatus {
        nodes: status.nodes.clone(),
        node_count: status.node_count,
        ready_nodes: status.ready_nodes,
        not_ready_nodes: status.not_ready_nodes.clone(),
        usage: status.usage,
        conditions: status.conditions.clone(),
        reports_requested_at: status.reports_requested_at,
        opt_in: status.opt_in.clone(),
        writer: status.writer.clone(),
        text: Some(text),
        allocations: Vec::new(),
        released: Vec::new(),
    }
}

/// The last word of a line, if there is one.
fn last(service: &Option<Name>) -> String {
    service.as_deref().map(|service| format!(" {service}")).unwrap_or_default()
}

fn line(text: &mut String, arguments: std::fmt::Arguments) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{arguments}");
}

fn pair(address: &AddressPair) -> String {
    let both = [address.ipv4.map(IpAddr::V4), address.ipv6.map(IpAddr::V6)];
    list(&both.into_iter().flatten().map(|a| a.to_string()).collect::<Vec<_>>())
}

fn list(words: &[impl ToString]) -> String {
    let words: Vec<String> = words.iter().map(ToString::to_string).collect();
    if words.is_empty() { ABSENT.to_owned() } else { words.join(",") }
}

/// The status with the allocations of its text as objects.
///
/// # Errors
/// A line is invalid; the text names it.
pub fn read(mut status: EgressGatewayStatus) -> Result<EgressGatewayStatus, String> {
    let Some(text) = status.text.take() else { return Ok(status) };
    let mut nodes: Vec<Name> = Vec::new();
    for line in text.lines() {
        read_line(line, &mut nodes, &mut status).ok_or_else(|| format!("status.text has a line {line:?}"))?;
    }
    Ok(status)
}

fn read_line(line: &str, nodes: &mut Vec<Name>, status: &mut EgressGatewayStatus) -> Option<()> {
    let mut words = line.split_whitespace();
    let first = words.next()?;
    if first == "node" {
        nodes.push(words.next()?.into());
    } else if let Some(id) = first.strip_prefix('-') {
        let id = id.parse().ok()?;
        let address = addresses(words.next()?)?;
        status.released.push(ReleasedAllocation {
            id,
            address,
            at: number(&mut words)?,
            policies: policies(words.next()?),
            service: words.next().map(Into::into),
        });
    } else if !first.starts_with(|c: char| c.is_ascii_lowercase()) {
        let id = first.parse().ok()?;
        let word = words.next()?;
        let Some((kind, ordinal)) = KINDS.iter().find_map(|(kind, l)| Some((*kind, word.strip_prefix(l)?))) else {
            let address = words.next().and_then(addresses).unwrap_or_default();
            // Behind node, since and leaving.
            let policies = policies(words.nth(3)?);
            let kind = AllocationKind::Unknown;
            status.allocations.push(Allocation { id, kind, address, policies, ..Allocation::default() });
            return Some(());
        };
        let ordinal = if ordinal.is_empty() { 0 } else { ordinal.parse().ok()? };
        let address = addresses(words.next()?)?;
        let node = node(words.next()?, nodes)?;
        let since = number(&mut words)?;
        let leaving = self::node(words.next()?, nodes)?;
        let policies = policies(words.next()?);
        let service = if kind == AllocationKind::Service { Some(words.next()?.into()) } else { None };
        status.allocations.push(Allocation { id, kind, ordinal, address, node, since, leaving, service, policies });
    }
    Some(())
}

fn number<T: FromStr>(words: &mut SplitWhitespace) -> Option<T> {
    words.next()?.parse().ok()
}

fn addresses(text: &str) -> Option<AddressPair> {
    let mut pair = AddressPair::default();
    for word in text.split(',').filter(|word| *word != ABSENT) {
        match word.parse().ok()? {
            IpAddr::V4(a) => pair.ipv4 = Some(a),
            IpAddr::V6(a) => pair.ipv6 = Some(a),
        }
    }
    Some(pair)
}

fn node(text: &str, nodes: &[Name]) -> Option<Option<Name>> {
    if text == ABSENT {
        return Some(None);
    }
    Some(Some(nodes.get(text.parse::<usize>().ok()?)?.clone()))
}

fn policies(text: &str) -> Users {
    text.split(',').filter(|word| *word != ABSENT).map(PolicyKey::from).collect()
}

#[cfg(test)]
mod tests;
