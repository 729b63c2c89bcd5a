//! Socket filters by a datagram's length, by its bytes and by a netlink attribute: classic BPF (`SO_ATTACH_FILTER`, socket(7)). A rejected datagram does not
//! wake the socket's reader.
// nix has no such socket option.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc::{self, c_void, sock_filter, sock_fprog, socklen_t};
use std::os::fd::{AsRawFd, OwnedFd};

/// Instructions, include/uapi/linux/bpf_common.h: `BPF_LD | BPF_W | BPF_LEN`, `BPF_LD | BPF_W | BPF_ABS`, `BPF_JMP | BPF_JGT | BPF_K`,
/// `BPF_RET | BPF_K`.
const LOAD_LENGTH: u16 = 0x80;
const LOAD_WORD_AT: u16 = 0x20;
const JUMP_IF_GREATER: u16 = 0x25;
const RETURN: u16 = 0x06;
/// `BPF_LD | BPF_IMM`, `BPF_LDX | BPF_IMM`, `BPF_LD | BPF_B | BPF_ABS`, `BPF_JMP | BPF_JEQ | BPF_K`, `BPF_MISC | BPF_TAX`,
/// `BPF_LD | BPF_W | BPF_IND`, `BPF_ALU | BPF_AND | BPF_K`.
const LOAD: u16 = 0x00;
const LOAD_INDEX: u16 = 0x01;
const LOAD_BYTE_AT: u16 = 0x30;
const JUMP_IF_EQUAL: u16 = 0x15;
const INDEX_TO_FOUND: u16 = 0x07;
const LOAD_WORD_BEHIND_INDEX: u16 = 0x40;
const AND: u16 = 0x54;
/// `SKF_AD_OFF + SKF_AD_NLATTR`, include/uapi/linux/filter.h: the offset of the first attribute of the kind in the index
/// register, from the offset in the accumulator on; 0 if there is none.
const FIND_ATTRIBUTE: u32 = (-0x1000i32 + 12) as u32;

/// Makes a socket accept only datagrams of more than `bytes` bytes. The length counts from where a raw socket's data
/// begin.
pub fn accept_longer_than(socket: &OwnedFd, bytes: u32) -> nix::Result<()> {
    attach(socket, bytes, true)
}

/// Makes a socket accept only datagrams of at most `bytes` bytes.
pub fn accept_up_to(socket: &OwnedFd, bytes: u32) -> nix::Result<()> {
    attach(socket, bytes, false)
}

/// Makes a raw socket accept only datagrams whose four bytes at the offset `at` are these.
pub fn accept_bytes_at(socket: &OwnedFd, at: u32, bytes: [u8; 4]) -> nix::Result<()> {
    // The kernel rejects a datagram that is too short for the load (`BPF_LD | BPF_ABS`, filter.txt).
    let steps = [
        step(LOAD_WORD_AT, 0, 0, at),
        step(JUMP_IF_EQUAL, 0, 1, u32::from_be_bytes(bytes)),
        accept(true),
        accept(false),
    ];
    attach_program(socket, steps)
}

/// Makes a netlink socket accept only datagrams whose attribute `kind`, four bytes in network order, equals `value` in the
/// bits of `mask`. The attributes begin at the offset `first`. A datagram without the attribute is rejected.
pub fn accept_attribute(socket: &OwnedFd, (first, kind): (u32, u32), value: u32, mask: u32) -> nix::Result<()> {
    let steps = [
        step(LOAD, 0, 0, first),
        step(LOAD_INDEX, 0, 0, kind),
        step(LOAD_BYTE_AT, 0, 0, FIND_ATTRIBUTE),
        step(JUMP_IF_EQUAL, 4, 0, 0),
        step(INDEX_TO_FOUND, 0, 0, 0),
        // Behind the attribute's header.
        step(LOAD_WORD_BEHIND_INDEX, 0, 0, 4),
        step(AND, 0, 0, mask),
        step(JUMP_IF_EQUAL, 1, 0, value & mask),
        accept(false),
        accept(true),
    ];
    attach_program(socket, steps)
}

fn step(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// The return value is the number of bytes to keep.
fn accept(accepts: bool) -> sock_filter {
    step(RETURN, 0, 0, if accepts { u32::MAX } else { 0 })
}

fn attach(socket: &OwnedFd, bytes: u32, longer: bool) -> nix::Result<()> {
    let steps = [step(LOAD_LENGTH, 0, 0, 0), step(JUMP_IF_GREATER, 0, 1, bytes), accept(longer), accept(!longer)];
    attach_program(socket, steps)
}

fn attach_program<const N: usize>(socket: &OwnedFd, mut steps: [sock_filter; N]) -> nix::Result<()> {
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
