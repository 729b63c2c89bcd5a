//! Connections that the kernel tracks: found by their mark, and forgotten.
//!
//! A connection keeps the path that it began with. When that path ends for it, its entry has to go; its next packet
//! is then judged anew. What is on its way meanwhile can be let in by a [`in_flight_reply`] entry.

mod in_flight_reply;
mod translated;
mod tuple;

pub use translated::{Made, Tracked, Translated, create, find_by_answers, find_by_request, forget, list_tracked, make};
pub use tuple::Tuple;

use crate::kernel::netlink::{
    Attributes, Error, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, Socket, append_message,
    attributes,
};
use anyhow::{Context, Result};
use nix::libc::{AF_INET, AF_INET6, ENOENT};
use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Message types: subsystem `NFNL_SUBSYS_CTNETLINK` above, message below
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
/// What of a tuple a dump is filtered by: `CTA_FILTER_FLAG(CTA_IP_SRC)`, net/netfilter/nf_internals.h. Since Linux 5.8.
const FILTER_IP_SRC: u32 = 1;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
/// Of one processor's counts, `enum ctattr_stats_cpu`.
const CTA_STATS_INSERT_FAILED: u16 = 9;
/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;
/// How many deletions go out in one datagram; the acknowledgements must fit into the socket's buffer.
const BATCH: usize = 64;

/// The connections whose mark, in the bits of `mask`, is `mark`. The kernel looks, so that a big table is cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The mark.
    pub mark: u32,
    /// The bits of it that count; 0: every connection.
    pub mask: u32,
}

impl Marked {
    /// Whether this is one of them.
    pub fn has(&self, connection: &Connection) -> bool {
        connection.mark & self.mask == self.mark & self.mask
    }
}

/// A connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Who began it.
    pub source: IpAddr,
    /// With whom, as the beginner sees it.
    pub destination: IpAddr,
    /// Who answers: the destination, or what it was translated to.
    pub reply_source: IpAddr,
    /// To whom the answers go: the source, or what it was translated to.
    pub reply_destination: IpAddr,
    /// Its IP protocol.
    pub protocol: u8,
    /// From which port is answered, if the protocol has ports.
    pub reply_port: Option<u16>,
    /// Its mark.
    pub mark: u32,
    /// What the kernel calls it for as long as it lasts (`nf_ct_get_id`); 0 if it does not say.
    pub id: u32,
    /// As its beginner sends it, with the ports.
    pub out: Option<Tuple>,
}

/// What becomes of a connection's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It stays.
    Stays,
    /// It is forgotten.
    Forgotten,
    /// It is forgotten, and for a second an entry with this mark lets in what the other end has sent before it could
    /// know. There is none for other protocols than TCP and UDP, nor if the destination was translated.
    Followed(u32),
    /// It is forgotten, and this one takes its place; with a mark, what the other end has sent before is let in as well.
    Replaced(Translated, Option<u32>),
}

/// All connections with that mark.
///
/// # Errors
/// The kernel's refusal.
pub fn list(socket: &mut Socket, marked: Marked) -> Result<Vec<Connection>> {
    select(socket, marked, Some)
}

/// Forgets the connections with that mark that `doomed` picks, and returns how many. Those that end by themselves in
/// the meantime do not count.
///
/// This reads and deletes synchronously: about 5 µs for each connection with the mark.
///
/// # Errors
/// The kernel's refusal; some may have been forgotten by then.
pub fn delete(socket: &mut Socket, marked: Marked, doomed: impl Fn(&Connection) -> bool) -> Result<usize> {
    settle(socket, marked, |c| if doomed(c) { Fate::Forgotten } else { Fate::Stays })
}

/// As [`delete`], for connections of which some have to be [`Followed`](Fate::Followed).
///
/// # Errors
/// The kernel's refusal; some may have been forgotten by then.
pub fn settle(socket: &mut Socket, marked: Marked, fate: impl Fn(&Connection) -> Fate) -> Result<usize> {
    let found = select_raw(socket, marked, |connection, raw| {
        let (late, heir) = match fate(&connection) {
            Fate::Stays => return None,
            Fate::Forgotten => (None, None),
            Fate::Followed(mark) => (Some(mark), None),
            Fate::Replaced(heir, late) => (late, Some(heir.request())),
        };
        let late = late.and_then(|mark| in_flight_reply::after(raw, mark));
        Some(Deletion { request: request(raw)?, followers: late.into_iter().chain(heir).collect() })
    })?;
    delete_all(socket, &found)
}

