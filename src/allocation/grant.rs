//! New paths, for policies that have none in the ledger.

use super::book::{Book, Path};
use super::demand::{Demand, Want};
use super::family::{Family, addresses, in_words, overlap, pair};
use super::placement::Load;
use super::resting::REST_SECONDS;
use super::verdict::{Reason, Refusal};
use crate::api::{AddressPair, PathKind, Sharing};
use crate::model::END_COOLDOWN;
use crate::model::condition::time;
use crate::model::drain::is_drained;
use crate::model::marks::MAX_PATH;
use std::collections::HashMap;
use std::net::IpAddr;

/// Gives paths to those who ask and have none, the elder first; returns, by the demand's place, why some get none.
/// Those who name an address come before those who take any.
pub(super) fn grant(book: &mut Book) -> HashMap<usize, Refusal> {
    let mut refused = HashMap::new();
    let mut lacking = HashMap::new();
    let mut nodes: Vec<Option<NodePaths>> = vec![None; book.desks.len()];
    for turn in [PathKind::Explicit, PathKind::Node, PathKind::Shared, PathKind::Dedicated] {
        for demand in 0..book.demands.all.len() {
            if book.demands.all[demand].path.is_some() {
                continue;
            }
            if let Some(refusal) = frozen(book, demand) {
                refused.insert(demand, refusal);
                continue;
            }
            let granted = match (&book.demands.all[demand].want, turn) {
                (Want::Explicit(pair), PathKind::Explicit) => {
                    let pair = pair.clone();
                    explicit(book, demand, pair)
                }
                (Want::Node, PathKind::Node) => {
                    let gateway = book.demands.all[demand].gateway;
                    let paths = nodes[gateway].get_or_insert_with(|| NodePaths::new(book, gateway));
                    node(book, demand, paths)
                }
                (Want::Shared, PathKind::Shared) | (Want::Dedicated, PathKind::Dedicated) => {
                    pool(book, demand, turn, &mut lacking)
                }
                _ => continue,
            };
            match granted {
                Ok(path) => book.assign(path, demand),
                Err(refusal) => {
                    refused.insert(demand, refusal);
                }
            }
        }
    }
    // Told by the finished ledger, so that the next look at it gives the same reasons: what such a policy named may
    // have gone to another one since.
    let mut exhausted_of: HashMap<(usize, Family), Refusal> = HashMap::new();
    for (demand, refusal) in &mut refused {
        if let Some(family) = lacking.get(demand) {
            let gateway = book.demands.all[*demand].gateway;
            *refusal =
                exhausted_of.entry((gateway, *family)).or_insert_with(|| exhausted(book, gateway, *family)).clone();
        }
        if let Demand { want: Want::Explicit(pair), gateway, .. } = &book.demands.all[*demand]
            && refusal.reason != Reason::GatewayInvalid
            && let Err(why) = check_named(book, *gateway, pair)
        {
            *refusal = why;
        }
    }
    refused
}

/// Why the gateway gives nothing out, if it does not.
fn frozen(book: &Book, demand: usize) -> Option<Refusal> {
    let desk = &book.desks[book.demands.all[demand].gateway];
    let message =
        format!("EgressGateway {:?} makes no sense, and gives out no egress IP until it is mended", desk.name);
    desk.gateway.frozen.then(|| Refusal::new(Reason::GatewayInvalid, message))
}

fn no_id() -> Refusal {
    let message = format!(
        "all {MAX_PATH} path ids of the cluster are in use or in cooldown; \
         let policies share addresses: name the same address, or say allocate: Shared"
    );
    Refusal::new(Reason::NoIdLeft, message)
}

fn explicit(book: &mut Book, demand: usize, address: AddressPair) -> Result<usize, Refusal> {
    let (gateway, policies) = (book.demands.all[demand].gateway, book.demands.all[demand].policies.clone());
    check_named(book, gateway, &address)?;
    let name = format!("Explicit/{}", in_words(&address));
    let id = book.new_id(gateway, &address, &policies, &name).ok_or_else(no_id)?;
    Ok(book.enter(book.again(gateway, id, PathKind::Explicit, address)))
}

/// Whether policies can have the addresses that they name.
fn check_named(book: &Book, gateway: usize, pair: &AddressPair) -> Result<(), Refusal> {
    addresses(pair).try_for_each(|address| check_one(book, gateway, pair, address))
}

