//! Messages between nodes' daemons: ICMPv6 echo requests (RFC 4443) through the tunnel, as liveness probes are.
//!
//! The datapath accepts echo requests in the tunnel only from nodes, with a hop limit that no forwarded packet has.
//! The messages need no API server. A node whose daemon does not listen for them answers them as any echo request.

use crate::datapath::icmpv6_filter;
use crate::datapath::names::{DEVICE, PROBER, is_health};
use crate::datapath::socket_filter;
use anyhow::{Context, Result};
use egret_nft::mac::Mac;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, bind, recvmsg, sendto,
    setsockopt, socket, sockopt,
};
use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UdpSocket;

const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// The hop limit of messages in the tunnel. A forwarded packet has a lower one.
const HOP_LIMIT: i32 = 255;
/// Length of an echo request without data.
const HEADER: usize = 8;
/// The largest message, in bytes. Any IPv6 link carries it (RFC 8200, section 5).
pub const MAX_MESSAGE: usize = 1200;
/// The smallest message, in bytes. A shorter echo request is a liveness probe.
const MIN_MESSAGE: usize = 4;
/// The receive buffer, bytes: room for some thousand messages while the processor is busy.
const RECEIVE_BUFFER: usize = 4 << 20;
/// So many messages are received at a time.
const AT_ONCE: usize = 64;

/// Sends and receives messages between daemons.
#[derive(Debug)]
pub struct NodeMessages {
    sender: OwnedFd,
    /// A raw socket, in tokio's datagram type so that a task can wait for it.
    receiver: UdpSocket,
    device: u32,
    /// The type of the messages that it receives.
    receives: u8,
}

impl NodeMessages {
    /// Opens sockets on the tunnel device, which has the index `device`. Messages have the source address `source`.
    ///
    /// # Errors
    /// A socket cannot be opened, or the device or its address does not exist.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(device: u32, source: Ipv6Addr) -> Result<Self> {
        let receiver = raw(&[ECHO_REQUEST])?;
        // A thousand nodes probe a gateway node; their requests must not wake its daemon.
        socket_filter::accept_longer_than(&receiver, (HEADER + MIN_MESSAGE - 1) as u32)
            .context("cannot filter by length; the kernel rejects SO_ATTACH_FILTER")?;
        Self::with_receiver(receiver, device, source, ECHO_REQUEST)
    }

    /// As [`open`](Self::open), for messages that begin with these bytes only.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// As [`open`](Self::open).
    pub fn open_for(magic: [u8; 4], device: u32, source: Ipv6Addr) -> Result<Self> {
        Self::with_magic(ECHO_REQUEST, magic, device, source)
    }

    /// As [`open_for`](Self::open_for), and receives only what nodes [`reply`] to the messages that it sends. A node that
    /// has no health address receives such replies, too.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Panics
    /// As [`open`](Self::open).
    pub fn open_for_replies(magic: [u8; 4], device: u32, source: Ipv6Addr) -> Result<Self> {
        Self::with_magic(ECHO_REPLY, magic, device, source)
    }

    fn with_magic(receives: u8, magic: [u8; 4], device: u32, source: Ipv6Addr) -> Result<Self> {
        let receiver = raw(&[receives])?;
        socket_filter::accept_bytes_at(&receiver, HEADER as u32, magic)
            .context("cannot filter by content; the kernel rejects SO_ATTACH_FILTER")?;
        Self::with_receiver(receiver, device, source, receives)
    }

    fn with_receiver(receiver: OwnedFd, device: u32, source: Ipv6Addr, receives: u8) -> Result<Self> {
        let sender = sender(device, source)?;
        setsockopt(&receiver, sockopt::Ipv6RecvHopLimit, &true)?;
        let _ = setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        Ok(NodeMessages { sender, receiver: UdpSocket::from_std(receiver.into())?, device, receives })
    }

    /// Sends a message of at most [`MAX_MESSAGE`] bytes.
    ///
    /// # Errors
    /// The message could not be sent.
    pub fn send(&self, node: Ipv6Addr, data: &[u8]) -> nix::Result<()> {
        send(&self.sender, ECHO_REQUEST, (node, self.device), data)
    }

    /// Waits until there may be a message; without a socket, forever.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn readable(messages: &Option<Self>) -> io::Result<()> {
        match messages {
            Some(messages) => messages.receiver.readable().await,
            None => std::future::pending().await,
        }
    }

    /// Returns the messages in the socket with the tunnel MAC addresses of their senders, without those that `decode` does
    /// not know. It reads at most 64: whatever other nodes send, the task does its other work between two calls.
    ///
    /// # Errors
    /// The socket failed.
    pub fn received<M>(&self, decode: impl Fn(&[u8]) -> Option<M>) -> io::Result<Vec<(Mac, M)>> {
        let mut received = Vec::new();
        for _ in 0..AT_ONCE {
            match self.receiver.try_io(Interest::READABLE, || self.receive()) {
                Ok(message) => received.extend(message),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if received.is_empty() => return Err(e),
                Err(_) => break,
            }
        }
        Ok(received.into_iter().filter_map(|(from, bytes): (Mac, Vec<u8>)| Some((from, decode(&bytes)?))).collect())
    }

    /// Receives a message; `None` if no node sent it.
    fn receive(&self) -> io::Result<Option<(Mac, Vec<u8>)>> {
        let mut message = [0; HEADER + MAX_MESSAGE];
        let mut control = nix::cmsg_space!(i32);
        let mut room = [IoSliceMut::new(&mut message)];
        let received =
            recvmsg::<SockaddrIn6>(self.receiver.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty())?;
        let near = received
            .cmsgs()
            .into_iter()
            .flatten()
            .any(|control| matches!(control, ControlMessageOwned::Ipv6HopLimit(HOP_LIMIT)));
        let whole = !received.flags.contains(MsgFlags::MSG_TRUNC);
        let (from, length) = (received.address.map(|a| a.ip()), received.bytes);
        let is_node =
            |from: Ipv6Addr| if self.receives == ECHO_REPLY { is_health(from) } else { PROBER.contains(from) };
        Ok(match (from, message[..length].split_at_checked(HEADER)) {
            (Some(from), Some(([kind, 0, ..], data))) if *kind == self.receives && near && whole && is_node(from) => {
                let [.., a, b, c, d, e, f] = from.octets();
                Some(([a, b, c, d, e, f], data.to_vec()))
            }
            _ => None,
        })
    }
}

