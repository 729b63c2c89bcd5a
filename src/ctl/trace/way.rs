//! Joins what the nodes saw of a packet to one way, and says what became of it.

use crate::model::trace::{Armed, Flow, Protocol, TraceSpec, TraceStep};
use serde::Serialize;
use std::net::IpAddr;
use std::time::Duration;

/// How long to wait for the reply to the pod's own packet.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// The tunnel device.
const TUNNEL: &str = "egret";

/// What the nodes saw, in the order in which it was told.
#[derive(Debug, Default)]
pub struct Collected {
    /// The steps, each with its node.
    pub steps: Vec<(String, TraceStep)>,
    /// Whether a kernel dropped messages.
    pub is_incomplete: bool,
    /// Daemons that have stopped to trace before the end, with the reason.
    pub ended: Vec<(String, String)>,
}

impl Collected {
    /// Adds a step. Returns whether the packet's fate is known.
    pub fn add(&mut self, node: &str, step: TraceStep, request: &TraceSpec) -> bool {
        let is_of_pod = node == request.node;
        let is_fate = step.is_drop() && (is_of_pod || request.source_port.is_some()) || is_of_pod && step.is_reply;
        self.steps.push((node.to_owned(), step));
        is_fate
    }
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum PacketOutcome {
    /// A reply came back to the pod.
    Answered,
    /// An ICMP error came back to the pod.
    Rejected,
    /// A rule dropped the packet, or its reply.
    Dropped,
    /// It ended between two chains or two nodes, without a rule that dropped it.
    Lost,
    /// It left, and no reply came.
    NotAnswered,
    /// No packet came out of the pod.
    NotSent,
}

/// The way of a packet.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Traced {
    /// The pod, `namespace/name`.
    pub pod: String,
    /// The pod's node.
    pub node: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The packet's source, as the pod wrote it.
    pub source: String,
    /// The packet's destination, as the pod wrote it.
    pub destination: String,
    /// What became of it.
    pub outcome: PacketOutcome,
    /// The same in a sentence.
    pub message: String,
    /// What to do, if something is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Where it left the cluster, with another source than the pod's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Egress>,
    /// The reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reply: Option<Reply>,
    /// The nodes in the order of the way, out and back.
    pub way: Vec<Hop>,
    /// Nodes of the way whose daemons did not trace, with the reason.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_traced: Vec<NotTraced>,
    /// Whether steps are missing, because a kernel dropped messages.
    pub is_incomplete: bool,
    /// What `why` says of the destination, if the packet was dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explanation: Option<String>,
}

/// Where a packet left the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Egress {
    /// The node.
    pub node: String,
    /// The source address.
    pub address: IpAddr,
    /// The source port, or the identifier of an ICMP echo.
    pub port: u16,
}

/// A reply that came back to the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reply {
    /// The sender.
    pub from: IpAddr,
    /// What it is: `SYN,ACK`, `echo-reply`; empty for UDP.
    pub what: String,
    /// Microseconds from the packet to the reply, at the pod's node.
    pub microseconds: u64,
}

/// What one node did with the packet, or with its reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    /// The node.
    pub node: String,
    /// Whether this is the reply.
    pub is_reply: bool,
    /// Each chain and rule that decided on it.
    pub steps: Vec<TraceStep>,
}

/// A node whose part of the way is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotTraced {
    /// The node.
    pub node: String,
    /// Why.
    pub why: String,
}

impl Hop {
    /// The interface by which the packet left the node; `None` if it did not leave, or was for the node.
    pub fn output(&self) -> Option<&str> {
        self.steps.iter().rev().find_map(|step| step.output.as_deref())
    }

    /// The interface by which the packet came.
    pub fn input(&self) -> Option<&str> {
        self.steps.iter().find_map(|step| step.input.as_deref())
    }

    /// The packet as it came.
    pub fn first(&self) -> Option<&Flow> {
        self.steps.iter().find_map(|step| step.flow.as_ref())
    }

