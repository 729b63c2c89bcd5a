//! The objects of a test in the cluster: made, waited for, deleted.

use super::logs::Log;
use super::objects::{self, ALIVE, Client as Pod, KEPT, LABEL, PREFIX, Selected};
use super::server::Server;
use crate::api::{AddressPair, EgressPolicy, EgressPolicyStatus};
use crate::cluster::kube::{Client, JSON, MERGE, RequestFailure};
use crate::ctl::status::{PolicyState, state_of};
use anyhow::{Context, bail};
use futures_util::future::join_all;
use http::Method;
use k8s_openapi::api::core::v1::Pod as PodObject;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// From one look at the API server to the next.
const PACE: Duration = Duration::from_millis(200);
/// How often a test shows that it runs.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A test that has not shown for so long that it runs is over.
const SILENT: Duration = Duration::from_secs(7);
/// How long a new namespace may be without its service account.
const ACCOUNT: Duration = Duration::from_secs(20);

const PODS: &str = "pods";
const POLICIES: &str = "egresspolicies";

/// The objects of one test.
pub struct Scene {
    pub client: Client,
    /// The name of the namespace, and of the gateway without nodes.
    pub name: String,
    pub image: String,
    pub server: Server,
}

/// An egress IP that is ready.
#[derive(Clone, Debug)]
pub struct Ready {
    pub address: AddressPair,
    /// The node that holds it.
    pub node: String,
}

fn collection(namespace: &str, plural: &str) -> String {
    match plural {
        PODS => format!("/api/v1/namespaces/{namespace}/pods"),
        _ => format!("/apis/egret.dev/v1alpha1/namespaces/{namespace}/{plural}"),
    }
}

fn gateways() -> &'static str {
    "/apis/egret.dev/v1alpha1/egressgateways"
}

impl Scene {
    async fn create(&self, path: &str, object: &Value) -> Result<(), RequestFailure> {
        let body = object.to_string().into_bytes();
        let made: Result<Value, RequestFailure> = self.client.ask(Method::POST, path, Some((JSON, body))).await;
        made.map(drop)
    }

