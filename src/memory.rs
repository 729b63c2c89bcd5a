//! How the C library's allocator is told to give memory back.
//!
//! Left to itself, glibc keeps what a big file took to read, and keeps it once for each thread that ever read one: its
//! threshold for giving memory back rises to the biggest block it has seen, and each thread has an arena of its own.
//! With 5,000 nodes and 10,000 policies that is 8 MB of 27, after a few changes.
//!
//! These settings cannot be made through a safe interface, hence the exception for this file.
#![allow(unsafe_code)]

#[cfg(target_env = "gnu")]
use nix::libc;

/// Blocks from this size on are mapped on their own, and unmapped when they are freed; bytes.
#[cfg(target_env = "gnu")]
const MAPPED_FROM: libc::c_int = 64 << 10;
/// Free memory at the heap's end that is kept; bytes.
#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 128 << 10;

/// Makes the allocator give memory back early, and use one arena. To be called before the first thread is started;
/// later it has less effect. With another C library it does nothing.
pub fn give_back_early() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, MAPPED_FROM), (libc::M_TRIM_THRESHOLD, KEPT)]
    {
        // SAFETY: mallopt takes two integers, refuses what it does not know, and takes its own lock.
        unsafe { libc::mallopt(setting, value) };
    }
}

/// Gives back what lies free between blocks that are in use: whole pages only. It looks at the whole heap, which takes
/// some milliseconds where there is much of it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
