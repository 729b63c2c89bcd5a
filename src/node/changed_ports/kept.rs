//! Connections that kept their pod's port. When the owner of their egress IP changes, the pod's node sends them to
//! the new owner. Without that, another pod's new connection could take the port of an idle one there, and the idle
//! connection would break with its next packet.

use super::message::{Changed, Message};
use super::task::Task;
use crate::api::AddressPair;
use crate::datapath::names::{HEALTH, of_mac};
use crate::model::marks::{EgressId, Marks};
use egret_nft::conntrack::{self, Insertion, MarkFilter, Tracked, Translated, Tuple};
use egret_nft::mac::Mac;
use egret_nft::rule::protocol::{TCP, UDP};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;
use tokio::time::Instant;

/// The egress IPs that this node's pods use, with their owners.
pub type Owners = BTreeMap<EgressId, EgressOwner>;

/// An egress IP and its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EgressOwner {
    /// The owner's tunnel MAC address; it may be this node.
    pub owner: Mac,
    /// The egress IP.
    pub address: AddressPair,
}

/// A message to the new owner is repeated after this time. The first may be lost, or arrive before the node knows
/// that it is the owner.
const AGAIN: Duration = Duration::from_secs(1);
/// The largest number of connections sent after a move, and for one pod address. Those with the longest timeout come
/// first.
const MOST: usize = 65_536;
const MOST_OF_POD: usize = 16_384;
/// Messages per batch, and the pause between two batches: the receiver's buffer has room for some thousand messages
/// of all nodes.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// The longest timeout of an idle connection, in seconds.
const LONGEST: u32 = super::receive::LONGEST;

/// What is to be sent to new owners.
#[derive(Debug, Default)]
pub(super) struct OwnerNotices {
    /// The last owner of each egress IP, also while it has none.
    owners: BTreeMap<EgressId, Mac>,
    /// The egress IPs that have moved, and when their connections are sent.
    moved: Vec<(Instant, EgressId)>,
    /// Connections that the kernel's table no longer contains, and when they are sent.
    gone: Vec<(Instant, Vec<Tracked>)>,
    messages: VecDeque<(Ipv6Addr, Vec<u8>)>,
    /// When the next messages may be sent.
    resume: Option<Instant>,
}

impl OwnerNotices {
    /// The next deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        let waiting = self.resume.filter(|_| !self.messages.is_empty());
        let due = self.moved.iter().map(|(at, _)| *at).chain(self.gone.iter().map(|(at, _)| *at));
        due.chain(waiting).min()
    }

    /// Schedules the egress IPs whose owner has changed. `own` is this node, which needs no message.
    pub(super) fn change(&mut self, owners: &Owners, own: Mac, now: Instant) {
        for (id, holder) in owners {
            let before = self.owners.insert(*id, holder.owner);
            if before.is_some_and(|before| before != holder.owner) {
                self.moved.retain(|(_, other)| other != id);
                if holder.owner != own {
                    self.moved.extend([(now, *id), (now + AGAIN, *id)]);
                }
            }
        }
    }

    /// The egress IPs that are due.
    fn moved(&mut self, owners: &Owners, now: Instant) -> Owners {
        let due = self.moved.extract_if(.., |(at, _)| *at <= now);
        due.filter_map(|(_, id)| Some((id, owners.get(&id)?.clone()))).collect()
    }

    /// The connections outside of the kernel's table that are due.
    fn gone(&mut self, now: Instant) -> Vec<Tracked> {
        self.gone.extract_if(.., |(at, _)| *at <= now).flat_map(|(_, gone)| gone).collect()
    }
}

impl Task {
    /// Schedules connections of this node's pods whose egress IPs have just moved from this node to others.
    pub(super) fn schedule_gone(&mut self, gone: Vec<Tracked>) {
        let now = Instant::now();
        self.notices.gone.extend([(now, gone.clone()), (now + AGAIN, gone)]);
    }

