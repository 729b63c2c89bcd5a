//! How memory is given back that is not needed any more.
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

/// Gives back the pages of the program's own file that were mapped so far. What only the start needed is not mapped
/// again; the rest comes back from the page cache when it is next executed or read, sixteen pages at a time.
///
/// Only segments that cannot be written to are given back (elf(5), `PT_LOAD` without `PF_W`): they are as they are in the
/// file. What relocations changed lies in the others.
pub fn give_program_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: dl_iterate_phdr takes a function and something to hand on, which is not used.
    unsafe {
        libc::dl_iterate_phdr(Some(give_object_back), std::ptr::null_mut());
    }
}

/// Gives back the segments of one object of the process that cannot be written to.
#[cfg(target_env = "gnu")]
unsafe extern "C" fn give_object_back(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    // SAFETY: the C library hands out one valid object, whose headers are mapped as long as it is.
    let (base, headers) = unsafe {
        let object = &*object;
        (object.dlpi_addr, std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)))
    };
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096) as u64;
    for segment in headers.iter().filter(|s| s.p_type == libc::PT_LOAD && s.p_flags & libc::PF_W == 0) {
        // Whole pages of the segment alone: the last one may be shared with what can be written to.
        let start = base + segment.p_vaddr.next_multiple_of(page);
        let end = base + (segment.p_vaddr + segment.p_memsz) / page * page;
        if end > start {
            // SAFETY: the range is a private mapping of a file that nothing has written to, so that the next access
            // finds in it what was there. It is mapped by the loader and never unmapped.
            unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        }
    }
    0
}
