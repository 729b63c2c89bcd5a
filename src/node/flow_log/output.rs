//! The thread that writes records. A slow file or program delays neither the thread that reads the kernel's
//! notifications nor the daemon: lines that do not fit into the queue are dropped.

use super::FlowLogMetrics;
use super::target::{Sink, count};
use anyhow::{Context, Result};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// The largest number of queued batches.
const QUEUE: usize = 256;
/// The shortest interval between two warnings.
const WARN: Duration = Duration::from_secs(10);

/// The sender of the queue.
pub(super) struct Output {
    queue: SyncSender<Vec<u8>>,
    metrics: FlowLogMetrics,
}

/// Starts the thread. It ends when the returned value is dropped.
pub(super) fn start(sink: Sink, metrics: FlowLogMetrics) -> Result<Output> {
    let (queue, batches) = sync_channel(QUEUE);
    let shared = metrics.clone();
    let thread = thread::Builder::new().name("flow-log-write".into());
    thread.spawn(move || write(sink, &batches, &shared)).context("a thread")?;
    Ok(Output { queue, metrics })
}

impl Output {
    /// Queues lines, or drops them if the queue is full.
    pub(super) fn put(&self, lines: Vec<u8>) {
        if let Err(TrySendError::Full(lines) | TrySendError::Disconnected(lines)) = self.queue.try_send(lines) {
            self.metrics.dropped("output", count(&lines));
        }
    }
}

fn write(mut sink: Sink, batches: &Receiver<Vec<u8>>, metrics: &FlowLogMetrics) {
    let mut warned: Option<Instant> = None;
    while let Ok(lines) = batches.recv() {
        let (written, result) = sink.write(&lines);
        metrics.written.inc_by(written);
        metrics.dropped("output", count(&lines) - written);
        if let (Err(e), true) = (result, warned.is_none_or(|at| at.elapsed() >= WARN)) {
            warned = Some(Instant::now());
            tracing::warn!("cannot write records of connections, which are dropped: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::flow_log::{Dropped, LogTarget};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_program_that_does_not_read_costs_records_and_no_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stream");
        let _deaf = UnixListener::bind(&path).unwrap();
        let metrics = FlowLogMetrics::default();
        let output = start(LogTarget::Unix(path).open(), metrics.clone()).unwrap();
        let begin = Instant::now();
        (0..4 * QUEUE).for_each(|_| output.put(b"0123456789\n".repeat(1000)));
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
        let dropped = metrics.dropped.get_or_create(&Dropped { reason: "output" }).get();
        assert!(dropped >= (2 * QUEUE * 1000) as u64, "{dropped} are dropped");
    }
}
