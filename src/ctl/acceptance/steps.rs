//! The promises, one after the other.

mod changes;
mod new_pods;

use super::judge::{Fault, PodAnswers, Series};
use super::logs::{self, Log};
use super::objects::{Client as Pod, Selected};
use super::participants::{Kind, Participants, names, used_before};
use super::remedy::{Findings, OF_THE_TEST};
use super::report::Reporter;
use super::scene::{Ready, Scene};
use super::{Options, TRAFFIC, problems};
use crate::api::AddressPair;
use crate::cluster::{PodsOf, SourceName};
use crate::ctl::check::Check;
use crate::ctl::problem::split_remedy;
use crate::ctl::{daemon, state};
use crate::probe::ProbeMethod;
use anyhow::bail;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// From one look at the answers to the next.
const PACE: Duration = Duration::from_millis(100);
/// How long an egress IP may take to be ready, and a change to arrive.
const ARRIVES: Duration = Duration::from_secs(30);
/// How long pods may take to start.
const STARTS: Duration = Duration::from_secs(90);
/// How long a log may take to be readable.
const READABLE: Duration = Duration::from_secs(15);
/// How long pods are watched that nothing may arrive from.
const BLOCKED: Duration = Duration::from_secs(5);
/// How long pods are watched after a move.
const AFTER_MOVE: Duration = Duration::from_secs(2);
/// New pods on each kind of node that ask a few times, beside one that goes on.
const NEW: usize = 2;
/// The requests that a new pod asks.
const REQUESTS: u64 = 3;
/// The policies.
const FIRST: &str = "first";
const SECOND: &str = "second";
const WITHOUT_GATEWAY: &str = "without-gateway-node";

/// A test under way.
struct Test<'a, 'r> {
    scene: &'a Scene,
    source: &'a SourceName,
    participants: &'a Participants,
    reporter: &'a mut Reporter<'r>,
    /// The egress IP of the first policy.
    first: Ready,
    /// All egress IPs of the test.
    egress_ips: Vec<AddressPair>,
    /// Which requests are judged.
    series: Vec<Series>,
    /// Pods that the policy selects, which go on to ask.
    running: Vec<Log>,
    /// Pods that no policy selects.
    unselected: Vec<Log>,
    /// Nodes whose pods had right answers.
    answered: Vec<String>,
    interval: u64,
}

/// Runs all steps.
///
/// # Errors
/// The API server refuses something, or does not answer.
pub(super) async fn run(
    scene: &Scene,
    source: &SourceName,
    options: &Options,
    participants: &Participants,
    reporter: &mut Reporter<'_>,
) -> anyhow::Result<()> {
    scene.make_namespace().await?;
    let used_before = used_before(&state::read(source, PodsOf::Nobody).await?.cluster, &participants.gateway);
    let begun = Instant::now();
    let first = match egress_ip(scene, participants, FIRST, 1000, used_before.first()).await? {
        Ok(first) => first,
        Err(why) => {
            let (what, remedy) = of_condition(&why);
            reporter.add(Check::failed(TRAFFIC, "a policy has an egress IP", what, remedy));
            return Ok(());
        }
    };
    let found = format!("{} on {}, after {:.1} s", listed(&first.address), first.node, begun.elapsed().as_secs_f64());
    reporter.add(Check::ok(TRAFFIC, "a policy has an egress IP", found));
    reporter.uses(&first.address);
    let interval = if scene.server.is_reflector { 2000 } else { 100 };
    let egress_ips = vec![first.address.clone()];
    let (series, running, unselected, answered) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut test = Test {
        scene,
        source,
        participants,
        reporter,
        first,
        egress_ips,
        series,
        running,
        unselected,
        answered,
        interval,
    };
    if !test.new_pods().await? {
        return Ok(());
    }
    if test.answered.is_empty() {
        // All of it would fail, or pass because nothing arrives.
        let found = "not tried, because new pods have the egress IP on no node";
        test.reporter.add(Check::unknown(TRAFFIC, "the other promises", found, ""));
        return test.unselected_pods().await;
    }
    test.many_pods(options.pods).await?;
    test.planned_move().await?;
    test.another_egress_ip(used_before.get(1)).await?;
    test.without_gateway_node().await?;
    test.policy_ends().await?;
    test.unselected_pods().await
}

/// Makes a policy and waits for its egress IP: one that earlier tests have used, if there is one.
async fn egress_ip(
    scene: &Scene,
    participants: &Participants,
    name: &str,
    priority: i32,
    used_before: Option<&AddressPair>,
) -> anyhow::Result<Result<Ready, String>> {
    scene.make_policy(name, &participants.gateway, Selected::Yes, priority, used_before).await?;
    match scene.wait_for_egress_ip(name, ARRIVES).await? {
        Err(_) if used_before.is_some() => {
            // It has become somebody else's, or is reserved.
            scene.delete_policy(name).await?;
            scene.make_policy(name, &participants.gateway, Selected::Yes, priority, None).await?;
            scene.wait_for_egress_ip(name, ARRIVES).await
        }
        other => Ok(other),
    }
}

fn listed(pair: &AddressPair) -> String {
    let all: Vec<String> = crate::model::addresses_of(pair).map(|ip| ip.to_string()).collect();
    all.join(", ")
}

