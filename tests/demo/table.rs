//! The table that the demo shows.

use lab::{Pod, Pods};
use std::net::IpAddr;

const HEADINGS: [&str; 6] = ["POD", "NODE", "DESTINATION", "WITHOUT", "WITH", ""];

/// One pod, one destination.
pub struct Row {
    cells: [String; 6],
    right: bool,
}

impl Row {
    /// A row without answers.
    pub fn new(pod: &Pod, server: IpAddr) -> Row {
        let kind = match pod.node.spec.pods {
            Pods::Routed => "ptp",
            Pods::Bridged => "bridge",
        };
        let node = format!("{} ({kind})", pod.node.name);
        Row { cells: [pod.name.clone(), node, server.to_string(), "-".into(), "-".into(), String::new()], right: true }
    }

    /// What was seen without the policy, and what should have been.
    pub fn without(mut self, seen: &str, promised: &str) -> Row {
        self.fill(3, seen, promised);
        self
    }

    /// What was seen with the policy, and what should have been.
    pub fn with(mut self, seen: &str, promised: &str) -> Row {
        self.fill(4, seen, promised);
        self
    }

    /// A remark at the row's end.
    pub fn note(mut self, text: &str) -> Row {
        if self.right {
            self.cells[5] = text.to_owned();
        }
        self
    }

    fn fill(&mut self, cell: usize, seen: &str, promised: &str) {
        self.cells[cell] = seen.to_owned();
        if seen != promised {
            self.right = false;
            self.cells[5] = format!("WRONG: promised was {promised}");
        }
    }
}

/// The rows.
pub struct Table(Vec<Row>);

impl Table {
    /// Without rows.
    pub fn new() -> Table {
        Table(Vec::new())
    }

    /// One more row.
    pub fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Whether every row is as promised.
    pub fn is_right(&self) -> bool {
        self.0.iter().all(|r| r.right)
    }

    /// Writes it to stdout, each column as wide as it needs.
    pub fn print(&self) {
        let headings = HEADINGS.map(str::to_owned);
        let rows = || std::iter::once(&headings).chain(self.0.iter().map(|r| &r.cells));
        let widths: Vec<usize> =
            (0..HEADINGS.len()).map(|i| rows().map(|r| r[i].chars().count()).max().unwrap_or(0)).collect();
        for (i, row) in rows().enumerate() {
            let line: Vec<String> = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}")).collect();
            println!("  {}", line.join("  ").trim_end());
            if i == 0 {
                println!("  {}", widths[..5].iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>().join("  "));
            }
        }
    }
}
