//! Packets that the machine itself lost: all namespaces share one queue a CPU between a veth's two ends, and one table
//! of neighbours a family. A test that counts single packets must know.

use std::fs;
use std::io;

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

/// Asks, and asks again if there was no answer while the machine was losing packets.
pub fn asked<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..5 {
        let before = dropped();
        match ask() {
            Err(_) if dropped() > before => {}
            answer => return answer,
        }
    }
    ask()
}
