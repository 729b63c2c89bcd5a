//! Policies that were in force when this daemon started, but are in no readable file: a file is broken or truncated,
//! or a directory is empty. Until that is corrected, the allocations and the readable parts of broken files stand for
//! them.

use super::file::Recovered;
use crate::api::Allocation;
use crate::model::fallback_policy::{ReadableParts, fallback_policy, from_allocation, listed_only};
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::warn;

/// The lost policies, and what is known of them.
#[derive(Debug, Default)]
pub struct Lost {
    /// The lost policies have been determined. Policies that are removed later are not lost.
    determined: bool,
    policies: BTreeSet<PolicyKey>,
    /// The readable policies of files that were invalid at the start.
    recovered: Recovered,
    /// Files and directories that were empty at the start.
    empty: BTreeSet<PathBuf>,
    /// Policies with allocations of gateways that are in no file either.
    orphans: BTreeMap<PolicyKey, (Name, Allocation)>,
}

impl Lost {
    /// Adds what could be read of an invalid file without a last good state.
    pub fn add_recovered(&mut self, recovered: Recovered) {
        if !self.determined {
            self.recovered.whole.extend(recovered.whole);
            self.recovered.readable.extend(recovered.readable);
        }
    }

    /// Notes whether a file or a directory has contents.
    pub fn note(&mut self, path: &Path, has_something: bool) {
        if has_something {
            self.empty.remove(path);
        } else if !self.determined {
            self.empty.insert(path.into());
        }
    }

    /// Whether any policy is lost.
    pub fn is_any(&self) -> bool {
        !self.policies.is_empty()
    }

    /// The problems, each with its file or directory.
    pub fn problems(&self) -> impl Iterator<Item = (&Path, &'static str)> {
        const WHAT: &str = "is empty, but policies are in force that are in no file; Egret uses what the allocations \
                            know of them. To remove them, delete it, or leave a comment in it";
        self.empty.iter().filter(|_| self.is_any()).map(|path| (&**path, WHAT))
    }

    /// Adds a substitute for each lost policy to the snapshot, until every file is readable or the policy is back.
    /// `unread`: a part of the directory cannot be read. `gateway_statuses`: allocations of gateways that are in no
    /// file.
    pub fn fill_in<'a>(
        &mut self,
        root: &Path,
        cluster: &mut Cluster,
        unread: bool,
        gateway_statuses: impl Iterator<Item = (&'a Name, &'a [Allocation])>,
    ) {
        self.empty.retain(|path| root.join(path).exists());
        let incomplete = unread || !self.empty.is_empty();
        if !std::mem::replace(&mut self.determined, true) && incomplete {
            self.determine(cluster, gateway_statuses);
        }
        if !incomplete {
            *self = Lost { determined: true, ..Lost::default() };
        }
        self.policies.retain(|key| !cluster.policies.contains_key(key));
        for key in &self.policies {
            let nothing = ReadableParts::default();
            let readable = self.recovered.readable.get(key).unwrap_or(&nothing);
            let orphan = || {
                self.orphans.get(key).map(|(gateway, allocation)| from_allocation(key, gateway, allocation, readable))
            };
            let policy = match self.recovered.whole.get(key) {
                Some(whole) => Some(whole.clone()),
                None => fallback_policy(cluster, key, readable).or_else(orphan).map(Arc::new),
            };
            if let Some(policy) = policy {
                cluster.policies.insert(key.clone(), policy);
            }
        }
    }

    fn determine<'a>(
        &mut self,
        cluster: &Cluster,
        gateway_statuses: impl Iterator<Item = (&'a Name, &'a [Allocation])>,
    ) {
        for (gateway, allocations) in gateway_statuses {
            let policies_of = |allocation: &Allocation| {
                let entry = (gateway.clone(), allocation.clone());
                allocation.policies.iter().map(move |key| (key.clone(), entry.clone())).collect::<Vec<_>>()
            };
            self.orphans.extend(allocations.iter().flat_map(policies_of));
        }
        self.policies = listed_only(cluster);
        self.policies.extend(self.orphans.keys().filter(|key| !cluster.policies.contains_key(*key)).cloned());
        for policy in &self.policies {
            warn!(
                %policy,
                "the policy is in force but in no readable file; Egret uses what is known of it until that is corrected"
            );
        }
    }
}
