//! The status as text: one screen, whatever the size of the cluster.

use super::{GatewayStatus, NodeState, NodeStatus, PolicyState, PolicyStatus, Role, Status};
use crate::ctl::output::{Colour, Show, View, age, count, number};
use crate::ctl::problem::{Problem, Severity};
use crate::ctl::table::{Cell, Table};
use std::cmp::Reverse;
use std::fmt::Write;

/// How many problems, gateways, nodes and policies are shown.
const SHOWN: [usize; 4] = [6, 6, 6, 6];

impl Show for Status {
    fn text(&self, view: View) -> String {
        let mut out = String::new();
        problems(self, view, &mut out);
        gateways(self, view, &mut out);
        nodes(self, view, &mut out);
        policies(self, view, &mut out);
        out
    }
}

fn heading(view: View, text: &str, out: &mut String) {
    let _ = writeln!(out, "{}", view.paint(Colour::Heading, text));
}

fn most(view: View, of: usize) -> usize {
    if view.wide { usize::MAX } else { SHOWN[of] }
}

/// How many rows are not shown.
fn rest(shown: usize, all: usize, what: &str, out: &mut String) {
    if all > shown {
        let _ = writeln!(out, "  … {} more {what}; -o wide shows all", number(all - shown));
    }
}

fn problems(status: &Status, view: View, out: &mut String) {
    let (errors, warnings): (Vec<&Problem>, Vec<&Problem>) =
        status.problems.iter().partition(|problem| problem.severity == Severity::Error);
    if status.problems.is_empty() {
        let _ = writeln!(out, "{}", view.paint(Colour::Good, "No problems."));
    } else {
        let text = format!(
            "Problems: {}, {}",
            count(errors.len(), "error", "errors"),
            count(warnings.len(), "warning", "warnings")
        );
        heading(view, &text, out);
    }
    let shown = most(view, 0);
    status.problems.iter().take(shown).for_each(|problem| problem.write(view, out));
    rest(shown, status.problems.len(), "problems", out);
}

fn gateways(status: &Status, view: View, out: &mut String) {
    let _ = writeln!(out);
    let ips: usize = status.gateways.iter().map(|gateway| gateway.egress_ips).sum();
    heading(
        view,
        &format!(
            "{} with {}",
            count(status.gateways.len(), "gateway", "gateways"),
            count(ips, "egress IP", "egress IPs")
        ),
        out,
    );
    if status.gateways.is_empty() {
        return;
    }
    let mut rows: Vec<&GatewayStatus> = status.gateways.iter().collect();
    rows.sort_by_key(|g| (g.ready_nodes >= g.nodes && g.nodes > 0 && g.not_held == 0, Reverse(g.egress_ips)));
    let mut table = Table::new(["GATEWAY", "NODES READY", "EGRESS IPS", "NOT HELD", "MOVING", "POLICIES", "POOL"]);
    for gateway in rows.iter().take(most(view, 1)) {
        let ready = format!("{} of {}", gateway.ready_nodes, gateway.nodes);
        let colour = match gateway.ready_nodes {
            0 => Colour::Bad,
            n if n < gateway.nodes => Colour::Doubtful,
            _ => Colour::Good,
        };
        let not_held = match gateway.not_held {
            0 => Cell::from("0"),
            n => Cell::coloured(Colour::Bad, number(n)),
        };
        table.row([
            gateway.name.as_str().into(),
            Cell::coloured(colour, ready),
            number(gateway.egress_ips).into(),
            not_held,
            number(gateway.moving).into(),
            number(gateway.policies).into(),
            pool(gateway).into(),
        ]);
    }
    *out += &table.text(view, 2);
    rest(most(view, 1), rows.len(), "gateways", out);
}

fn pool(gateway: &GatewayStatus) -> String {
    let of = gateway.pool.iter().map(|pool| {
        let cooling = match pool.cooling_down {
            0 => String::new(),
            n => format!(", {} in cooldown", number(n)),
        };
        let total = usize::try_from(pool.total).map_or_else(|_| format!("{:.0e}", pool.total as f64), number);
        format!("{}: {} of {total} used{cooling}", pool.family, number(pool.used))
    });
    let of: Vec<String> = of.collect();
    if of.is_empty() { "none".to_owned() } else { of.join("; ") }
}

