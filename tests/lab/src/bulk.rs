//! Transfers in one direction that go on in the background, for measuring how much comes through.

use super::host::Host;
use super::machine;
use super::server::{SINK, SOURCE};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A TCP connection that sends or receives as much as it can.
pub struct Bulk {
    ends: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<Option<String>>>,
}

impl Host {
    /// Sends to the port that takes what comes; [`Server::sunk`](super::server::Server::sunk) counts it there.
    ///
    /// # Errors
    /// The connection cannot be made.
    pub fn upload(&self, server: impl Into<IpAddr>) -> io::Result<Bulk> {
        let buffer = vec![0; 65536];
        self.transfer(SocketAddr::new(server.into(), SINK), move |stream, _| stream.write(&buffer))
    }

    /// Receives from the port that sends without end.
    ///
    /// # Errors
    /// The connection cannot be made.
    pub fn download(&self, server: impl Into<IpAddr>) -> io::Result<Bulk> {
        let mut buffer = vec![0; 65536];
        self.transfer(SocketAddr::new(server.into(), SOURCE), move |stream, received| {
            let size = stream.read(&mut buffer)?;
            received.fetch_add(size as u64, Ordering::Relaxed);
            Ok(size)
        })
    }

    fn transfer(
        &self,
        server: SocketAddr,
        mut step: impl FnMut(&mut TcpStream, &AtomicU64) -> io::Result<usize> + Send + 'static,
    ) -> io::Result<Bulk> {
        let mut stream = self.within(|| TcpStream::connect_timeout(&server, Duration::from_secs(3)))?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        stream.set_write_timeout(Some(Duration::from_millis(200)))?;
        let (ends, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (ends, received) = (Arc::clone(&ends), Arc::clone(&received));
            move || {
                while !ends.load(Ordering::Relaxed) {
                    match machine::uninterrupted(|| step(&mut stream, &received)) {
                        Ok(0) => return Some("closed by the server".to_owned()),
                        Ok(_) => {}
                        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                        Err(e) => return Some(e.to_string()),
                    }
                }
                None
            }
        });
        Ok(Bulk { ends, received, thread: Some(thread) })
    }
}

impl Bulk {
    /// How many bytes have been received.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Ends it; the error that ended it before, if there was one.
    pub fn stop(mut self) -> Option<String> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|thread| thread.join().expect("the transfer's thread"))
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}
