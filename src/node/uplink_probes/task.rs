//! The task that probes, and asks other nodes.

use super::judge::{Judge, ProbeState};
use super::message::{MAGIC, Message, milliseconds};
use super::{Finding, Findings, ProbeMetrics, Probing, Wanted};
use crate::datapath::node_messages::NodeMessages;
use crate::datapath::uplink_probe::probe;
use crate::model::fnv::fnv1a;
use crate::model::uplink_key::UplinkKey;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

/// How long to wait for an answer, at most.
const PATIENCE: Duration = Duration::from_secs(2);
/// The pause after the socket for messages could not be opened.
const AGAIN: Duration = Duration::from_secs(5);

/// Probes until the sender of `wanted` is dropped, and sends each change of the findings. `lost` are the uplinks that an
/// earlier daemon had found lost.
pub async fn watch(
    lost: BTreeSet<UplinkKey>,
    wanted: watch::Receiver<Wanted>,
    findings: watch::Sender<Findings>,
    metrics: ProbeMetrics,
) {
    let (results, answers) = mpsc::unbounded_channel();
    let begin = Instant::now();
    let task = Task {
        wanted,
        findings,
        metrics,
        lost,
        begin,
        uplinks: BTreeMap::new(),
        messages: None,
        open_again: begin,
        end: (0, None),
        results,
        answers,
    };
    task.run().await;
}

/// The result of a probe.
struct ProbeResult {
    /// The number of the probes, and the target among theirs.
    of: (u64, usize),
    sent: Instant,
    answered: bool,
}

/// One gateway's probes of one family.
struct Uplink {
    /// The number of the probes, which all nodes compute alike: of the gateway, the family and the targets.
    number: u64,
    probing: Probing,
    judge: Judge,
    /// When the other nodes are to be asked next.
    ask_at: Instant,
}

struct Task {
    wanted: watch::Receiver<Wanted>,
    findings: watch::Sender<Findings>,
    metrics: ProbeMetrics,
    lost: BTreeSet<UplinkKey>,
    /// The zero of the clock in requests.
    begin: Instant,
    uplinks: BTreeMap<UplinkKey, Uplink>,
    messages: Option<NodeMessages>,
    open_again: Instant,
    /// The device and the source address with which the socket was opened.
    end: (u32, Option<std::net::Ipv6Addr>),
    results: mpsc::UnboundedSender<ProbeResult>,
    answers: mpsc::UnboundedReceiver<ProbeResult>,
}

impl Task {
    async fn run(mut self) {
        loop {
            let next = self.next();
            tokio::select! {
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.change(),
                    Err(_) => return,
                },
                Some(result) = self.answers.recv() => self.take(&result),
                ready = NodeMessages::readable(&self.messages) => self.receive(ready),
                () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            while let Ok(result) = self.answers.try_recv() {
                self.take(&result);
            }
            self.probe_and_judge();
            self.ask();
            self.report();
        }
    }

    fn next(&self) -> Option<Instant> {
        let of_uplink = |uplink: &Uplink| {
            let ask = uplink.judge.asks().then_some(uplink.ask_at);
            [uplink.judge.next(), ask].into_iter().flatten().min()
        };
        self.uplinks.values().filter_map(of_uplink).min()
    }

    /// Takes what is to be probed from now on.
    fn change(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        let now = Instant::now();
        let mut before = std::mem::take(&mut self.uplinks);
        for (key, probing) in wanted.probes {
            let number = number_of(&key, &probing);
            let same = |uplink: &Uplink| uplink.number == number && uplink.probing.settings == probing.settings;
            // Probes that have changed begin anew: what the former targets said does not count.
            let uplink = match before.remove(&key).filter(same) {
                Some(uplink) => Uplink { probing, ..uplink },
                None => {
                    let lost = self.lost.remove(&key);
                    let judge = Judge::new(probing.settings, probing.targets.len(), lost, now);
                    Uplink { number, probing, judge, ask_at: now }
                }
            };
            self.uplinks.insert(key, uplink);
        }
        let end = (wanted.device, wanted.source);
        if self.end != end {
            (self.end, self.messages, self.open_again) = (end, None, now);
        }
        if self.uplinks.is_empty() {
            self.messages = None;
        }
    }

    fn take(&mut self, result: &ProbeResult) {
        let (number, target) = result.of;
        let Some((key, uplink)) = self.uplinks.iter_mut().find(|(_, uplink)| uplink.number == number) else { return };
        if let (Some(gateway), Some(target)) = (&key.gateway, uplink.probing.targets.get(target)) {
            self.metrics.count(gateway, target, result.answered);
        }
        if result.answered {
            uplink.judge.answered(result.sent);
        }
    }

    fn probe_and_judge(&mut self) {
        let now = Instant::now();
        for (key, uplink) in &mut self.uplinks {
            let Uplink { number, probing, judge, .. } = uplink;
            let number = *number;
            if judge.judge(now) {
                log(key, probing, judge.state());
            }
            for target in judge.due(now) {
                let (wanted, mark, results) = (probing.targets[target].clone(), probing.mark, self.results.clone());
                let device = probing.device.clone();
                tokio::spawn(async move {
                    let answered = probe(wanted, mark, device.as_deref(), PATIENCE).await;
                    tracing::trace!(?answered, "probe");
                    // Without a receiver the daemon is ending.
                    let _ = results.send(ProbeResult { of: (number, target), sent: now, answered: answered.is_ok() });
                });
            }
        }
    }

