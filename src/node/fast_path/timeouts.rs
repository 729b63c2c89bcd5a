//! The thread that corrects the timeouts of connections whose packets connection tracking does not all see ([`Prolonged`]).

use crate::model::marks::Marks;
use egret_nft::conntrack::{MarkFilter, Prolonged, TcpTimeouts};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// The longest interval. The kernel's own timeouts, five minutes, are corrected as often.
const LONGEST: Duration = Duration::from_secs(100);

/// Starts the thread, in this network namespace. It ends when the sender is dropped.
///
/// # Errors
/// No thread can be created.
pub(super) fn correct(marks: Marks) -> io::Result<mpsc::Sender<()>> {
    let (sender, end) = mpsc::channel();
    let marked = MarkFilter { mark: marks.connection(0), mask: marks.connection_mask() };
    let mut prolonged = Prolonged::default();
    thread::Builder::new().name("timeouts".into()).spawn(move || {
        loop {
            let timeouts = TcpTimeouts::read();
            if let Some(timeouts) = &timeouts {
                let changed = Socket::open(NETLINK_NETFILTER)
                    .map_err(anyhow::Error::from)
                    .and_then(|mut socket| Ok(prolonged.prolong(&mut socket, marked, timeouts)?));
                match changed {
                    Ok(0) => {}
                    Ok(n) => {
                        tracing::debug!("{n} connections of the fast path have the timeout of established ones again")
                    }
                    Err(e) => tracing::warn!("timeouts of connections of the fast path are not corrected: {e:#}"),
                }
            }
            // Twice while the shortest one passes, at least.
            let shortest = timeouts.map_or(LONGEST, |timeouts| Duration::from_secs(timeouts.shortest().into()));
            let pause = (shortest / 3).clamp(Duration::from_secs(1), LONGEST);
            if end.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(sender)
}
