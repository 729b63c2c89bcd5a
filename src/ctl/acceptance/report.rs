//! The checks of a test, shown as they come.

use super::super::check::text::line;
use super::super::check::{Check, CheckState};
use crate::api::AddressPair;
use crate::ctl::output::{Colour, Show, View, count};
use serde::Serialize;
use std::time::Instant;

/// The result.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The server.
    pub server: String,
    /// The namespace of the test; empty if it was not made.
    pub namespace: String,
    /// The egress IPs that the test had.
    pub egress_ips: Vec<AddressPair>,
    /// The checks, in their order.
    pub checks: Vec<Check>,
    /// How long it took, seconds.
    pub seconds: u64,
}

impl Report {
    /// Whether a promise was broken.
    pub fn has_failed(&self) -> bool {
        self.of(CheckState::Failed) > 0
    }

    fn of(&self, state: CheckState) -> usize {
        self.checks.iter().filter(|check| check.state == state).count()
    }
}

/// Collects the checks.
pub(super) struct Reporter<'a> {
    report: Report,
    begun: Instant,
    show: Option<super::Show<'a>>,
}

impl<'a> Reporter<'a> {
    pub(super) fn new(server: String, show: Option<super::Show<'a>>) -> Self {
        let report =
            Report { server, namespace: String::new(), egress_ips: Vec::new(), checks: Vec::new(), seconds: 0 };
        Reporter { report, begun: Instant::now(), show }
    }

    fn say(&self, text: &str) {
        if let Some(show) = self.show {
            show(text);
        }
    }

    pub(super) fn add(&mut self, check: Check) {
        let view = View::of_stdout(false);
        if self.report.checks.last().is_none_or(|last| last.group != check.group) {
            self.say(&format!("{}\n", view.paint(Colour::Heading, check.group)));
        }
        let mut text = String::new();
        line(&check, view, &mut text);
        self.say(&text);
        self.report.checks.push(check);
    }

    /// What earlier tests have left.
    pub(super) fn found_leftovers(&mut self, swept: &[String], kept: &[String]) {
        let name = "earlier tests";
        if !swept.is_empty() {
            self.add(Check::ok(super::CLUSTER, name, format!("deleted what {} left", swept.join(", "))));
        }
        if !kept.is_empty() {
            let remedy = format!("kubectl delete namespace,egressgateway -l {}=true", super::objects::LABEL);
            self.add(Check::unknown(super::CLUSTER, name, format!("{} was kept (--keep)", kept.join(", ")), remedy));
        }
    }

    pub(super) fn begins(&mut self, namespace: &str) {
        namespace.clone_into(&mut self.report.namespace);
        self.add(Check::ok(super::CLUSTER, "a namespace for the test", namespace));
    }

    pub(super) fn uses(&mut self, egress_ip: &AddressPair) {
        self.report.egress_ips.push(egress_ip.clone());
    }

    pub(super) fn end(mut self) -> Report {
        self.report.seconds = self.begun.elapsed().as_secs();
        self.report
    }
}

impl Show for Report {
    /// How it ended. The checks were shown as they came.
    fn text(&self, view: View) -> String {
        let (failed, open) = (self.of(CheckState::Failed), self.of(CheckState::Unknown) + self.of(CheckState::Warning));
        let open = if open > 0 { format!(", {open} not decided or with a warning") } else { String::new() };
        let text = match failed {
            0 => view.paint(
                Colour::Good,
                &format!("{} passed{open}, in {} s.", count(self.of(CheckState::Ok), "check", "checks"), self.seconds),
            ),
            n => view.paint(
                Colour::Bad,
                &format!(
                    "{} of {} failed{open}, in {} s.",
                    n,
                    count(self.checks.len(), "check", "checks"),
                    self.seconds
                ),
            ),
        };
        text + "\n"
    }
}