    /// Queues the connections that are due for new owners, and sends queued messages.
    pub(super) fn notify_owners(&mut self) {
        let now = Instant::now();
        let (owners, gone) = (self.notices.moved(&self.roles.owners, now), self.notices.gone(now));
        let mut found = Vec::new();
        if !owners.is_empty() {
            let marks = self.marks;
            let of_pods = MarkFilter { mark: marks.connection(0), mask: marks.connection_of_allocation_mask() };
            // A connection that is still translated to the egress IP here is sent later, by `schedule_gone`: this
            // node must know the connections that the new owner translates back.
            let is_there = |tracked: &Tracked| {
                let goes_on = tracked.is_established && tracked.back.destination == tracked.out.source;
                goes_on && owners.contains_key(&allocation(tracked.mark, marks))
            };
            match conntrack::list_tracked(&mut self.table, of_pods, is_there) {
                Ok(all) => found.extend(all.iter().filter_map(|tracked| self.kept(tracked, &owners))),
                Err(e) => tracing::warn!("cannot send the connections of moved egress IPs to their new owners: {e:#}"),
            }
        }
        found.extend(gone.iter().filter_map(|tracked| self.kept(tracked, &self.roles.owners)));
        for (owner, connections) in by_owner(found) {
            let messages = Message::Kept(connections).encode().into_iter();
            self.notices.messages.extend(messages.map(|message| (of_mac(HEALTH, owner), message)));
        }
        self.send_waiting(now);
    }

    fn send_waiting(&mut self, now: Instant) {
        if self.notices.resume.is_some_and(|at| at > now) {
            return;
        }
        for _ in 0..AT_ONCE {
            let Some((to, message)) = self.notices.messages.pop_front() else { break };
            self.send_bytes(to, &message);
        }
        self.notices.resume = Some(now + PAUSE);
    }

    /// The owner, the connection and its timeout to send for a connection of this node's pods, if another node owns
    /// its egress IP.
    fn kept(&self, tracked: &Tracked, owners: &Owners) -> Option<(Mac, Changed, u32)> {
        let holder =
            owners.get(&allocation(tracked.mark, self.marks)).filter(|holder| holder.owner != self.roles.mac)?;
        let (out, address) = kept_port(tracked, &holder.address)?;
        let changed = Changed { out, address, port: out.ports[0], source_node: self.roles.mac };
        Some((holder.owner, changed, tracked.timeout))
    }

    /// Inserts a connection that kept its port and that its pod's node has sent. An entry that exists here is newer
    /// and stays.
    pub(super) fn insert_kept(&mut self, from: Mac, changed: Changed, seconds: u32) {
        let Some(mark) = self.roles.mark_of_kept(from, &changed, self.marks) else { return };
        if self.replicas.has(&changed.out, changed.address) {
            return;
        }
        let Changed { out, address, port, .. } = changed;
        let made = conntrack::find_by_original(&mut self.table, &out).and_then(|there| match there {
            Some(_) => Ok(Insertion::Present),
            None => {
                let wanted = Translated { out, address, port, mark, timeout: seconds.clamp(1, LONGEST) };
                conntrack::insert(&mut self.table, &wanted)
            }
        });
        match made {
            Ok(Insertion::Present) => {}
            Ok(Insertion::Conflict) => drop(self.metrics.taken.inc()),
            Err(e) => self.log_error(&e),
        }
    }
}

fn allocation(mark: u32, marks: Marks) -> EgressId {
    (mark & marks.egress_id_mask()) as EgressId
}

/// Groups connections by owner. If there are too many, those with the longest timeout remain.
fn by_owner(mut found: Vec<(Mac, Changed, u32)>) -> BTreeMap<Mac, Vec<(Changed, u32)>> {
    found.sort_by_key(|(_, _, seconds)| std::cmp::Reverse(*seconds));
    let mut of_pods: HashMap<IpAddr, usize> = HashMap::new();
    found.retain(|(_, changed, _)| {
        let of_pod = of_pods.entry(changed.out.source).or_default();
        *of_pod += 1;
        *of_pod <= MOST_OF_POD
    });
    let mut by_owner: BTreeMap<Mac, Vec<(Changed, u32)>> = BTreeMap::new();
    for (owner, changed, seconds) in found.into_iter().take(MOST) {
        by_owner.entry(owner).or_default().push((changed, seconds));
    }
    by_owner
}

