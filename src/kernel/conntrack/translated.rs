//! Connections with their translation: read one by one, and made.
//!
//! A connection whose source port was changed is known by its translation alone. An entry that is made here has what the
//! connection's own entry on another node has, so that its next packet is translated as its first one was.

use super::in_flight_reply::{ASSURED, ESTABLISHED, established, to};
use super::tuple::Tuple;
use super::*;
use crate::kernel::nft::rule::protocol::TCP;
use nix::libc::EEXIST;

const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_NAT_SRC: u16 = 6;
const CTA_TIMEOUT: u16 = 7;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// `TCP_CONNTRACK_TIME_WAIT`, `_CLOSE`, include/uapi/linux/netfilter/nf_conntrack_tcp.h: both ends have closed it, or one
/// has reset it.
const TCP_IS_OVER: [u8; 2] = [7, 8];
/// `IPS_SEEN_REPLY`, include/uapi/linux/netfilter/nf_conntrack_common.h.
const SEEN_REPLY: u32 = 1 << 1;

/// A connection as it is tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The direction in which it was begun, before translation.
    pub out: Tuple,
    /// What the answers look like, before they are translated back.
    pub back: Tuple,
    /// Its mark.
    pub mark: u32,
    /// In how many seconds it is forgotten, if it goes on saying nothing. 0: not known.
    pub timeout: u32,
    /// Whether it has ended, and is still remembered for stray packets.
    pub is_over: bool,
    /// Whether both ends have spoken; of TCP, whether it is established and neither end has closed it.
    pub is_established: bool,
}

impl Tracked {
    /// Whether its source port was changed, and nothing but its source.
    pub fn has_changed_port(&self) -> bool {
        let same_server = (self.out.destination, self.out.ports[1]) == (self.back.source, self.back.ports[0]);
        same_server && self.out.ports[0] != self.back.ports[1] && self.out.source != self.back.destination
    }
}

/// A connection that is to be tracked as one that is established, with its source translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// As its beginner sends it.
    pub out: Tuple,
    /// The address that its source is translated to.
    pub address: IpAddr,
    /// The port that its source port is translated to.
    pub port: u16,
    /// Its mark.
    pub mark: u32,
    /// In how many seconds it is forgotten if nothing comes.
    pub timeout: u32,
}

impl Translated {
    /// What its answers look like.
    pub fn back(&self) -> Tuple {
        Tuple { destination: self.address, ports: [self.out.ports[1], self.port], ..self.out.reversed() }
    }

    /// The request that makes it. The kernel translates to this port or makes nothing (`nf_nat_setup_info`,
    /// `nf_conntrack_hash_check_insert`).
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

/// What became of an entry that was to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    /// It is there.
    There,
    /// Another connection has its place, at one of its ends.
    Taken,
}

/// The connection with these answers, or the one that was begun so.
///
/// # Errors
/// The kernel's refusal.
pub fn find_by_answers(socket: &mut Socket, back: &Tuple) -> Result<Option<Tracked>, Error> {
    Ok(find(socket, CTA_TUPLE_REPLY, back)?.and_then(|message| parse_tracked(&message)))
}

/// The connection that was begun so.
///
/// # Errors
/// The kernel's refusal.
pub fn find_by_request(socket: &mut Socket, out: &Tuple) -> Result<Option<Tracked>, Error> {
    Ok(find(socket, CTA_TUPLE_ORIG, out)?.and_then(|message| parse_tracked(&message)))
}

/// All connections with that mark that `pick` wants.
///
/// # Errors
/// The kernel's refusal.
pub fn list_tracked(socket: &mut Socket, marked: Marked, pick: impl Fn(&Tracked) -> bool) -> Result<Vec<Tracked>> {
    select_raw(socket, marked, |_, message| parse_tracked(message).filter(&pick))
}

/// Makes the entry. If it is there, its mark and its time are set, and its TCP windows count no more; another connection that was begun in the same way
/// gives place if `gives_place` says so.
///
/// # Errors
/// The kernel's refusal.
pub fn make(socket: &mut Socket, wanted: &Translated, gives_place: impl Fn(&Tracked) -> bool) -> Result<Made, Error> {
    if let Some(message) = find(socket, CTA_TUPLE_ORIG, &wanted.out)? {
        match parse_tracked(&message) {
            Some(there) if there.out == wanted.out && there.back == wanted.back() => {
                let mut update = wanted.out.header();
                update.nested(CTA_TUPLE_ORIG, |tuple| wanted.out.write(tuple));
                update.be32(CTA_TIMEOUT, wanted.timeout);
                update.be32(CTA_MARK, wanted.mark);
                if wanted.out.protocol == TCP {
                    // What has been said on another node meanwhile would be outside of the windows as they are here.
                    established(&mut update);
                }
                return match socket.request(IPCTNL_MSG_CT_NEW, 0, &update) {
                    Ok(()) => Ok(Made::There),
                    // It has ended meanwhile.
                    Err(e) if e.errno() == Some(ENOENT) => Ok(Made::Taken),
                    Err(e) => Err(e),
                };
            }
            Some(other) if gives_place(&other) => remove(socket, &message)?,
            _ => return Ok(Made::Taken),
        }
    }
    create(socket, wanted)
}

/// Makes the entry, if no other connection has its place.
///
/// # Errors
/// The kernel's refusal.
pub fn create(socket: &mut Socket, wanted: &Translated) -> Result<Made, Error> {
    match socket.request(IPCTNL_MSG_CT_NEW, NLM_F_CREATE | NLM_F_EXCL, &wanted.request()) {
        Ok(()) => Ok(Made::There),
        Err(e) if e.errno() == Some(EEXIST) => Ok(Made::Taken),
        Err(e) => Err(e),
    }
}

/// Forgets a connection, if `doomed` says so of what is there.
///
/// # Errors
/// The kernel's refusal.
pub fn forget(socket: &mut Socket, out: &Tuple, doomed: impl Fn(&Tracked) -> bool) -> Result<(), Error> {
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

/// The kernel's message about the connection that has this tuple, in one of its directions.
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
            // What a CNI has set apart by a zone is none of Egret's.
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