fn nodes(status: &Status, view: View, out: &mut String) {
    let _ = writeln!(out);
    let (gateways, sources): (Vec<&NodeStatus>, Vec<&NodeStatus>) =
        status.nodes.iter().partition(|node| !node.gateways.is_empty());
    let ready = |nodes: &[&NodeStatus]| number(nodes.iter().filter(|node| node.state == NodeState::Ready).count());
    heading(
        view,
        &format!(
            "{}: {} of {} gateway nodes and {} of {} other nodes ready",
            count(status.nodes.len(), "node", "nodes"),
            ready(&gateways),
            number(gateways.len()),
            ready(&sources),
            number(sources.len())
        ),
        out,
    );
    let is_good = |node: &NodeStatus| node.state == NodeState::Ready && node.unreachable_peers.is_empty();
    let mut rows: Vec<&NodeStatus> =
        status.nodes.iter().filter(|n| view.wide || !n.gateways.is_empty() || !is_good(n)).collect();
    rows.sort_by_key(|node| (is_good(node), node.gateways.is_empty(), Reverse(node.egress_ips)));
    let mut table =
        Table::new(["NODE", "STATE", "ROLE", "GATEWAYS", "EGRESS IPS", "VERSION", "IN SYNC", "UNREACHABLE"]);
    for node in rows.iter().take(most(view, 2)) {
        let state = match (node.state, node.drained) {
            (NodeState::Ready, true) => Cell::coloured(Colour::Doubtful, "Ready, drained"),
            (NodeState::Ready, false) => Cell::coloured(Colour::Good, "Ready"),
            (state, _) => Cell::coloured(Colour::Bad, format!("{state:?}")),
        };
        let role = match node.role {
            Role::Gateway => "gateway",
            Role::Source => "source",
        };
        let peers = crate::ctl::output::few(&node.unreachable_peers, if view.wide { usize::MAX } else { 3 });
        table.row([
            node.name.as_str().into(),
            state,
            role.into(),
            node.gateways.join(",").into(),
            number(node.egress_ips).into(),
            node.version.clone().unwrap_or_default().into(),
            node.in_sync_for.map(age).unwrap_or_default().into(),
            peers.into(),
        ]);
    }
    if !rows.is_empty() {
        *out += &table.text(view, 2);
    }
    rest(most(view, 2), rows.len(), "of these nodes", out);
}

fn policies(status: &Status, view: View, out: &mut String) {
    let _ = writeln!(out);
    let pods: u64 = status.policies.iter().map(|policy| u64::from(policy.pods)).sum();
    let states = [
        PolicyState::Ready,
        PolicyState::Shadowed,
        PolicyState::Unknown,
        PolicyState::NotReady,
        PolicyState::Pending,
        PolicyState::Rejected,
    ];
    let counts = states.map(|state| (state, status.policies.iter().filter(|policy| policy.state == state).count()));
    let counts = counts.iter().filter(|(_, n)| *n > 0).map(|(state, n)| format!("{} {}", number(*n), word(*state)));
    let counts: Vec<String> = counts.collect();
    let text = format!(
        "{} with {}{}{}",
        count(status.policies.len(), "policy", "policies"),
        count(usize::try_from(pods).unwrap_or(usize::MAX), "pod", "pods"),
        if counts.is_empty() { "" } else { ": " },
        counts.join(", ")
    );
    heading(view, &text, out);
    if status.policies.is_empty() {
        return;
    }
    let mut rows: Vec<&PolicyStatus> = status.policies.iter().collect();
    rows.sort_by_key(|policy| (policy.state, Reverse(policy.pods)));
    let mut table = Table::new(["POLICY", "STATE", "EGRESS IP", "NODE", "PODS", "GATEWAY"]);
    for policy in rows.iter().take(most(view, 3)) {
        let colour = match policy.state {
            PolicyState::Ready => Colour::Good,
            PolicyState::Shadowed | PolicyState::Pending => Colour::Doubtful,
            _ => Colour::Bad,
        };
        let addresses: Vec<String> = policy.egress_ip.iter().map(ToString::to_string).collect();
        table.row([
            policy.name.as_str().into(),
            Cell::coloured(colour, format!("{:?}", policy.state)),
            addresses.join(",").into(),
            policy.node.clone().unwrap_or_default().into(),
            number(policy.pods as usize).into(),
            policy.gateway.clone().unwrap_or_default().into(),
        ]);
    }
    *out += &table.text(view, 2);
    rest(most(view, 3), rows.len(), "policies", out);
}

/// A state in words.
fn word(state: PolicyState) -> &'static str {
    match state {
        PolicyState::Ready => "ready",
        PolicyState::Shadowed => "shadowed",
        PolicyState::Unknown => "on a node that reports nothing",
        PolicyState::NotReady => "not ready",
        PolicyState::Pending => "without a status",
        PolicyState::Rejected => "rejected",
    }
}
