//! The finished ledger, as it is stored and told.

use super::Outcome;
use super::book::{Book, Desk};
use super::demand::{Applicant, Want};
use super::family::{Family, addresses, pair};
use super::resting::{REST_SECONDS, cooldown_ended_until};
use super::verdict::{Grant, Reason, Refusal, Verdict};
use crate::api::{Condition, EgressGatewayStatus, LedgerPath, PathKind, ReleasedPath};
use crate::model::END_COOLDOWN;
use crate::model::condition::Conditions;
use ipnetwork::IpNetwork;
use std::collections::HashMap;
use std::net::IpAddr;

/// Closes the book. `refused` says, by the demand's place, who got no path.
pub(super) fn close(book: Book, refused: &HashMap<usize, Refusal>) -> Outcome {
    let mut outcome = Outcome::default();
    for (place, (applicant, demand)) in book.demands.applicants.iter().zip(&book.demands.of).enumerate() {
        let verdict = match demand {
            Err(refusal) => Verdict::Refused(refusal.clone()),
            Ok(demand) => match (book.demands.all[*demand].path, refused.get(demand)) {
                (Some(path), _) => Verdict::Granted(granted(&book, place, *demand, path)),
                (None, Some(refusal)) => Verdict::Refused(refusal.clone()),
                (None, None) => unreachable!("a demand is either granted or refused"),
            },
        };
        outcome.verdicts.insert(applicant.key.clone(), verdict);
    }

    let mut statuses = vec![EgressGatewayStatus::default(); book.desks.len()];
    for (place, path) in book.paths.iter().enumerate() {
        let users = book.users(place).into_iter();
        let mut users: Vec<&Applicant> = users.map(|p| &book.demands.applicants[p]).collect();
        users.sort_unstable_by_key(|applicant| &applicant.name);
        statuses[path.gateway].paths.push(LedgerPath {
            id: path.id,
            kind: path.kind,
            address: path.address.clone(),
            node: path.node.clone(),
            since: path.since,
            leaving: path.leaving.clone(),
            policies: users.into_iter().map(|applicant| applicant.key.clone()).collect(),
        });
    }
    for entry in &book.resting.entries {
        // What has been taken up again rests no longer.
        let address = pair(addresses(&entry.address).filter(|a| book.holder(*a).is_none()));
        if !address.is_empty() || !book.ids.is_live(entry.id) {
            statuses[entry.gateway].released.push(ReleasedPath {
                id: entry.id,
                address,
                policies: entry.policies.clone(),
                at: entry.at,
            });
        }
    }
    for (place, (desk, mut status)) in book.desks.iter().zip(statuses).enumerate() {
        status.nodes = desk.nodes.iter().map(|(name, _)| name.to_string()).collect();
        status.paths.sort_by_key(|path| path.id);
        status.released.sort_by_key(|r| (r.at, r.id, r.address.ipv4, r.address.ipv6));
        status.conditions = conditions(&book, place, desk, &status, refused);
        let next = status.released.first().map(|released| released.at + REST_SECONDS);
        outcome.next_release = [outcome.next_release, next].into_iter().flatten().min();
        outcome.gateways.insert(desk.name.clone(), status);
    }
    outcome
}

fn granted(book: &Book, applicant: usize, demand: usize, place: usize) -> Grant {
    let path = &book.paths[place];
    let desk = &book.desks[path.gateway];
    Grant {
        gateway: desk.name.clone(),
        id: path.id,
        kind: path.kind,
        address: path.address.clone(),
        node: path.node.clone(),
        leaving: path.leaving.clone(),
        shared_with: (path.kind == PathKind::Explicit).then(|| shared_with(book, applicant, place)).flatten(),
        note: note(book, demand, place),
    }
}

/// Who else uses a path, the most senior first; of many the first three, so that not each one's status changes when one
/// more comes.
fn shared_with(book: &Book, applicant: usize, path: usize) -> Option<String> {
    let others: Vec<usize> = book.users(path).into_iter().filter(|user| *user != applicant).collect();
    let names = others.iter().take(3).map(|user| book.demands.applicants[*user].name.as_str());
    let more = if others.len() > 3 { " and others" } else { "" };
    (!others.is_empty()).then(|| names.collect::<Vec<_>>().join(", ") + more)
}

/// What a person should know of a path that was granted all the same.
fn note(book: &Book, demand: usize, place: usize) -> Option<String> {
    let (path, demand) = (&book.paths[place], &book.demands.all[demand]);
    if !matches!(demand.want, Want::Dedicated | Want::Shared) {
        return None;
    }
    let desk = &book.desks[path.gateway];
    for entry in book.resting.of(path.gateway, &demand.policies) {
        // What another policy has by now is not in the released entry any more when the ledger is read again.
        let left_pool = |a: &IpAddr| {
            !desk.declared.contains(*a) && !book.node_addresses.contains_key(a) && book.holder(*a).is_none()
        };
        if let Some(lost) = addresses(&entry.address).find(left_pool) {
            return Some(format!("{lost} is no longer in the pool of the gateway, so the policy has left it"));
        }
    }
    let lacking =
        Family::BOTH.into_iter().find(|family| desk.open.has(*family) && family.of_pair(&path.address).is_none())?;
    Some(format!(
        "the gateway has no {lacking} address left for it, so its {lacking} traffic has none to leave from; \
         add addresses to the gateway's spec.addresses"
    ))
}

