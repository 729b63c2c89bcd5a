//! The way of a packet as text.

use super::way::{Hop, PacketOutcome, Traced};
use crate::ctl::output::{Colour, Show, View};
use crate::ctl::table::{Cell, Table};
use crate::model::trace::TraceStep;
use std::fmt::Write;

impl Show for Traced {
    fn text(&self, view: View) -> String {
        let colour = match self.outcome {
            PacketOutcome::Answered => Colour::Good,
            PacketOutcome::NotAnswered | PacketOutcome::NotSent => Colour::Doubtful,
            PacketOutcome::Rejected | PacketOutcome::Dropped | PacketOutcome::Lost => Colour::Bad,
        };
        let Traced { pod, node, protocol, source, destination, message, .. } = self;
        let mut out = format!("pod {pod} on node {node}: {protocol} {source} -> {destination}\n");
        let _ = writeln!(out, "{}", view.paint(colour, message));
        if let Some(remedy) = &self.remedy {
            let _ = writeln!(out, "remedy: {remedy}");
        }
        if let Some(egress) = &self.egress {
            let _ = writeln!(out, "it left from {}, port {}, on node {}", egress.address, egress.port, egress.node);
        }
        for hop in &self.way {
            out += "\n";
            out += &text(hop, view);
        }
        if !self.not_traced.is_empty() || self.is_incomplete {
            out += "\n";
        }
        for not_traced in &self.not_traced {
            let _ = writeln!(out, "node {} was not traced: {}", not_traced.node, not_traced.why);
        }
        if self.is_incomplete {
            out += "Steps are missing: the kernel told more than could be read. Try again.\n";
        }
        if let Some(explanation) = &self.explanation {
            let _ = write!(out, "\nkubectl egret why says:\n{explanation}");
        }
        out
    }
}

fn text(hop: &Hop, view: View) -> String {
    let what = if hop.is_reply { "reply" } else { "packet" };
    let mut head = format!("{what} on node {}", hop.node);
    if let Some(input) = hop.input() {
        let _ = write!(head, ", in by {input}");
    }
    if let Some(output) = hop.output() {
        let _ = write!(head, ", out by {output}");
    }
    if let (Some(first), Some(last)) = (hop.first(), hop.last()) {
        let _ = write!(head, ": {} -> {}", first.from(), first.to());
        if (first.from(), first.to()) != (last.from(), last.to()) {
            let _ = write!(head, ", now {} -> {}", last.from(), last.to());
        }
    }
    let mut table = Table::new(["TABLE", "CHAIN", "RULE"]);
    for step in hop.steps.iter().filter(|step| view.wide || matters(step)) {
        table.row([step.table.as_str().into(), step.chain.as_str().into(), rule(step)]);
    }
    format!("{}\n{}", view.paint(Colour::Heading, &head), table.text(view, 2))
}

/// Rules of Egret's, and what drops. `-o wide` shows other programs' chains and policies, too.
fn matters(step: &TraceStep) -> bool {
    step.is_drop() || step.is_of_egret() && step.rule.is_some()
}

fn rule(step: &TraceStep) -> Cell {
    let text = match &step.rule {
        Some(rule) if rule.starts_with("handle ") => format!("{rule}: {}", step.verdict),
        Some(rule) => rule.clone(),
        None if step.verdict == "return" => "(end of the chain)".to_owned(),
        None => format!("policy {}", step.verdict),
    };
    if step.is_drop() { Cell::coloured(Colour::Bad, text) } else { text.into() }
}
