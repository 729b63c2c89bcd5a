//! Changes under running pods: a planned move, another egress IP, no gateway node, the end of the policy.

use super::super::TRAFFIC;
use super::super::judge::{self, Fault, PodAnswers, Series};
use super::super::logs::Log;
use super::super::objects::Selected;
use super::{
    AFTER_MOVE, ARRIVES, BLOCKED, FIRST, PACE, SECOND, Test, WITHOUT_GATEWAY, egress_ip, listed, of_condition,
};
use crate::api::AddressPair;
use crate::ctl::check::Check;
use crate::ctl::moves::{self, MoveCommand};
use crate::ctl::output::count;
use crate::probe::ProbeMethod;
use anyhow::bail;
use std::net::IpAddr;
use std::time::Instant;
use tokio::time::sleep;

impl Test<'_, '_> {
    fn mark(&self) -> Vec<usize> {
        self.running.iter().map(Log::count).collect()
    }

    fn answers_since(&self, marks: &[usize]) -> Vec<PodAnswers> {
        self.running.iter().zip(marks).map(|(log, mark)| log.answers_since(*mark)).collect()
    }

    /// Waits until all answers of these series are right. Returns the answers, and what has stayed wrong.
    async fn settle(
        &self,
        marks: &[usize],
        series: &[Series],
        is_right: impl Fn(IpAddr, bool) -> bool + Copy,
    ) -> (Vec<PodAnswers>, Option<Fault>) {
        let begun = Instant::now();
        loop {
            let heard = self.answers_since(marks);
            if judge::have_settled(&heard, series, is_right) {
                return (heard, None);
            }
            if begun.elapsed() > ARRIVES {
                let fault = judge::unsettled(&heard, series, is_right);
                return (heard, fault);
            }
            sleep(PACE).await;
        }
    }

    /// A planned move of the egress IP to another gateway node.
    pub(super) async fn planned_move(&mut self) -> anyhow::Result<()> {
        let name = "a planned move";
        let to = self.participants.gateway_nodes.iter().find(|node| **node != self.first.node).cloned();
        let Some(to) = to else {
            let found = "the gateway has one node that is ready";
            self.reporter.add(Check::unknown(TRAFFIC, name, found, "give it a second one: label a node"));
            return Ok(());
        };
        let marks = self.mark();
        let request = MoveCommand::Move(format!("{}/{FIRST}", self.scene.name), Some(to.clone()));
        let moved = match moves::run(self.source, &request, &self.scene.name, Some(ARRIVES), &|_| {}).await {
            Ok(moved) => moved,
            Err(e) => {
                let remedy = "see docs/failover.md, and `kubectl egret status`";
                self.reporter.add(Check::failed(TRAFFIC, name, format!("{e:#}"), remedy));
                return Ok(());
            }
        };
        sleep(AFTER_MOVE).await;
        let first = self.first.address.clone();
        let is_first = |ip, ipv6| judge::of_family(&first, ipv6) == Some(ip);
        let (heard, silent) = self.settle(&marks, &self.series, is_first).await;
        let mut faults = judge::running_pods(&heard, &self.series, &self.egress_ips, true);
        faults.extend(silent);
        let held: Vec<Series> =
            self.series.iter().copied().filter(|series| series.method == ProbeMethod::Held).collect();
        let mut found = format!(
            "from {} to {to} in {} ms; the longest pause of new connections {} ms",
            self.first.node,
            moved.moves.first().map_or(0, |moved| moved.milliseconds),
            judge::longest_pause(&heard, &self.new_connections())
        );
        if !held.is_empty() {
            found += &format!(", of open ones {} ms, and all live on", judge::longest_pause(&heard, &held));
        }
        self.judged(name, faults, found).await
    }

    /// A policy of higher priority gives the pods another egress IP, and goes again.
    pub(super) async fn another_egress_ip(&mut self, used_before: Option<&AddressPair>) -> anyhow::Result<()> {
        let name = "a change to another egress IP, and back";
        let marks = self.mark();
        let second = match egress_ip(self.scene, self.participants, SECOND, 2000, used_before).await? {
            Ok(second) => second.address,
            Err(why) => {
                let (what, remedy) = of_condition(&why);
                self.reporter.add(Check::unknown(TRAFFIC, name, what, remedy));
                return self.scene.delete_policy(SECOND).await;
            }
        };
        self.reporter.uses(&second);
        self.egress_ips.push(second.clone());
        let series = self.new_connections();
        let is_second = |ip, ipv6| judge::of_family(&second, ipv6) == Some(ip);
        let (there, not_there) = self.settle(&marks, &series, is_second).await;
        let mut faults = judge::running_pods(&there, &self.series, &self.egress_ips, false);
        self.scene.delete_policy(SECOND).await?;
        let marks = self.mark();
        let first = self.first.address.clone();
        let is_first = |ip, ipv6| judge::of_family(&first, ipv6) == Some(ip);
        let (back, not_back) = self.settle(&marks, &series, is_first).await;
        faults.extend(judge::running_pods(&back, &self.series, &self.egress_ips, false));
        faults.extend([not_there, not_back].into_iter().flatten());
        let found = format!(
            "{}; the longest pause {} ms, and {} ms back",
            listed(&second),
            judge::longest_pause(&there, &self.new_connections()),
            judge::longest_pause(&back, &self.new_connections())
        );
        self.judged(name, faults, found).await
    }