/// For an established connection of this node's pods that kept its port: the tuple as it arrives at the owner of its
/// egress IP, and the egress IP.
pub fn kept_port(tracked: &Tracked, egress: &AddressPair) -> Option<(Tuple, IpAddr)> {
    let Tracked { out, back, .. } = tracked;
    let address: IpAddr = match out.source {
        IpAddr::V4(_) => egress.ipv4?.into(),
        IpAddr::V6(_) => egress.ipv6?.into(),
    };
    // On this node the source is translated to itself, or to the egress IP if this node was the owner.
    let is_egress = [out.source, address].contains(&back.destination) && back.ports[1] == out.ports[0];
    if !is_egress || !tracked.is_established || !matches!(out.protocol, TCP | UDP) {
        return None;
    }
    // This node has translated a Service's address to a server's.
    let comes = Tuple { destination: back.source, ports: [out.ports[0], back.ports[0]], ..*out };
    Some((comes, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Mac = [2; 6];
    const A: Mac = [3; 6];
    const B: Mac = [4; 6];

    fn egress() -> AddressPair {
        AddressPair { ipv4: Some([192, 0, 2, 50].into()), ipv6: None }
    }

    fn owners(owner: Mac) -> Owners {
        [(5, EgressOwner { owner, address: egress() })].into()
    }

    #[test]
    fn a_new_owner_is_notified_at_once_and_after_a_second() {
        let (mut notices, begin) = (OwnerNotices::default(), Instant::now());
        let told = |notices: &mut OwnerNotices, now| notices.moved(&owners(A), now).len();
        notices.change(&owners(A), HERE, begin);
        assert_eq!(notices.next(), None, "it is not known that it has moved");
        notices.change(&Owners::new(), HERE, begin);
        notices.change(&owners(B), HERE, begin);
        assert_eq!(notices.next(), Some(begin), "it had no owner for a while");
        assert_eq!((told(&mut notices, begin), told(&mut notices, begin)), (1, 0));
        assert_eq!(notices.next(), Some(begin + AGAIN));
        assert_eq!((told(&mut notices, begin + AGAIN), notices.next()), (1, None));
        notices.change(&owners(A), HERE, begin);
        notices.change(&owners(HERE), HERE, begin);
        assert_eq!(notices.next(), None, "this node is told by nobody");
    }

    #[test]
    fn only_established_connections_with_their_pods_port_are_sent() {
        let tuple = |source: [u8; 4], destination: [u8; 4], ports| Tuple {
            source: source.into(),
            destination: destination.into(),
            protocol: TCP,
            ports,
        };
        let (pod, service, server) = ([10, 244, 1, 5], [10, 96, 0, 9], [198, 51, 100, 7]);
        let (out, back) = (tuple(pod, service, [4000, 80]), tuple(server, pod, [8080, 4000]));
        let tracked = Tracked { out, back, mark: 0, timeout: 9, is_over: false, is_established: true };
        let comes = tuple(pod, server, [4000, 8080]);
        let address: IpAddr = [192, 0, 2, 50].into();
        assert_eq!(kept_port(&tracked, &egress()), Some((comes, address)));
        let was_owner = Tracked { back: Tuple { destination: address, ..back }, ..tracked };
        assert_eq!(kept_port(&was_owner, &egress()), Some((comes, address)));
        let none = [
            Tracked { is_established: false, ..tracked },
            Tracked { back: Tuple { ports: [8080, 4001], ..back }, ..tracked },
            Tracked { back: Tuple { destination: [192, 0, 2, 51].into(), ..back }, ..tracked },
            Tracked { out: Tuple { protocol: 132, ..out }, ..tracked },
        ];
        assert!(none.iter().all(|other| kept_port(other, &egress()).is_none()));
        assert_eq!(kept_port(&tracked, &AddressPair::default()), None, "no egress IP of that family");
    }

    #[test]
    fn connections_are_limited_for_each_pod_and_those_with_the_longest_timeout_come_first() {
        let changed = |pod: u8, n: u32| {
            let ports = [(n % 60_000) as u16 + 1, (n / 60_000) as u16 + 1];
            let out =
                Tuple { source: [10, 244, 1, pod].into(), destination: [198, 51, 100, 7].into(), protocol: 6, ports };
            Changed { out, address: [192, 0, 2, 50].into(), port: ports[0], source_node: HERE }
        };
        let busy = (0..20_000).map(|n| (A, changed(1, n), n));
        let found: Vec<_> = busy.chain([(B, changed(2, 1), 1)]).collect();
        let told = by_owner(found);
        assert_eq!((told[&A].len(), told[&B].len()), (MOST_OF_POD, 1));
        assert_eq!(told[&A][0].1, 19_999);
        let many = (0..200_000).map(|n| (A, changed((n % 200) as u8, n), n)).collect();
        assert_eq!(by_owner(many)[&A].len(), MOST);
    }
}
