//! A synchronous netlink socket, and an encoder and a parser of messages and [attributes](Attributes).
//!
//! It serves what no maintained crate covers: nf_tables and ctnetlink. In August 2026, netlink-packet-netfilter 0.4 has
//! types for six of the sixteen expressions that this crate's rules need: bitwise, cmp, immediate, lookup, meta and
//! payload; not byteorder, ct, dup, exthdr, fib, log, nat, notrack, objref and rt. It has none for named counters.
//!
//! A dump that the kernel marks as interrupted (`NLM_F_DUMP_INTR`) is read again, because it may miss entries.

mod attributes;

pub use attributes::{Attributes, attributes, string};

use netlink_sys::{Socket as RawSocket, SocketAddr};
use nix::libc::MSG_TRUNC;
use std::io;

/// Netlink protocol numbers, include/uapi/linux/netlink.h.
pub const NETLINK_ROUTE: isize = 0;
/// See [`NETLINK_ROUTE`].
pub const NETLINK_NETFILTER: isize = 12;

/// Message flags, include/uapi/linux/netlink.h.
pub const NLM_F_REQUEST: u16 = 0x1;
/// See [`NLM_F_REQUEST`].
pub const NLM_F_ACK: u16 = 0x4;
/// See [`NLM_F_REQUEST`].
pub const NLM_F_DUMP: u16 = 0x300;
/// See [`NLM_F_REQUEST`].
pub const NLM_F_EXCL: u16 = 0x200;
/// See [`NLM_F_REQUEST`].
pub const NLM_F_CREATE: u16 = 0x400;
/// See [`NLM_F_REQUEST`].
pub const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The response to a request with [`NLM_F_ACK`]: an errno, 0 for success.
pub const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_OVERRUN: u16 = 4;
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// The receive buffer, bytes. The kernel sizes a dump's datagrams by the largest buffer that was received into
/// before, up to 32 KiB (`netlink_dump`, net/netlink/af_netlink.c). An entry that fits into no datagram, such as a
/// long rule, ends the dump.
const BUFFER: usize = 64 << 10;
/// How often an interrupted dump is read before it fails.
const DUMP_TRIES: usize = 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket itself failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The kernel answered with an error.
    #[error("{}{}", io::Error::from_raw_os_error(*errno), if message.is_empty() { String::new() } else { format!(" ({message})") })]
    Kernel {
        /// The positive errno.
        errno: i32,
        /// The kernel's message (extended acknowledgement), empty if there is none.
        message: String,
        /// The sequence number of the request that failed.
        sequence: u32,
    },
    /// The datagram is no netlink message.
    #[error("netlink: malformed message")]
    Malformed,
}

impl Error {
    /// The positive errno, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Kernel { errno, .. } => Some(*errno),
            Error::Socket(e) => e.raw_os_error(),
            Error::Malformed => None,
        }
    }
}

