//! Which ICMPv6 messages a raw socket hears.
// nix has no such socket option.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc::{self, c_int, socklen_t};
use std::os::fd::{AsRawFd, OwnedFd};

/// `ICMPV6_FILTER`, include/uapi/linux/icmpv6.h.
const ICMPV6_FILTER: c_int = 1;

/// Lets a raw ICMPv6 socket hear messages of these types and no others (RFC 3542, section 3.2).
pub fn hear_only(socket: &OwnedFd, kinds: &[u8]) -> nix::Result<()> {
    // `struct icmp6_filter`: a bit that is set keeps a type out.
    let mut filter = [u32::MAX; 8];
    kinds.iter().for_each(|kind| filter[usize::from(kind / 32)] &= !(1 << (kind % 32)));
    let length = size_of_val(&filter) as socklen_t;
    // SAFETY: the kernel reads `length` bytes at the pointer, which is to as many, and keeps no hold of them.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_ICMPV6, ICMPV6_FILTER, (&raw const filter).cast(), length)
    };
    Errno::result(result).map(drop)
}
