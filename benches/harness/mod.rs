//! What measurements have in common: the machine, medians, tables in which each figure stands beside another of the
//! same run.
#![allow(dead_code, reason = "every measurement compiles its own copy, and uses part of it")]

pub mod api;
pub mod call;
pub mod cluster;
pub mod connections;
pub mod pods;
pub mod probers;

use lab::{Daemon, Lab, Node};
use std::fs;
use std::time::{Duration, Instant};

/// Prints what is measured, and on what. Until the end of this program no lab of another one begins.
pub fn begin(what: &str) {
    std::mem::forget(lab::turn::alone());
    let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpus = line("/proc/cpuinfo");
    let model = cpus.lines().find_map(|l| l.strip_prefix("model name")).map(|l| l.trim_start_matches([' ', '\t', ':']));
    println!("\n# {what}");
    println!(
        "Linux {}, {} CPUs ({}), load {} at the beginning\n",
        line("/proc/sys/kernel/osrelease"),
        std::thread::available_parallelism().map_or(0, usize::from),
        model.unwrap_or("unknown"),
        line("/proc/loadavg").split(' ').next().unwrap_or_default(),
    );
}

/// The middle of the values, which are not empty.
pub fn median<T: PartialOrd + Copy>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).expect("measured values are ordered"));
    sorted[sorted.len() / 2]
}

/// The smallest of the values, which are not empty.
pub fn least<T: PartialOrd + Copy>(values: &[T]) -> T {
    values.iter().copied().reduce(|a, b| if b < a { b } else { a }).expect("something was measured")
}

/// What a daemon has in memory, bytes: fields of `/proc/PID/status`, proc_pid_status(5).
#[derive(Clone, Copy)]
pub struct Memory {
    /// `VmRSS`
    pub resident: f64,
    /// `RssFile`: of that, pages of the program's own file.
    pub file: f64,
    /// `VmHWM`: the most that was resident.
    pub peak: f64,
}

impl Memory {
    /// What `daemon` has now.
    pub fn of(daemon: &Daemon) -> Self {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid().expect("it runs"))).expect("/proc");
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).expect("a field of /proc/PID/status");
            let kib: Option<f64> = line.split_whitespace().next().and_then(|n| n.parse().ok());
            kib.expect("a number") * 1024.0
        };
        Memory { resident: field("VmRSS:"), file: field("RssFile:"), peak: field("VmHWM:") }
    }
}

/// Starts the daemon, and waits until it answers plugins: then the kernel is in sync.
pub fn start(lab: &Lab, node: &Node) -> (Duration, Daemon) {
    let _ = fs::remove_file(node.cni_socket());
    let begin = Instant::now();
    let daemon = lab.start_node(&node.name);
    while !node.cni_socket().exists() {
        assert!(daemon.runs(), "the daemon has ended:\n{}", daemon.log());
        assert!(begin.elapsed() < Duration::from_secs(60), "not ready in a minute:\n{}", daemon.log());
        std::thread::sleep(Duration::from_micros(200));
    }
    (begin.elapsed(), daemon)
}

/// Millions of bytes.
pub fn mb(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}

/// Milliseconds.
pub fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// What must hold of a ratio.
#[derive(Clone, Copy)]
pub enum Bound {
    /// Nothing: it is shown for comparison.
    None,
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

/// Prints a table: what, its figure, and its ratio to something of the same run.
#[derive(Default)]
pub struct Table {
    rows: Vec<[String; 4]>,
}

impl Table {
    /// Adds a row. `ratio` is to what the caption of the table says.
    pub fn row(&mut self, what: &str, figure: String, ratio: f64, bound: Bound) {
        let verdict = match bound {
            Bound::None => String::new(),
            Bound::AtMost(most) => format!("<= {most}: {}", if ratio <= most { "kept" } else { "MISSED" }),
            Bound::AtLeast(least) => format!(">= {least}: {}", if ratio >= least { "kept" } else { "MISSED" }),
        };
        self.rows.push([what.to_owned(), figure, format!("{ratio:.2}"), verdict]);
    }

    /// Prints it, in Markdown.
    pub fn print(self, head: [&str; 3]) {
        let mut rows = vec![[head[0].to_owned(), head[1].to_owned(), head[2].to_owned(), "bound".to_owned()]];
        rows.extend(self.rows);
        let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 4] = std::array::from_fn(width);
        for (at, row) in rows.iter().enumerate() {
            let [a, b, c, d] = row;
            let [w, x, y, z] = widths;
            println!("| {a:w$} | {b:>x$} | {c:>y$} | {d:z$} |");
            if at == 0 {
                println!("|{}|{}:|{}:|{}|", "-".repeat(w + 2), "-".repeat(x + 1), "-".repeat(y + 1), "-".repeat(z + 2));
            }
        }
        println!();
    }
}
