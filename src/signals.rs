//! The signals that end a program.

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Completes when the program receives SIGTERM or SIGINT. Signals count from the call on, not from the first poll.
///
/// # Errors
/// The signals cannot be watched.
pub fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("stopping: SIGTERM"),
            _ = interrupt.recv() => tracing::info!("stopping: SIGINT"),
        }
    })
}
