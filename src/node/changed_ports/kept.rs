//! Connections that have kept their pod's port. When the owner of their egress IP changes, the node on which the pod runs
//! tells the next owner of them: else another pod's new connection could take there the port of one that says nothing just
//! then, and it would break when it speaks again.

use super::message::{Changed, Message};
use super::task::Task;
use crate::api::AddressPair;
use crate::datapath::names::{HEALTH, of_mac};
use crate::kernel::conntrack::{self, Insertion, MarkFilter, Tracked, Translated, Tuple};
use crate::kernel::nft::rule::protocol::{TCP, UDP};
use crate::model::mac::Mac;
use crate::model::marks::{EgressId, Marks};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;
use tokio::time::Instant;

/// Where this node's pods leave, by the ids of the egress IPs.
pub type Holders = BTreeMap<EgressId, Holder>;

/// An egress IP that has an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The owner's MAC address in the tunnel; this node may be it.
    pub owner: Mac,
    /// The egress IP.
    pub address: AddressPair,
}

/// The next owner is told twice: a message may be lost, or come before it knows that it is the owner.
const AGAIN: Duration = Duration::from_secs(1);
/// As many connections are told of at a time, and as many of one pod's address: those that live longest.
const MOST: usize = 65_536;
const MOST_OF_POD: usize = 16_384;
/// As many messages are sent at once, and then none for a moment: the receiver has room for some thousand of all nodes.
const AT_ONCE: usize = 64;
const PAUSE: Duration = Duration::from_millis(10);
/// The longest that a connection is kept for without a packet, in seconds.
const LONGEST: u32 = super::hearing::LONGEST;

/// What is to be told to next owners.
#[derive(Debug, Default)]
pub(super) struct Telling {
    /// The last owner of each egress IP. One that has none for a while may get another one.
    owners: BTreeMap<EgressId, Mac>,
    /// The egress IPs that have moved, and when their owners are told.
    moved: Vec<(Instant, EgressId)>,
    /// Connections that are in the kernel's table no more, and when they are told of.
    gone: Vec<(Instant, Vec<Tracked>)>,
    messages: VecDeque<(Ipv6Addr, Vec<u8>)>,
    /// When the next messages may be sent.
    resume: Option<Instant>,
}

impl Telling {
    /// When something is to be done next.
    pub(super) fn next(&self) -> Option<Instant> {
        let waiting = self.resume.filter(|_| !self.messages.is_empty());
        let due = self.moved.iter().map(|(at, _)| *at).chain(self.gone.iter().map(|(at, _)| *at));
        due.chain(waiting).min()
    }

    /// Notes which egress IPs have another owner than before. `own`: this node needs not be told.
    pub(super) fn change(&mut self, holders: &Holders, own: Mac, now: Instant) {
        for (id, holder) in holders {
            let before = self.owners.insert(*id, holder.owner);
            if before.is_some_and(|before| before != holder.owner) {
                self.moved.retain(|(_, other)| other != id);
                if holder.owner != own {
                    self.moved.extend([(now, *id), (now + AGAIN, *id)]);
                }
            }
        }
    }

    /// The egress IPs whose owners are told now.
    fn moved(&mut self, holders: &Holders, now: Instant) -> Holders {
        let due = self.moved.extract_if(.., |(at, _)| *at <= now);
        due.filter_map(|(_, id)| Some((id, holders.get(&id)?.clone()))).collect()
    }

    /// The connections that are told of now though the kernel's table has them no more.
    fn gone(&mut self, now: Instant) -> Vec<Tracked> {
        self.gone.extract_if(.., |(at, _)| *at <= now).flat_map(|(_, gone)| gone).collect()
    }
}

impl Task {
    /// Connections of this node's pods that left from here, and whose egress IPs have just gone to others.
    pub(super) fn hear_gone(&mut self, gone: Vec<Tracked>) {
        let now = Instant::now();
        self.telling.gone.extend([(now, gone.clone()), (now + AGAIN, gone)]);
    }

    /// Tells next owners of what is due, and sends what waits.
    pub(super) fn tell_next_owners(&mut self) {
        let now = Instant::now();
        let (holders, gone) = (self.telling.moved(&self.roles.holders, now), self.telling.gone(now));
        let mut found = Vec::new();
        if !holders.is_empty() {
            let marks = self.marks;
            let of_pods = MarkFilter { mark: marks.connection(0), mask: marks.connection_of_allocation_mask() };
            // What still has the egress IP's translation here is told of when it has it no more (`hear_gone`):
            // what the next owner translates back has to be known here.
            let is_there = |tracked: &Tracked| {
                let goes_on = tracked.is_established && tracked.back.destination == tracked.out.source;
                goes_on && holders.contains_key(&allocation(tracked.mark, marks))
            };
            match conntrack::list_tracked(&mut self.table, of_pods, is_there) {
                Ok(all) => found.extend(all.iter().filter_map(|tracked| self.kept(tracked, &holders))),
                Err(e) => tracing::warn!("connections of egress IPs that have moved cannot be told of: {e:#}"),
            }
        }
        found.extend(gone.iter().filter_map(|tracked| self.kept(tracked, &self.roles.holders)));
        for (owner, connections) in shared_out(found) {
            let messages = Message::Kept(connections).encode().into_iter();
            self.telling.messages.extend(messages.map(|message| (of_mac(HEALTH, owner), message)));
        }
        self.send_waiting(now);
    }

