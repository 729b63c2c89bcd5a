//! What the daemons show of themselves: logs, and HTTP endpoints for metrics and for health.

pub mod access;
pub mod logs;
pub mod server;
mod tls;
