//! `kubectl egret move`, `drain` and `rebalance`: planned moves of egress IPs. Each sets the annotation or label that
//! docs/failover.md describes, and can wait until the nodes report that the move is done.

mod movable;
mod progress;

use super::manifest::Field;
use super::output::{Show, View, count, few};
use super::state::{self, ClusterState};
use super::write::{WriteTarget, write};
use crate::cluster::{PodsOf, Source, SourceName};
use crate::model::drain::DRAIN_LABEL;
use crate::model::{MOVE_TO, REBALANCE};
use anyhow::bail;
use movable::{MovableIp, allocation_of, why_not};
use progress::{Progress, wait};
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// A command that moves egress IPs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MoveCommand {
    /// An egress IP, or that of a policy, to a node; `None`: the annotation that asks for a node is removed.
    Move(String, Option<String>),
    /// All egress IPs away from a node, or the end of that.
    Drain(String, bool),
    /// The egress IPs of a gateway evenly over its nodes, or the end of that.
    Rebalance(String, bool),
}

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Moved {
    /// What was written.
    pub written: Vec<String>,
    /// The moves that were waited for, with the time that each took.
    pub moves: Vec<MovedIp>,
    /// Egress IPs that stay where they are, with the reason.
    pub stays: Vec<String>,
    /// Whether `written` was told before the wait.
    #[serde(skip)]
    told: bool,
}

/// An egress IP that has moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MovedIp {
    /// The egress IP.
    pub egress_ip: String,
    /// The node that held it.
    pub from: String,
    /// The node that holds it.
    pub to: String,
    /// From the command until the new node reported that it holds it, as this program saw it.
    pub milliseconds: u64,
}

/// How progress is reported, a line at a time.
pub type Say<'a> = &'a dyn Fn(&str);

/// Carries out a command. With `patience`, it waits so long until it is done.
///
/// # Errors
/// It cannot be done, with the reason and the remedy; or it is not done within the time.
pub async fn run(
    source: &SourceName,
    command: &MoveCommand,
    namespace: &str,
    patience: Option<Duration>,
    say: Say<'_>,
) -> anyhow::Result<Moved> {
    let mut open = state::open(source, PodsOf::Nobody).await?;
    let before = ClusterState::of(&open);
    let mut moved = Moved::default();
    match command {
        MoveCommand::Move(what, Some(to)) => {
            let ip = allocation_of(&before, what, namespace)?;
            if ip.node.as_deref() == Some(to) && ip.held_by.iter().any(|holder| holder == to) {
                moved.stays.push(format!("{} is on node {to} already", ip.egress_ip));
                return Ok(moved);
            }
            if let Some(why) = why_not(&before, &ip, to) {
                bail!("{} cannot move to node {to}: {why}", ip.egress_ip);
            }
            for key in ip.to_annotate(&before) {
                let field = Field::Annotation(MOVE_TO);
                moved.written.push(write(source, &WriteTarget::Policy(key), field, Some(to)).await?);
            }
            follow(&mut open, Progress::of_move(&ip, to), patience, &mut moved, say).await?;
        }
        MoveCommand::Move(what, None) => {
            let ip = allocation_of(&before, what, namespace)?;
            for key in ip.annotated(&before) {
                moved.written.push(write(source, &WriteTarget::Policy(key), Field::Annotation(MOVE_TO), None).await?);
            }
            if moved.written.is_empty() {
                moved.stays.push(format!("no policy of {} asks for a node", ip.egress_ip));
            }
        }
        MoveCommand::Drain(node, begin) => {
            if !before.cluster.nodes.contains_key(node.as_str()) {
                bail!("the cluster has no node {node:?}");
            }
            let movable = MovableIp::on_node(&before, node);
            let field = Field::Label(DRAIN_LABEL);
            let value = begin.then_some("true");
            moved.written.push(write(source, &WriteTarget::Node(node.clone()), field, value).await?);
            if *begin {
                let (stay, go): (Vec<MovableIp>, Vec<MovableIp>) =
                    movable.into_iter().partition(|ip| ip.cannot_leave(&before, node).is_some());
                moved.stays.extend(
                    stay.iter()
                        .filter_map(|ip| Some(format!("{} stays: {}", ip.egress_ip, ip.cannot_leave(&before, node)?))),
                );
                follow(&mut open, Progress::of_drain(&go, node), patience, &mut moved, say).await?;
            }
        }
        MoveCommand::Rebalance(gateway, begin) => {
            if !before.cluster.gateways.contains_key(gateway.as_str()) {
                bail!("the cluster has no EgressGateway {gateway:?}");
            }
            let (target, field) = (WriteTarget::Gateway(gateway.clone()), Field::Annotation(REBALANCE));
            moved.written.push(write(source, &target, field, begin.then_some("true")).await?);
            if *begin {
                follow(&mut open, Progress::of_rebalance(&before, gateway), patience, &mut moved, say).await?;
            }
        }
    }
    Ok(moved)
}

async fn follow(
    open: &mut Source,
    progress: Progress,
    patience: Option<Duration>,
    moved: &mut Moved,
    say: Say<'_>,
) -> anyhow::Result<()> {
    if let Some(patience) = patience {
        moved.written.iter().for_each(|line| say(line));
        moved.told = true;
        moved.moves = wait(open, progress, patience, say).await?;
    }
    Ok(())
}

impl Show for Moved {
    fn text(&self, _: View) -> String {
        let mut out = String::new();
        let written = if self.told { &[] } else { self.written.as_slice() };
        for line in written.iter().chain(&self.stays) {
            let _ = writeln!(out, "{line}");
        }
        if let Some(longest) = self.moves.iter().map(|moved| moved.milliseconds).max() {
            let names: Vec<&str> = self.moves.iter().map(|moved| moved.egress_ip.as_str()).collect();
            let _ = writeln!(
                out,
                "{} in {longest} ms: {}. Connections continue: each old node served until the new one did.",
                count(self.moves.len(), "egress IP moved", "egress IPs moved"),
                few(&names, 5)
            );
        }
        out
    }
}

#[cfg(test)]
mod tests;
