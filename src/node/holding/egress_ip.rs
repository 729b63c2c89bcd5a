//! The state of one egress IP on this node, and the table of its transitions.

use crate::model::marks::EgressId;
use egret_nft::mac::Mac;
use std::collections::BTreeSet;
use std::net::IpAddr;
use tokio::time::Instant;

/// Another host's answer to a probe for an egress IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeReply {
    /// The probed address.
    pub address: IpAddr,
    /// The MAC address that answered.
    pub mac: Mac,
    /// Whether it is the tunnel MAC address of a node that was asked, because routers announce the address.
    pub by_node: bool,
    /// When a host first answered.
    pub first: Instant,
    /// When a host last answered. After a claim it is later, so that the claiming node can take the address.
    pub last: Instant,
}

/// The state of an egress IP on this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EgressIpState {
    /// The node does not hold it. It takes it if the allocation says so and no other host answers for it.
    #[default]
    Standby,
    /// Another host answers for it, and it is not on this node.
    Conflict(ProbeReply),
    /// The node holds it, as the allocation says.
    Owner,
    /// The node takes it over or has taken it over, because the node that the allocation named seemed dead.
    TakenOver,
    /// It is on this node, and another host answers for it or claims it. The next decision gives it up.
    Contested(ProbeReply),
    /// Another node holds it. It stays on this node until then, for packets on their way.
    InGracePeriod { until: Instant },
    /// The allocation assigns it to this node, which gave it up.
    Relinquished {
        /// The `since` of that allocation.
        since: i64,
        /// When the node gave it up.
        at: Instant,
        /// The host that answers for it, if there is one.
        answer: Option<ProbeReply>,
    },
}

/// A cause of a transition.
#[derive(Clone, Copy, Debug)]
pub enum Cause {
    /// The allocation is gone, or Egret does not place its address on this node.
    Ended,
    /// The allocation has been renewed, or no longer names this node.
    Reassigned,
    /// It is on no interface of this node.
    Absent,
    /// Another host answers for it, and it is not on this node.
    Answered(ProbeReply),
    /// Another host answers for it or claims it, and it is on this node.
    Contested(ProbeReply),
    /// The node gives it up, because it is contested or its uplink is lost. `since` is that of the allocation, if the
    /// allocation names this node.
    GivenUp { since: Option<i64>, at: Instant },
    /// The node adds or keeps it, because it is the owner.
    Taken,
    /// The node is to hold it, and must probe it or wait for an uplink first.
    NotYet,
    /// The node is to hold it instead of the node that the allocation names.
    OwnerDead,
    /// It is on this node until another node holds it.
    Kept,
    /// It is on this node, and another node holds it.
    MovedAway { until: Instant },
    /// It is not on this node and is not to be.
    Withdrawn,
}

impl EgressIpState {
    /// The table of transitions: the state after `cause`.
    #[must_use]
    pub fn after(self, cause: Cause) -> EgressIpState {
        use EgressIpState::{Conflict, Contested, InGracePeriod, Owner, Relinquished, Standby, TakenOver};
        match (cause, self) {
            (Cause::Ended, _) => Standby,

            (Cause::Reassigned, Relinquished { answer, .. }) => answer.map_or(Standby, Conflict),
            (Cause::Reassigned, _) => self,

            (Cause::Absent, Contested(answer)) => Conflict(answer),
            (Cause::Absent, _) => self,

            (Cause::Answered(a), Relinquished { since, at, .. }) => Relinquished { since, at, answer: Some(a) },
            // The host that held it answers. This node goes on with the takeover when that host is gone.
            (Cause::Answered(a), _) => Conflict(a),

            (Cause::Contested(a), Relinquished { since, at, .. }) => Relinquished { since, at, answer: Some(a) },
            (Cause::Contested(a), _) => Contested(a),

            (Cause::GivenUp { since: Some(since), at }, _) => Relinquished { since, at, answer: self.answer() },
            // It may not be removed at once.
            (Cause::GivenUp { since: None, .. }, Contested(_) | Conflict(_) | Relinquished { .. }) => self,
            (Cause::GivenUp { since: None, .. }, Owner | TakenOver | InGracePeriod { .. } | Standby) => Standby,

            (Cause::Taken, TakenOver) => TakenOver,
            (Cause::Taken, _) => Owner,

            (Cause::NotYet, Owner | InGracePeriod { .. }) => Standby,
            (Cause::NotYet, _) => self,

            (Cause::OwnerDead, Standby | Owner | InGracePeriod { .. }) => TakenOver,
            (Cause::OwnerDead, _) => self,

            (Cause::Kept, TakenOver | Relinquished { .. }) => self.without_answer(),
            (Cause::Kept, _) => Owner,

            // The deadline of a grace period stays.
            (Cause::MovedAway { .. }, InGracePeriod { .. } | Relinquished { .. }) => self.without_answer(),
            (Cause::MovedAway { until }, _) => InGracePeriod { until },

            (Cause::Withdrawn, Relinquished { .. }) => self.without_answer(),
            (Cause::Withdrawn, _) => Standby,
        }
    }

    /// The answer of another host, if there is one.
    pub fn answer(&self) -> Option<ProbeReply> {
        match self {
            EgressIpState::Conflict(answer) | EgressIpState::Contested(answer) => Some(*answer),
            EgressIpState::Relinquished { answer, .. } => *answer,
            EgressIpState::Standby
            | EgressIpState::Owner
            | EgressIpState::TakenOver
            | EgressIpState::InGracePeriod { .. } => None,
        }
    }

    fn without_answer(self) -> EgressIpState {
        match self {
            EgressIpState::Relinquished { since, at, .. } => EgressIpState::Relinquished { since, at, answer: None },
            other => other,
        }
    }

    /// Whether the node gives the egress IP up because another host has it. If it cannot be removed at once, it is
    /// given up again.
    pub fn is_contested(&self) -> bool {
        matches!(self, EgressIpState::Contested(_) | EgressIpState::Relinquished { answer: Some(_), .. })
    }

    /// The name of the state, in logs and in `egretd state`.
    pub fn name(&self) -> &'static str {
        match self {
            EgressIpState::Standby => "Standby",
            EgressIpState::Conflict(_) => "Conflict",
            EgressIpState::Owner => "Owner",
            EgressIpState::TakenOver => "TakenOver",
            EgressIpState::Contested(_) => "Contested",
            EgressIpState::InGracePeriod { .. } => "InGracePeriod",
            EgressIpState::Relinquished { .. } => "Relinquished",
        }
    }
}

/// An egress IP on this node: its state, and its probes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct EgressIp {
    /// Its state.
    pub state: EgressIpState,
    /// Whether a probe is in flight.
    pub probing: bool,
    /// The addresses that no other host answered for; `None` if none was probed.
    pub cleared: Option<BTreeSet<IpAddr>>,
}

impl EgressIp {
    /// Applies the table of transitions.
    pub fn apply(&mut self, id: EgressId, cause: Cause) {
        let before = self.state;
        self.state = before.after(cause);
        if self.state.name() != before.name() {
            tracing::debug!(id, from = before.name(), to = self.state.name(), "egress IP changed its state");
        }
    }
}

#[cfg(test)]
mod tests;
