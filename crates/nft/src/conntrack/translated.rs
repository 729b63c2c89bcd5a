//! Connections with their translation: looked up one by one, and inserted.
//!
//! If the kernel changed a connection's source port, only its entry knows the translation. An entry that is inserted
//! here copies the entry of another node, so that the connection's next packet is translated as before.

use super::in_flight_reply::{
    ASSURED, CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_STATE, CTA_STATUS, CTA_TIMEOUT, ESTABLISHED,
    established, to,
};
use super::tuple::Tuple;
use super::*;
use crate::rule::protocol::TCP;
use nix::libc::EEXIST;

const CTA_NAT_SRC: u16 = 6;
/// `TCP_CONNTRACK_TIME_WAIT`, `_CLOSE`, include/uapi/linux/netfilter/nf_conntrack_tcp.h: both ends have closed the
/// connection, or one has reset it.
const TCP_IS_OVER: [u8; 2] = [7, 8];
/// `IPS_SEEN_REPLY`, include/uapi/linux/netfilter/nf_conntrack_common.h.
const SEEN_REPLY: u32 = 1 << 1;

/// A tracked connection with its ports and its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The original direction, before translation.
    pub out: Tuple,
    /// The reply direction, before the replies are translated back.
    pub back: Tuple,
    /// The connection mark.
    pub mark: u32,
    /// Seconds until the idle entry expires; 0 if unknown.
    pub timeout: u32,
    /// Whether the connection has ended and its entry remains for late packets.
    pub is_over: bool,
    /// Whether packets have been seen in both directions. For TCP, whether the connection is established and neither
    /// end has closed it.
    pub is_established: bool,
}

impl Tracked {
    /// Whether translation changed the source address and port, and nothing else.
    pub fn has_changed_port(&self) -> bool {
        let same_server = (self.out.destination, self.out.ports[1]) == (self.back.source, self.back.ports[0]);
        same_server && self.out.ports[0] != self.back.ports[1] && self.out.source != self.back.destination
    }
}

/// An established connection with a translated source, to be inserted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// The original direction.
    pub out: Tuple,
    /// The address that the source is translated to.
    pub address: IpAddr,
    /// The port that the source port is translated to.
    pub port: u16,
    /// The connection mark.
    pub mark: u32,
    /// Seconds until the idle entry expires.
    pub timeout: u32,
}

impl Translated {
    /// The reply direction.
    pub fn back(&self) -> Tuple {
        Tuple { destination: self.address, ports: [self.out.ports[1], self.port], ..self.out.reversed() }
    }

    /// The request that inserts the entry. The kernel translates to exactly this port or inserts nothing
    /// (`nf_nat_setup_info`, `nf_conntrack_hash_check_insert`).
    pub(super) fn request(&self) -> Vec<u8> {
        let mut request = self.out.header();
        request.nested(CTA_TUPLE_ORIG, |tuple| self.out.write(tuple));
        request.nested(CTA_TUPLE_REPLY, |tuple| self.out.reversed().write(tuple));
        request.be32(CTA_STATUS, ASSURED);
        request.be32(CTA_TIMEOUT, self.timeout);
        request.be32(CTA_MARK, self.mark);
        request.nested(CTA_NAT_SRC, |nat| to(nat, self.address, self.port));
        if self.out.protocol == TCP {
            established(&mut request);
        }
        request
    }
}

/// The result of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insertion {
    /// The entry is in the table.
    Present,
    /// Another connection has the same tuple in one direction.
    Conflict,
}

/// Finds the connection that has this tuple in one of its directions, usually the reply direction.
pub fn find_by_reply(socket: &mut Socket, back: &Tuple) -> Result<Option<Tracked>, Error> {
    Ok(find(socket, CTA_TUPLE_REPLY, back)?.and_then(|message| parse_tracked(&message)))
}

/// Finds the connection that has this tuple in one of its directions, usually the original direction.
pub fn find_by_original(socket: &mut Socket, out: &Tuple) -> Result<Option<Tracked>, Error> {
    Ok(find(socket, CTA_TUPLE_ORIG, out)?.and_then(|message| parse_tracked(&message)))
}

/// Lists the connections that `marked` selects and for which `pick` returns true.
pub fn list_tracked(
    socket: &mut Socket,
    marked: MarkFilter,
    pick: impl Fn(&Tracked) -> bool,
) -> Result<Vec<Tracked>, ConntrackFailure> {
    select_raw(socket, marked, |_, message| parse_tracked(message).filter(&pick))
}

/// Calls `each` with every connection that `marked` selects, and with the state that `start` returned. It keeps none of
/// them in memory. If the kernel interrupts the dump, it begins again with a new state.
///
/// # Errors
/// The table cannot be read.
pub fn fold_tracked<S>(
    socket: &mut Socket,
    marked: MarkFilter,
    start: impl FnMut() -> S,
    mut each: impl FnMut(&mut S, &Tracked),
) -> Result<S, ConntrackFailure> {
    let read = socket.dump(IPCTNL_MSG_CT_GET, &marked.request(), start, |state, message| {
        if let Some(tracked) = parse_tracked(message).filter(|tracked| marked.has(tracked.mark)) {
            each(state, &tracked);
        }
    });
    read.map_err(ConntrackFailure::Read)
}

