//! Evening out how many paths each of a gateway's nodes has, where that is asked for.
//!
//! As few paths as can be are moved, and each as any planned move: the old node has it until the new one does. Not many
//! are on their way at once, so that a big gateway is not all in motion; the next ones follow when these have arrived.

use super::book::Book;
use super::moves::{self, Reports};
use crate::api::PathKind;
use crate::model::selector::Name;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// So many of a gateway's paths are on their way at once.
pub(super) const AT_ONCE: usize = 16;

/// What is on a node.
#[derive(Default)]
struct Burden {
    paths: usize,
    /// Those that may be moved.
    loose: Vec<usize>,
}

/// Moves some of a gateway's paths from where there are the most to where there are the fewest; `nodes` can take part.
/// A node that cannot hold what it has gets nothing. Paths that policies want where they are stay, and so do nodes' own
/// addresses.
pub(super) fn rebalance<'a>(
    book: &mut Book,
    paths: &[usize],
    nodes: impl Iterator<Item = &'a Name>,
    reports: &Reports,
) {
    let able =
        |name: &&Name| book.cluster.egress_nodes.get(*name).is_none_or(|status| status.of_paths().refused.is_empty());
    let mut burdens: BTreeMap<Name, Burden> =
        nodes.filter(able).map(|name| (name.clone(), Burden::default())).collect();
    let mut on_the_way = 0;
    for place in paths {
        let path = &book.paths[*place];
        let Some(node) = &path.node else { continue };
        let Some(burden) = burdens.get_mut(node) else { continue };
        burden.paths += 1;
        on_the_way += usize::from(path.leaving.is_some() && !reports.holds(node, path.id));
        let wanted_here = moves::wish(book, *place) == Some(node);
        if !wanted_here && path.leaving.is_none() && path.kind != PathKind::Node {
            burden.loose.push(*place);
        }
    }
    for _ in on_the_way..AT_ONCE {
        let fewest = burdens.iter().min_by_key(|(_, burden)| burden.paths).map(|(name, b)| (name.clone(), b.paths));
        let most = burdens.iter_mut().filter(|(_, burden)| !burden.loose.is_empty());
        let most = most.max_by_key(|(name, burden)| (burden.paths, Reverse((*name).clone())));
        let (Some((to, fewest)), Some((_, from))) = (fewest, most) else { return };
        if from.paths < fewest + 2 {
            return;
        }
        let Some(path) = from.loose.pop() else { return };
        from.paths -= 1;
        if let Some(burden) = burdens.get_mut(&to) {
            burden.paths += 1;
        }
        moves::move_to(book, path, Some(to), reports);
    }
}
