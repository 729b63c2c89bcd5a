//! Egret's fast path: eBPF programs for established connections (`programs/fast_path.bpf.c`), and their loader.
//!
//! The programs are in this repository as a light skeleton: a program that the kernel runs to create the maps, to find
//! the places of what it reads in its own types (BTF), and to load the others. So neither a compiler nor libbpf nor a
//! parser of ELF is needed. `make bpf` compiles them anew.

mod error;
mod map;
mod skeleton;
mod syscall;

pub use error::LoadError;
pub use map::Count;
pub use skeleton::{Link, Programs, programs_at};

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

/// The settings, which do not change while the programs are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a lease lasts.
    pub lease: Duration,
    /// The upper half of Egret's connection marks.
    pub connection_base: u16,
    /// The mask of the bits of a packet mark that tell its kind.
    pub kind_mask: u32,
    /// The number of packets of one direction of a connection before it may get a lease.
    pub after: u32,
}

impl Settings {
    /// `struct settings`, programs/fast_path.h.
    fn encode(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let lease = u64::try_from(self.lease.as_nanos()).unwrap_or(u64::MAX);
        bytes[0..8].copy_from_slice(&lease.to_ne_bytes());
        bytes[8..12].copy_from_slice(&(u32::from(self.connection_base) << 16).to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.kind_mask.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.after.to_ne_bytes());
        bytes
    }
}

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Where packets come in: it sends packets of connections with a lease straight on.
    Enter,
    /// Where packets leave into the tunnel: it gives leases.
    LeaveTunnel,
    /// Where packets leave by a gateway's uplink: it gives leases.
    LeaveUplink,
    /// Where packets leave to a pod: it gives leases.
    LeavePod,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Program::Enter => "enter",
            Program::LeaveTunnel => "leave_tunnel",
            Program::LeaveUplink => "leave_uplink",
            Program::LeavePod => "leave_pod",
        }
    }

    fn hook(self) -> Hook {
        if self == Program::Enter { Hook::Ingress } else { Hook::Egress }
    }
}

/// A hook of an interface, where programs of all parties run one after the other (tcx).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in.
    Ingress,
    /// Packets that leave.
    Egress,
}

impl Hook {
    /// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`, include/uapi/linux/bpf.h.
    const fn attach_type(self) -> u32 {
        match self {
            Hook::Ingress => 46,
            Hook::Egress => 47,
        }
    }
}

/// A TCP connection for which connection tracking must not check windows before it can get a lease: the original
/// direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Wish {
    /// The client's address.
    pub source: IpAddr,
    /// The server's address.
    pub destination: IpAddr,
    /// The client's port and the server's port.
    pub ports: [u16; 2],
}

impl Wish {
    /// The length of `struct wish`, programs/fast_path.h.
    const LENGTH: usize = 40;

    fn decode(bytes: &[u8; Wish::LENGTH]) -> Wish {
        let is_v6 = bytes[36] != 0;
        let address = |at: usize| {
            let mut octets = [0; 16];
            octets.copy_from_slice(&bytes[at..at + 16]);
            if is_v6 {
                return IpAddr::V6(Ipv6Addr::from(octets));
            }
            IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
        };
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        Wish { source: address(0), destination: address(16), ports: [port(32), port(34)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_decoded() {
        let mut bytes = [0; Wish::LENGTH];
        bytes[..4].copy_from_slice(&[10, 0, 0, 1]);
        bytes[16..20].copy_from_slice(&[192, 0, 2, 7]);
        bytes[32..36].copy_from_slice(&[0x30, 0x39, 1, 0xbb]);
        let of = |source, destination| Wish { source, destination, ports: [12345, 443] };
        assert_eq!(Wish::decode(&bytes), of([10, 0, 0, 1].into(), [192, 0, 2, 7].into()));
        bytes[..16].copy_from_slice(&[1; 16]);
        bytes[36] = 1;
        let mut server = [0; 16];
        server[..4].copy_from_slice(&[192, 0, 2, 7]);
        assert_eq!(Wish::decode(&bytes), of([1; 16].into(), server.into()));
    }

    #[test]
    fn settings_are_encoded_as_the_programs_read_them() {
        let settings =
            Settings { lease: Duration::from_secs(1), connection_base: 0x4547, kind_mask: 0xc000_0000, after: 32 };
        let word = |at: usize| u32::from_ne_bytes(settings.encode()[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4), word(8), word(12), word(16)], [1_000_000_000, 0, 0x4547_0000, 0xc000_0000, 32]);
    }
}
