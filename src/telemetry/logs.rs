//! Logging to stderr.

use anyhow::Context;
use std::io::IsTerminal;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Text, for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends the process's logs to stderr. `filter` is a level (`info`), or levels by module
/// (`info,egret::node=debug`).
///
/// # Errors
/// The filter cannot be parsed, or logging was set up already.
pub fn init(format: Format, filter: &str) -> anyhow::Result<()> {
    let filter: Targets = filter.parse().with_context(|| {
        format!(
            "log level {filter:?} is not valid; write error, warn, info, debug or trace, \
             or levels by module as in info,egret::node=debug"
        )
    })?;
    let layer = fmt::layer().with_writer(std::io::stderr);
    let layer = match format {
        Format::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        Format::Json => layer.json().flatten_event(true).with_current_span(false).boxed(),
    };
    let done = registry().with(layer.with_filter(filter)).try_init();
    done.map_err(|e| anyhow::anyhow!("cannot set up logging: {e}"))
}
