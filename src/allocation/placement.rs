//! Which node holds which path.

use super::book::Book;
use super::moves::{self, Reports};
use super::rebalance;
use crate::api::{PathKind, Placement};
use crate::model::Node;
use crate::model::drain::is_drained;
use crate::model::selector::Name;
use std::collections::{BTreeSet, HashMap};

/// How much each of some nodes has, by its place among the gateway's nodes, which are sorted by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Load {
    /// Count and place.
    order: BTreeSet<(u32, usize)>,
    count: HashMap<usize, u32>,
}

impl Load {
    pub(super) fn new(places: impl IntoIterator<Item = usize>) -> Self {
        let count: HashMap<usize, u32> = places.into_iter().map(|place| (place, 0)).collect();
        Load { order: count.keys().map(|place| (0, *place)).collect(), count }
    }

    /// One more for the node.
    pub(super) fn add(&mut self, place: usize) {
        if let Some(count) = self.count.get_mut(&place) {
            self.order.remove(&(*count, place));
            *count += 1;
            self.order.insert((*count, place));
        }
    }

    /// The node that has the least; of several, the first by name.
    pub(super) fn least(&self) -> Option<usize> {
        self.order.first().map(|(_, place)| *place)
    }

    /// All of the nodes, those that have the least first.
    pub(super) fn places(&self) -> impl Iterator<Item = usize> {
        self.order.iter().map(|(_, place)| *place)
    }
}

/// Gives each path a node of its gateway. A path stays where it is while its node is one of the gateway's, and is not
/// drained while others are there; and until it is asked for that paths be spread evenly.
pub(super) fn place(book: &mut Book) {
    let reports = Reports::new(book);
    let mut paths_of: Vec<Vec<usize>> = vec![Vec::new(); book.desks.len()];
    for (place, path) in book.paths.iter().enumerate() {
        paths_of[path.gateway].push(place);
    }
    for (gateway, paths) in paths_of.into_iter().enumerate() {
        match book.desks[gateway].gateway.placement {
            Placement::Managed => {
                moves::follow_takeovers(book, gateway, &paths, &reports);
                if !book.desks[gateway].gateway.frozen {
                    balance(book, gateway, &paths, &reports);
                }
                moves::finish(book, &paths, &reports);
            }
            Placement::External => follow(book, gateway, &paths),
        }
    }
}

/// The nodes of a gateway, as far as paths may be on them.
struct Room<'a> {
    /// By name.
    nodes: Vec<(&'a Name, &'a Node)>,
    /// Those that are not drained, or all if all are: paths stay where they are.
    open: HashMap<&'a Name, usize>,
    /// Those of them that paths can be moved to: they live, as far as can be told, and none has lost less of its uplinks.
    ready: HashMap<&'a Name, usize>,
}

impl<'a> Room<'a> {
    fn new(book: &Book<'a>, gateway: usize) -> Self {
        let nodes = book.desks[gateway].nodes.clone();
        let is_drained = |node: &Node| is_drained(book.desks[gateway].gateway, node);
        let all_drained = nodes.iter().all(|(_, node)| is_drained(node));
        let open = nodes.iter().enumerate().filter(|(_, (_, node))| all_drained || !is_drained(node));
        let open: HashMap<&Name, usize> = open.map(|(place, (name, _))| (*name, place)).collect();
        let anybody = nodes.iter().any(|(name, _)| book.is_reachable(name));
        let least = open.keys().filter(|name| book.lives(name)).map(|name| book.lacks(name, gateway)).min();
        let ready = |name: &Name| {
            book.lives(name) && (book.is_reachable(name) || !anybody) && Some(book.lacks(name, gateway)) == least
        };
        let ready = open.iter().filter(|(name, _)| ready(name)).map(|(name, place)| (*name, *place)).collect();
        Room { nodes, open, ready }
    }
}

/// A new path goes to the node that has the least of those that live. A path moves only if there is one that it can
/// be moved to, unless its node is none of the gateway's any more.
fn balance(book: &mut Book, gateway: usize, paths: &[usize], reports: &Reports) {
    let room = Room::new(book, gateway);
    for (path, node) in moves::asked_for(book, paths, &room.ready) {
        moves::move_to(book, path, Some(node), reports);
    }
    let mut load = Load::new(room.open.values().copied());
    let mut homeless = Vec::new();
    for path in paths {
        match book.paths[*path].node.as_ref().and_then(|name| room.open.get(name)) {
            Some(place) => load.add(*place),
            None if book.paths[*path].kind == PathKind::Node => {}
            None => homeless.push(*path),
        }
    }
    for path in homeless {
        let node = book.paths[path].node.as_ref();
        let stays = node.is_some_and(|name| room.nodes.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok());
        let is_ready = |place: &usize| room.ready.contains_key(room.nodes[*place].0);
        let lives = |place: &usize| book.lives(room.nodes[*place].0);
        let found = load.places().find(is_ready);
        let found = if node.is_some() { found } else { found.or_else(|| load.places().find(lives)) };
        let place = match found {
            None if stays => continue,
            found => found.or_else(|| load.least()),
        };
        moves::move_to(book, path, place.map(|place| room.nodes[place].0.clone()), reports);
        if let Some(place) = place {
            load.add(place);
        }
    }
    if book.desks[gateway].gateway.rebalance {
        rebalance::rebalance(book, paths, room.ready.into_keys(), reports);
    }
}

/// Something else places the addresses: the node that says it has one holds the path.
fn follow(book: &mut Book, gateway: usize, paths: &[usize]) {
    let mut reported: HashMap<u16, Vec<&Name>> = HashMap::new();
    for (name, _) in &book.desks[gateway].nodes {
        for id in book.cluster.egress_nodes.get(*name).into_iter().flat_map(|node| &node.of_paths().held) {
            reported.entry(*id).or_default().push(name);
        }
    }
    for path in paths {
        let path = &mut book.paths[*path];
        if path.kind == PathKind::Node {
            continue;
        }
        let here = |name: &Name| book.desks[gateway].nodes.binary_search_by(|(n, _)| (*n).cmp(name)).is_ok();
        path.node = match (path.node.take(), reported.get(&path.id)) {
            // While an address moves two nodes may say that they have it.
            (Some(node), Some(reporters)) if reporters.contains(&&node) => Some(node),
            (_, Some(reporters)) => reporters.first().map(|name| Name::clone(name)),
            (node, None) => node.filter(here),
        };
    }
}
