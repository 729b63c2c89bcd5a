//! The fast path: eBPF programs that send packets of established connections past nf_tables (`crates/bpf`).
//!
//! A thread of its own attaches the programs, ends all leases when anybody changes a rule or a route, and makes connection
//! tracking liberal with the connections that ask for it. Another one corrects these connections' timeouts. The programs and
//! their maps are held by this process: when it ends, however it ends, they go, and every packet takes the kernel's own way.

mod devices;
mod metrics;
mod task;
mod timeouts;

pub use egret_bpf::TunnelEnd;
pub use metrics::FastPathMetrics;

use crate::model::marks::Marks;
use crate::model::text::few;
use anyhow::{Context, Result};
use egret_bpf::{Count, Programs, Settings};
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;
use tokio::runtime::Builder;
use tokio::sync::watch;

/// The number of packets of one direction of a connection before it may get a lease. Shorter connections would pay for a
/// lease that they hardly use.
const AFTER: u32 = 32;
/// At most so many interfaces are named in the status.
const FEW: usize = 5;

/// What the node wants of the fast path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Why no packet may go the fast way now, if so.
    pub closed: Option<&'static str>,
    /// This node's end of the tunnel.
    pub tunnel: Option<TunnelEnd>,
    /// The other nodes' ends of the tunnel, and the index of the interface to each.
    pub nodes: BTreeMap<IpAddr, u32>,
    /// The indexes of the veths of selected pods.
    pub pods: BTreeSet<u32>,
    /// The indexes of the uplinks by which egress IPs leave.
    pub uplinks: BTreeSet<u32>,
    /// The other nodes, by the mark of their connections here.
    pub peers: BTreeMap<u32, Mac>,
    /// The egress IPs whose packets take the kernel's own way.
    pub slow: Slow,
}

/// The egress IPs whose packets take the kernel's own way: some rule must see each of them, or their gateway says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slow {
    /// Their egress IDs.
    pub ids: BTreeSet<u16>,
    /// Their addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// Whether packets go the fast way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Why none does, if so.
    pub closed: Option<String>,
    /// Interfaces whose packets do not, and why.
    pub without: BTreeMap<String, String>,
    /// Interfaces to other nodes that packets with a lease reach by the tunnel device, and why.
    pub by_device: BTreeMap<String, String>,
    /// The number of egress IPs whose packets take the kernel's own way.
    pub slow: usize,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.closed {
            Some(why) => write!(f, "all packets take the kernel's own way: {why}"),
            None => {
                f.write_str("packets of long connections go the fast way")?;
                if !self.without.is_empty() {
                    write!(f, ", except those of {}", named(&self.without))?;
                }
                if !self.by_device.is_empty() {
                    write!(f, "; the tunnel device sends and receives what passes {}", named(&self.by_device))?;
                }
                if self.slow > 0 {
                    let slow = self.slow;
                    write!(
                        f,
                        "; {slow} egress IPs have a DSCP, a bandwidth, or a gateway with fastPath: Off, and do not"
                    )?;
                }
                Ok(())
            }
        }
    }
}

fn named(interfaces: &BTreeMap<String, String>) -> String {
    few(interfaces.iter().map(|(interface, why)| format!("{interface} ({why})")), FEW)
}

/// The daemon's handle of the fast path. It ends when the handle is dropped.
#[derive(Debug)]
pub struct FastPath {
    wanted: watch::Sender<Wanted>,
    status: watch::Receiver<Status>,
    programs: Option<Arc<Programs>>,
    /// Ends the thread that corrects timeouts.
    _timeouts: Option<mpsc::Sender<()>>,
}

impl FastPath {
    /// Loads the programs and starts the thread. Where the kernel does not take the programs, the status says why, and
    /// everything takes the kernel's own way. `lease` is how long a lease lasts.
    ///
    /// # Errors
    /// The thread or its runtime cannot be created.
    pub fn start(lease: Duration, marks: Marks, metrics: FastPathMetrics) -> Result<Self> {
        let (wanted, changed) = watch::channel(Wanted::default());
        let settings =
            Settings { lease, connection_base: marks.connection_base(), kind_mask: marks.kind_mask(), after: AFTER };
        let programs = match Programs::load(&settings) {
            Ok(programs) => Arc::new(programs),
            Err(e) => {
                let closed = format!("{:#}", anyhow::Error::from(e));
                tracing::warn!("no fast path, all packets take the kernel's own way: {closed}");
                metrics.set_open(false);
                let (_, status) = watch::channel(Status { closed: Some(closed), ..Status::default() });
                return Ok(FastPath { wanted, status, programs: None, _timeouts: None });
            }
        };
        let (publish, status) = watch::channel(Status { closed: Some("it starts".to_owned()), ..Status::default() });
        let runtime = Builder::new_current_thread().enable_all().build().context("a thread's runtime")?;
        let task = {
            // Sockets of tokio are opened within its runtime.
            let _inside = runtime.enter();
            task::Task::new(programs.clone(), changed, publish, metrics).context("the fast path")?
        };
        let thread = thread::Builder::new().name("fast-path".into());
        thread.spawn(move || runtime.block_on(task.run())).context("a thread")?;
        let timeouts = timeouts::correct(marks).context("a thread")?;
        Ok(FastPath { wanted, status, programs: Some(programs), _timeouts: Some(timeouts) })
    }

    /// Sets what the node wants.
    pub fn set(&self, wanted: Wanted) {
        self.wanted.send_if_modified(|now| {
            let changed = *now != wanted;
            *now = wanted;
            changed
        });
    }

    /// Whether packets go the fast way.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Whether the status has changed since the last call.
    pub fn has_changed(&mut self) -> bool {
        let changed = self.status.has_changed().unwrap_or_default();
        if changed {
            self.status.mark_unchanged();
        }
        changed
    }

    /// The packets that went the fast way, by egress ID: those of this node's pods, and those of other nodes' pods.
    ///
    /// # Errors
    /// The kernel's maps cannot be read.
    pub fn counts(&self) -> Result<[BTreeMap<u16, Count>; 2]> {
        let counts = self.programs.as_ref().map(|programs| programs.counts());
        Ok(counts.transpose().context("the fast path's counters")?.unwrap_or_default())
    }
}
