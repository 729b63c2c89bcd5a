//! Logs, and HTTP endpoints for metrics and health.

pub mod access;
pub mod logs;
pub mod server;
mod tls;
