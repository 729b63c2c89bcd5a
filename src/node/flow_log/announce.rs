//! Announces this node's pods to the owners of their egress IPs, if these record connections.

use super::names::{PodName, encode};
use crate::datapath::names::{HEALTH, of_mac};
use crate::datapath::node_messages::NodeMessages;
use egret_nft::mac::Mac;
use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Everything is announced once more after this time, because a message may be lost.
const AGAIN: Duration = Duration::from_secs(1);
/// Then everything is announced at this interval, until it changes.
const INTERVAL: Duration = Duration::from_secs(15);

/// The announced pods, and the receivers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Announced {
    /// The tunnel device's index, and the source address of messages.
    pub end: Option<(u32, Ipv6Addr)>,
    /// The owners that record connections, with the time since when.
    pub to: BTreeMap<Mac, i64>,
    /// The pods of this node that policies select.
    pub pods: Vec<PodName>,
}

/// The daemon's handle of the task that announces. The task ends when the handle is dropped.
#[derive(Debug)]
pub struct Announcer {
    announced: watch::Sender<Arc<Announced>>,
}

impl Announcer {
    /// Starts the task.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start() -> Self {
        let (announced, wanted) = watch::channel(Arc::default());
        tokio::spawn(run(wanted));
        Announcer { announced }
    }

    /// Whether there is nothing to announce now.
    pub fn is_idle(&self) -> bool {
        self.announced.borrow().to.is_empty()
    }

    /// Announces these pods from now on.
    pub fn set(&self, announced: Announced) {
        self.announced.send_if_modified(|now| {
            let changed = **now != announced;
            if changed {
                *now = Arc::new(announced);
            }
            changed
        });
    }
}

async fn run(mut wanted: watch::Receiver<Arc<Announced>>) {
    let mut now: Arc<Announced> = Arc::default();
    let mut messages: Option<NodeMessages> = None;
    let mut due: Option<Instant> = None;
    loop {
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return;
                }
                let before = std::mem::replace(&mut now, wanted.borrow_and_update().clone());
                if before.end != now.end || now.to.is_empty() {
                    messages = None;
                }
                due = (!now.to.is_empty()).then(|| Instant::now() + AGAIN);
                open(&mut messages, &now);
                for (node, since) in &now.to {
                    let is_new = before.to.get(node) != Some(since) || before.end != now.end;
                    let pods = now.pods.iter().filter(|pod| is_new || !before.pods.contains(pod));
                    send(messages.as_ref(), *node, pods);
                }
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = Some(Instant::now() + INTERVAL);
                open(&mut messages, &now);
                now.to.keys().for_each(|node| send(messages.as_ref(), *node, &now.pods));
            }
        }
    }
}

/// Opens the socket if there is something to send. After a failure, the next announcement tries again.
fn open(messages: &mut Option<NodeMessages>, now: &Announced) {
    if let (None, Some((device, source)), false) = (&messages, now.end, now.to.is_empty()) {
        match NodeMessages::open(device, source) {
            Ok(opened) => *messages = Some(opened),
            Err(e) => tracing::debug!("cannot announce pods to nodes that record connections: {e:#}"),
        }
    }
}

fn send<'a>(messages: Option<&NodeMessages>, node: Mac, pods: impl IntoIterator<Item = &'a PodName>) {
    let Some(messages) = messages else { return };
    for message in encode(pods) {
        // A message that cannot be sent is repeated later.
        let _ = messages.send(of_mac(HEALTH, node), &message);
    }
}
