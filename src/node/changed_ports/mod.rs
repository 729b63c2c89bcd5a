//! Connections whose source port the gateway has changed, because another one had it: the other nodes that may come to own
//! the egress IP are told of them, so that the next owner translates them to the same port.
//!
//! All other connections keep their pod's port, and nobody needs to be told of them until the owner changes ([`kept`]). A thread of its own hears of the changed ones
//! and tells others at once, however busy the daemon is: in a planned move a connection's next packet may go to the next
//! owner a moment later.

mod hearing;
mod kept;
mod message;
mod owned;
mod replicas;
mod roles;
mod task;

pub use kept::{Holder, Holders, kept_port};
pub use replicas::Replicas;
pub use roles::{Role, Roles};

use crate::kernel::conntrack::Tracked;
use crate::model::marks::Marks;
use anyhow::{Context, Result};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};

/// What is counted. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Connections that this node, their owner, tells others of.
    pub owned: Gauge,
    /// Connections that this node was told of.
    pub replicas: Gauge,
    /// Connections that others were not told of, or that this node could not keep: there was no room.
    pub no_room: Counter,
    /// How often the kernel could not say which connections' ports it had changed: there were too many at once.
    pub overruns: Counter,
    /// Connections that this node was told of, and that another one here is in the way of.
    pub taken: Counter,
}

impl Figures {
    /// Shows them.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "changed_port_connections",
            "Connections with another port than their pod's that others of the gateway's nodes are told of",
            self.owned.clone(),
        );
        registry.register(
            "changed_port_replicas",
            "Connections with another port than their pod's that this node was told of by the owners of their egress IPs",
            self.replicas.clone(),
        );
        registry.register(
            "changed_port_no_room",
            "How often such a connection was not told of, or not kept: there was no room",
            self.no_room.clone(),
        );
        registry.register(
            "changed_port_overruns",
            "How often such connections began faster than the daemon hears of them; they are looked for later",
            self.overruns.clone(),
        );
        registry.register(
            "changed_port_taken",
            "How often such a connection could not be kept, for another one was in its place",
            self.taken.clone(),
        );
    }
}

/// The daemon's end.
#[derive(Debug)]
pub struct ChangedPorts {
    roles: watch::Sender<Arc<Roles>>,
    replicas: Arc<Replicas>,
    gone: mpsc::UnboundedSender<Vec<Tracked>>,
}

impl ChangedPorts {
    /// Starts the thread. It ends when this is dropped.
    ///
    /// # Errors
    /// No thread, or nothing to wait with, is to be had.
    pub fn start(marks: Marks, figures: Figures) -> Result<Self> {
        let (roles, wanted) = watch::channel(Arc::default());
        let (gone, heard) = mpsc::unbounded_channel();
        let replicas: Arc<Replicas> = Arc::default();
        let runtime = Builder::new_current_thread().enable_all().build().context("a thread's runtime")?;
        let task = task::Task::new((wanted, heard), replicas.clone(), marks, figures).context("connection tracking")?;
        let thread = thread::Builder::new().name("changed-ports".into());
        thread.spawn(move || runtime.block_on(task.run())).context("a thread")?;
        Ok(ChangedPorts { roles, replicas, gone })
    }

    /// This node's part from now on.
    pub fn set_roles(&self, roles: Roles) {
        self.roles.send_if_modified(|now| {
            let changed = **now != roles;
            if changed {
                *now = Arc::new(roles);
            }
            changed
        });
    }

    /// What other nodes have told of.
    pub fn replicas(&self) -> Arc<Replicas> {
        self.replicas.clone()
    }

    /// Takes connections of this node's pods that left from here, and whose egress IPs have gone to others: these are told of
    /// them, though the kernel's table has them no more.
    pub fn gone(&self) -> mpsc::UnboundedSender<Vec<Tracked>> {
        self.gone.clone()
    }
}
