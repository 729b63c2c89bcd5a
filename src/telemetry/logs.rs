//! Logs, to stderr.

use anyhow::Context;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends the process's logs to stderr. `filter` is a level (`info`), or levels by module
/// (`info,egret::kernel=debug`).
///
/// # Errors
/// The filter cannot be understood, or logs were set up already.
pub fn init(format: Format, filter: &str) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter).with_context(|| {
        format!(
            "log level {filter:?} cannot be understood; write error, warn, info, debug or trace, \
             or levels by module as in info,egret::kernel=debug"
        )
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match format {
        Format::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        Format::Json => builder.json().flatten_event(true).with_current_span(false).try_init(),
    };
    done.map_err(|e| anyhow::anyhow!("logs cannot be set up: {e}"))
}