/// How many packets the kernel has dropped, on all processors, because another connection had the place in the table that
/// theirs would have taken (`insert_failed` of `conntrack -S`). They are counted modulo 2^32 by each processor.
///
/// # Errors
/// The kernel's refusal.
pub fn insertions_failed(socket: &mut Socket) -> Result<u64> {
    let counted = socket.dump(IPCTNL_MSG_CT_GET_STATS_CPU, &[0; NFGENMSG], u64::default, |sum, message| {
        let all = attributes(message.get(NFGENMSG..).unwrap_or_default());
        let failed = all.filter(|(kind, _)| *kind == CTA_STATS_INSERT_FAILED);
        *sum += failed.filter_map(|(_, n)| Some(u64::from(u32::from_be_bytes(n.try_into().ok()?)))).sum::<u64>();
    });
    counted.context("cannot read what connection tracking has counted")
}

/// A connection that is forgotten, and the entries that take its place.
struct Deletion {
    request: Vec<u8>,
    followers: Vec<Vec<u8>>,
}

fn delete_all(socket: &mut Socket, requests: &[Deletion]) -> Result<usize> {
    let mut deleted = 0;
    for batch in requests.chunks(BATCH) {
        deleted += send(socket, batch).context("cannot delete tracked connections")?;
    }
    Ok(deleted)
}

/// Forgets connections that one of the addresses has begun or answers, whatever their mark, which `doomed` picks, and
/// returns how many.
///
/// # Errors
/// The kernel's refusal; some may have been forgotten by then.
pub fn delete_of(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    doomed: impl Fn(&Connection) -> bool,
) -> Result<usize> {
    let is_doomed =
        |c: &Connection| (addresses.contains(&c.source) || addresses.contains(&c.reply_source)) && doomed(c);
    let ends = [(CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS), (CTA_TUPLE_REPLY, CTA_FILTER_REPLY_FLAGS)];
    delete_by(socket, addresses, &ends, is_doomed)
}

/// Forgets connections that one of the addresses has begun, whatever their mark, which `doomed` picks, and returns how
/// many.
///
/// # Errors
/// The kernel's refusal; some may have been forgotten by then.
pub fn delete_begun_by(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    mut doomed: impl FnMut(&Connection) -> bool,
) -> Result<usize> {
    let is_doomed = |c: &Connection| addresses.contains(&c.source) && doomed(c);
    delete_by(socket, addresses, &[(CTA_TUPLE_ORIG, CTA_FILTER_ORIG_FLAGS)], is_doomed)
}

