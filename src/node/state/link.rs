//! Probes for egress IPs on the link, and claims of other nodes.

use super::NodeDaemon;
use crate::datapath::announce::{self, Claim};
use crate::model::fnv::fnv1a;
use crate::model::marks::EgressId;
use crate::node::assign::AssignmentResult;
use crate::node::host::UplinkStatus;
use crate::node_plan::addresses;
use crate::node_plan::allocations::NodeAllocation;
use egret_nft::mac::Mac;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::steps::Input;

/// The pause after a failed probe.
const UNASKABLE: Duration = Duration::from_millis(500);

/// A message from the link.
#[derive(Debug)]
pub enum LinkMessage {
    /// The result of a probe.
    Answers {
        allocations: BTreeSet<EgressId>,
        /// The MAC address that answered for each address; `None` if the probe failed.
        answers: Option<Vec<(EgressId, IpAddr, Option<Mac>)>>,
    },
    /// Another node's probe with a claim.
    Claim {
        /// The probed address.
        address: IpAddr,
        /// The sender's MAC address; all zeros if the probe does not contain it.
        by: Mac,
        claim: Claim,
    },
    /// The answer of the assign hook about an address.
    Assigned { address: IpAddr, answer: AssignmentResult },
}

/// The task that listens for claims, and the interfaces on which it listens.
#[derive(Debug, Default)]
pub struct ClaimListener(Option<(Vec<u32>, AbortHandle)>);

impl ClaimListener {
    /// Listens on the interfaces of the egress IPs if `alone`, because no other node reaches this one. Otherwise it
    /// stops to listen.
    pub fn listen(&mut self, alone: bool, uplinks_now: &UplinkStatus, claims: &mpsc::UnboundedSender<LinkMessage>) {
        let interfaces = if alone { uplinks_now.askable() } else { BTreeMap::new() };
        let listens = self.0.as_ref().filter(|(_, task)| !task.is_finished()).map(|(on, _)| on);
        if listens.is_some_and(|on| on.iter().eq(interfaces.keys())) || listens.is_none() && interfaces.is_empty() {
            return;
        }
        if let Some((_, task)) = self.0.take() {
            task.abort();
        }
        if interfaces.is_empty() {
            return;
        }
        let (on, interfaces) = (interfaces.keys().copied().collect(), interfaces.into_values().collect::<Vec<_>>());
        let claims = claims.clone();
        let task = tokio::spawn(async move {
            let send = |address, by, claim| drop(claims.send(LinkMessage::Claim { address, by, claim }));
            if let Err(e) = announce::listen_for_claims(&interfaces, send).await {
                tracing::warn!("cannot listen for other nodes' claims of egress IPs: {e:#}");
                tokio::time::sleep(UNASKABLE).await;
            }
        });
        self.0 = Some((on, task.abort_handle()));
    }
}

impl NodeDaemon {
    /// Takes a message from the link.
    pub fn link_message(&mut self, message: LinkMessage) {
        match message {
            LinkMessage::Answers { answers: Some(answers), .. } => {
                self.egress.holding.probed(answers, &self.view, &self.facts, Instant::now());
            }
            LinkMessage::Answers { allocations, answers: None } => self.egress.holding.probe_failed(allocations),
            LinkMessage::Claim { address, by, claim } => self.claimed(address, by, claim),
            LinkMessage::Assigned { address, answer } => self.hook_answered(address, answer),
        }
        self.pending.raise(Input::Host);
    }

    /// Handles a claim for an egress IP on this node. If no other node reaches this one, the egress IP is of no use
    /// here, and the claiming node, which others reach, can serve it.
    fn claimed(&mut self, address: IpAddr, by: Mac, claim: Claim) {
        let allocations = &self.view.allocations.allocations;
        let of_address = allocations
            .iter()
            .find(|(_, allocation)| allocation.is_managed() && addresses(allocation).any(|a| a == address));
        if let Some((id, allocation)) = of_address.filter(|_| self.liveness.alone)
            && allocation.is_here(*id, &self.facts)
            && claim == claim_of(*id, allocation)
        {
            self.egress.holding.claimed(*id, address, by, Instant::now());
        }
    }

    /// Probes the addresses of allocations in the background, once with each of the timeouts, and sends each result.
    pub(super) fn probe(&self, allocations: BTreeSet<EgressId>, timeouts: &'static [Duration]) {
        if allocations.is_empty() {
            return;
        }
        let (ids, mut targets): (Vec<EgressId>, Vec<_>) =
            self.egress.uplinks.targets(&self.view, &allocations).into_iter().unzip();
        // A node that no other node reaches claims nothing.
        for (id, target) in ids.iter().zip(&mut targets).filter(|_| self.liveness.reached) {
            target.claim = self.view.allocations.allocations.get(id).map(|allocation| claim_of(*id, allocation));
        }
        let results = self.listeners.link.clone();
        tokio::spawn(async move {
            for timeout in timeouts {
                let answers = match announce::probe(&targets, *timeout).await {
                    Ok(macs) => {
                        let each = ids.iter().zip(&targets).zip(macs);
                        Some(each.map(|((id, target), mac)| (*id, target.address, mac)).collect())
                    }
                    Err(e) => {
                        tracing::warn!("cannot probe egress IPs on the link: {e:#}");
                        tokio::time::sleep(UNASKABLE).await;
                        None
                    }
                };
                // Without a receiver the daemon is ending.
                let _ = results.send(LinkMessage::Answers { allocations: allocations.clone(), answers });
            }
        });
    }
}

/// The claim by which other nodes recognise a probe for an allocation's egress IP as an Egret node's. Hosts that know
/// only the link do not know it; those that can read the cluster's objects do.
fn claim_of(id: EgressId, allocation: &NodeAllocation) -> Claim {
    let [.., a, b, c, d, e, f] = fnv1a(allocation.gateway.bytes().chain(id.to_be_bytes())).to_be_bytes();
    // All zeros are no claim.
    [a, b, c, d, e, f | 1]
}
