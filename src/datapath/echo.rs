//! Asking other nodes' kernels, through the tunnel, whether they are there: ICMPv6 echo (RFC 4443).
//!
//! One socket asks everybody and hears all answers. It hears nothing else: a gateway's node is asked by a thousand
//! others, and none of that is to wake the daemon.

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
/// Nobody forwards what goes through the tunnel; what was forwarded has less.
const HOP_LIMIT: i32 = 255;
/// The length of an answer, in bytes.
const ANSWER: u32 = 8;
/// Room for one answer; what is longer is none of ours.
const MESSAGE: usize = 64;
/// Room for the answers of a few thousand nodes, while the daemon is busy.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Longer than this no answer lies unread.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A node's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The node's health address, or the one for an uplink of its.
    pub from: Ipv6Addr,
    /// The number of the question.
    pub sequence: u16,
    /// How long it has lain in the socket.
    pub waited: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Echo {
    /// A raw socket; tokio's type for datagrams can wait for it.
    socket: UdpSocket,
    device: u32,
    identifier: u16,
}

impl Echo {
    /// Asks from `source`, on the tunnel device, which has the index `device`.
    ///
    /// # Errors
    /// No socket is to be had, or the device or its address is not there.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open(device: u32, source: Ipv6Addr) -> Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)
            .context("cannot open a raw socket; the daemon needs CAP_NET_RAW")?;
        // Before it is bound, so that nothing else is ever queued.
        crate::kernel::icmpv6_filter::accept_types(&fd, &[ECHO_REPLY]).context("cannot filter ICMPv6 messages")?;
        // Nor the answers to what the daemons tell each other.
        crate::kernel::socket_filter::accept_up_to(&fd, ANSWER).context("cannot filter by length")?;
        setsockopt(&fd, sockopt::BindToDevice, &DEVICE.into()).context("cannot ask through the tunnel device")?;
        setsockopt(&fd, sockopt::Ipv6RecvHopLimit, &true)?;
        setsockopt(&fd, sockopt::Ipv6Ttl, &HOP_LIMIT)?;
        // Round trips are measured, and a daemon that is busy reads late.
        setsockopt(&fd, sockopt::ReceiveTimestampns, &true)?;
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(source, 0, 0, device)))
            .with_context(|| format!("cannot ask from {source}"))?;
        let socket = UdpSocket::from_std(fd.into())?;
        // Not the process id: in a container it is the same after a restart, and answers to the daemon before would count.
        let identifier = RandomState::new().build_hasher().finish() as u16;
        Ok(Echo { socket, device, identifier })
    }

    /// Asks a node.
    ///
    /// # Errors
    /// The host could not send it.
    pub fn ask(&self, node: Ipv6Addr, sequence: u16) -> nix::Result<()> {
        let ([a, b], [c, d]) = (self.identifier.to_be_bytes(), sequence.to_be_bytes());
        // The kernel fills in the checksum (RFC 3542, section 3.1).
        let message = [ECHO_REQUEST, 0, 0, 0, a, b, c, d];
        let to = SockaddrIn6::from(SocketAddrV6::new(node, 0, 0, self.device));
        sendto(self.socket.as_raw_fd(), &message, &to, MsgFlags::empty()).map(drop)
    }

    /// Waits until there may be an answer.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn heard(&self) -> io::Result<()> {
        self.socket.readable().await
    }

    /// The next answer that is there.
    ///
    /// # Errors
    /// The socket failed.
    pub fn answer(&self) -> io::Result<Option<Answer>> {
        loop {
            match self.socket.try_io(Interest::READABLE, || self.receive()) {
                Ok(Some(answer)) => return Ok(Some(answer)),
                Ok(None) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
    }

    /// A message; `None`: it is no answer to this daemon.
    fn receive(&self) -> io::Result<Option<Answer>> {
        let mut message = [0; MESSAGE];
        let mut control = nix::cmsg_space!(i32, TimeSpec);
        let mut room = [IoSliceMut::new(&mut message)];
        let heard = recvmsg::<SockaddrIn6>(self.socket.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty())?;
        let (mut near, mut arrived) = (false, None);
        for control in heard.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::Ipv6HopLimit(limit) => near = limit == HOP_LIMIT,
                ControlMessageOwned::ScmTimestampns(time) => arrived = Some(Duration::from(time)),
                _ => {}
            }
        }
        // The kernel's stamp is of the clock that can be set; a step makes it one that has just come.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let waited = arrived.and_then(|arrived| now.checked_sub(arrived)).filter(|waited| *waited < LONGEST_WAIT);
        let (from, length) = (heard.address.map(|a| a.ip()), heard.bytes);
        Ok(match (near, from, &message[..length]) {
            (true, Some(from), [ECHO_REPLY, 0, _, _, a, b, c, d])
                if is_health(from) && u16::from_be_bytes([*a, *b]) == self.identifier =>
            {
                let sequence = u16::from_be_bytes([*c, *d]);
                Some(Answer { from, sequence, waited: waited.unwrap_or_default() })
            }
            _ => None,
        })
    }
}