/// Sends a message as a reply from this node's health address `source`, on the tunnel device with the index `device`.
///
/// # Errors
/// The message could not be sent: the node has no such address now, for instance.
pub fn reply(device: u32, source: Ipv6Addr, node: Ipv6Addr, data: &[u8]) -> Result<()> {
    let sender = sender(device, source)?;
    send(&sender, ECHO_REPLY, (node, device), data).with_context(|| format!("cannot reply to {node}"))
}

/// A socket that sends from `source` on the device with the index `device`.
fn sender(device: u32, source: Ipv6Addr) -> Result<OwnedFd> {
    let sender = raw(&[])?;
    setsockopt(&sender, sockopt::Ipv6Ttl, &HOP_LIMIT)?;
    bind(sender.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, device)))
        .with_context(|| format!("cannot send from {source}"))?;
    Ok(sender)
}

fn send(socket: &OwnedFd, kind: u8, (node, device): (Ipv6Addr, u32), data: &[u8]) -> nix::Result<()> {
    // The kernel fills in the checksum (RFC 3542, section 3.1).
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(data);
    let to = SockaddrIn6::from(SocketAddrV6::new(node, 0, 0, device));
    sendto(socket.as_raw_fd(), &message, &to, MsgFlags::empty()).map(drop)
}

/// Opens a raw socket on the tunnel device that receives ICMPv6 messages of these types.
fn raw(types: &[u8]) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)
        .context("cannot open a raw socket; the daemon needs CAP_NET_RAW")?;
    icmpv6_filter::accept_types(&fd, types).context("cannot filter ICMPv6 messages")?;
    setsockopt(&fd, sockopt::BindToDevice, &DEVICE.into()).context("cannot bind to the tunnel device")?;
    Ok(fd)
}
