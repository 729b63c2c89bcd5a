//! What the daemons show of themselves: logs, and an HTTP endpoint for metrics and health.

pub mod logs;
pub mod server;
