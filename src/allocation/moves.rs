//! Paths that change their node. What a node has taken over from a dead one stays with it; what is moved on purpose
//! stays with the old node until the new one says that it has it.

use super::book::Book;
use crate::api::PathKind;
use crate::model::ownership::{self, Liveness, Standing};
use crate::model::selector::Name;
use std::collections::{HashMap, HashSet};

/// What nodes say that they have.
pub(super) struct Reports<'a> {
    held: HashMap<&'a str, HashSet<u16>>,
    taken: HashMap<(u16, i64), Vec<&'a str>>,
}

impl<'a> Reports<'a> {
    pub(super) fn new(book: &Book<'a>) -> Self {
        let mut reports = Reports { held: HashMap::new(), taken: HashMap::new() };
        for (name, status) in book.cluster.egress_nodes.iter().filter(|(n, _)| book.cluster.nodes.contains_key(*n)) {
            let said = status.of_paths();
            reports.held.insert(name, said.held.iter().copied().collect());
            for taken in &said.taken {
                reports.taken.entry((taken.id, taken.since)).or_default().push(name);
            }
        }
        reports
    }

    pub(super) fn holds(&self, node: &str, id: u16) -> bool {
        self.held.get(node).is_some_and(|paths| paths.contains(&id))
    }
}

/// The ledger follows a node that has taken a path over. What was said of an older ledger counts no more.
pub(super) fn follow_takeovers(book: &mut Book, gateway: usize, paths: &[usize], reports: &Reports) {
    for place in paths.iter().filter(|place| book.paths[**place].kind != PathKind::Node).collect::<Vec<_>>() {
        let path = &book.paths[*place];
        let of_gateway = |name: &&str| book.desks[gateway].nodes.iter().any(|(n, _)| ***n == **name);
        let takers = reports.taken.get(&(path.id, path.since)).map(Vec::as_slice).unwrap_or_default();
        let takers: Vec<&str> = takers.iter().copied().filter(of_gateway).collect();
        let standing = Standing {
            id: path.id,
            node: path.node.as_deref(),
            leaving: None,
            arrived: true,
            takers: &takers,
            members: &[],
            needs: &[],
        };
        // All nodes see the same one of several as the owner.
        let taker: Option<Name> = ownership::owner(standing, &Liveness::default()).map(Into::into);
        if taker.is_some() && taker != path.node {
            give(book, *place, taker, None);
        }
    }
}

/// The paths that a policy wants on another of these nodes, and on which. A path that is a node's own address cannot
/// move.
pub(super) fn asked_for(book: &Book, paths: &[usize], nodes: &HashMap<&Name, usize>) -> Vec<(usize, Name)> {
    let asked = |place: &usize| {
        let path = &book.paths[*place];
        let wanted = wish(book, *place)?;
        let moves = path.kind != PathKind::Node && path.node.as_ref() != Some(wanted) && nodes.contains_key(wanted);
        moves.then(|| (*place, wanted.clone()))
    };
    paths.iter().filter_map(asked).collect()
}

/// The node that a path is wanted on. Of several policies with the same path, the most senior one that says something
/// decides.
pub(super) fn wish<'b>(book: &'b Book, path: usize) -> Option<&'b Name> {
    let policies = book.paths[path].demands.iter().flat_map(|demand| &book.demands.all[*demand].policies);
    let asking = policies.min_by_key(|p| (book.demands.applicants[**p].policy.move_to().is_none(), **p))?;
    book.demands.applicants[*asking].policy.move_to()
}

/// Gives a path another node. If an old one says that it has it, it keeps it until the new one does.
pub(super) fn move_to(book: &mut Book, place: usize, node: Option<Name>, reports: &Reports) {
    let path = &book.paths[place];
    let old = [path.node.clone(), path.leaving.clone()].into_iter().flatten();
    let leaving = old.into_iter().find(|old| reports.holds(old, path.id) && node.as_ref() != Some(old));
    give(book, place, node.clone(), leaving.filter(|_| node.is_some()));
}

fn give(book: &mut Book, place: usize, node: Option<Name>, leaving: Option<Name>) {
    let now = book.now;
    let path = &mut book.paths[place];
    if path.node != node {
        path.since = now.max(path.since + 1);
    }
    (path.node, path.leaving) = (node, leaving);
}

/// Ends the moves that are over: the new node has the path, or the old one has it no more.
pub(super) fn finish(book: &mut Book, paths: &[usize], reports: &Reports) {
    for place in paths {
        let path = &mut book.paths[*place];
        let arrived = path.node.as_ref().is_none_or(|node| reports.holds(node, path.id));
        if arrived || path.leaving.as_ref().is_some_and(|old| !reports.holds(old, path.id)) {
            path.leaving = None;
        }
    }
}
