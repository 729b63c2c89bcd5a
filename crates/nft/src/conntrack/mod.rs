//! Entries of connection tracking (ctnetlink): listed by mark or address, deleted, replaced.
//!
//! A connection keeps the allocation with which it began. When the connection may no longer use it, the daemon
//! deletes the entry, and the next packet is classified anew. An in-flight reply entry admits replies that are in
//! flight meanwhile.

mod events;
mod in_flight_reply;
mod liberal;
mod translated;
mod tuple;

pub use events::{ATTRIBUTES, ConnectionEvent, MARK, Traffic, parse_event, subscribe};
pub use liberal::{Prolonged, TcpTimeouts, set_liberal};
pub use translated::{
    Insertion, Tracked, Translated, delete_one, find_by_original, find_by_reply, fold_tracked, insert,
    insert_or_update, list_tracked,
};
pub use tuple::Tuple;

use crate::netlink::{
    Attributes, Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, Socket, append_message,
    attributes,
};
use nix::libc::{AF_INET, AF_INET6, ENOENT};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Message types: subsystem `NFNL_SUBSYS_CTNETLINK` in the upper byte, message in the lower
/// (include/uapi/linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h).
const IPCTNL_MSG_CT_NEW: u16 = 0x100;
const IPCTNL_MSG_CT_GET: u16 = 0x101;
const IPCTNL_MSG_CT_DELETE: u16 = 0x102;
const IPCTNL_MSG_CT_GET_STATS_CPU: u16 = 0x104;
/// Attributes of a connection, include/uapi/linux/netfilter/nfnetlink_conntrack.h, and of its tuples.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_FILTER: u16 = 25;
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
/// A dump's filter compares the source address: `CTA_FILTER_FLAG(CTA_IP_SRC)`, net/netfilter/nf_internals.h. Since
/// Linux 5.8.
const FILTER_IP_SRC: u32 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
/// A counter of one processor, `enum ctattr_stats_cpu`.
const CTA_STATS_INSERT_FAILED: u16 = 9;
/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// Deletions per datagram. Their acknowledgements must fit into the socket's receive buffer.
const BATCH: usize = 64;

/// Why the entries could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackFailure {
    /// The entries cannot be listed.
    #[error("cannot read the tracked connections; is the kernel module nf_conntrack_netlink there?")]
    Read(#[source] Error),
    /// The kernel rejected a deletion or a replacement.
    #[error("cannot delete tracked connections")]
    Delete(#[source] Error),
    /// The kernel rejected a change.
    #[error("cannot change tracked connections")]
    Update(#[source] Error),
    /// The counters cannot be read.
    #[error("cannot read the counters of connection tracking")]
    Counters(#[source] Error),
}

/// Selects the connections whose mark equals `mark` in the bits of `mask`. The kernel filters, which keeps a large
/// table cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MarkFilter {
    /// The mark.
    pub mark: u32,
    /// The bits to compare; 0 selects every connection.
    pub mask: u32,
}

impl MarkFilter {
    /// Whether it selects `connection`.
    pub fn matches(&self, connection: &Connection) -> bool {
        self.has(connection.mark)
    }

    fn has(&self, mark: u32) -> bool {
        mark & self.mask == self.mark & self.mask
    }

    /// The request of a dump that the kernel filters.
    fn request(&self) -> Vec<u8> {
        // AF_UNSPEC selects both families.
        let mut request = vec![0; NFGENMSG];
        if self.mask != 0 {
            request.be32(CTA_MARK, self.mark);
            request.be32(CTA_MARK_MASK, self.mask);
        }
        request
    }
}

/// A tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The client.
    pub source: IpAddr,
    /// The server's address as the client sees it.
    pub destination: IpAddr,
    /// The source of the replies: the destination, or the address that it was translated to.
    pub reply_source: IpAddr,
    /// The destination of the replies: the source, or the address that it was translated to.
    pub reply_destination: IpAddr,
    /// The IP protocol.
    pub protocol: u8,
    /// The source port of the replies, if the protocol has ports.
    pub reply_port: Option<u16>,
    /// The connection mark.
    pub mark: u32,
    /// The kernel's id of the entry (`nf_ct_get_id`); 0 if the kernel gives none.
    pub id: u32,
    /// The original direction, with the ports.
    pub out: Option<Tuple>,
}

/// What to do with a connection's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryAction {
    /// Keep the entry.
    Keep,
    /// Delete the entry.
    Delete,
    /// Delete the entry, and for one second admit replies in flight by an entry with this mark. Only for TCP and UDP,
    /// and only if the destination was not translated.
    DeleteAdmittingReplies(u32),
    /// Replace the entry by this one. With a mark, also admit replies in flight to the old entry.
    Replace(Translated, Option<u32>),
}

