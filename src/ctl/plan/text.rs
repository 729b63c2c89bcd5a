//! The plan as text.

use super::{Change, Kind, Plan, PodsChange};
use crate::ctl::output::{Colour, Show, View, count, few};
use std::fmt::Write;

/// How many pods of one change are named, and how many changes of one kind are shown.
const NAMED: usize = 5;
const SHOWN: usize = 20;

impl Show for Plan {
    fn text(&self, view: View) -> String {
        let mut out = String::new();
        let limit = if view.wide { usize::MAX } else { SHOWN };
        for rejected in &self.rejected {
            let _ = writeln!(out, "{} {rejected}", view.paint(Colour::Bad, "rejected"));
        }
        self.pods.iter().take(limit).for_each(|change| pods(change, view, &mut out));
        rest(self.pods.len(), limit, &mut out);
        for changes in [&self.policies, &self.gateways, &self.moves] {
            changes.iter().take(limit).for_each(|change| one(change, view, &mut out));
            rest(changes.len(), limit, &mut out);
        }
        let _ = writeln!(out, "{}", self.summary());
        out
    }
}

fn rest(all: usize, limit: usize, out: &mut String) {
    if all > limit {
        let _ = writeln!(out, "  … {} more; -o wide shows all", all - limit);
    }
}

fn pods(change: &PodsChange, view: View, out: &mut String) {
    let ways = |ways: &[super::egress::Egress]| match ways {
        [] => "the node's address".to_owned(),
        some => some.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
    };
    let (sign, colour) = match change.kind {
        Kind::Gain => ("+", Colour::Good),
        Kind::Change => ("~", Colour::Doubtful),
        Kind::Lose => ("-", Colour::Bad),
    };
    let most = if view.wide { usize::MAX } else { NAMED };
    let _ = writeln!(
        out,
        "{} {}: {} -> {}",
        view.paint(colour, sign),
        count(change.pods.len(), "pod", "pods"),
        ways(&change.from),
        ways(&change.to)
    );
    let _ = writeln!(out, "    {}", few(&change.pods, most));
    let _ = writeln!(out, "    {}", change.connections);
}

fn one(change: &Change, view: View, out: &mut String) {
    let (sign, colour) = if change.worse { ("!", Colour::Bad) } else { ("~", Colour::Good) };
    let _ = writeln!(out, "{} {} {}", view.paint(colour, sign), change.object, change.message);
}

impl Plan {
    fn summary(&self) -> String {
        let rejected = match self.rejected.len() {
            0 => String::new(),
            n => format!(" {} would be rejected.", count(n, "object", "objects")),
        };
        if !self.changes_anything() {
            return format!("Nothing changes.{rejected}");
        }
        let of = |kind: Kind| self.pods.iter().filter(|c| c.kind == kind).map(|c| c.pods.len()).sum::<usize>();
        format!(
            "Plan: {} an egress IP, {} and {} one; {}, {} and {}.{rejected}",
            count(of(Kind::Gain), "pod gains", "pods gain"),
            count(of(Kind::Change), "changes", "change"),
            count(of(Kind::Lose), "loses", "lose"),
            count(self.policies.len(), "policy changes", "policies change"),
            count(self.gateways.len(), "gateway", "gateways"),
            count(self.moves.len(), "egress IP moves", "egress IPs move"),
        )
    }
}