fn check_one(book: &Book, gateway: usize, pair: &AddressPair, address: IpAddr) -> Result<(), Refusal> {
    let desk = &book.desks[gateway];
    if !desk.declared.contains(address) {
        let message = format!(
            "{address} is not in the pool of EgressGateway {:?}; add it to the gateway's spec.addresses, \
             or name an address that is there",
            desk.name
        );
        return Err(Refusal::new(Reason::AddressOutsidePool, message));
    }
    let holder = book.holder(address);
    let own = holder.is_some_and(|path| book.paths[path].gateway == gateway);
    if !desk.usable.contains(address) && !own {
        let with = desk.overlaps.iter().find(|o| o.first <= address && address <= o.last);
        let with = with.map(|o| book.desks[o.with].name.to_string()).unwrap_or_default();
        let message = format!(
            "{address} is in the pools of EgressGateways {with:?} and {:?}, and the former keeps it; \
             take it out of one of the pools, or name another address",
            desk.name
        );
        return Err(Refusal::new(Reason::AddressOutsidePool, message));
    }
    if let Some(holder) = holder {
        let path = &book.paths[holder];
        if own && path.kind == PathKind::Explicit && path.address == *pair {
            let message = format!(
                "{} is the egress IP of {}, and EgressGateway {:?} shares none across namespaces (spec.sharing: \
                 Namespace); name another address, or have sharing: Cluster set there",
                in_words(pair),
                book.demands.name_some(&book.users(holder)),
                desk.name
            );
            return Err(Refusal::new(Reason::AddressNotShared, message));
        }
        let message = format!(
            "{address} is taken by {}, which leaves from {} ({:?}); name another address{}",
            book.demands.name_some(&book.users(holder)),
            in_words(&path.address),
            path.kind,
            match path.kind {
                PathKind::Explicit => {
                    let among = match desk.gateway.sharing {
                        Sharing::Namespace => ", if it is of the same namespace",
                        Sharing::Cluster => "",
                    };
                    format!(", or exactly {} to share the path{among}", in_words(&path.address))
                }
                _ => String::new(),
            }
        );
        return Err(Refusal::new(Reason::AddressTaken, message));
    }
    if let Some(node) = book.node_with(gateway, address) {
        let message = format!(
            "{address} is the own address of node {node:?}; name another address, or say allocate: Node to leave \
             from a node's own"
        );
        return Err(Refusal::new(Reason::AddressOfNode, message));
    }
    if let Some(network) = book.inside(address) {
        let message = format!(
            "{address} is in {network}, a network of the cluster's pods or Services, and no server outside can answer to \
             it; name another address, and take it out of the gateway's spec.addresses"
        );
        return Err(Refusal::new(Reason::AddressInCluster, message));
    }
    Ok(())
}

/// An address of each family that the pool has. Of which family it has none left, is put into `lacking`.
fn pool(
    book: &mut Book,
    demand: usize,
    kind: PathKind,
    lacking: &mut HashMap<usize, Family>,
) -> Result<usize, Refusal> {
    let (gateway, policies) = (book.demands.all[demand].gateway, book.demands.all[demand].policies.clone());
    let desk = &book.desks[gateway];
    if desk.open.is_empty() {
        let message = if !desk.usable.is_empty() {
            format!(
                "all addresses of EgressGateway {:?} are reserved for policies that name them; name one, or add addresses \
                 to its spec.addresses",
                desk.name
            )
        } else if desk.declared.is_empty() {
            format!(
                "EgressGateway {:?} has no addresses; add some to its spec.addresses, or say allocate: Node",
                desk.name
            )
        } else {
            format!(
                "all addresses of EgressGateway {:?} are other gateways' too, and theirs; add addresses to its \
                 spec.addresses",
                desk.name
            )
        };
        return Err(Refusal::new(Reason::PoolEmpty, message));
    }
    let mut found = Vec::new();
    for family in Family::BOTH.into_iter().filter(|family| book.desks[gateway].open.has(*family)).collect::<Vec<_>>() {
        match book.pick(gateway, family, &policies) {
            Some(address) => found.push(address),
            None => {
                lacking.insert(demand, family);
                return Err(Refusal::new(Reason::PoolExhausted, String::new()));
            }
        }
    }
    let address = pair(found);
    let name = match kind {
        PathKind::Shared => "Shared".to_owned(),
        _ => format!("Dedicated/{}", book.demands.applicants[policies[0]].name),
    };
    let id = book.new_id(gateway, &address, &policies, &name).ok_or_else(no_id)?;
    Ok(book.enter(book.again(gateway, id, kind, address)))
}

