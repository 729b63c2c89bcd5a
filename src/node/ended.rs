//! Connections that have ended, by a pod's end or by the end of a policy, while the kernel still tracks them.
//!
//! A tracked connection keeps the path that it began with. Left in the table, it would lend its path to the next pod
//! with the same address, and keep the pod on a path that it has no more.

use super::pods::{Holder, Pods, Use};
use crate::kernel::conntrack::{self, Marked};
use crate::kernel::netlink::{NETLINK_NETFILTER, Socket};
use crate::plan::marks::{Marks, PathId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

/// Which connections are to be forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ended {
    /// All of these addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// All that pods as they are could not have begun: it is not known what they used before this daemon started.
    pub of_earlier: bool,
    /// Those of these addresses on these paths.
    paths: BTreeMap<IpAddr, BTreeSet<PathId>>,
}

impl Ended {
    /// Adds what pods could use before and can no more.
    pub fn uses(&mut self, before: &BTreeMap<Holder, Use>, now: &BTreeMap<Holder, Use>, pods: &Pods) {
        let none = BTreeSet::new();
        // Pods that are gone are seen to when they go: their addresses may be others' by now.
        for (holder, old) in before.iter().filter(|(holder, _)| pods.has(holder)) {
            let new = now.get(holder).map_or(&none, |u| &u.paths);
            let paths: BTreeSet<PathId> = old.paths.difference(new).copied().collect();
            if !paths.is_empty() {
                for address in &old.addresses {
                    self.paths.entry(*address).or_default().extend(&paths);
                }
            }
        }
    }

    /// Takes them out of the kernel's table. What cannot be taken out is tried again the next time.
    pub async fn forget(&mut self, marks: Marks, uses: &BTreeMap<Holder, Use>) {
        if *self == Ended::default() {
            return;
        }
        let Ended { addresses, of_earlier, paths } = self.clone();
        let possible = of_earlier.then(|| Possible::new(uses));
        let ours = Marked { mark: marks.connection(0), mask: marks.connection_kind_mask() };
        // A large table takes its time, and the endpoint for metrics and health goes on meanwhile.
        let forgotten = tokio::task::spawn_blocking(move || {
            let mut socket = Socket::open(NETLINK_NETFILTER)?;
            conntrack::delete(&mut socket, ours, |c| {
                let path = (c.mark & marks.path_mask()) as PathId;
                addresses.contains(&c.source)
                    // What is late for a connection begins at the other end.
                    || addresses.contains(&c.reply_source)
                    || possible.as_ref().is_some_and(|possible| !possible.contains(c.source, path))
                    || paths.get(&c.source).is_some_and(|p| p.contains(&path))
            })
        });
        match forgotten.await {
            Ok(Ok(n)) => {
                if n > 0 {
                    tracing::info!(entries = n, "connections of paths or pods that are gone were ended");
                }
                *self = Ended::default();
            }
            Ok(Err(e)) => tracing::error!("the connection table cannot be cleaned: {e:#}"),
            Err(e) => tracing::error!("the connection table cannot be cleaned: {e}"),
        }
    }
}

/// What pods as they are could have begun.
#[derive(Debug, Default)]
struct Possible {
    /// Connections on these paths, of each address.
    paths: HashMap<IpAddr, BTreeSet<PathId>>,
    /// Any of these addresses: it is not known which policies select them.
    any: HashSet<IpAddr>,
}

impl Possible {
    fn new(uses: &BTreeMap<Holder, Use>) -> Self {
        let mut possible = Possible::default();
        for (address, used) in uses.values().flat_map(|used| used.addresses.iter().map(move |a| (*a, used))) {
            if used.held {
                possible.any.insert(address);
            }
            possible.paths.entry(address).or_default().extend(&used.paths);
        }
        possible
    }

    fn contains(&self, source: IpAddr, path: PathId) -> bool {
        self.any.contains(&source) || self.paths.get(&source).is_some_and(|paths| paths.contains(&path))
    }
}
