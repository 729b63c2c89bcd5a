//! TCP connections whose packets the kernel need not see.

use super::in_flight_reply::{
    BE_LIBERAL, CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY,
    CTA_PROTOINFO_TCP_STATE, CTA_STATUS, CTA_TIMEOUT, ESTABLISHED, FIXED_TIMEOUT,
};
use super::*;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// `IP_CT_TCP_FLAG_MAXACK_SET`, include/uapi/linux/netfilter/nf_conntrack_tcp.h: a reset is judged by the last number that
/// was acknowledged.
const MAXACK_SET: u8 = 0x20;
/// `IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED`: data was seen that nobody has acknowledged, and the entry expires sooner.
const UNACKNOWLEDGED: u8 = 0x10;

/// Timeouts of connection tracking for TCP, in seconds, `net.netfilter.nf_conntrack_tcp_timeout_…`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpTimeouts {
    /// Of an established connection.
    pub established: u32,
    /// While data is not acknowledged.
    pub unacknowledged: u32,
    /// After retransmissions, or while a window is closed.
    pub retransmitted: u32,
    /// After a reset.
    pub closed: u32,
}

impl TcpTimeouts {
    /// Reads those of this network namespace. `None` if one of them cannot be read.
    pub fn read() -> Option<Self> {
        let read = |name: &str| {
            let path = format!("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_{name}");
            fs::read_to_string(path).ok()?.trim().parse().ok()
        };
        Some(TcpTimeouts {
            established: read("established")?,
            unacknowledged: read("unacknowledged")?,
            retransmitted: read("max_retrans")?,
            closed: read("close")?,
        })
    }

    /// The shorter one of the timeouts that [`Prolonged`] corrects.
    pub fn shortest(&self) -> u32 {
        self.unacknowledged.min(self.retransmitted)
    }

    /// Whether no packet has changed the timeout of a connection that was given that of established ones so long ago. The
    /// kernel says how many whole seconds are left.
    fn is_unused(&self, timeout: u32, since: Duration) -> bool {
        (u64::from(timeout) + since.as_secs()).abs_diff(self.established.into()) <= 5
    }

    /// Whether an established connection that expires after so many seconds does so early.
    fn is_early(&self, timeout: u32) -> bool {
        let longest = self.unacknowledged.max(self.retransmitted);
        timeout > self.closed && timeout <= longest && longest < self.established
    }
}

/// Which connections' timeouts were corrected, and when.
///
/// Connection tracking that sees few of a connection's packets finds most of them outside of the windows. It accepts them
/// and remembers nothing of them (`nf_tcp_log_invalid`, net/netfilter/nf_conntrack_proto_tcp.c). If it last saw data without
/// its acknowledgement, a retransmission or a closed window, this stays so, and each packet sets the timeout that is meant
/// for that: five minutes in place of days. A connection that is idle for longer than that would be forgotten.
#[derive(Debug, Default)]
pub struct Prolonged(HashMap<u32, Instant>);

impl Prolonged {
    /// Gives the established connections that `marked` selects, for which [`set_liberal`] was called, the timeout of
    /// established ones. It is to be called more often than the shortest of the timeouts passes. Returns how many it changed.
    ///
    /// # Errors
    /// The table cannot be read, or the kernel refuses a change.
    pub fn prolong(
        &mut self,
        socket: &mut Socket,
        marked: MarkFilter,
        timeouts: &TcpTimeouts,
    ) -> Result<usize, ConntrackFailure> {
        let now = Instant::now();
        let read = socket.dump(IPCTNL_MSG_CT_GET, &marked.request(), Vec::new, |found, message| {
            found.extend(Liberal::parse(message).filter(|entry| marked.has(entry.mark)));
        });
        let found: Vec<Liberal> = read.map_err(ConntrackFailure::Read)?;
        // Forgets those that have ended.
        let mut before = std::mem::take(&mut self.0);
        let mut requests = Vec::new();
        for entry in found {
            // One that nobody has used since comes to the end of the time that it was given.
            let unused = before.remove(&entry.id).filter(|at| timeouts.is_unused(entry.timeout, now - *at));
            if let Some(at) = unused {
                self.0.insert(entry.id, at);
            } else if timeouts.is_early(entry.timeout) {
                self.0.insert(entry.id, now);
                requests.push(entry.request(timeouts.established));
            }
        }
        update_all(socket, &requests).map_err(ConntrackFailure::Update)
    }
}