/// Lists the connections that `marked` selects.
pub fn list(socket: &mut Socket, marked: MarkFilter) -> Result<Vec<Connection>, ConntrackFailure> {
    select(socket, marked, Some)
}

/// Deletes the selected connections for which `doomed` returns true, and returns how many it deleted. Connections that
/// end by themselves in the meantime do not count.
///
/// This reads and deletes synchronously: about 5 µs for each selected connection.
///
/// # Errors
/// The table cannot be read, or the kernel rejected a deletion; other connections may have been deleted.
pub fn delete(
    socket: &mut Socket,
    marked: MarkFilter,
    doomed: impl Fn(&Connection) -> bool,
) -> Result<usize, ConntrackFailure> {
    update_entries(socket, marked, |c| if doomed(c) { EntryAction::Delete } else { EntryAction::Keep })
}

/// Does to each selected connection's entry what `action` returns. Returns how many entries it deleted or replaced.
///
/// # Errors
/// As [`delete`].
pub fn update_entries(
    socket: &mut Socket,
    marked: MarkFilter,
    action: impl Fn(&Connection) -> EntryAction,
) -> Result<usize, ConntrackFailure> {
    let found = select_raw(socket, marked, |connection, raw| {
        let (admitted, replacement) = match action(&connection) {
            EntryAction::Keep => return None,
            EntryAction::Delete => (None, None),
            EntryAction::DeleteAdmittingReplies(mark) => (Some(mark), None),
            EntryAction::Replace(replacement, admitted) => (admitted, Some(replacement.request())),
        };
        let admitted = admitted.and_then(|mark| in_flight_reply::after(raw, mark));
        Some(Deletion { request: request(raw)?, insertions: admitted.into_iter().chain(replacement).collect() })
    })?;
    delete_all(socket, &found)
}

/// How many packets the kernel has dropped, on all processors, because another connection had the same tuple
/// (`insert_failed` of `conntrack -S`). Each processor counts modulo 2^32.
pub fn insertions_failed(socket: &mut Socket) -> Result<u64, ConntrackFailure> {
    let counted = socket.dump(IPCTNL_MSG_CT_GET_STATS_CPU, &[0; NFGENMSG], u64::default, |sum, message| {
        let all = attributes(message.get(NFGENMSG..).unwrap_or_default());
        let failed = all.filter(|(kind, _)| *kind == CTA_STATS_INSERT_FAILED);
        *sum += failed.filter_map(|(_, n)| Some(u64::from(u32::from_be_bytes(n.try_into().ok()?)))).sum::<u64>();
    });
    counted.map_err(ConntrackFailure::Counters)
}

/// A request that deletes a connection's entry, and the requests that create entries in its place.
struct Deletion {
    request: Vec<u8>,
    insertions: Vec<Vec<u8>>,
}

fn delete_all(socket: &mut Socket, requests: &[Deletion]) -> Result<usize, ConntrackFailure> {
    let mut deleted = 0;
    for batch in requests.chunks(BATCH) {
        deleted += send(socket, batch).map_err(ConntrackFailure::Delete)?;
    }
    Ok(deleted)
}

/// Deletes the connections whose source or reply source is one of the addresses, with any mark, for which `doomed`
/// returns true. Returns how many.
///
/// # Errors
/// As [`delete`].
pub fn delete_by_address(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    doomed: impl Fn(&Connection) -> bool,
) -> Result<usize, ConntrackFailure> {
    let is_doomed =
        |c: &Connection| (addresses.contains(&c.source) || addresses.contains(&c.reply_source)) && doomed(c);
    let ends = [(CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS), (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS)];
    delete_matching(socket, addresses, &ends, is_doomed)
}

/// Deletes the connections whose source is one of the addresses, with any mark, for which `doomed` returns true.
/// Returns how many.
///
/// # Errors
/// As [`delete`].
pub fn delete_by_source(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    mut doomed: impl FnMut(&Connection) -> bool,
) -> Result<usize, ConntrackFailure> {
    let is_doomed = |c: &Connection| addresses.contains(&c.source) && doomed(c);
    delete_matching(socket, addresses, &[(CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS)], is_doomed)
}

