//! Who holds an egress IP that routers announce. Nobody on a link answers for it, so a node that may have missed a takeover
//! asks the other nodes of the gateway, through the tunnel. It needs no API server.
//!
//! The request is an ICMP echo request, which the other node's kernel answers, too. The answer of its daemon is an echo reply:
//! a node receives it that has no health address, because it has just returned.

mod message;

use crate::datapath::names::{HEALTH, PROBER, of_mac};
use crate::datapath::node_messages::{NodeMessages, reply};
use crate::model::marks::EgressId;
use anyhow::Result;
use egret_nft::mac::Mac;
use message::{AT_ONCE, MAGIC, Message};
use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::Ipv6Addr;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

/// How often each node is asked, because the tunnel may lose a request.
const REQUESTS: u32 = 3;
/// The pause after the socket could not be opened or read.
const AGAIN: Duration = Duration::from_secs(5);

/// This node's end of the tunnel: the index of the device, and the address from which the node sends; `None`: the tunnel
/// carries no IPv6.
type End = Option<(u32, Ipv6Addr)>;

/// The egress IPs about which this node answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The node's end of the tunnel.
    pub end: End,
    /// The node's tunnel MAC address.
    pub mac: Mac,
    /// Those that it holds and that routers announce.
    pub ids: BTreeSet<EgressId>,
}

/// Answers requests until the sender of `held` is dropped.
pub async fn answer(mut held: watch::Receiver<Held>) {
    let mut messages = None;
    let mut open = (None, false);
    loop {
        let now = held.borrow_and_update().clone();
        let wanted = (now.end, !now.ids.is_empty());
        if open != wanted {
            (messages, open) = (now.end.filter(|_| wanted.1).and_then(listen), wanted);
        }
        tokio::select! {
            changed = held.changed() => if changed.is_err() { return },
            ready = NodeMessages::readable(&messages) => {
                let received = ready.and_then(|()| messages.as_ref().map_or(Ok(Vec::new()), |m| m.received(Message::decode)));
                if let Err(e) = answer_all(&now, received) {
                    tracing::warn!("cannot receive other nodes' requests about egress IPs: {e}");
                    (messages, open.1) = (None, false);
                    sleep(AGAIN).await;
                }
            }
            // A socket that could not be opened is opened again.
            () = sleep(AGAIN), if wanted.1 && messages.is_none() => open.1 = false,
        }
    }
}

fn listen((device, source): (u32, Ipv6Addr)) -> Option<NodeMessages> {
    let opened = NodeMessages::open_for(MAGIC, device, source);
    opened.map_err(|e| tracing::warn!("other nodes' requests about egress IPs cannot be answered: {e:#}")).ok()
}

fn answer_all(held: &Held, received: io::Result<Vec<(Mac, Message)>>) -> io::Result<()> {
    let (received, Some((device, _))) = (received?, held.end) else { return Ok(()) };
    for (from, request) in received.into_iter().filter(|(_, message)| !message.is_answer) {
        let ids: Vec<EgressId> = request.ids.into_iter().filter(|id| held.ids.contains(id)).collect();
        if ids.is_empty() {
            continue;
        }
        let answer = Message { is_answer: true, number: request.number, ids }.encode();
        let (own, to) = (of_mac(HEALTH, held.mac), of_mac(PROBER, from));
        // Without a health address this node is about to give its egress IPs up.
        if let Err(e) = reply(device, own, to, &answer) {
            tracing::debug!("another node's request about egress IPs is not answered: {e:#}");
        }
    }
    Ok(())
}

/// Asks the nodes with these tunnel MAC addresses which of these egress IPs they hold. Returns the node for each that one
/// holds, after the timeout, or as soon as each has one.
///
/// # Errors
/// The socket cannot be opened or read.
pub async fn ask(
    end: End,
    peers: &[Mac],
    ids: &BTreeSet<EgressId>,
    timeout: Duration,
) -> Result<BTreeMap<EgressId, Mac>> {
    let mut holders = BTreeMap::new();
    let (Some((device, source)), false) = (end, peers.is_empty() || ids.is_empty()) else { return Ok(holders) };
    let messages = Some(NodeMessages::open_for_replies(MAGIC, device, source)?);
    // Nobody else knows it.
    let number = RandomState::new().build_hasher().finish();
    let all: Vec<EgressId> = ids.iter().copied().collect();
    let requests: Vec<Vec<u8>> =
        all.chunks(AT_ONCE).map(|some| Message { is_answer: false, number, ids: some.to_vec() }.encode()).collect();
    let (begin, mut asked) = (Instant::now(), 0);
    while holders.len() < ids.len() && begin.elapsed() < timeout {
        // The first request is sent at once, the others within the first half of the time.
        let due = begin + timeout / 2 / REQUESTS * asked;
        if asked < REQUESTS && due <= Instant::now() {
            asked += 1;
            for (peer, request) in peers.iter().flat_map(|peer| requests.iter().map(move |q| (*peer, q))) {
                // A request that cannot be sent counts as one without an answer.
                let _ = messages.as_ref().map(|messages| messages.send(of_mac(HEALTH, peer), request));
            }
            continue;
        }
        let until = if asked < REQUESTS { due } else { begin + timeout };
        if timeout_at(until, NodeMessages::readable(&messages)).await.is_err() {
            continue;
        }
        let received = messages.as_ref().map_or(Ok(Vec::new()), |messages| messages.received(Message::decode))?;
        for (from, answer) in received.into_iter().filter(|(_, m)| m.is_answer && m.number == number) {
            holders.extend(answer.ids.into_iter().filter(|id| ids.contains(id)).map(|id| (id, from)));
        }
    }
    Ok(holders)
}
