//! A socket filter by a datagram's length: classic BPF (`SO_ATTACH_FILTER`, socket(7)). A rejected datagram does not
//! wake the socket's reader.
// nix has no such socket option.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc::{self, c_void, sock_filter, sock_fprog, socklen_t};
use std::os::fd::{AsRawFd, OwnedFd};

/// Instructions, include/uapi/linux/bpf_common.h: `BPF_LD | BPF_W | BPF_LEN`, `BPF_JMP | BPF_JGT | BPF_K`,
/// `BPF_RET | BPF_K`.
const LOAD_LENGTH: u16 = 0x80;
const JUMP_IF_GREATER: u16 = 0x25;
const RETURN: u16 = 0x06;

/// Makes a socket accept only datagrams of more than `bytes` bytes. The length counts from where a raw socket's data
/// begin.
pub fn accept_longer_than(socket: &OwnedFd, bytes: u32) -> nix::Result<()> {
    attach(socket, bytes, true)
}

/// Makes a socket accept only datagrams of at most `bytes` bytes.
pub fn accept_up_to(socket: &OwnedFd, bytes: u32) -> nix::Result<()> {
    attach(socket, bytes, false)
}

fn attach(socket: &OwnedFd, bytes: u32, longer: bool) -> nix::Result<()> {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    // The return value is the number of bytes to keep.
    let accept = |accepts: bool| step(RETURN, 0, 0, if accepts { u32::MAX } else { 0 });
    let mut steps = [step(LOAD_LENGTH, 0, 0, 0), step(JUMP_IF_GREATER, 0, 1, bytes), accept(longer), accept(!longer)];
    let program = sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: the kernel copies `program` and the steps that it points to, and keeps no pointer to them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast::<c_void>(),
            size_of_val(&program) as socklen_t,
        )
    };
    Errno::result(result).map(drop)
}