    /// The packet as it left, or as the last base chain saw it.
    pub fn last(&self) -> Option<&Flow> {
        self.steps.iter().rev().find_map(|step| step.flow.as_ref())
    }
}

/// The destination with its port.
pub fn target(request: &TraceSpec) -> String {
    flow(request, request.source_port.unwrap_or_default()).to()
}

fn flow(request: &TraceSpec, source_port: u16) -> Flow {
    Flow {
        protocol: request.protocol.number(request.destination),
        source: request.source,
        source_port,
        destination: request.destination,
        destination_port: request.port,
        what: String::new(),
    }
}

/// Joins what the nodes saw.
pub fn traced(request: &TraceSpec, of_pod: &Armed, collected: Collected, not_traced: Vec<NotTraced>) -> Traced {
    let Collected { steps, is_incomplete, ended, .. } = collected;
    let way = hops(request, steps);
    let at_pod = |is_reply| way.iter().find(|hop| hop.node == request.node && hop.is_reply == is_reply);
    let began = at_pod(false).and_then(|hop| hop.steps.first()).map_or(0, |step| step.at);
    let reply = at_pod(true).and_then(|hop| Some((hop.first()?, hop.steps.first()?.at)));
    let reply = reply.map(|(flow, at)| Reply {
        from: flow.source,
        what: flow.what.clone(),
        microseconds: at.saturating_sub(began),
    });
    let source_port = at_pod(false).and_then(Hop::first).map(|flow| flow.source_port).or(request.source_port);
    let ends = flow(request, source_port.unwrap_or_default());
    let left = way.iter().rfind(|hop| !hop.is_reply && hop.output().is_some_and(|device| device != TUNNEL));
    let egress = left.and_then(|hop| Some((hop.node.clone(), hop.last()?)));
    let egress = egress.filter(|(_, flow)| flow.source != request.source);
    let egress = egress.map(|(node, flow)| Egress { node, address: flow.source, port: flow.source_port });
    let not_traced: Vec<NotTraced> =
        not_traced.into_iter().chain(ended.into_iter().map(|(node, why)| NotTraced { node, why })).collect();
    let fate = Fate { request, of_pod, way: &way, reply: reply.as_ref(), not_traced: &not_traced };
    let (outcome, message, remedy) = fate.tell();
    Traced {
        pod: format!("{}/{}", request.namespace, request.pod),
        node: request.node.clone(),
        protocol: request.protocol,
        source: ends.from(),
        destination: ends.to(),
        outcome,
        message,
        remedy,
        egress,
        reply,
        way,
        not_traced,
        is_incomplete,
        explanation: None,
    }
}

/// The pod's node, the others, and back again.
fn hops(request: &TraceSpec, steps: Vec<(String, TraceStep)>) -> Vec<Hop> {
    let mut out: Vec<Hop> = Vec::new();
    for (node, step) in steps {
        let is_same = |hop: &&mut Hop| hop.node == node && hop.is_reply == step.is_reply;
        match out.iter_mut().find(is_same) {
            Some(hop) => hop.steps.push(step),
            None => out.push(Hop { node, is_reply: step.is_reply, steps: vec![step] }),
        }
    }
    let of_pod = |hop: &Hop| hop.node == request.node;
    let chosen = out.iter().find(|hop| of_pod(hop) && !hop.is_reply).and_then(Hop::first).map(|flow| flow.source_port);
    for hop in &mut out {
        // A node that waits beside the pod's sees other connections, too; and a server sends its answer again.
        let first = hop.steps.iter().find(|step| match (&step.flow, request.source_port, chosen) {
            (Some(flow), None, Some(port)) if !hop.is_reply => flow.source_port == port,
            (Some(flow), None, Some(port)) => {
                flow.destination_port == port || flow.protocol != chosen_protocol(request)
            }
            _ => true,
        });
        if let Some(packet) = first.map(|step| step.packet)
            && (hop.is_reply || hop.node != request.node)
        {
            hop.steps.retain(|step| step.packet == packet);
        }
    }
    out.retain(|hop| !hop.steps.is_empty());
    let place = |hop: &Hop| match (hop.is_reply, of_pod(hop)) {
        (false, true) => 0,
        (false, false) => 1,
        (true, false) => 2,
        (true, true) => 3,
    };
    out.sort_by_key(place);
    out
}

