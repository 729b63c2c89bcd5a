//! Settings of glibc's allocator, so that freed memory goes back to the kernel.
//!
//! With its defaults, glibc keeps what a big file took to read, once for each thread that read one: the threshold
//! above which it returns memory rises to the largest block so far, and each thread has an arena of its own. With
//! 5,000 nodes and 10,000 policies that is 8 MB of 27, after a few changes.
//!
//! There is no safe interface to these settings, hence the exception for this file.
#![allow(unsafe_code)]

#[cfg(target_env = "gnu")]
use nix::libc;

/// Blocks of at least this size, in bytes, are mapped separately, and unmapped when they are freed.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD_BYTES: libc::c_int = 64 << 10;
/// Free memory at the heap's end that is kept, in bytes.
#[cfg(target_env = "gnu")]
const TRIM_THRESHOLD_BYTES: libc::c_int = 128 << 10;

/// Makes the allocator return memory early, and use one arena. Call it before the first thread starts; later it has
/// less effect. It does nothing with another C library.
pub fn give_back_early() {
    #[cfg(target_env = "gnu")]
    for (setting, value) in [
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
    ] {
        // SAFETY: mallopt takes two integers, rejects unknown settings, and takes its own lock.
        unsafe { libc::mallopt(setting, value) };
    }
}

/// Returns free whole pages between blocks that are in use to the kernel. It walks the whole heap, which takes some
/// milliseconds if that is large.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes a number and its own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
