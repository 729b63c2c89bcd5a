//! The directory with real files and the real watcher.

mod any_text;
mod changes;
mod manifests;
mod statuses;
mod unreadable;

use super::open;
use crate::cluster::{Scope, Source};
use crate::model::Cluster;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Longer than a change takes to be seen, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(8);

/// A directory, before it is opened and after.
struct Fixture {
    directory: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("manifests")).unwrap();
        Fixture { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        let root = self.directory.path().join("manifests");
        if name.is_empty() { root } else { root.join(name) }
    }

    fn put(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
    }

    /// As most editors do it: another file replaces the first.
    fn put_by_renaming(&self, name: &str, text: &str) {
        let new = self.path(&format!("{name}.tmp"));
        fs::write(&new, text).unwrap();
        fs::rename(new, self.path(name)).unwrap();
    }

    async fn open(&self) -> Opened {
        self.open_for(Scope::Controller).await
    }

    async fn open_for(&self, scope: Scope) -> Opened {
        Opened(open(&self.path(""), scope).await.unwrap(), self.path("").display().to_string())
    }
}

struct Opened(Source, String);

impl Opened {
    fn now(&self) -> Arc<Cluster> {
        self.0.snapshots.borrow().clone()
    }

    /// The problems, without the directory's own path.
    fn problems(&self) -> Vec<String> {
        self.0.problems.borrow().iter().map(|p| p.replace(&format!("{}/", self.1), "")).collect()
    }

    async fn until(&mut self, what: &str, condition: impl Fn(&Cluster) -> bool) -> Arc<Cluster> {
        let mut snapshots = self.0.snapshots.clone();
        let result = tokio::time::timeout(LIMIT, snapshots.wait_for(|c| condition(c))).await;
        match result {
            Ok(c) => c.unwrap().clone(),
            Err(_) => panic!("never saw {what}; problems: {:?}", self.problems()),
        }
    }

    async fn until_problem(&mut self, part: &str) -> String {
        let wait = self.0.problems.wait_for(|all| all.iter().any(|p| p.contains(part)));
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            panic!("never a problem with {part:?}; problems: {:?}", self.problems());
        }
        self.problems().into_iter().find(|p| p.contains(part)).unwrap()
    }

    async fn until_well(&mut self) {
        let wait = self.0.problems.wait_for(|all| all.is_empty());
        if tokio::time::timeout(LIMIT, wait).await.is_err() {
            panic!("still problems: {:?}", self.problems());
        }
    }
}

fn gateway(name: &str, address: &str) -> String {
    format!(
        "apiVersion: egret.dev/v1alpha1\nkind: EgressGateway\nmetadata:\n  name: {name}\nspec:\n  nodeSelector: {{}}\n  \
         addresses:\n  - {address:?}\n"
    )
}

fn policy(namespace: &str, name: &str, priority: i32) -> String {
    format!(
        "apiVersion: egret.dev/v1alpha1\nkind: EgressPolicy\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  \
         podSelector: {{}}\n  priority: {priority}\n"
    )
}

fn priority(cluster: &Cluster, key: &str) -> Option<i32> {
    cluster.policies.get(&key.into()).map(|p| p.priority)
}
