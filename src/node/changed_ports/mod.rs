//! Replication of connections whose source port the gateway changed, because another connection had the port. The
//! owner of an egress IP sends them to the other nodes that may become its owner, so that the next owner translates
//! them to the same port.
//!
//! All other connections keep their pod's port and need no replication until the owner changes ([`kept`]). A thread
//! of its own reads the log of changed ports and sends at once, even if the daemon is busy: in a planned move, a
//! connection's next packet may reach the next owner a moment later.

mod kept;
mod message;
mod owned;
mod receive;
mod replicas;
mod roles;
mod task;

pub use kept::{EgressOwner, Owners, kept_port};
pub use replicas::Replicas;
pub use roles::{Role, Roles};

use crate::model::marks::Marks;
use anyhow::{Context, Result};
use egret_nft::conntrack::Tracked;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Builder;
use tokio::sync::{mpsc, watch};

/// Metrics of the replication. Clones share the values.
#[derive(Clone, Debug, Default)]
pub struct ReplicationMetrics {
    /// Connections that this node owns and replicates.
    pub owned: Gauge,
    /// Connections that this node has received.
    pub replicas: Gauge,
    /// Connections that were not replicated or not stored, because a limit was reached.
    pub no_room: Counter,
    /// How often the kernel dropped messages of the log of changed ports.
    pub overruns: Counter,
    /// Received connections that conflict with another connection of this node.
    pub taken: Counter,
}

impl ReplicationMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "changed_port_connections",
            "Connections with a changed port that this node owns and replicates to the gateway's other nodes",
            self.owned.clone(),
        );
        registry.register(
            "changed_port_replicas",
            "Connections with a changed port that this node has received from the owners of their egress IPs",
            self.replicas.clone(),
        );
        registry.register(
            "changed_port_no_room",
            "Connections with a changed port that were not replicated or not stored, because a limit was reached",
            self.no_room.clone(),
        );
        registry.register(
            "changed_port_overruns",
            "How often the kernel dropped log messages about connections with a changed port; the daemon reads its table later",
            self.overruns.clone(),
        );
        registry.register(
            "changed_port_taken",
            "Received connections with a changed port that conflict with another connection of this node",
            self.taken.clone(),
        );
    }
}

/// The daemon's handle of the replication thread.
#[derive(Debug)]
pub struct ChangedPorts {
    roles: watch::Sender<Arc<Roles>>,
    replicas: Arc<Replicas>,
    gone: mpsc::UnboundedSender<Vec<Tracked>>,
}

impl ChangedPorts {
    /// Starts the thread. It ends when the handle is dropped.
    ///
    /// # Errors
    /// The thread, its runtime or its socket cannot be created.
    pub fn start(marks: Marks, metrics: ReplicationMetrics) -> Result<Self> {
        let (roles, wanted) = watch::channel(Arc::default());
        let (gone, heard) = mpsc::unbounded_channel();
        let replicas: Arc<Replicas> = Arc::default();
        let runtime = Builder::new_current_thread().enable_all().build().context("a thread's runtime")?;
        let task = task::Task::new((wanted, heard), replicas.clone(), marks, metrics).context("connection tracking")?;
        let thread = thread::Builder::new().name("changed-ports".into());
        thread.spawn(move || runtime.block_on(task.run())).context("a thread")?;
        Ok(ChangedPorts { roles, replicas, gone })
    }

    /// Sets this node's roles from now on.
    pub fn set_roles(&self, roles: Roles) {
        self.roles.send_if_modified(|now| {
            let changed = **now != roles;
            if changed {
                *now = Arc::new(roles);
            }
            changed
        });
    }

    /// The connections that other nodes have replicated to this one.
    pub fn replicas(&self) -> Arc<Replicas> {
        self.replicas.clone()
    }

    /// A channel for connections of this node's pods whose egress IPs have moved from this node to others. They are
    /// sent to the new owners, although the kernel's table no longer contains them.
    pub fn gone(&self) -> mpsc::UnboundedSender<Vec<Tracked>> {
        self.gone.clone()
    }
}