fn exhausted(book: &Book, gateway: usize, family: Family) -> Refusal {
    let desk = &book.desks[gateway];
    let cooling = book.resting.entries.iter().filter(|entry| !entry.ended).filter(|entry| {
        let address = family.of_pair(&entry.address);
        address.is_some_and(|a| desk.open.contains(a) && book.holder(a).is_none())
    });
    let until = cooling.map(|entry| entry.at).min().map(|at| {
        let (at, until) = (time(at), time(at + REST_SECONDS));
        format!(
            "what was given back at {at} is free again at {until}, or at once if you annotate the gateway with \
             {END_COOLDOWN}={at}; "
        )
    });
    let message = format!(
        "EgressGateway {:?} has no {family} address left: all {} are in use, in cooldown, or are nodes' own; {}add \
         addresses to its spec.addresses, or let policies say allocate: Shared",
        desk.name,
        desk.open.size(family),
        until.unwrap_or_default()
    );
    Refusal::new(Reason::PoolExhausted, message)
}

/// A gateway's nodes as paths: which has one, and how many policies use it.
#[derive(Clone, Debug)]
struct NodePaths {
    /// By the node's place.
    paths: Vec<Option<usize>>,
    load: Load,
}

impl NodePaths {
    fn new(book: &Book, gateway: usize) -> Self {
        let nodes = &book.desks[gateway].nodes;
        let usable = (0..nodes.len()).filter(|place| !book.own_address(nodes[*place].1).is_empty());
        let (mut open, drained): (Vec<usize>, Vec<usize>) =
            usable.partition(|place| !is_drained(book.desks[gateway].gateway, nodes[*place].1));
        if open.iter().any(|place| book.lives(nodes[*place].0)) {
            open.retain(|place| book.lives(nodes[*place].0));
        }
        let mut load = Load::new(if open.is_empty() { drained } else { open });
        let mut paths = vec![None; nodes.len()];
        let places: HashMap<_, _> = nodes.iter().enumerate().map(|(place, (name, _))| (*name, place)).collect();
        for demand in book.demands.all.iter().filter(|d| d.gateway == gateway && d.want == Want::Node) {
            let Some(path) = demand.path else { continue };
            if let Some(place) = book.paths[path].node.as_ref().and_then(|name| places.get(name)) {
                paths[*place] = Some(path);
                load.add(*place);
            }
        }
        NodePaths { paths, load }
    }
}

fn node(book: &mut Book, demand: usize, nodes: &mut NodePaths) -> Result<usize, Refusal> {
    let (gateway, policies) = (book.demands.all[demand].gateway, book.demands.all[demand].policies.clone());
    let desk = &book.desks[gateway];
    let before = book.resting.of(gateway, &policies).into_iter().find_map(|entry| {
        let same = |place: &usize| overlap(&book.own_address(desk.nodes[*place].1), &entry.address);
        nodes.load.places().find(same)
    });
    let Some(place) = before.or_else(|| nodes.load.least()) else {
        let message = if desk.nodes.is_empty() {
            format!(
                "no node matches the nodeSelector of EgressGateway {:?}; label a node, or mend the selector",
                desk.name
            )
        } else {
            format!(
                "no node of EgressGateway {:?} has an InternalIP of its own that no path has; see the nodes' \
                 status.addresses, or add addresses to the gateway's spec.addresses",
                desk.name
            )
        };
        return Err(Refusal::new(Reason::NoNode, message));
    };
    let path = match nodes.paths[place] {
        Some(path) => path,
        None => {
            let (name, node) = desk.nodes[place];
            let address = book.own_address(node);
            let id = book.new_id(gateway, &address, &policies, &format!("Node/{name}")).ok_or_else(no_id)?;
            book.enter(Path { since: book.now, ..Path::new(gateway, id, PathKind::Node, address, Some(name.clone())) })
        }
    };
    nodes.paths[place] = Some(path);
    nodes.load.add(place);
    Ok(path)
}
