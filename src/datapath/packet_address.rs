//! The address of a packet socket: an interface and a protocol.
// nix reads such addresses from the kernel but has no safe way to construct one.
#![allow(unsafe_code)]

use nix::libc::{AF_PACKET, sockaddr_ll};
use nix::sys::socket::{LinkAddr, SockaddrLike};

/// The address of interface `ifindex` for frames of `ethertype`, to bind to or to send to. `None` if the index is out
/// of range.
pub fn packet_address(ifindex: u32, ethertype: u16) -> Option<LinkAddr> {
    let address = sockaddr_ll {
        sll_family: u16::try_from(AF_PACKET).ok()?,
        sll_protocol: ethertype.to_be(),
        sll_ifindex: i32::try_from(ifindex).ok()?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = u32::try_from(size_of::<sockaddr_ll>()).ok()?;
    // SAFETY: the pointer is to a complete sockaddr_ll of the given length, and from_raw copies it.
    unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_contains_the_interface_and_the_protocol() {
        let address = packet_address(7, 0x0806).unwrap();
        assert_eq!((address.ifindex(), u16::from_be(address.protocol())), (7, 0x0806));
        assert!(packet_address(u32::MAX, 0x0806).is_none());
    }
}
