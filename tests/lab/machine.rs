//! Packets that the machine itself lost: all namespaces share one queue a CPU between a veth's two ends, and a
//! neighbour's test or measurement can fill it. A test that counts single packets must know.

use std::fs;
use std::io::{self, ErrorKind};

/// How many packets found the queues full, since the machine started: the second column of `softnet_stat`,
/// hexadecimal, a line each CPU (`softnet_seq_show`, net/core/net-procfs.c). `net.core.netdev_max_backlog` is the
/// limit; it has no namespace, and so is not a test's to change.
pub fn dropped() -> u64 {
    let text = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    let column = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok();
    text.lines().filter_map(column).sum()
}

/// Asks, and asks again if there was no answer while the machine was losing packets.
pub fn asked<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..5 {
        let before = dropped();
        match ask() {
            Err(e) if matches!(e.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock) && dropped() > before => {}
            answer => return answer,
        }
    }
    ask()
}
