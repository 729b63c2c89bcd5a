//! The steps of a pass: the inputs on which each runs, the steps that it needs, and what it applies.
//!
//! An input says what may have changed. It makes the steps pending that depend on it. A pass runs the first pending
//! step of the table again and again, until none is left. So a step runs after the steps that it needs, and what a step
//! observes, such as an address that was added, makes earlier steps run again in the same pass.

use std::collections::BTreeSet;

/// What may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Input {
    /// A pass begins.
    Pass,
    /// The snapshot of the cluster.
    Cluster,
    /// The addresses of this node's pods, beyond the networks that the cluster names for them.
    PodAddresses,
    /// The liveness of other nodes.
    Liveness,
    /// A node that was dead answers again.
    PeerReturned,
    /// Links, addresses, routes or rules of this host, or a deadline of an egress IP.
    Host,
    /// Files and rules that the plugin writes while the daemon is away.
    PluginRecords,
    /// The facts that a step has observed about this node.
    Facts,
    /// Egress IPs that are about to be added to this node.
    Coming,
    /// The addresses of this node, after egress IPs were added or removed.
    Addresses,
    /// The node has never been in sync.
    NeverInSync,
}

/// A step of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    View,
    EndedPods,
    PluginRecords,
    OfflinePolicies,
    Allocations,
    Tunnel,
    Vlans,
    Routing,
    Uplinks,
    Decision,
    Handovers,
    Coming,
    TablesAhead,
    Addresses,
    Announcements,
    TakenOver,
    Peers,
    Tables,
    TunnelEntrance,
    Connections,
    Quarantine,
    EndedConnections,
    Release,
    Detached,
    FirstOfflinePolicies,
}

/// A row of the table.
#[derive(Debug)]
pub struct Row {
    pub step: Step,
    /// The inputs that make it pending.
    pub on: &'static [Input],
    /// The steps that must have run before it, without a failure, if they are pending.
    pub needs: &'static [Step],
    /// The inputs that it may raise.
    pub raises: &'static [Input],
    /// What it applies, in words.
    pub applies: &'static str,
}

const fn row(
    step: Step,
    on: &'static [Input],
    needs: &'static [Step],
    raises: &'static [Input],
    applies: &'static str,
) -> Row {
    Row { step, on, needs, raises, applies }
}

/// All steps, in an order in which each stands below those that it needs.
pub const STEPS: [Row; 25] = [
    row(
        Step::View,
        &[Input::Cluster, Input::PodAddresses],
        &[],
        &[Input::Host],
        "computes the desired state from the cluster, the facts and the pods' addresses",
    ),
    row(
        Step::EndedPods,
        &[Input::Cluster],
        &[Step::View],
        &[Input::PluginRecords],
        "drops pods that the cluster has dropped, and unmanaged pods that no policy selects any more",
    ),
    row(
        Step::PluginRecords,
        &[Input::PluginRecords],
        &[],
        &[Input::PodAddresses],
        "reads the quarantines, the pods' veths and the attachments, in this order",
    ),
    // Before the tables, so that the plugin knows every policy that is in force.
    row(
        Step::OfflinePolicies,
        &[Input::Pass],
        &[Step::View],
        &[Input::NeverInSync],
        "writes the offline policy snapshot on a node that has been in sync before",
    ),
    row(
        Step::Allocations,
        &[Input::Liveness, Input::Facts],
        &[Step::View],
        &[],
        "computes the allocations of the desired state again, with other facts about the same cluster",
    ),
    row(
        Step::Tunnel,
        &[Input::Host],
        &[Step::View, Step::PluginRecords],
        &[],
        "the tunnel device, from the node's tunnel address",
    ),
    // Again after egress IPs were removed from a VLAN that nobody needs any more.
    row(
        Step::Vlans,
        &[Input::Host, Input::Addresses],
        &[Step::View],
        &[],
        "the interfaces of VLANs that gateways of this node name",
    ),
    row(
        Step::Routing,
        &[Input::Host],
        &[Step::View, Step::Tunnel, Step::Vlans],
        &[],
        "routing rules and routing tables",
    ),
    row(
        Step::Uplinks,
        &[Input::Host],
        &[Step::View, Step::Tunnel, Step::Vlans],
        &[Input::Facts],
        "reads the uplinks of egress IPs, and whether this node can hold any",
    ),
    row(
        Step::Decision,
        &[Input::Host],
        &[Step::Allocations, Step::Uplinks],
        &[Input::Facts],
        "decides which egress IPs are to be here, and starts probes for them",
    ),
    row(
        Step::Handovers,
        &[Input::Host],
        &[Step::Allocations, Step::Decision],
        &[],
        "records the handovers of planned moves",
    ),
    row(
        Step::Coming,
        &[Input::Host],
        &[Step::Handovers],
        &[Input::Facts, Input::Coming],
        "finds the egress IPs that are to be added now",
    ),
    // The kernel adds a thousand addresses in a second, and this node's pods need not wait for them.
    row(
        Step::TablesAhead,
        &[Input::Coming],
        &[Step::Allocations, Step::Tunnel, Step::Coming],
        &[],
        "the nftables tables and tracked connections, before egress IPs are added",
    ),
    row(
        Step::Addresses,
        &[Input::Host],
        &[Step::Allocations, Step::Decision, Step::TablesAhead],
        &[Input::Facts, Input::Addresses],
        "egress IPs on the uplinks, and health addresses in the tunnel",
    ),
    row(
        Step::Announcements,
        &[Input::PeerReturned],
        &[Step::Addresses],
        &[],
        "announces again what was taken over from a node that has returned",
    ),
    row(
        Step::TakenOver,
        &[Input::Addresses],
        &[Step::Allocations, Step::Addresses],
        &[],
        "finds the egress IPs that this node has taken over",
    ),
    row(
        Step::Peers,
        &[Input::Host],
        &[Step::Allocations, Step::Tunnel],
        &[],
        "forwarding entries and neighbours of the other nodes in the tunnel",
    ),
    row(
        Step::Tables,
        &[Input::Pass],
        &[Step::Allocations, Step::PluginRecords, Step::Tunnel],
        &[],
        "the nftables tables, in one transaction",
    ),
    row(
        Step::TunnelEntrance,
        &[Input::Pass],
        &[Step::Routing, Step::Tables],
        &[],
        "the way into the tunnel, if the tables have the first or no more the last pod that an ifb device limits",
    ),
    row(
        Step::Connections,
        &[Input::Host],
        &[Step::Tables],
        &[],
        "tracked connections of egress IPs that have moved to this node or away from it",
    ),
    // Only after the tables contain the quarantined pods.
    row(
        Step::Quarantine,
        &[Input::PluginRecords],
        &[Step::PluginRecords, Step::Tables],
        &[],
        "quarantines unmanaged pods without a veth, and finds the quarantines to lift",
    ),
    // Before the responses: after them the runtime may give a pod's address to the next pod.
    row(
        Step::EndedConnections,
        &[Input::Pass],
        &[Step::Tables, Step::Quarantine],
        &[],
        "deletes the tracked connections of pods and policies that have ended",
    ),
    row(
        Step::Release,
        &[Input::PluginRecords],
        &[Step::Quarantine, Step::EndedConnections],
        &[],
        "lifts the quarantines of pods that the tables contain",
    ),
    row(
        Step::Detached,
        &[Input::Pass],
        &[Step::EndedConnections, Step::Release],
        &[],
        "removes the files of attachments whose DEL has come",
    ),
    // Pods of a node that has never been in sync start as if Egret were not there.
    row(
        Step::FirstOfflinePolicies,
        &[Input::NeverInSync],
        &[Step::Routing, Step::Addresses, Step::Peers, Step::Detached],
        &[],
        "writes the first offline policy snapshot, when all else is in sync",
    ),
];