/// As [`delete_by_address`], for connections with one of the addresses as the source of one of these tuples.
fn delete_matching(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    ends: &[(u16, u16)],
    mut is_doomed: impl FnMut(&Connection) -> bool,
) -> Result<usize, ConntrackFailure> {
    if addresses.is_empty() {
        return Ok(0);
    }
    let mut doomed = |c: Connection, raw: &[u8]| {
        Some(Deletion { request: is_doomed(&c).then(|| request(raw))??, insertions: Vec::new() })
    };
    if is_worth_reading(ends.len() * addresses.len()) {
        let found = select_raw(socket, MarkFilter { mark: 0, mask: 0 }, doomed)?;
        return delete_all(socket, &found);
    }
    let mut deleted = 0;
    for (address, (tuple, flags)) in addresses.iter().flat_map(|address| ends.iter().map(move |end| (address, *end))) {
        let mut filter = vec![0; NFGENMSG];
        filter[0] = if address.is_ipv4() { AF_INET as u8 } else { AF_INET6 as u8 };
        filter.nested(tuple, |t| {
            t.nested(CTA_TUPLE_IP, |ip| match address {
                IpAddr::V4(a) => ip.attribute(CTA_IP_V4_SRC, &a.octets()),
                IpAddr::V6(a) => ip.attribute(CTA_IP_V6_SRC, &a.octets()),
            });
        });
        filter.nested(CTA_FILTER, |f| f.attribute(flags, &FILTER_IP_SRC.to_ne_bytes()));
        let found = select_filtered(socket, &filter, &mut doomed)?;
        deleted += delete_all(socket, &found)?;
    }
    Ok(deleted)
}

/// Whether reading the table once costs less than `searches` filtered dumps. Each filtered dump walks all buckets,
/// empty or not. Reading costs one walk, and as much as `BUCKETS` more buckets for each connection.
fn is_worth_reading(searches: usize) -> bool {
    const BUCKETS: usize = 150;
    let number = |what: &str| -> Option<usize> {
        fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{what}")).ok()?.trim().parse().ok()
    };
    let (Some(connections), Some(buckets)) = (number("count"), number("buckets")) else { return false };
    connections.saturating_mul(BUCKETS) < (searches - 1).saturating_mul(buckets)
}

fn select<T>(
    socket: &mut Socket,
    marked: MarkFilter,
    mut pick: impl FnMut(Connection) -> Option<T>,
) -> Result<Vec<T>, ConntrackFailure> {
    select_raw(socket, marked, |connection, _| pick(connection))
}

fn select_raw<T>(
    socket: &mut Socket,
    marked: MarkFilter,
    mut pick: impl FnMut(Connection, &[u8]) -> Option<T>,
) -> Result<Vec<T>, ConntrackFailure> {
    select_filtered(socket, &marked.request(), |connection, message| {
        marked.matches(&connection).then(|| pick(connection, message)).flatten()
    })
}

fn select_filtered<T>(
    socket: &mut Socket,
    filter: &[u8],
    mut pick: impl FnMut(Connection, &[u8]) -> Option<T>,
) -> Result<Vec<T>, ConntrackFailure> {
    let entries = socket.dump(IPCTNL_MSG_CT_GET, filter, Vec::new, |found, message| {
        found.extend(parse(message).and_then(|connection| pick(connection, message)));
    });
    entries.map_err(ConntrackFailure::Read)
}

fn parse(message: &[u8]) -> Option<Connection> {
    let (mut original, mut reply, mut mark, mut id) = (None, None, 0, 0);
    let (mut protocol, mut reply_port, mut out) = (0, None, None);
    for (kind, value) in attributes(message.get(NFGENMSG..)?) {
        match kind {
            CTA_TUPLE_ORIG => (original, out) = (tuple(value), Tuple::parse(value)),
            CTA_TUPLE_REPLY => {
                reply = tuple(value);
                (protocol, reply_port) = protocol_and_source_port(value);
            }
            CTA_MARK => mark = u32::from_be_bytes(value.try_into().ok()?),
            CTA_ID => id = u32::from_be_bytes(value.try_into().ok()?),
            _ => {}
        }
    }
    let ((source, destination), (reply_source, reply_destination)) = (original?, reply?);
    Some(Connection { source, destination, reply_source, reply_destination, protocol, reply_port, mark, id, out })
}

fn protocol_and_source_port(tuple: &[u8]) -> (u8, Option<u16>) {
    let (mut protocol, mut port) = (0, None);
    let all = attributes(tuple).filter(|(kind, _)| *kind == CTA_TUPLE_PROTO).flat_map(|(_, value)| attributes(value));
    for (kind, value) in all {
        match kind {
            CTA_PROTO_NUM => protocol = value.first().copied().unwrap_or_default(),
            CTA_PROTO_SRC_PORT => port = value.try_into().ok().map(u16::from_be_bytes),
            _ => {}
        }
    }
    (protocol, port)
}

/// The source and the destination of a tuple.
fn tuple(value: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let (_, addresses) = attributes(value).find(|(kind, _)| *kind == CTA_TUPLE_IP)?;
    let (mut source, mut destination) = (None, None);
    for (kind, bytes) in attributes(addresses) {
        match kind {
            CTA_IP_V4_SRC => source = v4(bytes),
            CTA_IP_V4_DST => destination = v4(bytes),
            CTA_IP_V6_SRC => source = v6(bytes),
            CTA_IP_V6_DST => destination = v6(bytes),
            _ => {}
        }
    }
    Some((source?, destination?))
}

