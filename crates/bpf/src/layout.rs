//! What the programs and this crate share, as bytes: programs/fast_path.h.

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
    pub(crate) fn encode(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let lease = u64::try_from(self.lease.as_nanos()).unwrap_or(u64::MAX);
        bytes[0..8].copy_from_slice(&lease.to_ne_bytes());
        bytes[8..12].copy_from_slice(&(u32::from(self.connection_base) << 16).to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.kind_mask.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.after.to_ne_bytes());
        bytes
    }
}

/// This node's end of the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelEnd {
    /// The index of the tunnel device.
    pub device: u32,
    /// The address to which the other nodes send.
    pub local: IpAddr,
    /// The UDP port.
    pub port: u16,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The tunnel device's MAC address.
    pub mac: [u8; 6],
}

/// The length of `struct state`, programs/fast_path.h.
pub(crate) const STATE: usize = 40;

/// `struct state`: the generation of leases, 0 if nothing goes the fast way, and the tunnel.
pub(crate) fn state(generation: u32, tunnel: Option<&TunnelEnd>) -> [u8; STATE] {
    let mut bytes = [0; STATE];
    let Some(tunnel) = tunnel else { return bytes };
    bytes[0..4].copy_from_slice(&generation.to_ne_bytes());
    bytes[4..8].copy_from_slice(&tunnel.device.to_ne_bytes());
    bytes[8..24].copy_from_slice(&address(tunnel.local));
    bytes[24..28].copy_from_slice(&(tunnel.vni << 8).to_be_bytes());
    bytes[28..30].copy_from_slice(&tunnel.port.to_be_bytes());
    bytes[30..36].copy_from_slice(&tunnel.mac);
    bytes[36] = tunnel.local.is_ipv6().into();
    bytes
}

/// `struct address`.
pub(crate) fn address(address: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    match address {
        IpAddr::V4(v4) => bytes[..4].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => bytes = v6.octets(),
    }
    bytes
}

/// A TCP connection for which connection tracking must not check windows before it can get a lease: the original
/// direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseRequest {
    /// The client's address.
    pub source: IpAddr,
    /// The server's address.
    pub destination: IpAddr,
    /// The client's port and the server's port.
    pub ports: [u16; 2],
}

impl LeaseRequest {
    /// The length of `struct lease_request`, programs/fast_path.h.
    pub(crate) const LENGTH: usize = 40;

    pub(crate) fn decode(bytes: &[u8; LeaseRequest::LENGTH]) -> LeaseRequest {
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
        LeaseRequest { source: address(0), destination: address(16), ports: [port(32), port(34)] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_decoded() {
        let mut bytes = [0; LeaseRequest::LENGTH];
        bytes[..4].copy_from_slice(&[10, 0, 0, 1]);
        bytes[16..20].copy_from_slice(&[192, 0, 2, 7]);
        bytes[32..36].copy_from_slice(&[0x30, 0x39, 1, 0xbb]);
        let of = |source, destination| LeaseRequest { source, destination, ports: [12345, 443] };
        assert_eq!(LeaseRequest::decode(&bytes), of([10, 0, 0, 1].into(), [192, 0, 2, 7].into()));
        bytes[..16].copy_from_slice(&[1; 16]);
        bytes[36] = 1;
        let mut server = [0; 16];
        server[..4].copy_from_slice(&[192, 0, 2, 7]);
        assert_eq!(LeaseRequest::decode(&bytes), of([1; 16].into(), server.into()));
    }

    #[test]
    fn the_state_is_encoded_as_the_programs_read_it() {
        let local = IpAddr::from([10, 0, 0, 1]);
        let mut tunnel = TunnelEnd { device: 7, local, port: 7871, vni: 0x01_0203, mac: [2, 3, 4, 5, 6, 7] };
        let bytes = state(9, Some(&tunnel));
        assert_eq!([bytes[0..4].to_vec(), bytes[4..8].to_vec()], [9_u32, 7].map(|n| n.to_ne_bytes().to_vec()));
        assert_eq!(bytes[8..14], [10, 0, 0, 1, 0, 0]);
        assert_eq!(bytes[24..], [1, 2, 3, 0, 0x1e, 0xbf, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0]);
        tunnel.local = IpAddr::from([1; 16]);
        assert_eq!(state(9, Some(&tunnel))[8..24], [1; 16]);
        assert_eq!(state(9, Some(&tunnel))[36], 1);
        assert_eq!(state(9, None), [0; STATE]);
    }

    #[test]
    fn settings_are_encoded_as_the_programs_read_them() {
        let settings =
            Settings { lease: Duration::from_secs(1), connection_base: 0x4547, kind_mask: 0xc000_0000, after: 32 };
        let word = |at: usize| u32::from_ne_bytes(settings.encode()[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4), word(8), word(12), word(16)], [1_000_000_000, 0, 0x4547_0000, 0xc000_0000, 32]);
    }
}
