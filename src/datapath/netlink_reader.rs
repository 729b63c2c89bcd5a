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
    /// The same socket, in tokio's datagram type.
    readiness: UdpSocket,
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
        let readiness = UdpSocket::from_std(socket.as_fd().try_clone_to_owned()?.into())?;
        Ok(NetlinkReader { socket, readiness })
    }

    /// Waits until there may be a datagram.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn readable(&self) -> io::Result<()> {
        self.readiness.readable().await
    }

    /// Reads the next datagram without waiting, and calls `each` with every message in it.
    ///
    /// # Errors
    /// The socket failed.
    pub fn read(&mut self, mut each: impl FnMut(Message<'_>)) -> io::Result<Read> {
        let NetlinkReader { socket, readiness } = self;
        let received = readiness.try_io(Interest::READABLE, || {
            socket.receive(&mut each).map_err(|e| match e {
                netlink::Error::Socket(e) => e,
                other => io::Error::other(other),
            })
        });
        match received {
            Ok(()) => Ok(Read::Datagram),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Read::Nothing),
            Err(e) if e.raw_os_error() == Some(ENOBUFS) => Ok(Read::Lost),
            Err(e) => Err(e),
        }
    }
}