fn v4(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).ok().map(|b| Ipv4Addr::from(b).into())
}

fn v6(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 16]>::try_from(bytes).ok().map(|b| Ipv6Addr::from(b).into())
}

/// A request that identifies one connection by its tuple, zone and id. The id keeps a newer connection with the same
/// tuple from being deleted instead.
fn request(message: &[u8]) -> Option<Vec<u8>> {
    let (header, rest) = message.split_at_checked(NFGENMSG)?;
    let mut request = header.to_vec();
    for (kind, value) in attributes(rest) {
        match kind {
            CTA_TUPLE_ORIG => request.nested(kind, |inner| inner.extend_from_slice(value)),
            CTA_ZONE | CTA_ID => request.attribute(kind, value),
            _ => {}
        }
    }
    Some(request)
}

/// Sends deletions in one datagram, each followed by the entries that take its place. Returns how many connections
/// existed.
fn send(socket: &mut Socket, requests: &[Deletion]) -> Result<usize, Error> {
    let mut datagram = Vec::new();
    let (mut deletions, mut insertions) = (BTreeSet::new(), BTreeSet::new());
    for deletion in requests {
        let mut append = |kind, flags, pending: &mut BTreeSet<u32>, request: &[u8]| {
            let sequence = socket.next_sequence();
            pending.insert(sequence);
            let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            append_message(&mut datagram, kind, flags, sequence, |m| m.extend_from_slice(request));
        };
        append(IPCTNL_MSG_CT_DELETE, 0, &mut deletions, &deletion.request);
        // Directly after the deletion, because the new entry has the same tuple.
        for insertion in &deletion.insertions {
            append(IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, &mut insertions, insertion);
        }
    }
    socket.send(&datagram)?;
    let (mut deleted, mut refused) = (0, None);
    while !(deletions.is_empty() && insertions.is_empty()) {
        socket.receive(|m| {
            if m.kind != NLMSG_ERROR {
                return;
            }
            // If a new entry is rejected, at most some packets are lost and the connection lives on.
            if !deletions.remove(&m.sequence) {
                insertions.remove(&m.sequence);
                return;
            }
            match m.acknowledgement() {
                Ok(()) => deleted += 1,
                Err(e) if e.errno() == Some(ENOENT) => {}
                Err(e) => refused = Some(e),
            }
        })?;
    }
    refused.map_or(Ok(deleted), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// A connection as the kernel encodes it, with further attributes.
    fn entry(of: [[u8; 4]; 4], mark: u32, more: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut message = vec![AF_INET as u8, 0, 0, 0];
        for (tuple, [source, destination]) in [(CTA_TUPLE_ORIG, [of[0], of[1]]), (CTA_TUPLE_REPLY, [of[2], of[3]])] {
            message.nested(tuple, |t| {
                t.nested(CTA_TUPLE_IP, |ip| {
                    ip.attribute(CTA_IP_V4_SRC, &source);
                    ip.attribute(CTA_IP_V4_DST, &destination);
                });
            });
        }
        message.be32(CTA_MARK, mark);
        more.iter().for_each(|(kind, value)| message.attribute(*kind, value));
        message
    }

    proptest! {
        #[test]
        fn a_connection_is_parsed_and_a_truncated_one_is_no_other(
            of in any::<[[u8; 4]; 4]>(), mark in any::<u32>(), more in vec((200u16..300, vec(any::<u8>(), 0..9)), 0..4),
            cut in any::<prop::sample::Index>(), broken in any::<(prop::sample::Index, u8)>(),
        ) {
            let whole = entry(of, mark, &more);
            let [source, destination, reply_source, reply_destination] = of.map(IpAddr::from);
            let (protocol, reply_port, id) = (0, None, 0);
            let read = parse(&whole);
            let out = read.as_ref().and_then(|read| read.out);
            let expected = Connection {
                source, destination, reply_source, reply_destination, protocol, reply_port, mark, id, out,
            };
            prop_assert_eq!(read, Some(expected));
            if let Some(read) = parse(&whole[..cut.index(whole.len())]) {
                prop_assert_eq!((read.source, read.reply_destination), (source, reply_destination));
            }
            let (at, byte) = broken;
            let mut corrupted = whole;
            let at = at.index(corrupted.len());
            corrupted[at] = byte;
            drop((parse(&corrupted), request(&corrupted), in_flight_reply::after(&corrupted, mark)));
        }

        #[test]
        fn arbitrary_bytes_cause_no_panic(bytes in vec(any::<u8>(), 0..120)) {
            drop((parse(&bytes), request(&bytes), in_flight_reply::after(&bytes, 1)));
        }
    }
}
