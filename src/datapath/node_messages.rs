//! What nodes' daemons tell each other: in ICMPv6 echo requests (RFC 4443) through the tunnel, as nodes ask each other
//! whether they live.
//!
//! The datapath lets echo requests through the tunnel from nodes alone, with a hop limit that nothing forwarded has; the
//! API server need not be there; and a node whose daemon hears no such messages answers them as any other.

use crate::datapath::names::{ASKING, DEVICE};
use crate::kernel::icmpv6_filter;
use crate::kernel::socket_filter;
use crate::model::mac::Mac;
use anyhow::{Context, Result};
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
/// Nobody forwards what goes through the tunnel; what was forwarded has less.
const HOP_LIMIT: i32 = 255;
/// Length of an echo request without data.
const HEADER: usize = 8;
/// How much a message may hold, in bytes: any IPv6 link carries it (RFC 8200, section 5).
pub const MOST: usize = 1200;
/// What is longer than a question whether a node lives by these bytes at least is a message.
const LEAST: usize = 4;
/// Room for some thousand messages, while the processor is busy.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Sends and hears them.
#[derive(Debug)]
pub struct NodeMessages {
    sender: OwnedFd,
    /// A raw socket; tokio's type for datagrams can wait for it.
    receiver: UdpSocket,
    device: u32,
}

impl NodeMessages {
    /// Sends from `source`, on the tunnel device, which has the index `device`.
    ///
    /// # Errors
    /// No socket is to be had, or the device or its address is not there.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(device: u32, source: Ipv6Addr) -> Result<Self> {
        let sender = raw(&[])?;
        setsockopt(&sender, sockopt::Ipv6Ttl, &HOP_LIMIT)?;
        bind(sender.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, device)))
            .with_context(|| format!("cannot send from {source}"))?;
        let receiver = raw(&[ECHO_REQUEST])?;
        // A gateway's node is asked whether it lives by a thousand others.
        socket_filter::accept_longer_than(&receiver, (HEADER + LEAST - 1) as u32)
            .context("cannot filter by length; the kernel refuses SO_ATTACH_FILTER")?;
        setsockopt(&receiver, sockopt::Ipv6RecvHopLimit, &true)?;
        let _ = setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        Ok(NodeMessages { sender, receiver: UdpSocket::from_std(receiver.into())?, device })
    }

    /// Sends a message of at most [`MOST`] bytes.
    ///
    /// # Errors
    /// The host could not send it.
    pub fn send(&self, node: Ipv6Addr, data: &[u8]) -> nix::Result<()> {
        // The kernel fills in the checksum (RFC 3542, section 3.1).
        let mut message = vec![ECHO_REQUEST, 0, 0, 0, 0, 0, 0, 0];
        message.extend_from_slice(data);
        let to = SockaddrIn6::from(SocketAddrV6::new(node, 0, 0, self.device));
        sendto(self.sender.as_raw_fd(), &message, &to, MsgFlags::empty()).map(drop)
    }

    /// Waits until there may be a message.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn heard(&self) -> io::Result<()> {
        self.receiver.readable().await
    }

    /// The next message that is there, and the tunnel's MAC address of the node that sent it.
    ///
    /// # Errors
    /// The socket failed.
    pub fn next(&self) -> io::Result<Option<(Mac, Vec<u8>)>> {
        loop {
            match self.receiver.try_io(Interest::READABLE, || self.receive()) {
                Ok(Some(message)) => return Ok(Some(message)),
                Ok(None) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// A message; `None`: it is no node's.
    fn receive(&self) -> io::Result<Option<(Mac, Vec<u8>)>> {
        let mut message = [0; HEADER + MOST];
        let mut control = nix::cmsg_space!(i32);
        let mut room = [IoSliceMut::new(&mut message)];
        let heard =
            recvmsg::<SockaddrIn6>(self.receiver.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty())?;
        let near = heard
            .cmsgs()
            .into_iter()
            .flatten()
            .any(|control| matches!(control, ControlMessageOwned::Ipv6HopLimit(HOP_LIMIT)));
        let whole = !heard.flags.contains(MsgFlags::MSG_TRUNC);
        let (from, length) = (heard.address.map(|a| a.ip()), heard.bytes);
        Ok(match (from, message[..length].split_at_checked(HEADER)) {
            (Some(from), Some(([ECHO_REQUEST, 0, ..], data))) if near && whole && ASKING.contains(from) => {
                let [.., a, b, c, d, e, f] = from.octets();
                Some(([a, b, c, d, e, f], data.to_vec()))
            }
            _ => None,
        })
    }
}

/// A raw socket that hears these ICMPv6 messages on the tunnel device.
fn raw(hears: &[u8]) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)
        .context("cannot open a raw socket; the daemon needs CAP_NET_RAW")?;
    icmpv6_filter::accept_types(&fd, hears).context("cannot filter ICMPv6 messages")?;
    setsockopt(&fd, sockopt::BindToDevice, &DEVICE.into()).context("cannot speak through the tunnel device")?;
    Ok(fd)
}
