//! Records of connections: which pod used which egress IP and port at what time.
//!
//! The kernel notifies the gateway node when a connection begins and ends, filtered by Egret's connection mark. One
//! thread turns each notification into a line of JSON ([`record`]), and another one writes the lines ([`output`]), so
//! that neither the daemon nor the kernel waits for a slow file. Records that do not fit into the queue are dropped
//! and counted.
//!
//! A gateway node does not know other nodes' pods. A node that records reports this in its EgressNode. Other nodes
//! then announce their pods to it through the tunnel ([`announce`]), without the API server.

mod announce;
mod names;
mod output;
mod record;
mod target;
mod task;

pub use announce::{Announced, Announcer};
pub use names::PodName;
pub use target::LogTarget;
pub use task::{FlowView, RecordedIp};

use crate::model::marks::Marks;
use anyhow::{Context, Result};
use jiff::Timestamp;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::thread;
use tokio::runtime::Builder;
use tokio::sync::watch;

/// Why a record was dropped.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Dropped {
    /// `kernel`: the kernel dropped notifications; each report of the kernel counts once. `output`: the file, the
    /// program or the server did not accept the record.
    reason: &'static str,
}

/// Metrics of the records. Clones share the values.
#[derive(Clone, Debug, Default)]
pub struct FlowLogMetrics {
    written: Counter,
    dropped: Family<Dropped, Counter>,
}

impl FlowLogMetrics {
    /// Registers the metrics.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("flow_log_records", "Records of connections that were written", self.written.clone());
        registry.register(
            "flow_log_dropped_records",
            "Records of connections that were dropped; kernel: how often the kernel dropped notifications, output: it \
             was not taken in time",
            self.dropped.clone(),
        );
    }

    fn dropped(&self, reason: &'static str, records: u64) {
        self.dropped.get_or_create(&Dropped { reason }).inc_by(records);
    }
}

/// The daemon's handle of the thread that records. The thread ends when the handle is dropped.
#[derive(Debug)]
pub struct FlowLog {
    view: watch::Sender<Arc<FlowView>>,
    since: i64,
}

impl FlowLog {
    /// Starts to record.
    ///
    /// # Errors
    /// A thread or its runtime cannot be created.
    pub fn start(target: &LogTarget, marks: Marks, metrics: FlowLogMetrics) -> Result<Self> {
        let (view, wanted) = watch::channel(Arc::default());
        let runtime = Builder::new_current_thread().enable_all().build().context("a thread's runtime")?;
        let output = output::start(target.open(), metrics.clone())?;
        let task = task::Task::new(wanted, marks, output, metrics);
        let thread = thread::Builder::new().name("flow-log".into());
        thread.spawn(move || runtime.block_on(task.run())).context("a thread")?;
        tracing::info!(to = %target, "records connections of egress IPs while this node holds some");
        Ok(FlowLog { view, since: Timestamp::now().as_second() })
    }

    /// When it began, seconds since the Unix epoch.
    pub fn since(&self) -> i64 {
        self.since
    }

    /// Sets what the daemon knows of the cluster from now on.
    pub fn set_view(&self, view: FlowView) {
        self.view.send_replace(Arc::new(view));
    }
}