fn conditions(
    book: &Book,
    place: usize,
    desk: &Desk,
    status: &EgressGatewayStatus,
    refused: &HashMap<usize, Refusal>,
) -> Vec<Condition> {
    let mut conditions = Conditions::new(&desk.gateway.status.conditions, desk.gateway.generation, book.now);
    let defaults: Vec<&str> =
        book.desks.iter().filter(|other| other.gateway.default).map(|other| &**other.name).collect();
    if let Some(fault) = &desk.gateway.fault {
        conditions.add("Accepted", false, "Invalid", format!("{fault}; {}", desk.gateway.used()));
    } else if let Some(overlap) = desk.overlaps.first() {
        let range = if overlap.first == overlap.last {
            overlap.first.to_string()
        } else {
            format!("{}-{}", overlap.first, overlap.last)
        };
        let more = match desk.overlaps.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more ranges with others)"),
        };
        let message = format!(
            "{range} is in the pool of EgressGateway {:?} too, which keeps it{more}; take it out of one of the pools",
            book.desks[overlap.with].name
        );
        conditions.add("Accepted", false, "PoolOverlap", message);
    } else if let Some((network, address)) = inside(book, desk) {
        let message = format!(
            "{address} is in {network}, a network of the cluster's pods or Services, and is not given to policies; take \
             it out of spec.addresses"
        );
        conditions.add("Accepted", false, "PoolInCluster", message);
    } else if desk.gateway.default && defaults.len() > 1 {
        let message = format!(
            "several gateways are the default one: {}; policies that name no gateway get no path from them unless \
             they had one; leave default: true on one",
            defaults.join(", ")
        );
        conditions.add("Accepted", false, "SeveralDefaultGateways", message);
    } else if let Err(text) = cooldown_ended_until(desk.gateway) {
        let message = format!(
            "its addresses are its own; the annotation {END_COOLDOWN} is no time, and is passed over: {text:?}; write it \
             like {}",
            "2026-01-31T12:00:00Z"
        );
        conditions.add("Accepted", true, "Accepted", message);
    } else {
        conditions.add("Accepted", true, "Accepted", "its addresses are its own");
    }

    let matching = match desk.nodes.len() {
        1 => "1 node matches".to_owned(),
        n => format!("{n} nodes match"),
    };
    if desk.nodes.is_empty() {
        let message = "no node matches spec.nodeSelector; label a node, or mend the selector";
        conditions.add("Ready", false, "NoNode", message);
    } else if desk.nodes.iter().all(|(name, node)| node.is_lost(book.now) || !book.lives(name)) {
        let message = format!("{matching}, and none of them is known to live: nobody hears of them; see what they do");
        conditions.add_unknown("Ready", "NoNodeHeard", message);
    } else {
        conditions.add("Ready", true, "NodesMatch", matching);
    }

    let wants = book.demands.all.iter().enumerate().filter(|(_, demand)| demand.gateway == place);
    let exhausted = wants.filter_map(|(d, _)| refused.get(&d)).find(|r| r.reason == Reason::PoolExhausted);
    match exhausted {
        Some(refusal) => conditions.add("AddressesLeft", false, Reason::PoolExhausted, refusal.message.as_str()),
        None if desk.declared.is_empty() => conditions.add("AddressesLeft", true, "NoPool", "it has no pool"),
        None if desk.usable.is_empty() => {
            let message = "all of its pool is other gateways' too, and theirs; add addresses to spec.addresses";
            conditions.add("AddressesLeft", false, Reason::PoolEmpty, message);
        }
        None => conditions.add("AddressesLeft", true, "AddressesLeft", in_use(desk, status)),
    }
    conditions.finish()
}

/// A network of the cluster's own that the gateway's pool reaches into, and the first address of it.
fn inside(book: &Book, desk: &Desk) -> Option<(IpNetwork, IpAddr)> {
    desk.gateway.pool.iter().find_map(|range| book.inside_range(range))
}

/// `IPv4: 3 of 10 in use, 1 in cooldown`.
fn in_use(desk: &Desk, status: &EgressGatewayStatus) -> String {
    let families = Family::BOTH.into_iter().filter(|family| desk.usable.has(*family));
    let families = families.map(|family| {
        let pool = |pair| family.of_pair(pair).is_some_and(|address| desk.usable.contains(address));
        let used = status.paths.iter().filter(|p| p.kind != PathKind::Node && pool(&p.address)).count();
        let cooling = status.released.iter().filter(|r| pool(&r.address) && r.at > desk.ended_until).count();
        format!("{family}: {used} of {} in use, {cooling} in cooldown", desk.usable.size(family))
    });
    families.collect::<Vec<_>>().join("; ")
}
