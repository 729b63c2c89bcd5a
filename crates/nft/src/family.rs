//! IP versions.

use std::fmt;
use std::net::IpAddr;

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both versions.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The version of an address.
    pub fn of(address: &IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// Whether an address is of this version.
    pub fn has(self, address: &IpAddr) -> bool {
        Family::of(address) == self
    }

    /// The length of an address, bits.
    pub fn bits(self) -> u8 {
        match self {
            Family::V4 => 32,
            Family::V6 => 128,
        }
    }

    /// `AF_INET` or `AF_INET6`, which fit the one byte that netlink headers have for them.
    pub fn number(self) -> u8 {
        match self {
            Family::V4 => nix::libc::AF_INET as u8,
            Family::V6 => nix::libc::AF_INET6 as u8,
        }
    }
}

/// `IPv4` or `IPv6`.
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        })
    }
}