/// A netlink socket in the network namespace in which it was opened.
pub struct Socket {
    raw: RawSocket,
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// Opens a socket of `protocol` in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel lacks the protocol, or the process may open no more sockets.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut raw = RawSocket::new(protocol)?;
        let port = raw.bind_auto()?.port_number();
        raw.connect(&SocketAddr::new(0, 0))?;
        raw.set_ext_ack(true)?;
        // Old kernels do not support it for every protocol. Without it, the kernel does not filter dumps.
        let _ = raw.set_netlink_get_strict_chk(true);
        Ok(Socket { raw, port, sequence: 0, buffer: Vec::with_capacity(BUFFER) })
    }

    /// Makes the send buffer and the receive buffer large enough for a batch of `bytes` and its acknowledgements.
    ///
    /// # Errors
    /// The kernel rejects the size.
    pub fn set_buffers(&mut self, bytes: usize) -> io::Result<()> {
        self.raw.set_rx_buf_sz(bytes)?;
        set_send_buffer(&self.raw, bytes)
    }

    /// Makes [`receive`](Self::receive) return an error (`EAGAIN`) instead of waiting.
    ///
    /// # Errors
    /// The socket cannot be set to non-blocking.
    pub fn set_non_blocking(&self) -> io::Result<()> {
        self.raw.set_non_blocking(true)
    }

    /// Joins a multicast group: the kernel sends its notifications to this socket.
    ///
    /// # Errors
    /// The kernel has no such group.
    pub fn join(&mut self, group: u32) -> io::Result<()> {
        self.raw.add_membership(group)
    }

    /// The socket's netlink port. Notifications about changes that this socket made carry it.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Returns the next sequence number; it is never 0.
    pub fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Sends one message, or several in sequence, as one datagram.
    ///
    /// # Errors
    /// The socket failed, or it sent only a part.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.raw.send(bytes, 0)?;
        if sent != bytes.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink message sent in part"));
        }
        Ok(())
    }

    /// Receives one datagram and calls `each` with every message in it.
    ///
    /// # Errors
    /// The socket failed, or the datagram is no netlink message.
    #[expect(clippy::disallowed_methods, reason = "this is the one caller of the raw function")]
    pub fn receive(&mut self, mut each: impl FnMut(Message<'_>)) -> Result<(), Error> {
        self.buffer.clear();
        let length = loop {
            match self.raw.recv(&mut self.buffer, MSG_TRUNC) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => break other?,
            }
        };
        if length > self.buffer.len() {
            return Err(Error::Malformed);
        }
        messages(&self.buffer, &mut each)
    }

    /// Sends one request and waits for the kernel's acknowledgement.
    pub fn request(&mut self, kind: u16, flags: u16, payload: &[u8]) -> Result<(), Error> {
        let sequence = self.next_sequence();
        self.send(&message(kind, NLM_F_REQUEST | NLM_F_ACK | flags, sequence, payload))?;
        loop {
            let mut answer = None;
            self.receive(|m| {
                if m.sequence == sequence && m.kind == NLMSG_ERROR {
                    answer = Some(m.acknowledgement());
                }
            })?;
            if let Some(result) = answer {
                return result;
            }
        }
    }

    /// Sends one request and returns the payload of its only response.
    pub fn get(&mut self, kind: u16, payload: &[u8]) -> Result<Vec<u8>, Error> {
        let sequence = self.next_sequence();
        self.send(&message(kind, NLM_F_REQUEST, sequence, payload))?;
        loop {
            let mut answer = None;
            self.receive(|m| {
                if m.sequence == sequence {
                    answer = Some(match m.kind {
                        NLMSG_ERROR => m.acknowledgement().map(|()| Vec::new()),
                        _ => Ok(m.payload.to_vec()),
                    });
                }
            })?;
            if let Some(result) = answer {
                return result;
            }
        }
    }

    /// Requests a dump and calls `each` with every entry's payload and the state that `start` returned. An interrupted
    /// dump is requested again, with a new state from `start`.
    ///
    /// # Errors
    /// The kernel returned an error, or the dump was interrupted 20 times.
    pub fn dump<S>(
        &mut self,
        kind: u16,
        payload: &[u8],
        mut start: impl FnMut() -> S,
        mut each: impl FnMut(&mut S, &[u8]),
    ) -> Result<S, Error> {
        for _ in 0..DUMP_TRIES {
            let mut state = start();
            let sequence = self.next_sequence();
            self.send(&message(kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, payload))?;
            let (mut done, mut interrupted) = (None, false);
            while done.is_none() {
                self.receive(|m| {
                    if m.sequence != sequence {
                        return;
                    }
                    interrupted |= m.flags & NLM_F_DUMP_INTR != 0;
                    match m.kind {
                        NLMSG_DONE | NLMSG_ERROR => done = Some(m.acknowledgement()),
                        NLMSG_OVERRUN => interrupted = true,
                        _ => each(&mut state, m.payload),
                    }
                })?;
            }
            match done {
                Some(Err(Error::Kernel { errno, .. })) if errno == nix::libc::EINTR => continue,
                Some(Err(e)) => return Err(e),
                _ if interrupted => continue,
                _ => return Ok(state),
            }
        }
        Err(Error::Socket(io::Error::new(
            io::ErrorKind::Interrupted,
            "the kernel's table changes faster than it can be read; try again when it changes less often",
        )))
    }
}

impl std::os::fd::AsFd for Socket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

impl std::os::fd::AsRawFd for Socket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.raw.as_raw_fd()
    }
}

fn set_send_buffer(raw: &RawSocket, bytes: usize) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    use std::os::fd::AsFd;
    let fd = raw.as_fd();
    // With CAP_NET_ADMIN the size may exceed net.core.wmem_max.
    setsockopt(&fd, sockopt::SndBufForce, &bytes)
        .or_else(|_| setsockopt(&fd, sockopt::SndBuf, &bytes))
        .map_err(io::Error::from)?;
    setsockopt(&fd, sockopt::RcvBufForce, &bytes).or(Ok::<(), nix::Error>(())).map_err(io::Error::from)
}

/// Calls `each` with every message of a datagram.
///
/// # Errors
/// The datagram is no netlink message.
pub fn messages(datagram: &[u8], mut each: impl FnMut(Message<'_>)) -> Result<(), Error> {
    let mut rest = datagram;
    while rest.len() >= HEADER {
        let len = u32_at(rest, 0) as usize;
        if len < HEADER || len > rest.len() {
            return Err(Error::Malformed);
        }
        each(Message {
            kind: u16_at(rest, 4),
            flags: u16_at(rest, 6),
            sequence: u32_at(rest, 8),
            port: u32_at(rest, 12),
            payload: &rest[HEADER..len],
        });
        rest = &rest[align(len).min(rest.len())..];
    }
    Ok(())
}

/// One received message.
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub sequence: u32,
    /// `nlmsg_pid`: in a notification, the port of the socket that made the change.
    pub port: u32,
    /// The bytes behind the header.
    pub payload: &'a [u8],
}

