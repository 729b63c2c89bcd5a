//! What the machine itself does to tests. It loses packets: all namespaces share one queue a CPU between a veth's two
//! ends, and one table of neighbours a family. And it stalls: a processor that others use lets no thread run in time.
//! A test that counts single packets or measures times must know.

use std::cell::Cell;
use std::fs;
use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the thread that notices stalls wants to run.
const TICK: Duration = Duration::from_millis(5);
/// A thread that runs this late is one of a busy machine, and no stall.
const USUAL: Duration = Duration::from_millis(20);
/// After so long a stall nothing can be said of a packet that was not answered in time.
const STANDSTILL: Duration = Duration::from_millis(60);

/// The ends of stalls, and how long each was.
static STALLS: Mutex<Vec<(Instant, Duration)>> = Mutex::new(Vec::new());

thread_local! {
    /// When this thread's test began.
    static BEGIN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Begins to notice stalls for the test of this thread.
pub fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(thread::spawn(notice_stalls)));
    BEGIN.set(Some(Instant::now()));
}

/// The longest time for which a thread that wanted to run could not, since this thread's test began.
pub fn longest_stall() -> Duration {
    BEGIN.get().map_or(Duration::ZERO, longest_stall_since)
}

fn longest_stall_since(begin: Instant) -> Duration {
    stalls().iter().filter(|(end, _)| *end >= begin).map(|(_, stall)| *stall).max().unwrap_or_default()
}

fn stalls() -> MutexGuard<'static, Vec<(Instant, Duration)>> {
    STALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn notice_stalls() {
    loop {
        let begin = Instant::now();
        thread::sleep(TICK);
        let late = begin.elapsed().saturating_sub(TICK);
        if late > USUAL {
            stalls().push((Instant::now(), late));
        }
    }
}

/// How many packets found one of them full, since the machine started: `softnet_stat`'s second column
/// (`softnet_seq_show`, net/core/net-procfs.c; the limit is `net.core.netdev_max_backlog`), and the last of
/// `ndisc_cache`'s and `arp_cache`'s (`table_fulls`, `neigh_stat_seq_show`, net/core/neighbour.c; the limit is
/// `gc_thresh3`, 1024). Both limits are the machine's, not a namespace's, and so not a test's to change.
pub fn dropped() -> u64 {
    column("/proc/net/softnet_stat", 1)
        + column("/proc/net/stat/ndisc_cache", 12)
        + column("/proc/net/stat/arp_cache", 12)
}

/// The sum of a column of hexadecimal numbers; a line of headings counts as 0.
fn column(file: &str, number: usize) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(|l| u64::from_str_radix(l.split_whitespace().nth(number)?, 16).ok()).sum()
}

/// Whether notes are printed. Tests print them beside a failure.
static NOTES: AtomicBool = AtomicBool::new(true);

/// Prints no notes from now on, for a program whose output people read.
pub fn print_no_notes() {
    NOTES.store(false, Relaxed);
}

fn note(text: &str) {
    if NOTES.load(Relaxed) {
        println!("{text}");
    }
}

/// Asks, and asks again if there was no answer while the machine was losing packets or stood still.
pub fn asked<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..5 {
        let (begin, before) = (Instant::now(), dropped());
        match ask() {
            Err(e) if dropped() > before || longest_stall_since(begin) > STANDSTILL => {
                let (lost, stall) = (dropped() - before, longest_stall_since(begin));
                note(&format!("asked again ({e}): the machine lost {lost} packets, and no thread ran for {stall:?}"));
            }
            Err(e) => {
                note(&format!("not answered ({e}): no thread ran for {:?}", longest_stall_since(begin)));
                return Err(e);
            }
            answer => return answer,
        }
    }
    ask()
}

/// Binds a socket to a port that this test, and nobody else in the namespace, has had before. A process that another
/// test is just starting has copies of all sockets until it executes its program, so the port may be in use for some
/// milliseconds more.
pub fn bound<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..100 {
        match bind() {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => thread::sleep(Duration::from_millis(10)),
            socket => return socket,
        }
    }
    bind()
}

/// Receives a datagram as [`uninterrupted`] does.
///
/// # Errors
/// Those of the call; no datagram came within the socket's timeout.
#[expect(clippy::disallowed_methods, reason = "the function that the others are to use")]
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<usize> {
    uninterrupted(|| socket.recv(buffer))
}

/// Calls until the call is not interrupted. The kernel may interrupt a `recv` with a timeout without any signal: it wakes a
/// thread for work of its own (`TIF_NOTIFY_SIGNAL`), and does not restart such a call (`sock_intr_errno`,
/// include/net/sock.h).
///
/// # Errors
/// Those of the call.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