fn chosen_protocol(request: &TraceSpec) -> u8 {
    request.protocol.number(request.destination)
}

/// What became of the packet follows from these.
struct Fate<'a> {
    request: &'a TraceSpec,
    of_pod: &'a Armed,
    way: &'a [Hop],
    reply: Option<&'a Reply>,
    not_traced: &'a [NotTraced],
}

type Told = (PacketOutcome, String, Option<String>);

impl Fate<'_> {
    fn tell(&self) -> Told {
        self.dropped().or_else(|| self.replied()).unwrap_or_else(|| self.unanswered())
    }

    fn dropped(&self) -> Option<Told> {
        let dropped = |hop: &'_ Hop| hop.steps.iter().position(|step| step.is_drop());
        let (hop, at) = self.way.iter().find_map(|hop| Some((hop, dropped(hop)?)))?;
        let TraceStep { table, chain, rule, .. } = &hop.steps[at];
        let what = if hop.is_reply { "the reply" } else { "it" };
        let by = rule.as_ref().map_or_else(|| "by its policy".to_owned(), |rule| format!("by the rule {rule:?}"));
        let message = format!("node {}: chain {chain} of table {table} dropped {what} {by}", hop.node);
        Some((PacketOutcome::Dropped, message, Some(self.remedy(rule.as_deref(), &hop.steps[at]))))
    }

    /// A remedy by the counter that the rule has: docs/operations.md lists them all.
    fn remedy(&self, rule: Option<&str>, step: &TraceStep) -> String {
        if !step.is_of_egret() {
            return format!(
                "another program's rule: `nft -a list table {}` shows it; let the packet pass there",
                step.table
            );
        }
        let counter = rule.and_then(|rule| rule.split("counter name \"").nth(1)?.split('"').next()).unwrap_or_default();
        match counter {
            "blocked" | "no_hop" => {
                let dropped = self.of_pod.egress_ips.iter().filter_map(|ip| Some((ip, ip.dropped.as_ref()?)));
                let why = dropped.map(|(ip, why)| {
                    let addresses: Vec<String> = ip.addresses.iter().map(ToString::to_string).collect();
                    format!("packets for {} are dropped: {why}", addresses.join(", "))
                });
                let why: Vec<String> = why.collect();
                let remedy = "`kubectl egret status` names what is wrong with the gateway";
                if why.is_empty() { remedy.to_owned() } else { format!("{}; {remedy}", why.join("; ")) }
            }
            "spoofed" => "the source address is not the pod's own: see whether the pod has the address that its status says".into(),
            "unmarked" => "another program clears Egret's marks: let its rules set marks with a mask (docs/limits.md)".into(),
            "leaked" => "something has taken away or changed a part of Egret's datapath: see the daemon's log on the node".into(),
            "unknown" => "the owner does not know the egress IP or the pod's node yet: `kubectl egret status`, and its daemon's log".into(),
            "to_owner" => "the destination is an address of the owner itself: name it with --direct of the daemons (docs/limits.md)".into(),
            "stale" => "the connection is older than its egress IP: it begins anew with the next packet; send it again".into(),
            "unsolicited" => "the reply is of no connection that the node knows: its egress IP may be moving; send it again".into(),
            "not_routed" => "another program has sent it into the device egret-out: find it and let it send elsewhere".into(),
            "foreign" => "it is a packet to the tunnel's port that no node has sent: use another destination port".into(),
            _ => "see the table of drops in docs/operations.md".into(),
        }
    }

    fn replied(&self) -> Option<Told> {
        let Reply { from, what, microseconds } = self.reply?;
        let after = format!("after {} ms", *microseconds as f64 / 1000.0);
        let is_error = !what.is_empty() && self.request.protocol != Protocol::Tcp && what != "echo-reply"
            || self.request.protocol == Protocol::Tcp && what.contains('-');
        if is_error {
            let message = format!("an ICMP error came back: {what}, from {from}, {after}");
            let remedy =
                "the host that sent it, or a router before the destination, does not let the packet pass".to_owned();
            return Some((PacketOutcome::Rejected, message, Some(remedy)));
        }
        let kind = if what.is_empty() { String::new() } else { format!(" with {what}") };
        let refused = if what.contains("RST") { ": no program listens there, or a firewall resets" } else { "" };
        Some((PacketOutcome::Answered, format!("{from} answered{kind} {after}{refused}"), None))
    }

    /// No rule dropped it, and no reply came to the pod.
    fn unanswered(&self) -> Told {
        let hop = |is_reply, is_pod: bool| {
            self.way.iter().find(|hop| hop.is_reply == is_reply && (hop.node == self.request.node) == is_pod)
        };
        let Some(at_pod) = hop(false, true) else { return self.not_sent() };
        let Some(output) = at_pod.output() else { return ended_within(at_pod) };
        let at_owner = hop(false, false);
        let leaving = if output == TUNNEL { at_owner } else { Some(at_pod) };
        let Some(leaving) = leaving else { return self.not_arrived() };
        if leaving.output().is_none() {
            return ended_within(leaving);
        }
        if let Some(back) = hop(true, false) {
            let message = format!("the reply came to node {} and not from there to the pod's node", back.node);
            return (PacketOutcome::Lost, message, Some(self.tunnel_remedy()));
        }
        let from = leaving.last().map(Flow::from).unwrap_or_default();
        let message = format!("it left node {} from {from}, and no reply came", leaving.node);
        let remedy = match self.request.protocol {
            Protocol::Udp => {
                "see whether the server lets this address in, and whether it answers such a datagram at all"
            }
            _ => "see whether the server lets this address in, and whether its network has a route back to it",
        };
        (PacketOutcome::NotAnswered, message, Some(remedy.to_owned()))
    }

    fn not_sent(&self) -> Told {
        let to = target(self.request);
        match self.request.source_port {
            None => {
                let message = format!("the pod sent no packet to {to} in this time");
                (PacketOutcome::NotSent, message, Some("let the application send, or leave --wait away".into()))
            }
            Some(_) => {
                let message = format!("the probe to {to} did not come in by the pod's veth");
                (PacketOutcome::NotSent, message, Some("see the daemon's log on the pod's node".into()))
            }
        }
    }

    fn not_arrived(&self) -> Told {
        let owners: Vec<&str> = self.of_pod.egress_ips.iter().filter_map(|ip| ip.node.as_deref()).collect();
        let owners = owners.join(", ");
        if self.not_traced.is_empty() {
            let message =
                format!("it went into the tunnel on node {}, and did not come to {owners}", self.request.node);
            return (PacketOutcome::Lost, message, Some(self.tunnel_remedy()));
        }
        let message = format!("it went into the tunnel on node {} to {owners}, and no reply came", self.request.node);
        let remedy = "the way on the owner is not known; see below why it was not traced".to_owned();
        (PacketOutcome::NotAnswered, message, Some(remedy))
    }

    fn tunnel_remedy(&self) -> String {
        "see whether UDP 7871 passes between the two nodes both ways; `kubectl egret status` shows which nodes do not reach which".into()
    }
}

/// Between two chains, or behind the last one.
fn ended_within(hop: &Hop) -> Told {
    let chain = hop.steps.last().map(|step| step.chain.as_str()).unwrap_or_default();
    let message = format!("it ended on node {} behind chain {chain}, and no rule dropped it", hop.node);
    let remedy = "the destination is the node itself, or routing or reverse-path filtering dropped it: `ip route get`, `nstat -a`";
    (PacketOutcome::Lost, message, Some(remedy.to_owned()))
}

#[cfg(test)]
mod tests;