impl Message<'_> {
    /// Reads the payload as `struct nlmsgerr`.
    ///
    /// # Errors
    /// The payload carries an errno.
    pub fn acknowledgement(&self) -> Result<(), Error> {
        if self.payload.len() < 4 {
            return Ok(());
        }
        let errno = i32::from_ne_bytes([self.payload[0], self.payload[1], self.payload[2], self.payload[3]]);
        if errno == 0 {
            return Ok(());
        }
        let mut message = String::new();
        if self.kind == NLMSG_ERROR && self.flags & NLM_F_ACK_TLVS != 0 && self.payload.len() >= 4 + HEADER {
            // The attributes follow the failed request: its header alone if the response is capped, else all of it.
            let request = if self.flags & NLM_F_CAPPED != 0 { HEADER } else { u32_at(self.payload, 4) as usize };
            let at = (4 + align(request)).min(self.payload.len());
            for (kind, value) in attributes(&self.payload[at..]) {
                if kind == NLMSGERR_ATTR_MSG {
                    message = string(value);
                }
            }
        }
        Err(Error::Kernel { errno: -errno, message, sequence: self.sequence })
    }
}

/// Encodes a message with its header. Netlink headers are in the host's byte order.
pub fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + align(payload.len()));
    append_message(&mut out, kind, flags, sequence, |m| m.extend_from_slice(payload));
    out
}

/// Appends a message whose payload `fill` writes, and pads it so that another message can follow.
pub fn append_message(out: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&sequence.to_ne_bytes());
    out.extend_from_slice(&[0; 4]);
    fill(out);
    let len = (out.len() - start) as u32;
    out[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    pad(out);
}

/// Sets a flag in the first message header of `message`.
pub fn set_flag(message: &mut [u8], flag: u16) {
    let flags = u16_at(message, 6) | flag;
    message[6..8].copy_from_slice(&flags.to_ne_bytes());
}

fn align(len: usize) -> usize {
    (len + 3) & !3
}

fn pad(out: &mut Vec<u8>) {
    out.resize(align(out.len()), 0);
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_within_their_bounds(bytes in vec(any::<u8>(), 0..200), len in 0u32..220) {
            let mut datagram = len.to_ne_bytes().to_vec();
            datagram.extend(&bytes);
            for datagram in [&bytes, &datagram] {
                let mut sizes = 0;
                let read = messages(datagram, |message| {
                    sizes += HEADER + message.payload.len();
                    drop(message.acknowledgement());
                });
                prop_assert!(sizes <= datagram.len());
                prop_assert!(read.is_ok() || datagram.len() >= HEADER);
            }
            let sizes: usize = attributes(&bytes).map(|(_, value)| 4 + value.len()).sum();
            prop_assert!(sizes <= bytes.len());
        }

        #[test]
        fn a_truncated_error_keeps_its_errno(
            errno in 1i32..200, text in "[a-z ]{0,20}", cut in any::<prop::sample::Index>(),
        ) {
            let mut payload = (-errno).to_ne_bytes().to_vec();
            payload.extend(message(1, 0, 7, b"abcdef"));
            payload.text(NLMSGERR_ATTR_MSG, &text);
            let payload = &payload[..4 + cut.index(payload.len() - 3)];
            for flags in [0, NLM_F_ACK_TLVS, NLM_F_ACK_TLVS | NLM_F_CAPPED] {
                let answer = Message { kind: NLMSG_ERROR, flags, sequence: 7, port: 0, payload };
                prop_assert_eq!(answer.acknowledgement().unwrap_err().errno(), Some(errno));
            }
        }

        #[test]
        fn encoded_messages_and_attributes_are_parsed_back(written in vec((0u16..0x4000, vec(any::<u8>(), 0..9)), 0..9)) {
            let mut inner = Vec::new();
            for (kind, value) in &written {
                inner.attribute(*kind, value);
            }
            let mut outer = Vec::new();
            outer.nested(5, |nest| nest.extend(&inner));
            outer.text(6, "end");
            let mut datagram = message(9, 1, 2, &outer);
            append_message(&mut datagram, 10, 3, 4, |m| m.extend(&inner));
            let mut read = Vec::new();
            messages(&datagram, |m| read.push((m.kind, m.flags, m.sequence, m.payload.to_vec()))).unwrap();
            prop_assert_eq!(&read[0], &(9, 1, 2, outer));
            prop_assert_eq!(&read[1], &(10, 3, 4, inner));
            let mut nests = attributes(&read[0].3);
            let (kind, nest) = nests.next().unwrap();
            prop_assert_eq!(kind, 5);
            let of_nest: Vec<(u16, Vec<u8>)> = attributes(nest).map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(of_nest, written);
            prop_assert_eq!(nests.next().map(|(kind, text)| (kind, string(text))), Some((6, "end".to_owned())));
        }
    }
}
