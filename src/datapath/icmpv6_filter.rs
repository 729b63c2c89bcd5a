//! A raw socket's filter by ICMPv6 type.
// nix has no such socket option.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc::{self, c_int, socklen_t};
use std::os::fd::{AsRawFd, OwnedFd};

/// `ICMPV6_FILTER`, include/uapi/linux/icmpv6.h.
const ICMPV6_FILTER: c_int = 1;

/// Makes a raw ICMPv6 socket accept only messages of these types (RFC 3542, section 3.2).
pub fn accept_types(socket: &OwnedFd, kinds: &[u8]) -> nix::Result<()> {
    // `struct icmp6_filter`: a bit that is set blocks a type.
    let mut filter = [u32::MAX; 8];
    kinds.iter().for_each(|kind| filter[usize::from(kind / 32)] &= !(1 << (kind % 32)));
    let length = size_of_val(&filter) as socklen_t;
    // SAFETY: the pointer is to `length` bytes; the kernel copies them and keeps no pointer.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_ICMPV6, ICMPV6_FILTER, (&raw const filter).cast(), length)
    };
    Errno::result(result).map(drop)
}
