//! bpf(2). This is the one place in Egret that needs `unsafe`: no maintained crate has a safe call of bpf(2) without a
//! loader of its own, and the kernel takes addresses as numbers.
#![allow(unsafe_code, reason = "bpf(2) takes addresses as numbers, and returns file descriptors")]

use nix::libc;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Commands, `enum bpf_cmd`, include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    MapCreate = 0,
    MapLookup = 1,
    MapUpdate = 2,
    MapDelete = 3,
    MapNextKey = 4,
    ProgLoad = 5,
    ProgRun = 10,
    ProgQuery = 16,
    MapLookupAndDelete = 21,
    LinkCreate = 28,
}

/// The length of `union bpf_attr` as it is sent, bytes: what lies behind is zero for the kernel.
const LENGTH: usize = 144;

/// `union bpf_attr` of one call. It borrows the buffers whose addresses it holds.
pub(crate) struct Attributes<'a> {
    bytes: [u8; LENGTH],
    borrowed: std::marker::PhantomData<&'a mut [u8]>,
}

impl<'a> Attributes<'a> {
    pub(crate) fn new() -> Self {
        Attributes { bytes: [0; LENGTH], borrowed: std::marker::PhantomData }
    }

    pub(crate) fn number(mut self, at: usize, value: u32) -> Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    pub(crate) fn long(mut self, at: usize, value: u64) -> Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    /// The address of a buffer that the kernel reads.
    pub(crate) fn input(self, at: usize, buffer: &'a [u8]) -> Self {
        self.long(at, buffer.as_ptr() as u64)
    }

    /// The address of a buffer that the kernel writes. The caller makes it as long as the command demands.
    pub(crate) fn output(self, at: usize, buffer: &'a mut [u8]) -> Self {
        self.long(at, buffer.as_mut_ptr() as u64)
    }

    /// A number that the kernel wrote.
    pub(crate) fn answer(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    /// Calls the kernel.
    ///
    /// # Errors
    /// As bpf(2).
    pub(crate) fn call(&mut self, command: Command) -> io::Result<i32> {
        // SAFETY: the attributes outlive the call, and so do the buffers, which they borrow.
        let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_long, self.bytes.as_mut_ptr(), LENGTH) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
    }

    /// As [`call`](Self::call), of a command that returns a new file descriptor.
    pub(crate) fn open(&mut self, command: Command) -> io::Result<OwnedFd> {
        self.call(command).map(own)
    }
}

/// Takes a file descriptor that the kernel has just made for this process.
pub(crate) fn own(fd: i32) -> OwnedFd {
    // SAFETY: the kernel made it for this call, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The address of a buffer, for a structure that another call hands to the kernel.
pub(crate) fn address(buffer: &[u8]) -> u64 {
    buffer.as_ptr() as u64
}