/// An established connection for which tracking is liberal in both directions, and that this host has seen packets of.
struct Liberal {
    id: u32,
    mark: u32,
    timeout: u32,
    /// Its tuple, zone and id.
    key: Vec<u8>,
}

impl Liberal {
    fn parse(message: &[u8]) -> Option<Self> {
        let (mut id, mut mark, mut status, mut timeout, mut flags) = (0, 0, 0, 0, None);
        for (kind, value) in attributes(message.get(NFGENMSG..)?) {
            let number = || Some(u32::from_be_bytes(value.try_into().ok()?));
            match kind {
                CTA_ID => id = number()?,
                CTA_MARK => mark = number()?,
                CTA_STATUS => status = number()?,
                CTA_TIMEOUT => timeout = number()?,
                CTA_PROTOINFO => flags = established_flags(value),
                _ => {}
            }
        }
        let [original, reply] = flags?;
        // Entries that were made by netlink have no other flag before their first packet.
        let is_tracked = (original | reply) & !BE_LIBERAL != 0;
        let is_wanted = original & reply & BE_LIBERAL != 0 && is_tracked && status & FIXED_TIMEOUT == 0;
        is_wanted.then(|| Some(Liberal { id, mark, timeout, key: request(message)? }))?
    }

    fn request(self, timeout: u32) -> Vec<u8> {
        let mut request = self.key;
        request.be32(CTA_TIMEOUT, timeout);
        flags(&mut request, [0, UNACKNOWLEDGED]);
        request
    }
}

/// The flags of both directions, if the connection is established. `value` is the content of `CTA_PROTOINFO`.
fn established_flags(value: &[u8]) -> Option<[u8; 2]> {
    let (_, tcp) = attributes(value).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP)?;
    let first = |wanted| attributes(tcp).find(|(kind, _)| *kind == wanted)?.1.first().copied();
    let flags = [first(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL)?, first(CTA_PROTOINFO_TCP_FLAGS_REPLY)?];
    (first(CTA_PROTOINFO_TCP_STATE)? == ESTABLISHED).then_some(flags)
}

/// Makes connection tracking accept all packets of these TCP connections, given by their original direction: it will not
/// see all of them, so it cannot judge their numbers. The kernel does the same for connections in its flow tables
/// (`flow_offload_fixup_tcp`). Returns how many connections existed. [`Prolonged`] is to correct their timeouts.
///
/// # Errors
/// The socket failed, or the kernel refuses the change.
pub fn set_liberal(socket: &mut Socket, connections: &[Tuple]) -> Result<usize, Error> {
    let requests: Vec<_> = connections.iter().map(request_liberal).collect();
    update_all(socket, &requests)
}

/// Sends the requests, each of which changes an entry. Returns how many entries existed.
fn update_all(socket: &mut Socket, requests: &[Vec<u8>]) -> Result<usize, Error> {
    let mut changed = 0;
    for batch in requests.chunks(BATCH) {
        let (mut datagram, mut pending) = (Vec::new(), BTreeSet::new());
        for request in batch {
            let sequence = socket.next_sequence();
            pending.insert(sequence);
            append_message(&mut datagram, IPCTNL_MSG_CT_NEW, NLM_F_REQUEST | NLM_F_ACK, sequence, |message| {
                message.extend_from_slice(request);
            });
        }
        socket.send(&datagram)?;
        let mut refused = None;
        while !pending.is_empty() {
            socket.receive(|m| {
                if m.kind != NLMSG_ERROR || !pending.remove(&m.sequence) {
                    return;
                }
                match m.acknowledgement() {
                    Ok(()) => changed += 1,
                    Err(e) if e.errno() == Some(ENOENT) => {}
                    Err(e) => refused = Some(e),
                }
            })?;
        }
        if let Some(e) = refused {
            return Err(e);
        }
    }
    Ok(changed)
}