    /// Makes the namespace.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn make_namespace(&self) -> anyhow::Result<()> {
        let made = self.create("/api/v1/namespaces", &objects::namespace(&self.name)).await;
        made.with_context(|| {
            format!("cannot make the namespace {}; docs/kubectl.md lists the rights that the test needs", self.name)
        })
    }

    /// Makes a policy, in place of one of the same name.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn make_policy(
        &self,
        name: &str,
        gateway: &str,
        selects: Selected,
        priority: i32,
        address: Option<&AddressPair>,
    ) -> anyhow::Result<()> {
        let object = objects::policy(&self.name, name, gateway, selects, priority, address, &self.server);
        let made = self.create(&collection(&self.name, POLICIES), &object).await;
        made.with_context(|| format!("cannot make the EgressPolicy {}/{name}", self.name))
    }

    /// Makes the gateway that selects no node.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn make_gateway_without_nodes(&self) -> anyhow::Result<()> {
        let made = self.create(gateways(), &objects::gateway_without_nodes(&self.name)).await;
        made.with_context(|| format!("cannot make the EgressGateway {}", self.name))
    }

    /// Deletes a policy.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn delete_policy(&self, name: &str) -> anyhow::Result<()> {
        let path = format!("{}/{name}", collection(&self.name, POLICIES));
        let gone: Result<Value, RequestFailure> = self.client.ask(Method::DELETE, &path, None).await;
        gone.map(drop).with_context(|| format!("cannot delete the EgressPolicy {}/{name}", self.name))
    }

    /// Makes pods, all at once. A new namespace has no service account for a moment, and no pod before it.
    ///
    /// # Errors
    /// The API server refuses one.
    pub async fn make_pods(&self, pods: &[Pod]) -> anyhow::Result<()> {
        let made = join_all(pods.iter().map(|pod| self.make_pod(pod))).await;
        made.into_iter().collect()
    }

    async fn make_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        let object = objects::pod(&self.name, &self.image, &self.server, pod);
        let begun = Instant::now();
        loop {
            match self.create(&collection(&self.name, PODS), &object).await {
                Err(RequestFailure::Refused { message, .. })
                    if message.contains("serviceaccount") && begun.elapsed() < ACCOUNT =>
                {
                    sleep(PACE).await;
                }
                other => return other.with_context(|| format!("cannot make the pod {}/{}", self.name, pod.name)),
            }
        }
    }

    /// Waits until the pods have started, or have ended if they end. Returns their addresses.
    ///
    /// # Errors
    /// One has not within `patience`; the text says why.
    pub async fn wait_for_pods(
        &self,
        pods: &[Pod],
        ended: bool,
        patience: Duration,
    ) -> anyhow::Result<Vec<std::net::IpAddr>> {
        let begun = Instant::now();
        loop {
            let all = self.pods().await?;
            let is_there = |pod: &&Pod| {
                let phase = all.get(&pod.name).and_then(|object| object.status.as_ref()?.phase.as_deref());
                matches!((phase, ended), (Some("Succeeded"), _) | (Some("Running"), false))
            };
            let missing: Vec<&Pod> = pods.iter().filter(|pod| !is_there(pod)).collect();
            let Some(first) = missing.first() else {
                let ips = pods.iter().filter_map(|pod| all.get(&pod.name)?.status.as_ref()?.pod_ips.as_ref());
                return Ok(ips.flatten().filter_map(|ip| ip.ip.parse().ok()).collect());
            };
            if begun.elapsed() > patience {
                let why = self.why_not_started(&first.name, all.get(&first.name)).await;
                bail!(
                    "{} of {} pods have not {} within {} s, {} on {} among them: {why}",
                    missing.len(),
                    pods.len(),
                    if ended { "ended" } else { "started" },
                    patience.as_secs(),
                    first.name,
                    first.node
                );
            }
            sleep(PACE).await;
        }
    }

    async fn pods(&self) -> anyhow::Result<BTreeMap<String, PodObject>> {
        let list: k8s_openapi::List<PodObject> =
            self.client.get(&collection(&self.name, PODS)).await.context("cannot read the test's pods")?;
        Ok(list.items.into_iter().map(|pod| (pod.metadata.name.clone().unwrap_or_default(), pod)).collect())
    }

    /// What kubelet says of a pod that does not start: the container's state, or the newest event.
    async fn why_not_started(&self, name: &str, pod: Option<&PodObject>) -> String {
        let waiting = || {
            let status = pod?.status.as_ref()?;
            let waiting = status.container_statuses.as_ref()?.first()?.state.as_ref()?.waiting.as_ref()?;
            let reason = waiting.reason.as_deref().filter(|reason| *reason != "ContainerCreating")?;
            Some(format!("{reason}: {}", waiting.message.as_deref().unwrap_or_default()))
        };
        if let Some(why) = waiting() {
            return why;
        }
        let path = format!("/api/v1/namespaces/{}/events?fieldSelector=involvedObject.name%3D{name}", self.name);
        let events: Value = self.client.get(&path).await.unwrap_or_default();
        let last = events["items"].as_array().and_then(|events| {
            let warnings = events.iter().filter(|event| event["type"] == "Warning");
            warnings.filter_map(|event| event["message"].as_str()).next_back()
        });
        let phase = pod.and_then(|pod| pod.status.as_ref()?.phase.clone()).unwrap_or_default();
        last.map_or_else(
            || format!("it is {phase}, and nothing tells why; see whether kubelet runs there"),
            str::to_owned,
        )
    }

    /// Follows the logs of pods.
    pub fn follow(&self, pods: &[Pod]) -> Vec<Log> {
        pods.iter().map(|pod| Log::follow(&self.client, &self.name, &pod.name, &pod.node)).collect()
    }

    /// The status of a policy.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn policy(&self, name: &str) -> anyhow::Result<EgressPolicyStatus> {
        let path = format!("{}/{name}", collection(&self.name, POLICIES));
        let policy: EgressPolicy = self.client.get(&path).await.context("cannot read the test's policy")?;
        Ok(policy.status.unwrap_or_default())
    }

    /// Waits until a policy's egress IP is ready; `Err` in the result: the condition that says why it is not.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn wait_for_egress_ip(&self, name: &str, patience: Duration) -> anyhow::Result<Result<Ready, String>> {
        let begun = Instant::now();
        loop {
            let status = self.policy(name).await?;
            let state = state_of(&status);
            if matches!(state, PolicyState::Ready | PolicyState::Shadowed)
                && let (Some(address), Some(node)) = (&status.addresses, &status.node)
            {
                return Ok(Ok(Ready { address: address.clone(), node: node.clone() }));
            }
            // A rejection is final: only the user can change it.
            if state == PolicyState::Rejected || begun.elapsed() > patience {
                let bad = status.conditions.iter().find(|c| c.status != "True" && c.type_ != "Shadowed");
                let silent = "the controller has not answered; see whether the Deployment egret-controller is ready";
                return Ok(Err(bad.map_or_else(|| silent.to_owned(), |c| format!("{}: {}", c.reason, c.message))));
            }
            sleep(PACE).await;
        }
    }

    /// Shows others that this test runs, for ever.
    pub async fn stay_alive(&self) -> std::convert::Infallible {
        let mut beats = 0_u64;
        loop {
            sleep(HEARTBEAT).await;
            beats += 1;
            // One that fails makes no difference, if the next one does not.
            let _ = self.annotate(&beats.to_string()).await;
        }
    }

    /// Marks the namespace as one that the user keeps.
    pub async fn keep(&self) {
        let _ = self.annotate(KEPT).await;
    }

    async fn annotate(&self, value: &str) -> Result<(), RequestFailure> {
        let patch = json!({"metadata": {"annotations": {ALIVE: value}}}).to_string().into_bytes();
        let path = format!("/api/v1/namespaces/{}", self.name);
        let done: Result<Value, RequestFailure> = self.client.ask(Method::PATCH, &path, Some((MERGE, patch))).await;
        done.map(drop)
    }

    /// Deletes everything, and waits until it is gone. Returns what is left, with the reason.
    pub async fn delete(&self, patience: Duration) -> Vec<String> {
        delete(&self.client, &self.name, patience).await
    }
}

