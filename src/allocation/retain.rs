//! What is in the ledger stays there, as long as it is asked for and valid.

use super::book::{Book, Path};
use super::demand::Want;
use super::family::{Family, addresses, overlap, pair};
use crate::api::{LedgerPath, PathKind};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// Carries over what stays, and lets the rest of it rest.
pub(super) fn retain(book: &mut Book) {
    // Pool addresses first: where a node has taken one for its own, the path is the elder.
    for nodes_own in [false, true] {
        for gateway in 0..book.desks.len() {
            let desk = book.desks[gateway].gateway;
            let mut paths: Vec<&LedgerPath> =
                desk.status.paths.iter().filter(|p| (p.kind == PathKind::Node) == nodes_own).collect();
            paths.sort_by_key(|p| p.id);
            for path in paths {
                let stays = if nodes_own { node_path(book, gateway, path) } else { pool_path(book, gateway, path) };
                if !stays {
                    book.rest(gateway, path.id, path.address.clone(), path.policies.clone(), book.now);
                }
            }
        }
    }
    complete(book);
}

/// The demands for paths of the gateway, as yet without one, that policies make which the ledger lists.
fn demands_of<'b>(book: &'b Book, gateway: usize, path: &'b LedgerPath) -> impl Iterator<Item = usize> + 'b {
    let places = path.policies.iter().filter_map(|name| book.demands.places.get(name));
    places.filter_map(|place| book.demands.of[*place].as_ref().ok().copied()).filter(move |d| {
        let demand = &book.demands.all[*d];
        demand.gateway == gateway && demand.path.is_none()
    })
}

fn pool_path(book: &mut Book, gateway: usize, path: &LedgerPath) -> bool {
    let fitting = demands_of(book, gateway, path).filter(|d| match (&book.demands.all[*d].want, path.kind) {
        (Want::Explicit(pair), PathKind::Explicit) => *pair == path.address,
        (Want::Shared, PathKind::Shared) | (Want::Dedicated, PathKind::Dedicated) => true,
        _ => false,
    });
    // The most senior one's, if the gateway shares addresses across namespaces no longer.
    let Some(demand) = fitting.min() else { return false };
    let may_keep = |address: &IpAddr| {
        let reserved = || book.desks[gateway].gateway.reservations.iter().any(|reserved| reserved.contains(*address));
        book.desks[gateway].declared.contains(*address) && (path.kind == PathKind::Explicit || !reserved())
    };
    let (kept, lost): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses(&path.address).partition(|address| may_keep(address) && !book.held.contains_key(address));
    // Who named an address means this one; who did not is content with half a pair while a new half is looked for.
    if kept.is_empty() || (path.kind == PathKind::Explicit && !lost.is_empty()) || !book.ids.take(path.id) {
        return false;
    }
    if !lost.is_empty() {
        book.rest(gateway, path.id, pair(lost), path.policies.clone(), book.now);
    }
    let place = book.enter(Path {
        gateway,
        id: path.id,
        kind: path.kind,
        address: pair(kept),
        node: path.node.clone(),
        since: path.since,
        leaving: path.leaving.clone(),
        demands: vec![],
    });
    book.assign(place, demand);
    true
}

fn node_path(book: &mut Book, gateway: usize, path: &LedgerPath) -> bool {
    let nodes = &book.desks[gateway].nodes;
    let Some((name, node)) = path.node.as_deref().and_then(|n| nodes.iter().find(|(name, _)| &***name == n).copied())
    else {
        return false;
    };
    let demands: BTreeSet<usize> =
        demands_of(book, gateway, path).filter(|d| book.demands.all[*d].want == Want::Node).collect();
    let address = book.own_address(node);
    // With another address it is another path: what runs over the old one cannot live on.
    if demands.is_empty() || !overlap(&address, &path.address) || !book.ids.take(path.id) {
        return false;
    }
    let place = book.enter(Path {
        gateway,
        id: path.id,
        kind: PathKind::Node,
        address,
        node: Some(name.clone()),
        since: path.since,
        leaving: None,
        demands: vec![],
    });
    for demand in demands {
        book.assign(place, demand);
    }
    true
}

/// Gives paths the half of their pair that they lack: the pool has got a second family, or has lost an address.
fn complete(book: &mut Book) {
    for demand in 0..book.demands.all.len() {
        let Some(place) = book.demands.all[demand].path else { continue };
        if !matches!(book.paths[place].kind, PathKind::Dedicated | PathKind::Shared) {
            continue;
        }
        let gateway = book.paths[place].gateway;
        for family in Family::BOTH {
            if family.of_pair(&book.paths[place].address).is_some() || !book.desks[gateway].open.has(family) {
                continue;
            }
            let policies = std::mem::take(&mut book.demands.all[demand].policies);
            if let Some(address) = book.pick(gateway, family, &policies) {
                book.held.insert(address, place);
                let path = &mut book.paths[place];
                path.address = pair(addresses(&path.address).chain([address]));
            }
            book.demands.all[demand].policies = policies;
        }
    }
}