/// Inserts the entry. If it exists, its mark and timeout are set and its TCP window checks are turned off. Another
/// connection with the same original tuple is deleted first if `gives_place` returns true for it.
pub fn insert_or_update(
    socket: &mut Socket,
    wanted: &Translated,
    gives_place: impl Fn(&Tracked) -> bool,
) -> Result<Insertion, Error> {
    if let Some(message) = find(socket, CTA_TUPLE_ORIG, &wanted.out)? {
        match parse_tracked(&message) {
            Some(there) if there.out == wanted.out && there.back == wanted.back() => {
                let mut update = wanted.out.header();
                update.nested(CTA_TUPLE_ORIG, |tuple| wanted.out.write(tuple));
                update.be32(CTA_TIMEOUT, wanted.timeout);
                update.be32(CTA_MARK, wanted.mark);
                if wanted.out.protocol == TCP {
                    // Data that passed through another node meanwhile would be outside of this node's windows.
                    established(&mut update);
                }
                return match socket.request(IPCTNL_MSG_CT_NEW, 0, &update) {
                    Ok(()) => Ok(Insertion::Present),
                    // The entry has expired meanwhile.
                    Err(e) if e.errno() == Some(ENOENT) => Ok(Insertion::Conflict),
                    Err(e) => Err(e),
                };
            }
            Some(other) if gives_place(&other) => remove(socket, &message)?,
            _ => return Ok(Insertion::Conflict),
        }
    }
    insert(socket, wanted)
}

/// Inserts the entry if no other connection has one of its tuples.
pub fn insert(socket: &mut Socket, wanted: &Translated) -> Result<Insertion, Error> {
    match socket.request(IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, &wanted.request()) {
        Ok(()) => Ok(Insertion::Present),
        Err(e) if e.errno() == Some(EEXIST) => Ok(Insertion::Conflict),
        Err(e) => Err(e),
    }
}

/// Deletes the connection with the original tuple `out` if `doomed` returns true for it.
pub fn delete_one(socket: &mut Socket, out: &Tuple, doomed: impl Fn(&Tracked) -> bool) -> Result<(), Error> {
    match find(socket, CTA_TUPLE_ORIG, out)? {
        Some(message) if parse_tracked(&message).is_some_and(|there| there.out == *out && doomed(&there)) => {
            remove(socket, &message)
        }
        _ => Ok(()),
    }
}

fn remove(socket: &mut Socket, message: &[u8]) -> Result<(), Error> {
    let Some(request) = request(message) else { return Ok(()) };
    match socket.request(IPCTNL_MSG_CT_DELETE, 0, &request) {
        Err(e) if e.errno() != Some(ENOENT) => Err(e),
        _ => Ok(()),
    }
}

/// The kernel's message about the connection that has this tuple in one of its directions.
fn find(socket: &mut Socket, kind: u16, tuple: &Tuple) -> Result<Option<Vec<u8>>, Error> {
    let mut request = tuple.header();
    request.nested(kind, |t| tuple.write(t));
    match socket.get(IPCTNL_MSG_CT_GET, &request) {
        Ok(message) => Ok(Some(message)),
        Err(e) if e.errno() == Some(ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

fn parse_tracked(message: &[u8]) -> Option<Tracked> {
    let (mut out, mut back, mut mark, mut timeout, mut status, mut state) = (None, None, 0, 0, 0, None);
    for (kind, value) in attributes(message.get(NFGENMSG..)?) {
        match kind {
            CTA_TUPLE_ORIG => out = Tuple::parse(value),
            CTA_TUPLE_REPLY => back = Tuple::parse(value),
            CTA_MARK => mark = u32::from_be_bytes(value.try_into().ok()?),
            CTA_TIMEOUT => timeout = u32::from_be_bytes(value.try_into().ok()?),
            CTA_STATUS => status = u32::from_be_bytes(value.try_into().ok()?),
            CTA_PROTOINFO => state = tcp_state(value),
            // Connections in a zone are another program's, such as a CNI's; Egret uses none here.
            CTA_ZONE => return None,
            _ => {}
        }
    }
    let is_over = state.is_some_and(|state| TCP_IS_OVER.contains(&state));
    let is_established = status & SEEN_REPLY != 0 && state.is_none_or(|state| state == ESTABLISHED);
    Some(Tracked { out: out?, back: back?, mark, timeout, is_over, is_established })
}

fn tcp_state(info: &[u8]) -> Option<u8> {
    let (_, tcp) = attributes(info).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP)?;
    let (_, state) = attributes(tcp).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP_STATE)?;
    state.first().copied()
}
