//! Policies that were in force when this daemon started, and that no file tells of: a file was broken, or cut off to
//! nothing, or a directory was emptied. Until that is mended, what the allocations and the broken files tell of them stands for
//! them.

use super::file::Salvage;
use crate::api::Allocation;
use crate::model::fallback_policy::{ReadableParts, fallback_policy, from_allocation, listed_only};
use crate::model::selector::Name;
use crate::model::{Cluster, PolicyKey};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::warn;

/// See the module.
#[derive(Debug, Default)]
pub struct Lost {
    /// It was looked which they are. Whatever goes later on has been seen to go.
    looked: bool,
    policies: BTreeSet<PolicyKey>,
    /// What files that were wrong from the beginning tell of their policies.
    salvage: Salvage,
    /// Files of no bytes, and directories without anything, that were so from the beginning.
    hollow: BTreeSet<PathBuf>,
    /// Policies on paths of gateways that are in no file either.
    orphans: BTreeMap<PolicyKey, (Name, Allocation)>,
}

impl Lost {
    /// A file that cannot be read, and of which nothing is known, tells this.
    pub fn salvaged(&mut self, salvage: Salvage) {
        if !self.looked {
            self.salvage.whole.extend(salvage.whole);
            self.salvage.readable.extend(salvage.readable);
        }
    }

    /// A file or a directory has something in it, or not.
    pub fn note(&mut self, path: &Path, has_something: bool) {
        if has_something {
            self.hollow.remove(path);
        } else if !self.looked {
            self.hollow.insert(path.into());
        }
    }

    /// Whether any policy is lost.
    pub fn is_any(&self) -> bool {
        !self.policies.is_empty()
    }

    /// What is wrong, by file or directory.
    pub fn problems(&self) -> impl Iterator<Item = (&Path, &'static str)> {
        const WHAT: &str = "is empty, and there are policies in force that are in no file; what the allocations know of them is used. \
                            If they are to go, delete this, or leave a comment in it";
        self.hollow.iter().filter(|_| self.is_any()).map(|path| (&**path, WHAT))
    }

    /// Puts in what stands for the policies that are lost, until every file is known or they are there. `unread`: a part of
    /// the directory cannot be read; `allocations` are those of gateways that are in no file.
    pub fn fill_in<'a>(
        &mut self,
        root: &Path,
        cluster: &mut Cluster,
        unread: bool,
        gateway_statuses: impl Iterator<Item = (&'a Name, &'a [Allocation])>,
    ) {
        self.hollow.retain(|path| root.join(path).exists());
        let incomplete = unread || !self.hollow.is_empty();
        if !std::mem::replace(&mut self.looked, true) && incomplete {
            self.look(cluster, gateway_statuses);
        }
        if !incomplete {
            *self = Lost { looked: true, ..Lost::default() };
        }
        self.policies.retain(|key| !cluster.policies.contains_key(key));
        for key in &self.policies {
            let nothing = ReadableParts::default();
            let readable = self.salvage.readable.get(key).unwrap_or(&nothing);
            let orphan = || self.orphans.get(key).map(|(gateway, path)| from_allocation(key, gateway, path, readable));
            let policy = match self.salvage.whole.get(key) {
                Some(whole) => Some(whole.clone()),
                None => fallback_policy(cluster, key, readable).or_else(orphan).map(Arc::new),
            };
            if let Some(policy) = policy {
                cluster.policies.insert(key.clone(), policy);
            }
        }
    }

    fn look<'a>(&mut self, cluster: &Cluster, gateway_statuses: impl Iterator<Item = (&'a Name, &'a [Allocation])>) {
        for (gateway, paths) in gateway_statuses {
            let from_allocation = |path: &Allocation| {
                let place = (gateway.clone(), path.clone());
                path.policies.iter().map(move |key| (key.clone(), place.clone())).collect::<Vec<_>>()
            };
            self.orphans.extend(paths.iter().flat_map(from_allocation));
        }
        self.policies = listed_only(cluster);
        self.policies.extend(self.orphans.keys().filter(|key| !cluster.policies.contains_key(*key)).cloned());
        for policy in &self.policies {
            warn!(
                %policy,
                "it is in force and in no file that can be read: until that is mended, what is known of it is used"
            );
        }
    }
}