fn in_words(series: &[Series]) -> String {
    let has = |is: &dyn Fn(&Series) -> bool, word: &'static str| series.iter().any(is).then_some(word);
    let families = [has(&|s| !s.ipv6, "IPv4"), has(&|s| s.ipv6, "IPv6")];
    let methods = [has(&|s| s.method == ProbeMethod::Tcp, "TCP"), has(&|s| s.method == ProbeMethod::Udp, "UDP")];
    let all: Vec<&str> = families.into_iter().chain(methods).flatten().collect();
    all.join(", ")
}

impl Test<'_, '_> {
    /// The methods by which new connections are made.
    fn methods(&self) -> &'static [ProbeMethod] {
        if self.scene.server.is_reflector { &[ProbeMethod::Tcp] } else { &[ProbeMethod::Tcp, ProbeMethod::Udp] }
    }

    fn all_methods(&self) -> &'static [ProbeMethod] {
        if self.scene.server.is_reflector {
            &[ProbeMethod::Tcp]
        } else {
            &[ProbeMethod::Tcp, ProbeMethod::Udp, ProbeMethod::Held]
        }
    }

    /// The series of new connections, of those that are judged.
    fn new_connections(&self) -> Vec<Series> {
        self.series.iter().copied().filter(|series| series.method != ProbeMethod::Held).collect()
    }

    fn client(&self, name: String, node: &str, selected: Selected, methods: &'static [ProbeMethod], count: u64) -> Pod {
        Pod { name, node: node.to_owned(), selected, methods, count, interval: self.interval }
    }

    /// A pod on the node of each kind.
    fn clients(
        &self,
        prefix: &str,
        kinds: &[(Kind, String)],
        selected: Selected,
        methods: &'static [ProbeMethod],
        count: u64,
    ) -> Vec<Pod> {
        let each = kinds.iter().enumerate();
        each.map(|(n, (_, node))| self.client(format!("{prefix}-{n}"), node, selected, methods, count)).collect()
    }

    /// Waits for pods; if they do not come, this is reported.
    async fn started(&mut self, pods: &[Pod], ended: bool) -> anyhow::Result<Option<Vec<IpAddr>>> {
        match self.scene.wait_for_pods(pods, ended, STARTS).await {
            Ok(ips) => Ok(Some(ips)),
            Err(e) => {
                let remedy = match pods.first() {
                    Some(pod) if !ended => format!(
                        "see `kubectl -n {} describe pod {}` with --keep; --image names another image",
                        self.scene.name, pod.name
                    ),
                    _ => "see that the API server reaches the kubelets".to_owned(),
                };
                self.reporter.add(Check::failed(TRAFFIC, "pods start", format!("{e:#}"), remedy));
                Ok(None)
            }
        }
    }

    /// The logs of pods that have ended.
    async fn whole(&self, pods: &[Pod]) -> anyhow::Result<Vec<PodAnswers>> {
        let mut heard = Vec::new();
        for pod in pods {
            let begun = Instant::now();
            loop {
                match logs::whole(&self.scene.client, &self.scene.name, &pod.name, &pod.node).await {
                    Ok(of) => break heard.push(of),
                    Err(_) if begun.elapsed() < READABLE => sleep(PACE).await,
                    Err(e) => bail!("cannot read the log of pod {} on {}: {e}", pod.name, pod.node),
                }
            }
        }
        Ok(heard)
    }

    /// Reports what became of a promise.
    async fn judged(&mut self, name: &str, faults: Vec<Fault>, found: String) -> anyhow::Result<()> {
        let check = match faults.first() {
            None => Check::ok(TRAFFIC, name, found),
            Some(fault) => {
                let known = self.known(fault.node()).await?;
                let more = faults.len() - 1;
                let more = if more > 0 { format!("; {more} more") } else { String::new() };
                let (told, remedy) = (fault.told(|ip| known.name(ip)) + &more, known.remedy(fault));
                match fault {
                    // One packet may be lost in any network.
                    Fault::NoAnswer { right_later: true, .. } if faults.len() == 1 => {
                        Check::warning(TRAFFIC, name, told, remedy)
                    }
                    Fault::Slow { .. } => Check::warning(TRAFFIC, name, told, remedy),
                    _ => Check::failed(TRAFFIC, name, told, remedy),
                }
            }
        };
        self.reporter.add(check);
        Ok(())
    }

    /// What the cluster says of a node and of the owner.
    async fn known(&self, node: &str) -> anyhow::Result<Findings> {
        let (state, problems) = problems(self.source).await?;
        let owner = self.scene.policy(FIRST).await.ok().and_then(|status| status.node);
        let owner = owner.unwrap_or_else(|| self.first.node.clone());
        let mut daemons = std::collections::BTreeMap::new();
        for node in [node, owner.as_str()] {
            if let Ok(is_ready) = daemon::is_ready(&self.scene.client, node).await {
                daemons.insert(node.to_owned(), is_ready);
            }
        }
        let mut names = names(&state.cluster);
        let own = self.egress_ips.iter().flat_map(crate::model::addresses_of);
        names.extend(own.map(|ip| (ip, OF_THE_TEST.to_owned())));
        Ok(Findings {
            problems,
            daemons,
            names,
            policy: format!("{}/{FIRST}", self.scene.name),
            gateway: self.participants.gateway.clone(),
            owner,
            egress: listed(&self.first.address),
            server: self.scene.server.named(),
            answered: self.answered.clone(),
        })
    }
}

/// What is wrong, by a condition's message, and the remedy.
fn of_condition(message: &str) -> (String, String) {
    let (what, remedy) = split_remedy(message);
    (what, if remedy.is_empty() { "see `kubectl egret status`".to_owned() } else { remedy })
}