    fn send_waiting(&mut self, now: Instant) {
        if self.telling.resume.is_some_and(|at| at > now) {
            return;
        }
        for _ in 0..AT_ONCE {
            let Some((to, message)) = self.telling.messages.pop_front() else { break };
            self.send_bytes(to, &message);
        }
        self.telling.resume = Some(now + PAUSE);
    }

    /// What the egress IP's owner, another node, is told of a connection of a pod here, and for how long it lives.
    fn kept(&self, tracked: &Tracked, holders: &Holders) -> Option<(Mac, Changed, u32)> {
        let holder =
            holders.get(&allocation(tracked.mark, self.marks)).filter(|holder| holder.owner != self.roles.mac)?;
        let (out, address) = kept_port(tracked, &holder.address)?;
        let changed = Changed { out, address, port: out.ports[0], source_node: self.roles.mac };
        Some((holder.owner, changed, tracked.timeout))
    }

    /// A node's word of a connection of one of its pods, which has kept its port. What is known of it here is newer.
    pub(super) fn hold_kept(&mut self, from: Mac, changed: Changed, seconds: u32) {
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
            Ok(Insertion::Conflict) => drop(self.figures.taken.inc()),
            Err(e) => self.complain(&e),
        }
    }
}

fn allocation(mark: u32, marks: Marks) -> EgressId {
    (mark & marks.allocation_mask()) as EgressId
}

/// What is told to each owner: no more than there is room for, of what lives longest.
fn shared_out(mut found: Vec<(Mac, Changed, u32)>) -> BTreeMap<Mac, Vec<(Changed, u32)>> {
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

/// An established connection of a pod here, as it comes to the owner of its egress IP, and the egress IP: if it has its
/// pod's port there.
pub fn kept_port(tracked: &Tracked, egress: &AddressPair) -> Option<(Tuple, IpAddr)> {
    let Tracked { out, back, .. } = tracked;
    let address: IpAddr = match out.source {
        IpAddr::V4(_) => egress.ipv4?.into(),
        IpAddr::V6(_) => egress.ipv6?.into(),
    };
    // Here its source is translated to itself, or to the egress IP if this node was its owner.
    let is_egress = [out.source, address].contains(&back.destination) && back.ports[1] == out.ports[0];
    if !is_egress || !tracked.is_established || !matches!(out.protocol, TCP | UDP) {
        return None;
    }
    // A Service's address has become a server's here.
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

    fn holders(owner: Mac) -> Holders {
        [(5, Holder { owner, address: egress() })].into()
    }

    #[test]
    fn who_comes_to_own_an_egress_ip_is_told_at_once_and_after_a_second() {
        let (mut telling, begin) = (Telling::default(), Instant::now());
        let told = |telling: &mut Telling, now| telling.moved(&holders(A), now).len();
        telling.change(&holders(A), HERE, begin);
        assert_eq!(telling.next(), None, "it is not known that it has moved");
        telling.change(&Holders::new(), HERE, begin);
        telling.change(&holders(B), HERE, begin);
        assert_eq!(telling.next(), Some(begin), "it had no owner for a while");
        assert_eq!((told(&mut telling, begin), told(&mut telling, begin)), (1, 0));
        assert_eq!(telling.next(), Some(begin + AGAIN));
        assert_eq!((told(&mut telling, begin + AGAIN), telling.next()), (1, None));
        telling.change(&holders(A), HERE, begin);
        telling.change(&holders(HERE), HERE, begin);
        assert_eq!(telling.next(), None, "this node is told by nobody");
    }

    #[test]
    fn told_of_are_established_connections_with_their_pods_port() {
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
    fn a_pod_takes_no_more_than_its_share_and_what_lives_longest_comes_first() {
        let changed = |pod: u8, n: u32| {
            let ports = [(n % 60_000) as u16 + 1, (n / 60_000) as u16 + 1];
            let out =
                Tuple { source: [10, 244, 1, pod].into(), destination: [198, 51, 100, 7].into(), protocol: 6, ports };
            Changed { out, address: [192, 0, 2, 50].into(), port: ports[0], source_node: HERE }
        };
        let busy = (0..20_000).map(|n| (A, changed(1, n), n));
        let found: Vec<_> = busy.chain([(B, changed(2, 1), 1)]).collect();
        let told = shared_out(found);
        assert_eq!((told[&A].len(), told[&B].len()), (MOST_OF_POD, 1));
        assert_eq!(told[&A][0].1, 19_999);
        let many = (0..200_000).map(|n| (A, changed((n % 200) as u8, n), n)).collect();
        assert_eq!(shared_out(many)[&A].len(), MOST);
    }
}
