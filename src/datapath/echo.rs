//! Liveness probes of other nodes' kernels through the tunnel: ICMPv6 echo (RFC 4443).
//!
//! One socket sends all requests and receives all replies, and nothing else. A thousand nodes probe a gateway node,
//! and their requests must not wake its daemon.

use crate::datapath::names::{DEVICE, is_health};
use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, recvmsg, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::Interest;
use tokio::net::UdpSocket;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// The hop limit of messages in the tunnel. A forwarded packet has a lower one.
const HOP_LIMIT: i32 = 255;
/// The length of a reply, in bytes.
const REPLY: u32 = 8;
/// Bytes read of a message. A reply is shorter.
const MESSAGE: usize = 64;
/// The receive buffer, bytes: room for the replies of a few thousand nodes while the daemon is busy.
const RECEIVE_BUFFER: usize = 1 << 20;

/// The longest time that a reply is assumed to wait in the socket.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A node's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The node's health address, or the health address of one of its uplinks.
    pub from: Ipv6Addr,
    /// The sequence number of the request.
    pub sequence: u16,
    /// How long the reply waited in the socket.
    pub waited: Duration,
}

/// The socket of liveness probes.
#[derive(Debug)]
pub struct Echo {
    /// A raw socket, in tokio's datagram type so that a task can wait for it.
    socket: UdpSocket,
    device: u32,
    identifier: u16,
}

impl Echo {
    /// Opens a socket on the tunnel device, which has the index `device`. Requests have the source address `source`.
    ///
    /// # Errors
    /// The socket cannot be opened, or the device or its address does not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(device: u32, source: Ipv6Addr) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)
            .context("cannot open a raw socket; the daemon needs CAP_NET_RAW")?;
        // Filter before the bind, so that no other message is ever queued.
        crate::datapath::icmpv6_filter::accept_types(&fd, &[ECHO_REPLY]).context("cannot filter ICMPv6 messages")?;
        // Kernels also reply to the longer messages between daemons; those replies are not for this socket.
        crate::datapath::socket_filter::accept_up_to(&fd, REPLY).context("cannot filter by length")?;
        setsockopt(&fd, sockopt::BindToDevice, &DEVICE.into()).context("cannot bind to the tunnel device")?;
        setsockopt(&fd, sockopt::Ipv6RecvHopLimit, &true)?;
        setsockopt(&fd, sockopt::Ipv6Ttl, &HOP_LIMIT)?;
        // Round-trip times are measured with the kernel's timestamps, because a busy daemon reads late.
        setsockopt(&fd, sockopt::ReceiveTimestampns, &true)?;
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, device)))
            .with_context(|| format!("cannot send probes from {source}"))?;
        let socket = UdpSocket::from_std(fd.into())?;
        // Random, not the process id: in a container that is the same after a restart, and replies to the previous
        // daemon would count.
        let identifier = RandomState::new().build_hasher().finish() as u16;
        Ok(Echo { socket, device, identifier })
    }

    /// Sends an echo request to `node`.
    ///
    /// # Errors
    /// The request could not be sent.
    pub fn request(&self, node: Ipv6Addr, sequence: u16) -> nix::Result<()> {
        let ([a, b], [c, d]) = (self.identifier.to_be_bytes(), sequence.to_be_bytes());
        // The kernel fills in the checksum (RFC 3542, section 3.1).
        let message = [ECHO_REQUEST, 0, 0, 0, a, b, c, d];
        let to = SockaddrIn6::from(SocketAddrV6::new(node, 0, 0, self.device));
        sendto(self.socket.as_raw_fd(), &message, &to, MsgFlags::empty()).map(drop)
    }

    /// Waits until there may be a reply.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn readable(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// Returns the next reply in the socket, `None` if there is none.
    ///
    /// # Errors
    /// The socket failed.
    pub fn reply(&self) -> io::Result<Option<Reply>> {
        loop {
            match self.socket.try_io(Interest::READABLE, || self.receive()) {
                Ok(Some(reply)) => return Ok(Some(reply)),
                Ok(None) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// Receives a message; `None` if it is no reply to this daemon.
    fn receive(&self) -> io::Result<Option<Reply>> {
        let mut message = [0; MESSAGE];
        let mut control = nix::cmsg_space!(i32, TimeSpec);
        let mut room = [IoSliceMut::new(&mut message)];
        let received =
            recvmsg::<SockaddrIn6>(self.socket.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty())?;
        let (mut near, mut arrived) = (false, None);
        for control in received.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::Ipv6HopLimit(limit) => near = limit == HOP_LIMIT,
                ControlMessageOwned::ScmTimestampns(time) => arrived = Some(Duration::from(time)),
                _ => {}
            }
        }
        // The kernel's timestamp is of the wall clock. If the clock was set meanwhile, the reply counts as just
        // received.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let waited = arrived.and_then(|arrived| now.checked_sub(arrived)).filter(|waited| *waited < LONGEST_WAIT);
        let (from, length) = (received.address.map(|a| a.ip()), received.bytes);
        Ok(match (near, from, &message[..length]) {
            (true, Some(from), [ECHO_REPLY, 0, _, _, a, b, c, d])
                if is_health(from) && u16::from_be_bytes([*a, *b]) == self.identifier =>
            {
                let sequence = u16::from_be_bytes([*c, *d]);
                Some(Reply { from, sequence, waited: waited.unwrap_or_default() })
            }
            _ => None,
        })
    }
}