/// Deletes the objects of a test: pods first, so that they do not outlive their policies.
async fn delete(client: &Client, name: &str, patience: Duration) -> Vec<String> {
    let namespace = format!("/api/v1/namespaces/{name}");
    let gateway = format!("{}/{name}", gateways());
    let (pods, policies) = (collection(name, PODS), collection(name, POLICIES));
    let begun = Instant::now();
    let mut left = Vec::new();
    for path in [&pods, &policies, &gateway, &namespace] {
        let deleted: Result<Value, RequestFailure> = client.ask(Method::DELETE, path, None).await;
        if let Err(e) = deleted.as_ref()
            && !e.is_not_found()
            && !e.is_conflict()
        {
            left.push(format!("{path}: {e}"));
        }
    }
    while left.is_empty() {
        let gone = [&gateway, &namespace].map(|path| client.get::<Value>(path));
        let there: Vec<&str> = join_all(gone)
            .await
            .iter()
            .zip([&gateway, &namespace])
            .filter(|(answer, _)| !answer.as_ref().is_err_and(RequestFailure::is_not_found))
            .map(|(_, path)| path.as_str())
            .collect();
        if there.is_empty() {
            break;
        }
        if begun.elapsed() > patience {
            left.extend(there.iter().map(|path| format!("{path}: it is still there after {} s", patience.as_secs())));
        }
        sleep(PACE).await;
    }
    left
}

/// Deletes what earlier tests have left that were killed. A test that runs changes its namespace every two seconds.
/// Returns the names that were deleted, and those that the user keeps.
///
/// # Errors
/// The namespaces cannot be read.
pub async fn sweep(client: &Client) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let before = beats(client).await?;
    let (kept, other): (BTreeMap<String, String>, BTreeMap<String, String>) =
        before.into_iter().partition(|(_, beat)| beat == KEPT);
    let mut swept = Vec::new();
    if !other.is_empty() {
        sleep(SILENT).await;
        let now = beats(client).await?;
        for (name, _) in other.iter().filter(|(name, beat)| now.get(*name).is_some_and(|now| now == *beat)) {
            // What cannot be deleted is not in the way of this test.
            delete(client, name, Duration::ZERO).await;
            swept.push(name.clone());
        }
    }
    Ok((swept, kept.into_keys().collect()))
}

/// The tests that are there, by name, each with its last sign of life. A gateway without a namespace gives none.
async fn beats(client: &Client) -> anyhow::Result<BTreeMap<String, String>> {
    let selector = format!("?labelSelector={}%3Dtrue", LABEL.replace('/', "%2F"));
    let read = async |path: &str| -> anyhow::Result<Vec<(String, String)>> {
        let list: Value =
            client.get(&format!("{path}{selector}")).await.with_context(|| format!("cannot list {path}"))?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let is_ours = |item: &Value| {
            let name = item["metadata"]["name"].as_str().filter(|name| name.starts_with(PREFIX))?;
            let is_going = item["metadata"]["deletionTimestamp"].is_string();
            let beat = item["metadata"]["annotations"][ALIVE].as_str().unwrap_or_default();
            (!is_going).then(|| (name.to_owned(), beat.to_owned()))
        };
        Ok(items.iter().filter_map(is_ours).collect())
    };
    let mut all: BTreeMap<String, String> = read(gateways()).await?.into_iter().collect();
    all.extend(read("/api/v1/namespaces").await?);
    Ok(all)
}
