//! Traces of a packet's way, for `kubectl egret trace`.
//!
//! A trace is a task of its own, with sockets of its own: the daemon's state does not know of it, and nothing of it is left
//! when its connection, its task or the daemon ends. Its table goes with the socket that owns it
//! (`datapath/trace_table.rs`). Without a trace no rule sets the packet's bit, and the kernel does not look at it.

mod filter;
mod relay;
mod rules;
mod session;

pub use relay::relay;
pub use session::{Slots, serve};

use crate::datapath::route_socket::RouteSocket;
use crate::model::trace::{Armed, TraceSpec};
use crate::node::host::Chains;
use tokio::sync::oneshot;

/// A request for a trace that waits for what the daemon knows.
pub struct TraceRequest {
    /// What is to be traced.
    pub request: TraceSpec,
    /// Where the answer goes.
    pub response: oneshot::Sender<TraceContext>,
}

/// What the daemon knows that a trace needs.
pub struct TraceContext {
    /// What the command is told. The interface is `None` if the daemon does not know the pod's.
    pub armed: Armed,
    /// The chains of Egret's tables.
    pub chains: Vec<Chains>,
    /// For the search of the pod's veth.
    pub routes: RouteSocket,
}
