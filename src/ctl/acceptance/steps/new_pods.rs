//! New pods: their first packets on a node of each kind, and many of them at once.

use super::super::TRAFFIC;
use super::super::judge::{self, Fault, PodAnswers, Series};
use super::super::logs::Log;
use super::super::objects::{Client as Pod, Selected};
use super::super::participants::Kind;
use super::{NEW, PACE, READABLE, REQUESTS, Test, in_words, listed};
use crate::ctl::check::Check;
use crate::ctl::output::count;
use crate::probe::ProbeMethod;
use anyhow::bail;
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tokio::time::sleep;

impl Test<'_, '_> {
    /// The first packets of new pods on a node of each kind. `false`: the server answers nobody.
    pub(super) async fn new_pods(&mut self) -> anyhow::Result<bool> {
        let kinds = self.participants.kinds(&self.first.node);
        let mut pods = self.clients("running", &kinds, Selected::Yes, self.all_methods(), 0);
        pods.extend(self.clients("unselected", &kinds, Selected::No, self.methods(), 0));
        for n in 0..NEW {
            pods.extend(self.clients(&format!("new-{n}"), &kinds, Selected::Yes, self.methods(), REQUESTS));
        }
        self.scene.make_pods(&pods).await?;
        let (lasting, ending): (Vec<Pod>, Vec<Pod>) = pods.into_iter().partition(|pod| pod.count == 0);
        let Some(ips) = self.started(&lasting, false).await? else { return Ok(false) };
        let (selected, others): (Vec<Pod>, Vec<Pod>) =
            lasting.into_iter().partition(|pod| pod.selected == Selected::Yes);
        self.running = self.scene.follow(&selected);
        self.unselected = self.scene.follow(&others);
        if self.started(&ending, true).await?.is_none() {
            return Ok(false);
        }
        let mut heard = self.whole(&ending).await?;
        self.wait_for_answers(&ips).await?;
        if !self.choose_series(&ips, &heard) {
            return Ok(false);
        }
        heard.extend(self.running.iter().map(|log| log.answers_since(0)));
        let series = self.new_connections();
        let right = |pod: &&PodAnswers| {
            let faults = judge::new_pods(std::slice::from_ref(*pod), &series, &self.first.address).0;
            faults.iter().all(|fault| matches!(fault, Fault::Slow { .. }))
        };
        self.answered = heard.iter().filter(right).map(|pod| pod.node.clone()).collect();
        for kind in [Kind::Owner, Kind::Gateway, Kind::Plain] {
            let name = format!("the first packet of a new pod, on {}", kind.word());
            let Some((_, node)) = kinds.iter().find(|(k, _)| *k == kind) else {
                self.reporter.add(Check::unknown(TRAFFIC, &name, "there is no such node that is ready", ""));
                continue;
            };
            let of_node: Vec<PodAnswers> = heard.iter().filter(|pod| pod.node == *node).cloned().collect();
            let (faults, slowest) = judge::new_pods(&of_node, &series, &self.first.address);
            let found = format!(
                "{node}: {}, {}; the slowest first answer after {slowest} ms",
                count(of_node.len(), "pod", "pods"),
                in_words(&series)
            );
            self.judged(&name, faults, found).await?;
        }
        Ok(true)
    }

    /// Waits until every pod that goes on has asked a few times.
    async fn wait_for_answers(&self, ips: &[IpAddr]) -> anyhow::Result<()> {
        let series: Vec<Series> = self.possible(ips);
        let limit = READABLE + Duration::from_millis(self.interval * REQUESTS);
        let begun = Instant::now();
        let logs = || self.running.iter().chain(&self.unselected);
        while !logs().all(|log| log.answers_since(0).has_asked(&series, 3)) {
            if begun.elapsed() > limit {
                let failure = logs().find_map(Log::failure);
                let Some((pod, failure)) = failure else { return Ok(()) };
                bail!("cannot read the log of pod {pod}: {failure}; see that the API server reaches the kubelets");
            }
            sleep(PACE).await;
        }
        Ok(())
    }

    /// The requests that pods and server have the families for, and that the egress IP answers.
    fn possible(&self, ips: &[IpAddr]) -> Vec<Series> {
        let has = |ipv6: bool| {
            self.scene.server.addresses.iter().any(|at| at.is_ipv6() == ipv6)
                && ips.iter().any(|ip| ip.is_ipv6() == ipv6)
                && judge::of_family(&self.first.address, ipv6).is_some()
        };
        let families = [false, true].into_iter().filter(|ipv6| has(*ipv6));
        families
            .flat_map(|ipv6| self.all_methods().iter().map(move |method| Series { method: *method, ipv6 }))
            .collect()
    }

    /// Chooses what is judged: what somebody has an answer to. `false`: nothing.
    fn choose_series(&mut self, ips: &[IpAddr], new: &[PodAnswers]) -> bool {
        let possible = self.possible(ips);
        let all: Vec<PodAnswers> =
            self.running.iter().chain(&self.unselected).map(|log| log.answers_since(0)).collect();
        let is_answered =
            |series: &Series| all.iter().chain(new).any(|pod| pod.of(*series).any(|answer| answer.saw.is_some()));
        let (answered, silent): (Vec<Series>, Vec<Series>) = possible.iter().partition(|series| is_answered(series));
        let name = "the server answers";
        let server = self.scene.server.named();
        if answered.is_empty() {
            let error = all.iter().chain(new).flat_map(|pod| &pod.answers).find_map(|answer| answer.error.as_deref());
            let found = match (possible.is_empty(), error) {
                (true, _) => format!(
                    "{server} has no address of a family that the pods and the egress IP {} have",
                    listed(&self.first.address)
                ),
                (false, error) => format!("{server} answers no pod, selected or not: {}", error.unwrap_or("no answer")),
            };
            let remedy = "start it with `kubectl egret test-server` on a host outside, and let the nodes and the egress \
                          IPs reach its port, TCP and UDP";
            self.reporter.add(Check::failed(TRAFFIC, name, found, remedy));
            return false;
        }
        let text = format!("{server}: {}", in_words(&answered));
        self.reporter.add(match silent.iter().find(|series| series.method != ProbeMethod::Held) {
            None => Check::ok(TRAFFIC, name, text),
            Some(series) => {
                let remedy = "let it pass, or the test says nothing about it";
                Check::warning(TRAFFIC, name, format!("{text}; nobody has an answer by {series}"), remedy)
            }
        });
        self.series = answered;
        true
    }

    /// Many new pods at once, on all nodes.
    pub(super) async fn many_pods(&mut self, pods: usize) -> anyhow::Result<()> {
        let nodes = self.participants.all_nodes();
        let each = nodes.iter().cycle().take(if nodes.is_empty() { 0 } else { pods }).enumerate();
        let all: Vec<Pod> = each
            .map(|(n, node)| self.client(format!("many-{n}"), node, Selected::Yes, self.methods(), REQUESTS))
            .collect();
        let begun = Instant::now();
        self.scene.make_pods(&all).await?;
        if self.started(&all, true).await?.is_none() {
            return Ok(());
        }
        let took = begun.elapsed().as_secs_f64();
        let heard = self.whole(&all).await?;
        let (faults, slowest) = judge::new_pods(&heard, &self.new_connections(), &self.first.address);
        let found = format!(
            "{} on {}, done after {took:.1} s; the slowest first answer after {slowest} ms",
            count(all.len(), "pod", "pods"),
            count(nodes.len().min(all.len()), "node", "nodes")
        );
        self.judged("many new pods at once", faults, found).await
    }
}
