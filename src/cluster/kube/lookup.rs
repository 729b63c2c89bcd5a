//! Looks up a pod by name that starts before the watch has delivered it.

use super::client::Client;
use super::watch::Change;
use crate::cluster::decode::{Reading, decode};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::model::{Cluster, ObjectKey, Pod};
use serde_json::value::RawValue;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch::Receiver;
use tokio::time::sleep;
use tracing::debug;

/// The time that the watch has to deliver a pod by itself.
const WAIT: Duration = Duration::from_millis(50);

/// Asks the API server for single pods.
#[derive(Clone)]
pub struct Lookup {
    pub(super) client: Client,
    pub(super) reading: Reading,
    pub(super) names: Arc<Mutex<Names>>,
    pub(super) changes: Sender<Change>,
    pub(super) snapshots: Receiver<Arc<Cluster>>,
}

impl Lookup {
    /// Makes one of the next snapshots have the pod, if there is one of this name on this node. With an empty `uid`, any
    /// pod of the name.
    pub fn look_for(&self, pod: ObjectKey, uid: String) {
        let this = self.clone();
        tokio::spawn(async move {
            sleep(WAIT).await;
            let known = |p: &Arc<Pod>| uid.is_empty() || *p.uid == *uid;
            if this.snapshots.borrow().pods.get(&pod).is_some_and(known) {
                return;
            }
            let path = Kind::Pod.path_of(Some(&pod.namespace), &pod.name);
            let text: Box<RawValue> = match this.client.get(&path).await {
                Ok(text) => text,
                Err(e) => return debug!(%pod, "cannot look up the pod: {e}"),
            };
            let decoded = {
                let mut names = this.names.lock().unwrap_or_else(PoisonError::into_inner);
                decode(Kind::Pod, text.get().as_bytes(), &this.reading, &mut names)
            };
            match decoded {
                // The receiver is gone when the daemon ends.
                Ok(decoded) => drop(this.changes.send(Change::Found(decoded)).await),
                Err(e) => debug!(%pod, "cannot look up the pod: {e}"),
            }
        });
    }
}
