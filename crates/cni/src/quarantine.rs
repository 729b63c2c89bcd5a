//! The quarantine. A quarantined pod reaches the cluster's networks only, until the daemon has programmed it.
//!
//! Each address of the pod has two routing rules. One leads to a table in which the daemon has left the cluster's
//! networks and an `unreachable` default route. The other does the same for packets that an eBPF program on the pod's
//! veth redirects to an interface, past the kernel's forwarding.

pub use crate::source_rule::PROTOCOL;
use crate::source_rule::{OUTGOING, Source, SourceRules, sources};
use egret_nft::Family;
use egret_nft::netlink::{Attributes, Error, NETLINK_ROUTE, Socket, attributes};
use nix::libc;
use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

/// Routing table of quarantined pods: it contains the cluster's networks alone.
pub const TABLE_QUARANTINE: u32 = 7873;
/// Routing table of packets that an eBPF program redirects: it contains the cluster's networks, and for each interface a
/// route that `bpf_redirect_neigh` takes for no way out.
pub const TABLE_REDIRECTED: u32 = 7875;
/// Priority of the quarantine's routing rules for redirected packets. All of Egret's rules come before those of common
/// CNIs.
pub const RULE_QUARANTINE_REDIRECTED: u32 = 70;
/// Priority of the quarantine's routing rules.
pub const RULE_QUARANTINE: u32 = 71;

const RULES: SourceRules = SourceRules { priority: RULE_QUARANTINE, table: TABLE_QUARANTINE, unmarked: false };
const REDIRECTED: SourceRules =
    SourceRules { priority: RULE_QUARANTINE_REDIRECTED, table: TABLE_REDIRECTED, unmarked: false };
/// `sizeof(struct rtmsg)`.
const HEADER: usize = 12;

/// The quarantine of the network namespace in which it was opened.
pub struct Quarantine(Socket);

impl Quarantine {
    /// Opens the quarantine of this network namespace.
    ///
    /// # Errors
    /// A netlink socket cannot be opened.
    pub fn open() -> io::Result<Self> {
        Socket::open(NETLINK_ROUTE).map(Quarantine)
    }

    /// The socket's netlink port, which is in the kernel's notifications about changes made with this socket.
    pub fn port(&self) -> u32 {
        self.0.port()
    }

    /// Whether the table isolates a pod, that is, it has the `unreachable` default route. A rule that leads to an
    /// empty table has no effect.
    ///
    /// # Errors
    /// The routes cannot be read.
    pub fn is_ready(&mut self, family: Family) -> Result<bool, Error> {
        let mut request = vec![0; HEADER];
        request[0] = family.number();
        request[7] = libc::RTN_UNREACHABLE;
        request.attribute(libc::RTA_TABLE, &TABLE_QUARANTINE.to_ne_bytes());
        let found = self.0.dump(
            libc::RTM_GETROUTE,
            &request,
            || false,
            |found, route| {
                // Old kernels do not filter.
                *found |= route.len() >= HEADER
                    && (route[0], route[1], route[7]) == (family.number(), 0, libc::RTN_UNREACHABLE)
                    && number(&route[HEADER..], libc::RTA_TABLE) == Some(TABLE_QUARANTINE);
            },
        );
        match found {
            // The table or the family does not exist.
            Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(false),
            other => other,
        }
    }

    /// Puts an address into quarantine. It succeeds if the address is there already.
    ///
    /// # Errors
    /// A rule cannot be added.
    pub fn add(&mut self, address: &IpAddr) -> Result<(), Error> {
        REDIRECTED.add(&mut self.0, &outgoing(address))?;
        RULES.add(&mut self.0, &any(address))
    }

    /// Takes an address out of quarantine. It succeeds if the address is not there.
    ///
    /// # Errors
    /// A rule cannot be deleted.
    pub fn lift(&mut self, address: &IpAddr) -> Result<(), Error> {
        RULES.delete(&mut self.0, &any(address))?;
        REDIRECTED.delete(&mut self.0, &outgoing(address))
    }

    /// The addresses in quarantine, also those that lack one of the two rules.
    ///
    /// # Errors
    /// The rules cannot be read.
    pub fn addresses(&mut self) -> Result<BTreeSet<IpAddr>, Error> {
        let [rules, redirected] = self.sources()?;
        Ok(&rules | &redirected)
    }

    /// The addresses in quarantine that have both rules.
    ///
    /// # Errors
    /// The rules cannot be read.
    pub fn complete(&mut self) -> Result<BTreeSet<IpAddr>, Error> {
        let [rules, redirected] = self.sources()?;
        Ok(&rules & &redirected)
    }

    fn sources(&mut self) -> Result<[BTreeSet<IpAddr>; 2], Error> {
        let all = sources([RULES, REDIRECTED], &mut self.0)?;
        Ok(all.map(|of| of.into_iter().map(|source| source.address).collect()))
    }
}

fn any(address: &IpAddr) -> Source {
    Source { address: *address, interface: None }
}

fn outgoing(address: &IpAddr) -> Source {
    Source { address: *address, interface: Some(OUTGOING.into()) }
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    let (_, value) = attributes(bytes).find(|(k, _)| *k == kind)?;
    value.try_into().ok().map(u32::from_ne_bytes)
}