    /// Asks the other nodes whether probes succeed there that fail here.
    fn ask(&mut self) {
        let now = Instant::now();
        self.open(now);
        let asked = u64::try_from((now - self.begin).as_millis()).unwrap_or(u64::MAX);
        for uplink in self.uplinks.values_mut().filter(|uplink| uplink.judge.asks() && uplink.ask_at <= now) {
            uplink.ask_at = now + uplink.probing.settings.interval / 2;
            let request = Message::Request { probes: uplink.number, asked }.encode();
            for peer in uplink.probing.peers.values() {
                // A request that cannot be sent is asked again.
                let _ = self.messages.as_ref().map(|messages| messages.send(*peer, &request));
            }
        }
    }

    fn open(&mut self, now: Instant) {
        let (device, Some(source)) = self.end else { return };
        if self.messages.is_some() || self.uplinks.is_empty() || self.open_again > now {
            return;
        }
        match NodeMessages::open_for(MAGIC, device, source) {
            Ok(messages) => self.messages = Some(messages),
            Err(e) => {
                self.open_again = now + AGAIN;
                tracing::warn!(
                    "other nodes cannot be asked about probes, and no failure of probes moves egress IPs: {e:#}"
                );
            }
        }
    }

    fn receive(&mut self, ready: io::Result<()>) {
        let Some(messages) = &self.messages else { return };
        match ready.and_then(|()| messages.received(Message::decode)) {
            Ok(received) => received.into_iter().for_each(|(from, message)| self.handle(from, message)),
            Err(e) => {
                tracing::warn!("cannot receive other nodes' messages about probes: {e}");
                (self.messages, self.open_again) = (None, Instant::now() + AGAIN);
            }
        }
    }

    fn handle(&mut self, from: egret_nft::mac::Mac, message: Message) {
        let number = match message {
            Message::Request { probes, .. } | Message::Answer { probes, .. } => probes,
        };
        let uplink = self.uplinks.values_mut().find(|uplink| uplink.number == number);
        let Some((uplink, peer)) = uplink.and_then(|uplink| {
            let peer = *uplink.probing.peers.get(&from)?;
            Some((uplink, peer))
        }) else {
            return;
        };
        match message {
            Message::Request { probes, asked } => {
                let Some(sent) = uplink.judge.success() else { return };
                let age = u32::try_from(milliseconds(sent.elapsed())).unwrap_or(u32::MAX);
                let answer = Message::Answer { probes, asked, age }.encode();
                let _ = self.messages.as_ref().map(|messages| messages.send(peer, &answer));
            }
            Message::Answer { asked, age, .. } => {
                // The answer was given after the request, so the probe is not older than this.
                let at = self.begin.checked_add(Duration::from_millis(asked));
                let at = at.and_then(|at| at.checked_sub(Duration::from_millis(age.into())));
                if let Some(at) = at.filter(|at| *at <= Instant::now()) {
                    uplink.judge.proven(from, at);
                }
            }
        }
    }

    fn report(&self) {
        let findings = self.uplinks.iter().map(|(key, uplink)| {
            let state = uplink.judge.state();
            (key.clone(), Finding { state, message: message(&uplink.probing, state) })
        });
        let new: Findings = findings.collect();
        self.findings.send_if_modified(|now| {
            let changed = *now != new;
            if changed {
                self.metrics.show(&new);
                *now = new;
            }
            changed
        });
    }
}

/// All nodes compute it alike, whatever their version. Answers about other targets prove nothing, so these are part of
/// it.
fn number_of(key: &UplinkKey, probing: &Probing) -> u64 {
    let targets: Vec<String> = probing.targets.iter().map(ToString::to_string).collect();
    let gateway = key.gateway.as_deref().unwrap_or_default();
    fnv1a(format!("{gateway}, {}: {}", key.family(), targets.join(", ")).bytes())
}

fn message(probing: &Probing, state: ProbeState) -> String {
    let targets: Vec<String> = probing.targets.iter().map(ToString::to_string).collect();
    let targets = targets.join(", ");
    match state {
        ProbeState::Lost => format!("its probes have failed while another node's succeeded: {targets}"),
        ProbeState::Fails => format!("no answer from {targets}, and no other node of the gateway is known to get one"),
        ProbeState::Unproven | ProbeState::Succeeds => String::new(),
    }
}

fn log(key: &UplinkKey, probing: &Probing, state: ProbeState) {
    let gateway = key.gateway.as_deref().unwrap_or_default();
    let family = key.family();
    match state {
        ProbeState::Lost | ProbeState::Fails => {
            tracing::warn!(gateway, family, "probes fail: {}", message(probing, state));
        }
        ProbeState::Succeeds => tracing::info!(gateway, family, "probes succeed"),
        ProbeState::Unproven => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::uplink_probes::ProbeTarget;
    use crate::node::uplink_probes::ProbeSettings;

    #[test]
    fn probes_have_the_same_number_on_all_nodes_and_other_targets_another() {
        let key = |gateway: &str, ipv4| UplinkKey { interface: None, ipv4, gateway: Some(gateway.into()) };
        let probing = |last: u8| Probing {
            settings: ProbeSettings { interval: Duration::from_secs(1), misses: 3 },
            targets: vec![ProbeTarget::Icmp([192, 0, 2, last].into())],
            mark: 0,
            device: None,
            peers: BTreeMap::new(),
        };
        let number = number_of(&key("web", true), &probing(1));
        // It must stay the same in later versions.
        assert_eq!(number, fnv1a("web, IPv4: icmp 192.0.2.1".bytes()));
        let elsewhere = Probing { mark: 7, peers: [([2; 6], "fe80::1".parse().unwrap())].into(), ..probing(1) };
        assert_eq!(number_of(&UplinkKey { interface: Some("eth1".into()), ..key("web", true) }, &elsewhere), number);
        for (key, last) in [(key("web", true), 2), (key("web", false), 1), (key("db", true), 1)] {
            assert_ne!(number_of(&key, &probing(last)), number);
        }
    }
}
