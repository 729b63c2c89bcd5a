//! Names of pods, by address: their wire format, and what the pods' nodes have announced.

use crate::datapath::node_messages::MAX_MESSAGE;
use egret_nft::mac::Mac;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The first bytes of each message: its type and the version of the format. Then follow pods, one line of JSON each.
const MAGIC: [u8; 4] = *b"egf\x01";
/// A pod that has not been announced for this time is dropped. It is several times the interval of announcements.
pub(super) const FORGOTTEN: Duration = Duration::from_secs(60);
/// The largest number of addresses that are stored.
const ADDRESSES: usize = 262_144;

/// A pod, with what is needed to name it in a record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; empty if neither the runtime nor the source reports one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The policies that select it, in order of precedence.
    pub policies: Vec<String>,
}

/// Encodes pods into as many messages of at most [`MAX_MESSAGE`] bytes as needed. A pod that is too long for one is
/// left out.
pub(super) fn encode<'a>(pods: impl IntoIterator<Item = &'a PodName>) -> Vec<Vec<u8>> {
    let mut messages: Vec<Vec<u8>> = Vec::new();
    for pod in pods {
        let Some(line) = line(pod) else { continue };
        if messages.last().is_none_or(|message| message.len() + line.len() > MAX_MESSAGE) {
            messages.push(MAGIC.to_vec());
        }
        if let Some(message) = messages.last_mut() {
            message.extend_from_slice(&line);
        }
    }
    messages
}

/// The pod as one line. If it has too many policies for a message, the last ones are left out.
fn line(pod: &PodName) -> Option<Vec<u8>> {
    let mut pod = pod.clone();
    loop {
        let mut line = serde_json::to_vec(&pod).ok()?;
        line.push(b'\n');
        if MAGIC.len() + line.len() <= MAX_MESSAGE {
            return Some(line);
        }
        pod.policies.pop()?;
    }
}

/// Decodes a message; `None` if the bytes are no message of this version.
pub(super) fn decode(bytes: &[u8]) -> Option<Vec<PodName>> {
    let lines = bytes.strip_prefix(&MAGIC)?.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The pods of other nodes, by node and address.
#[derive(Debug, Default)]
pub(super) struct Names {
    known: HashMap<(Mac, IpAddr), (Instant, Arc<PodName>)>,
}

impl Names {
    /// Stores the pods that a node has announced. A node can name its own pods only.
    pub(super) fn announced(&mut self, from: Mac, pods: Vec<PodName>, now: Instant) {
        for pod in pods {
            let has_room = self.known.len() < ADDRESSES;
            let pod = Arc::new(pod);
            for address in &pod.addresses {
                let key = (from, *address);
                match self.known.get_mut(&key) {
                    Some((heard, known)) if *known == pod => *heard = now,
                    Some(known) => *known = (now, pod.clone()),
                    None if has_room => drop(self.known.insert(key, (now, pod.clone()))),
                    None => {}
                }
            }
        }
    }

    /// The pod with this address on this node.
    pub(super) fn get(&self, node: Mac, address: IpAddr) -> Option<Arc<PodName>> {
        self.known.get(&(node, address)).map(|(_, pod)| pod.clone())
    }

    /// Drops pods that are no longer announced.
    pub(super) fn prune(&mut self, now: Instant) {
        self.known.retain(|_, (heard, _)| now.saturating_duration_since(*heard) < FORGOTTEN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pod(n: usize) -> PodName {
        PodName {
            addresses: vec![format!("10.244.1.{n}").parse().unwrap(), format!("fd00:244:1::{n:x}").parse().unwrap()],
            namespace: "shop".into(),
            name: format!("visitor-{n}"),
            uid: if n.is_multiple_of(2) { String::new() } else { "d9607e19-f88f-11e6-a518-42010a800195".into() },
            policies: vec!["shop/visitors".into(), "everybody".into()],
        }
    }

    #[test]
    fn encoded_pods_are_decoded_back_and_no_message_is_too_long() {
        let pods: Vec<PodName> = (1..200).map(pod).collect();
        let messages = encode(&pods);
        assert!(messages.len() > 1 && messages.iter().all(|message| message.len() <= MAX_MESSAGE));
        let decoded: Vec<PodName> = messages.iter().flat_map(|message| decode(message).unwrap()).collect();
        assert_eq!(decoded, pods);
        let many = PodName { policies: (0..200).map(|n| format!("shop/policy-{n}")).collect(), ..pod(1) };
        let [message] = &encode([&many])[..] else { panic!("one message") };
        let read = decode(message).unwrap().remove(0);
        assert!(read.policies.len() > 20 && many.policies.starts_with(&read.policies));
        assert_eq!(decode(b"egp\x01\x03\x00"), None, "a message about changed ports");
    }

    #[test]
    fn a_node_names_its_own_pods_and_pods_that_are_no_longer_announced_are_dropped() {
        let (mut names, begin, of) = (Names::default(), Instant::now(), pod(1));
        let address = of.addresses[0];
        names.announced([1; 6], vec![of.clone()], begin);
        assert_eq!(names.get([1; 6], address).as_deref(), Some(&of));
        assert_eq!(names.get([2; 6], address), None, "another node's pod has this address too, or it lies");
        let other = PodName { name: "other".into(), ..of };
        names.announced([1; 6], vec![other.clone()], begin + FORGOTTEN / 2);
        names.prune(begin + FORGOTTEN);
        assert_eq!(names.get([1; 6], address).as_deref(), Some(&other));
        names.prune(begin + 2 * FORGOTTEN);
        assert_eq!(names.get([1; 6], address), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_cause_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            drop(decode(&bytes));
            drop(decode(&[&MAGIC[..], &bytes].concat()));
        }
    }
}