    /// Pods of a policy whose gateway has no node: nothing leaves.
    pub(super) async fn without_gateway_node(&mut self) -> anyhow::Result<()> {
        let name = "blocked without a gateway node";
        self.scene.make_gateway_without_nodes().await?;
        self.scene.make_policy(WITHOUT_GATEWAY, &self.scene.name, Selected::Blocked, 1000, None).await?;
        let kinds = self.participants.kinds(&self.first.node);
        let pods = self.clients("blocked", &kinds, Selected::Blocked, self.methods(), 0);
        self.scene.make_pods(&pods).await?;
        if self.started(&pods, false).await?.is_none() {
            return Ok(());
        }
        let blocked = self.scene.follow(&pods);
        let series = self.new_connections();
        let begun = Instant::now();
        let heard = loop {
            let heard: Vec<PodAnswers> = blocked.iter().map(|log| log.answers_since(0)).collect();
            let enough = heard.iter().all(|pod| pod.has_asked(&series, 2)) && begun.elapsed() > BLOCKED;
            if enough || begun.elapsed() > ARRIVES {
                break heard;
            }
            sleep(PACE).await;
        };
        let requests: usize = heard.iter().map(|pod| pod.answers.len()).sum();
        if requests == 0 {
            bail!("the pods of the step {name:?} say nothing; see that the API server reaches the kubelets");
        }
        let found =
            format!("{}, {}, none answered", count(pods.len(), "pod", "pods"), count(requests, "request", "requests"));
        self.judged(name, judge::blocked_pods(&heard, &series), found).await
    }

    /// The policy is deleted: its pods leave as before.
    pub(super) async fn policy_ends(&mut self) -> anyhow::Result<()> {
        let name = "a policy ends";
        let marks = self.mark();
        self.scene.delete_policy(FIRST).await?;
        let egress_ips = self.egress_ips.clone();
        let is_egress = |ip, ipv6| egress_ips.iter().any(|pair| judge::of_family(pair, ipv6) == Some(ip));
        if !self.has_answer(&self.unselected) {
            let found = "the server does not answer pods without an egress IP, so this cannot be seen";
            self.reporter.add(Check::unknown(TRAFFIC, name, found, ""));
            return Ok(());
        }
        let (heard, fault) = self.settle(&marks, &self.series, |ip, ipv6| !is_egress(ip, ipv6)).await;
        let pause = judge::longest_pause(&heard, &self.new_connections());
        let found = format!("its pods have their nodes' addresses; the longest pause {pause} ms");
        self.judged(name, fault.into_iter().collect(), found).await
    }

    fn has_answer(&self, logs: &[Log]) -> bool {
        logs.iter().any(|log| log.answers_since(0).answers.iter().any(|answer| answer.saw.is_some()))
    }

    /// Pods that no policy selects, all the while.
    pub(super) async fn unselected_pods(&mut self) -> anyhow::Result<()> {
        let name = "pods that no policy selects are untouched";
        if !self.has_answer(&self.unselected) {
            let found = "the server does not answer them: perhaps a firewall lets egress IPs pass only";
            self.reporter.add(Check::unknown(TRAFFIC, name, found, "let nodes reach the server to check this"));
            return Ok(());
        }
        let heard: Vec<PodAnswers> = self.unselected.iter().map(|log| log.answers_since(0)).collect();
        let series = self.new_connections();
        let faults = judge::unselected_pods(&heard, &series, &self.egress_ips);
        let requests: usize = heard.iter().map(|pod| pod.answers.len()).sum();
        let found = format!(
            "{}, never with an egress IP; the longest pause {} ms",
            count(requests, "answer", "answers"),
            judge::longest_pause(&heard, &series)
        );
        self.judged(name, faults, found).await
    }
}
