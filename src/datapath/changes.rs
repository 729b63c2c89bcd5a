//! Netlink notifications about anything that can change what becomes of a packet: the fast path ends all leases then. In
//! contrast to [`watch`](super::watch), which tells the daemon what to read again, this knows no interest: a change of
//! anybody's counts.

use super::watch::{DATAGRAM, listen, poll_receive};
use egret_nft::netlink::{NETLINK_NETFILTER, NETLINK_ROUTE, messages};
use netlink_sys::TokioSocket;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};

/// Multicast groups, include/uapi/linux/rtnetlink.h: links, queueing disciplines and filters, IPv4 routes and rules, IPv6
/// routes and rules, settings of interfaces of both families.
const ROUTE_GROUPS: [u32; 8] = [1, 4, 7, 8, 11, 19, 24, 25];
/// `NFNLGRP_NFTABLES`, include/uapi/linux/netfilter/nfnetlink.h.
const NFNLGRP_NFTABLES: u32 = 7;
/// Message types of links, queueing disciplines and filters, include/uapi/linux/rtnetlink.h.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const TRAFFIC_CONTROL: std::ops::RangeInclusive<u16> = 36..=46;

/// What has changed, besides anything else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Rules of nf_tables.
    pub rules: bool,
    /// Interfaces, or their queueing disciplines and filters.
    pub interfaces: bool,
}

/// Receives the notifications, in the network namespace in which it was opened.
pub struct Changes {
    route: TokioSocket,
    netfilter: TokioSocket,
    buffer: Box<[u8]>,
}

impl Changes {
    /// Starts to receive.
    ///
    /// # Errors
    /// A socket cannot be opened.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> io::Result<Self> {
        Ok(Changes {
            route: listen(NETLINK_ROUTE, &ROUTE_GROUPS)?,
            netfilter: listen(NETLINK_NETFILTER, &[NFNLGRP_NFTABLES])?,
            buffer: vec![0; DATAGRAM].into(),
        })
    }

    /// Waits for changes. It is cancel-safe.
    ///
    /// # Errors
    /// A socket failed.
    pub async fn next(&mut self) -> io::Result<Changed> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Changed>> {
        let (mut changed, mut any) = (Changed::default(), false);
        while let Poll::Ready(read) = poll_receive(&self.netfilter, &mut self.buffer, cx) {
            read?;
            (changed.rules, any) = (true, true);
        }
        while let Poll::Ready(read) = poll_receive(&self.route, &mut self.buffer, cx) {
            any = true;
            let mut interfaces = false;
            let whole = read?.is_some_and(|length| {
                let parsed = messages(&self.buffer[..length.min(self.buffer.len())], |m| {
                    interfaces |= matches!(m.kind, RTM_NEWLINK | RTM_DELLINK) || TRAFFIC_CONTROL.contains(&m.kind);
                });
                parsed.is_ok()
            });
            // What was lost may have been anything.
            changed.interfaces |= interfaces || !whole;
        }
        if any { Poll::Ready(Ok(changed)) } else { Poll::Pending }
    }
}
