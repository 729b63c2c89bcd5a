//! Route netlink for the daemon: one socket, served by a background task.
//!
//! A dump that the kernel marks as interrupted (`NLM_F_DUMP_INTR`) is requested again. It may miss entries, and the
//! caller would then add entries that exist and delete entries that belong there. Strict checking is on, so that the
//! kernel filters dumps instead of ignoring the filter.

use anyhow::{Context, Result, anyhow, bail};
use egret_nft::netlink::{Error as KernelError, attributes, string};
use futures_util::{Stream, StreamExt};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{AsyncSocket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::proto::{ConnectionHandle, new_connection};
use std::os::fd::AsFd;
use std::time::Duration;

/// How often an interrupted dump is read before it fails.
const DUMP_TRIES: usize = 20;
/// Changes per datagram. Each acknowledgement takes about 1 KiB of socket memory, and the kernel drops those that
/// exceed the receive buffer. The next datagram is sent when all acknowledgements have been read.
const BATCH: usize = 128;
/// The receive buffer, bytes: room for acknowledgements and for several concurrent dumps.
const RECEIVE_BUFFER: usize = 1 << 20;
/// The kernel responds at once. This limits the wait for a response that was lost.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// `NLMSGERR_ATTR_MSG`, include/uapi/linux/netlink.h: the text of an extended acknowledgement.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// A change to the kernel's state, with its description.
pub struct Change {
    /// The request.
    pub message: RouteNetlinkMessage,
    /// Flags besides `NLM_F_REQUEST | NLM_F_ACK`.
    pub flags: u16,
    /// Errno values that mean that the change had been made before.
    pub done_already: &'static [i32],
    /// What the change does, for the text of an error: "cannot {about}: ...".
    pub about: String,
}

/// What became of one change.
#[derive(Debug)]
pub enum ChangeResult {
    /// It was made.
    Made,
    /// It had been made before.
    DoneAlready,
    /// The kernel refused it.
    Refused(anyhow::Error),
}

/// The result of several changes that do not depend on each other.
#[derive(Debug)]
pub struct Applied<T> {
    /// How many changes were made.
    pub changes: usize,
    /// The keys of the changes that failed, with the errors.
    pub refused: Vec<(T, anyhow::Error)>,
}

impl<T> Applied<T> {
    /// Returns how many changes were made.
    ///
    /// # Errors
    /// A change failed. The error is the first one, with the number of failed changes.
    pub fn all(mut self) -> Result<usize> {
        match self.refused.len() {
            0 => Ok(self.changes),
            1 => Err(self.refused.swap_remove(0).1),
            n => Err(self.refused.swap_remove(0).1.context(format!("{n} changes failed, the first of them"))),
        }
    }
}

/// A route netlink socket in the network namespace in which it was opened. Clones share the socket.
#[derive(Clone, Debug)]
pub struct RouteSocket {
    handle: ConnectionHandle<RouteNetlinkMessage>,
    port: u32,
}

impl RouteSocket {
    /// Opens a socket in the calling thread's network namespace, and starts the task that serves it. The task ends
    /// when the last clone is dropped.
    ///
    /// # Errors
    /// The socket cannot be opened, or the kernel (before 4.20) does not support strict checking.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self> {
        let (mut connection, handle, unsolicited) =
            new_connection::<RouteNetlinkMessage>(NETLINK_ROUTE).context("cannot open a route netlink socket")?;
        // The socket joins no multicast group, so it receives no notifications.
        drop(unsolicited);
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let raw = connection.socket_mut().socket_mut();
        let port = raw.bind_auto().context("cannot bind a route netlink socket")?.port_number();
        raw.set_ext_ack(true).context("route netlink: NETLINK_EXT_ACK")?;
        raw.set_cap_ack(true).context("route netlink: NETLINK_CAP_ACK")?;
        raw.set_netlink_get_strict_chk(true).context("route netlink: NETLINK_GET_STRICT_CHK")?;
        // With CAP_NET_ADMIN the size may exceed net.core.rmem_max. The default size is enough for a batch, too.
        let _ = setsockopt(&raw.as_fd(), sockopt::RcvBufForce, &RECEIVE_BUFFER);
        tokio::spawn(connection);
        Ok(RouteSocket { handle, port })
    }

    /// The socket's netlink port. Notifications about changes that this socket made carry it.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Requests a dump and collects what `pick` returns for its entries.
    ///
    /// # Errors
    /// The kernel returned an error, or the table changes faster than it can be read.
    pub async fn dump<T>(
        &self,
        request: RouteNetlinkMessage,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut answers = self.send(vec![message(request.clone(), NLM_F_DUMP)])?;
            let mut found = Vec::new();
            let mut interrupted = false;
            loop {
                let (header, payload) = next(&mut answers).await?.into_parts();
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(m) => found.extend(pick(m)),
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(kernel_error(done.code, &done.extended_ack).into());
                    }
                    NetlinkPayload::Done(_) => break,
                    NetlinkPayload::Error(e) if e.code.is_some() => {
                        return Err(kernel_error(e.raw_code(), e.header.get(HEADER..).unwrap_or_default()).into());
                    }
                    NetlinkPayload::Overrun(_) => interrupted = true,
                    _ => {}
                }
            }
            if !interrupted {
                return Ok(found);
            }
        }
        bail!("the kernel's table changes faster than it can be read; try again when it changes less often")
    }

    /// Requests one object.
    ///
    /// # Errors
    /// The kernel returned an error, such as `ENODEV`; [`errno`] extracts it.
    pub async fn get(&self, request: RouteNetlinkMessage) -> Result<RouteNetlinkMessage> {
        // With an acknowledgement the wait ends even if the response itself cannot be parsed.
        let mut answers = self.send(vec![message(request, NLM_F_ACK)])?;
        let mut found = None;
        loop {
            match next(&mut answers).await?.payload {
                NetlinkPayload::InnerMessage(m) => found = Some(m),
                NetlinkPayload::Error(e) if e.code.is_some() => {
                    return Err(kernel_error(e.raw_code(), e.header.get(HEADER..).unwrap_or_default()).into());
                }
                NetlinkPayload::Error(_) => break,
                _ => {}
            }
        }
        found.context("the kernel's response cannot be parsed")
    }

    /// Makes changes in their order and returns how many it made. A failed change does not stop the others.
    ///
    /// # Errors
    /// A change failed. The error is the first one, with the number of failed changes.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<usize> {
        self.apply_keyed(changes.into_iter().map(|change| ((), change)).collect()).await?.all()
    }

    /// Makes changes in their order and returns the keys of those that failed.
    ///
    /// # Errors
    /// The socket failed or received no response.
    pub async fn apply_keyed<T>(&self, changes: Vec<(T, Change)>) -> Result<Applied<T>> {
        let (of, changes): (Vec<T>, Vec<Change>) = changes.into_iter().unzip();
        let mut applied = Applied { changes: 0, refused: Vec::new() };
        for (of, outcome) in of.into_iter().zip(self.apply_each(changes).await?) {
            match outcome {
                ChangeResult::Made => applied.changes += 1,
                ChangeResult::DoneAlready => {}
                ChangeResult::Refused(e) => applied.refused.push((of, e)),
            }
        }
        Ok(applied)
    }

    /// Makes changes in their order and returns the outcome of each.
    ///
    /// # Errors
    /// The socket failed or received no response.
    pub async fn apply_each(&self, changes: Vec<Change>) -> Result<Vec<ChangeResult>> {
        let mut outcomes = Vec::with_capacity(changes.len());
        let mut changes = changes.into_iter().peekable();
        while changes.peek().is_some() {
            let mut expected = Vec::with_capacity(BATCH);
            let batch = changes
                .by_ref()
                .take(BATCH)
                .map(|change| {
                    expected.push((change.about, change.done_already));
                    message(change.message, NLM_F_ACK | change.flags)
                })
                .collect();
            let mut answers = self.send(batch)?;
            // The kernel acknowledges each message of a batch once, in their order.
            for (about, done_already) in expected {
                let NetlinkPayload::Error(answer) = next(&mut answers).await?.payload else {
                    bail!("cannot {about}: the kernel's response cannot be parsed");
                };
                outcomes.push(match -answer.raw_code() {
                    0 => ChangeResult::Made,
                    errno if done_already.contains(&errno) => ChangeResult::DoneAlready,
                    errno => {
                        let refused = kernel_error(-errno, answer.header.get(HEADER..).unwrap_or_default());
                        ChangeResult::Refused(anyhow::Error::from(refused).context(format!("cannot {about}")))
                    }
                });
            }
        }
        Ok(outcomes)
    }

    fn send(
        &self,
        messages: Vec<NetlinkMessage<RouteNetlinkMessage>>,
    ) -> Result<impl Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + use<>> {
        self.handle.request_batch(messages, SocketAddr::new(0, 0)).map_err(|_| closed())
    }
}

/// The positive errno, if the kernel returned `error`.
pub fn errno(error: &anyhow::Error) -> Option<i32> {
    error.downcast_ref::<KernelError>().and_then(KernelError::errno)
}

async fn next<M>(answers: &mut (impl Stream<Item = M> + Unpin)) -> Result<M> {
    match tokio::time::timeout(RESPONSE_TIMEOUT, answers.next()).await {
        Ok(Some(answer)) => Ok(answer),
        Ok(None) => Err(closed()),
        Err(_) => bail!("no response to a route netlink request within {} s", RESPONSE_TIMEOUT.as_secs()),
    }
}

fn closed() -> anyhow::Error {
    anyhow!("the route netlink socket is closed")
}

fn message(inner: RouteNetlinkMessage, flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    NetlinkMessage::new(header, NetlinkPayload::InnerMessage(inner))
}

fn kernel_error(code: i32, extended: &[u8]) -> KernelError {
    let message = attributes(extended).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG).map(|(_, text)| string(text));
    KernelError::Kernel { errno: code.abs(), message: message.unwrap_or_default(), sequence: 0 }
}