fn request_liberal(out: &Tuple) -> Vec<u8> {
    let mut request = out.header();
    request.nested(CTA_TUPLE_ORIG, |tuple| out.write(tuple));
    flags(&mut request, [BE_LIBERAL, BE_LIBERAL | MAXACK_SET]);
    request
}

/// Appends flags of both directions, with the mask of those that change (`struct nf_ct_tcp_flags`).
fn flags(request: &mut Vec<u8>, flags_and_mask: [u8; 2]) {
    request.nested(CTA_PROTOINFO, |info| {
        info.nested(CTA_PROTOINFO_TCP, |tcp| {
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &flags_and_mask);
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, &flags_and_mask);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: TcpTimeouts =
        TcpTimeouts { established: 432_000, unacknowledged: 300, retransmitted: 300, closed: 10 };

    #[test]
    fn a_timeout_is_early_between_that_of_a_reset_and_that_of_an_established_connection() {
        let early = [10, 11, 300, 301, 432_000].map(|timeout| TIMEOUTS.is_early(timeout));
        assert_eq!(early, [false, true, true, false, false]);
        assert!(
            TIMEOUTS.is_unused(431_900, Duration::from_secs(100))
                && TIMEOUTS.is_unused(299, Duration::from_secs(431_700))
        );
        assert!(
            !TIMEOUTS.is_unused(299, Duration::from_secs(100))
                && !TIMEOUTS.is_unused(431_990, Duration::from_secs(100))
        );
        let short = TcpTimeouts { established: 200, ..TIMEOUTS };
        assert!(!short.is_early(100), "{short:?}");
    }

    /// A connection as the kernel encodes it, with the flags of its directions.
    fn entry(state: u8, status: u32, flags: [u8; 2]) -> Vec<u8> {
        let out =
            Tuple { source: [10, 0, 0, 1].into(), destination: [192, 0, 2, 1].into(), protocol: 6, ports: [1, 2] };
        let mut message = out.header();
        message.nested(CTA_TUPLE_ORIG, |tuple| out.write(tuple));
        message.be32(CTA_ID, 7);
        message.be32(CTA_MARK, 0x4547_0001);
        message.be32(CTA_STATUS, status);
        message.be32(CTA_TIMEOUT, 299);
        message.nested(CTA_PROTOINFO, |info| {
            info.nested(CTA_PROTOINFO_TCP, |tcp| {
                tcp.attribute(CTA_PROTOINFO_TCP_STATE, &[state]);
                tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[flags[0], 0]);
                tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, &[flags[1], 0]);
            });
        });
        message
    }

    #[test]
    fn established_connections_with_packets_of_their_own_are_prolonged() {
        let found = Liberal::parse(&entry(ESTABLISHED, 0, [BE_LIBERAL, BE_LIBERAL | UNACKNOWLEDGED])).unwrap();
        assert_eq!((found.id, found.mark, found.timeout), (7, 0x4547_0001, 299));
        let not = [
            // Closing; for replies in flight; tracked in one direction; not seen yet.
            entry(ESTABLISHED + 1, 0, [BE_LIBERAL | MAXACK_SET; 2]),
            entry(ESTABLISHED, FIXED_TIMEOUT, [BE_LIBERAL | MAXACK_SET; 2]),
            entry(ESTABLISHED, 0, [BE_LIBERAL | MAXACK_SET, MAXACK_SET]),
            entry(ESTABLISHED, 0, [BE_LIBERAL; 2]),
        ];
        for message in not {
            assert!(Liberal::parse(&message).is_none(), "{message:?}");
        }
        for length in 0..entry(ESTABLISHED, 0, [0; 2]).len() {
            drop(Liberal::parse(&entry(ESTABLISHED, 0, [BE_LIBERAL | MAXACK_SET; 2])[..length]));
        }
    }
}