/// The steps that are to run.
#[derive(Debug, Default)]
pub struct Pending {
    steps: BTreeSet<Step>,
    /// The steps that have failed in this pass.
    failed: BTreeSet<Step>,
    /// The steps that have run in this pass, with or without a failure.
    ran: BTreeSet<Step>,
    /// The step that is running.
    running: Option<&'static Row>,
}

impl Pending {
    /// Makes the steps pending that depend on `input`.
    pub fn raise(&mut self, input: Input) {
        debug_assert!(
            self.running.is_none_or(|row| row.raises.contains(&input)),
            "{:?} raises {input:?}",
            self.running
        );
        self.steps.extend(on(input));
    }

    /// Begins a pass.
    pub fn begin(&mut self) {
        self.failed.clear();
        self.ran.clear();
        self.raise(Input::Pass);
    }

    /// The step to run next, which [`end_step`](Self::end_step) is to be called for. A step that has failed, and the
    /// steps that need it, wait for the next pass.
    pub fn next(&mut self) -> Option<Step> {
        let mut blocked = self.failed.clone();
        for row in &STEPS {
            if !self.steps.contains(&row.step) || blocked.contains(&row.step) {
                continue;
            }
            if row.needs.iter().any(|need| blocked.contains(need)) {
                blocked.insert(row.step);
                continue;
            }
            self.steps.remove(&row.step);
            self.running = Some(row);
            return Some(row.step);
        }
        None
    }

    /// Ends the running step.
    pub fn end_step(&mut self, succeeded: bool) {
        let Some(row) = self.running.take() else { return };
        self.ran.insert(row.step);
        if !succeeded {
            self.steps.insert(row.step);
            self.failed.insert(row.step);
        }
    }

    /// Ends the pass. Steps that depend on the same input as one that has not succeeded run again in the next pass.
    pub fn end(&mut self) {
        let open = STEPS.iter().filter(|row| self.steps.contains(&row.step)).flat_map(|row| row.on);
        self.steps = open.flat_map(|input| on(*input)).collect();
    }

    /// Drops a pending step whose work is done.
    pub fn drop_step(&mut self, step: Step) {
        self.steps.remove(&step);
    }

    /// Whether a step has run in this pass.
    pub fn has_run(&self, step: Step) -> bool {
        self.ran.contains(&step)
    }

    /// The rows of the pending steps.
    pub fn rows(&self) -> impl Iterator<Item = &'static Row> {
        STEPS.iter().filter(|row| self.steps.contains(&row.step))
    }
}

/// The steps that depend on an input.
fn on(input: Input) -> impl Iterator<Item = Step> {
    STEPS.iter().filter(move |row| row.on.contains(&input)).map(|row| row.step)
}

#[cfg(test)]
mod tests;