/// As [`delete_of`], of connections with the addresses in these tuples.
fn delete_by(
    socket: &mut Socket,
    addresses: &BTreeSet<IpAddr>,
    ends: &[(u16, u16)],
    mut is_doomed: impl FnMut(&Connection) -> bool,
) -> Result<usize> {
    if addresses.is_empty() {
        return Ok(0);
    }
    let mut doomed = |c: Connection, raw: &[u8]| {
        Some(Deletion { request: is_doomed(&c).then(|| request(raw))??, followers: Vec::new() })
    };
    if is_worth_reading(ends.len() * addresses.len()) {
        let found = select_raw(socket, Marked { mark: 0, mask: 0 }, doomed)?;
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

/// Whether it costs less to read the table once than to have the kernel search it so many times. Each search goes through
/// the whole of it, empty or not; reading takes as long as that, and as going through `BUCKETS` more for each connection.
fn is_worth_reading(searches: usize) -> bool {
    const BUCKETS: usize = 150;
    let number = |what: &str| -> Option<usize> {
        fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{what}")).ok()?.trim().parse().ok()
    };
    let (Some(connections), Some(buckets)) = (number("count"), number("buckets")) else { return false };
    connections.saturating_mul(BUCKETS) < (searches - 1).saturating_mul(buckets)
}

fn select<T>(socket: &mut Socket, marked: Marked, mut pick: impl FnMut(Connection) -> Option<T>) -> Result<Vec<T>> {
    select_raw(socket, marked, |connection, _| pick(connection))
}

fn select_raw<T>(
    socket: &mut Socket,
    marked: Marked,
    mut pick: impl FnMut(Connection, &[u8]) -> Option<T>,
) -> Result<Vec<T>> {
    // AF_UNSPEC: both families.
    let mut filter = vec![0; NFGENMSG];
    if marked.mask != 0 {
        filter.be32(CTA_MARK, marked.mark);
        filter.be32(CTA_MARK_MASK, marked.mask);
    }
    select_filtered(socket, &filter, |connection, message| {
        marked.has(&connection).then(|| pick(connection, message)).flatten()
    })
}

fn select_filtered<T>(
    socket: &mut Socket,
    filter: &[u8],
    mut pick: impl FnMut(Connection, &[u8]) -> Option<T>,
) -> Result<Vec<T>> {
    let entries = socket.dump(IPCTNL_MSG_CT_GET, filter, Vec::new, |found, message| {
        found.extend(parse(message).and_then(|connection| pick(connection, message)));
    });
    entries.context("cannot read the tracked connections; is the kernel module nf_conntrack_netlink there?")
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

/// Source and destination.
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

/// What names one connection: its tuple and zone, and its id, so that another one that has taken its place since
/// stays.
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

/// Sends deletions in one datagram, each with the entries that follow, and returns how many connections were there.
fn send(socket: &mut Socket, requests: &[Deletion]) -> Result<usize, Error> {
    let mut datagram = Vec::new();
    let (mut deletions, mut followers) = (BTreeSet::new(), BTreeSet::new());
    for deletion in requests {
        let mut append = |kind, flags, pending: &mut BTreeSet<u32>, request: &[u8]| {
            let sequence = socket.next_sequence();
            pending.insert(sequence);
            let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
            append_message(&mut datagram, kind, flags, sequence, |m| m.extend_from_slice(request));
        };
        append(IPCTNL_MSG_CT_DELETE, 0, &mut deletions, &deletion.request);
        // Right behind it, for both have the same place in the kernel's table.
        for follower in &deletion.followers {
            append(IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, &mut followers, follower);
        }
    }
    socket.send(&datagram)?;
    let (mut deleted, mut refused) = (0, None);
    while !(deletions.is_empty() && followers.is_empty()) {
        socket.receive(|m| {
            if m.kind != NLMSG_ERROR {
                return;
            }
            // A follower that cannot be is a packet's loss, and its connection lives on.
            if !deletions.remove(&m.sequence) {
                followers.remove(&m.sequence);
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

    /// A connection as the kernel tells of it, and what else stands there.
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
        fn what_the_kernel_tells_is_understood_and_what_is_cut_short_is_nothing_else(
            of in any::<[[u8; 4]; 4]>(), mark in any::<u32>(), more in vec((200u16..300, vec(any::<u8>(), 0..9)), 0..4),
            cut in any::<prop::sample::Index>(), broken in any::<(prop::sample::Index, u8)>(),
        ) {
            let whole = entry(of, mark, &more);
            let [source, destination, reply_source, reply_destination] = of.map(IpAddr::from);
            let (protocol, reply_port, id) = (0, None, 0);
            let read = parse(&whole);
            let out = read.as_ref().and_then(|read| read.out);
            let told = Connection { source, destination, reply_source, reply_destination, protocol, reply_port, mark, id, out };
            prop_assert_eq!(read, Some(told));
            if let Some(read) = parse(&whole[..cut.index(whole.len())]) {
                prop_assert_eq!((read.source, read.reply_destination), (source, reply_destination));
            }
            let (at, byte) = broken;
            let mut spoilt = whole;
            let at = at.index(spoilt.len());
            spoilt[at] = byte;
            drop((parse(&spoilt), request(&spoilt), in_flight_reply::after(&spoilt, mark)));
        }

        #[test]
        fn any_bytes_are_no_reason_to_panic(bytes in vec(any::<u8>(), 0..120)) {
            drop((parse(&bytes), request(&bytes), in_flight_reply::after(&bytes, 1)));
        }
    }
}
