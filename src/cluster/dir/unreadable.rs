//! Policies that were in force when this daemon started, but that no file names: a file is truncated, its text is not
//! YAML, or a directory is empty. Until that is corrected, the allocations stand for them.

use super::merge::Refusals;
use crate::cluster::kind::Kind;
use crate::cluster::refused::{Readable, Refused};
use crate::model::PolicyKey;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The unreadable policies.
#[derive(Debug, Default)]
pub struct UnreadablePolicies {
    /// The unreadable policies have been determined. Policies that are removed later are not unreadable.
    pub determined: bool,
    pub policies: BTreeSet<PolicyKey>,
    /// Files and directories that were empty at the start.
    empty: BTreeSet<PathBuf>,
}

impl UnreadablePolicies {
    /// Notes whether a file or a directory has contents.
    pub fn note(&mut self, path: &Path, has_something: bool) {
        if has_something {
            self.empty.remove(path);
        } else if !self.determined {
            self.empty.insert(path.into());
        }
    }

    /// Whether any policy is unreadable.
    pub fn is_any(&self) -> bool {
        !self.policies.is_empty()
    }

    /// The problems, each with its file or directory.
    pub fn problems(&self) -> impl Iterator<Item = (&Path, &'static str)> {
        const WHAT: &str = "is empty, but policies are in force that are in no file; Egret uses what the allocations \
                            know of them. To remove them, delete it, or leave a comment in it";
        self.empty.iter().filter(|_| self.is_any()).map(|path| (&**path, WHAT))
    }

    /// Whether a policy may be in what cannot be read. If every file can be read, nothing is unreadable any longer.
    /// `unread`: a part of the directory cannot be read.
    pub fn is_possible(&mut self, root: &Path, unread: bool) -> bool {
        self.empty.retain(|path| root.join(path).exists());
        let is_possible = unread || !self.empty.is_empty();
        if !is_possible {
            self.policies.clear();
        }
        is_possible
    }

    /// The unreadable policies as refused objects of which nothing can be read.
    pub fn refusals(&self) -> Refusals {
        let refused = |key: &PolicyKey| {
            let readable = Readable::Policy(Box::default());
            let text = "it is in force but in no readable file".to_owned();
            let key = (Kind::of_policy(key), (key.namespace.clone(), key.name.clone()));
            (key, Refused { text, generation: None, readable })
        };
        self.policies.iter().map(refused).collect()
    }
}
