//! The checks as text, in groups.

use super::{Check, CheckState, Checks};
use crate::ctl::output::{Colour, Show, View, count};
use std::fmt::Write;

impl Show for Checks {
    fn text(&self, view: View) -> String {
        let mut out = String::new();
        let mut group = "";
        for check in &self.checks {
            if check.group != group {
                group = check.group;
                let _ = writeln!(out, "{}", view.paint(Colour::Heading, group));
            }
            line(check, view, &mut out);
        }
        let of = |state: CheckState| self.checks.iter().filter(|check| check.state == state).count();
        let (failed, warnings) = (of(CheckState::Failed), of(CheckState::Warning));
        let text = match (failed, warnings) {
            (0, 0) => view.paint(Colour::Good, "Everything is as it should be."),
            (0, n) => view.paint(Colour::Doubtful, &format!("Egret works; {}.", count(n, "warning", "warnings"))),
            (n, m) => view.paint(
                Colour::Bad,
                &format!("{}, {}.", count(n, "check failed", "checks failed"), count(m, "warning", "warnings")),
            ),
        };
        let _ = writeln!(out, "{text}");
        if !self.is_installed {
            let _ = writeln!(out, "Egret is not installed here yet; docs/install.md says how.");
        }
        out
    }
}

/// Adds a check as a line, and its remedy.
pub(in crate::ctl) fn line(check: &Check, view: View, out: &mut String) {
    let (colour, sign) = match check.state {
        CheckState::Ok => (Colour::Good, "ok     "),
        CheckState::Unknown => (Colour::Doubtful, "unknown"),
        CheckState::Warning => (Colour::Doubtful, "warning"),
        CheckState::Failed => (Colour::Bad, "failed "),
    };
    let _ = writeln!(out, "  {}  {}: {}", view.paint(colour, sign), check.name, check.found);
    if !check.remedy.is_empty() {
        let _ = writeln!(out, "           remedy: {}", check.remedy);
    }
}
