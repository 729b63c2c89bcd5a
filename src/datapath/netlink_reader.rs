//! Reads the kernel's netlink messages when there are some, in a task that waits for other things too.

use egret_nft::netlink::{self, Message, Socket};
use nix::libc::ENOBUFS;
use std::io;
use std::os::fd::AsFd;
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// A netlink socket that a task can wait for.
pub struct NetlinkReader {
    socket: Socket,
    /// The same socket, in tokio's datagram type; `None` while nobody waits for it.
    readiness: Option<UdpSocket>,
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// One datagram was read.
    Datagram,
    /// The socket's buffer was full, and the kernel dropped messages.
    Lost,
    /// There is no datagram.
    Nothing,
}

impl NetlinkReader {
    /// Reads from this socket.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking, or be duplicated.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(socket: Socket) -> io::Result<Self> {
        socket.set_non_blocking()?;
        let mut reader = NetlinkReader { socket, readiness: None };
        reader.watch()?;
        Ok(reader)
    }

    /// Begins to wait for datagrams again. Those that came meanwhile count.
    ///
    /// # Errors
    /// The socket cannot be duplicated.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch(&mut self) -> io::Result<()> {
        if self.readiness.is_none() {
            self.readiness = Some(UdpSocket::from_std(self.socket.as_fd().try_clone_to_owned()?.into())?);
        }
        Ok(())
    }

    /// Stops waiting for datagrams. While tokio waits, each datagram wakes its thread (`EPOLLET`), also if no task wants
    /// to read it yet.
    pub fn unwatch(&mut self) {
        self.readiness = None;
    }

    /// Waits until there may be a datagram; for ever after [`unwatch`](Self::unwatch).
    ///
    /// # Errors
    /// The socket failed.
    pub async fn readable(&self) -> io::Result<()> {
        match &self.readiness {
            Some(readiness) => readiness.readable().await,
            None => std::future::pending().await,
        }
    }

    /// Reads the next datagram without waiting, and calls `each` with every message in it.
    ///
    /// # Errors
    /// The socket failed.
    pub fn read(&mut self, mut each: impl FnMut(Message<'_>)) -> io::Result<Read> {
        let NetlinkReader { socket, readiness } = self;
        let mut receive = || {
            socket.receive(&mut each).map_err(|e| match e {
                netlink::Error::Socket(e) => e,
                other => io::Error::other(other),
            })
        };
        let received = match readiness {
            Some(readiness) => readiness.try_io(Interest::READABLE, receive),
            None => receive(),
        };
        match received {
            Ok(()) => Ok(Read::Datagram),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Read::Nothing),
            Err(e) if e.raw_os_error() == Some(ENOBUFS) => Ok(Read::Lost),
            Err(e) => Err(e),
        }
    }
}
