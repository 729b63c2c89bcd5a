//! Leader election among controllers: the holder of the Lease leads
//! (<https://kubernetes.io/docs/concepts/architecture/leases/>).
//!
//! The Lease does not prevent late writes: a process can be paused between the check of its time and the write.
//! docs/kubernetes.md explains what prevents them; it starts with [`Leadership::confirm`].

use super::client::{Client, JSON, RequestFailure};
use super::watch::random;
use crate::cluster::Term;
use http::Method;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

/// The Lease's name.
const NAME: &str = "egret-controller";

/// Settings of leader election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElectionSettings {
    /// The namespace of the Lease; empty: the namespace of this process.
    pub namespace: String,
    /// The name of this process, which no other process has.
    pub identity: String,
    /// Others can take a Lease that has not been renewed for this time.
    pub duration: Duration,
    /// A leader that cannot renew the Lease for this time no longer leads. It is shorter than `duration`.
    pub deadline: Duration,
    /// The interval of reading and renewing it.
    pub interval: Duration,
}

impl ElectionSettings {
    /// Settings with the times of Kubernetes' own controllers.
    pub fn new(namespace: String, identity: String) -> Self {
        let s = Duration::from_secs;
        ElectionSettings { namespace, identity, duration: s(15), deadline: s(10), interval: s(2) }
    }

    /// A name that no other process has: the host name, which is a pod's own, and a random number.
    pub fn unique_identity() -> String {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}-{:08x}", host.trim(), random(1 << 32))
    }
}

/// The leadership of this process.
#[derive(Clone)]
pub struct Leadership {
    contender: Arc<Contender>,
    seen: watch::Receiver<Option<Term>>,
}

struct Contender {
    client: Client,
    settings: ElectionSettings,
    /// Held while the Lease is read and written.
    lock: tokio::sync::Mutex<()>,
    /// The time at which the leadership ends unless the Lease is renewed.
    until: Mutex<Option<Instant>>,
    term: watch::Sender<Option<Term>>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Lease {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    resource_version: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    holder_identity: Option<String>,
    lease_duration_seconds: Option<i64>,
    acquire_time: Option<String>,
    renew_time: Option<String>,
    lease_transitions: Option<i64>,
}

/// Another process's Lease, and when this version was first seen: clocks of different hosts are not compared.
struct Observed {
    version: String,
    at: Instant,
}

impl Leadership {
    /// Contends for the Lease until this value is dropped.
    pub fn start(client: Client, settings: ElectionSettings) -> Self {
        let (term, seen) = watch::channel(None);
        let contender =
            Arc::new(Contender { client, settings, lock: Default::default(), until: Mutex::new(None), term });
        tokio::spawn(contend(contender.clone()));
        Leadership { contender, seen }
    }

    /// Waits until this process becomes the leader, or is no longer.
    pub async fn changed(&mut self) {
        // The sender lives as long as this value.
        let _ = self.seen.changed().await;
    }

    /// The current term of this process, if it leads.
    pub fn term(&self) -> Option<Term> {
        let term = self.seen.borrow().clone();
        term.filter(|_| self.contender.leads())
    }

    /// Renews the Lease. If that succeeds, this process was the leader after the call, and a later leader sees
    /// everything that was written before it.
    ///
    /// # Errors
    /// Another process has the Lease, or the API server gives no answer.
    pub async fn confirm(&self) -> anyhow::Result<()> {
        let _guard = self.contender.lock.lock().await;
        let lease = self.contender.read().await?;
        if lease.spec.holder_identity.as_deref() != Some(&self.contender.settings.identity) || self.term().is_none() {
            self.contender.step_down("another controller has the Lease");
            anyhow::bail!("another controller leads now");
        }
        Ok(self.contender.take(lease).await?)
    }

    /// Releases the Lease, so that the next leader need not wait.
    pub async fn release(&self) {
        if self.term().is_none() {
            return;
        }
        let _guard = self.contender.lock.lock().await;
        self.contender.step_down("it releases the Lease");
        if let Ok(mut lease) = self.contender.read().await
            && lease.spec.holder_identity.as_deref() == Some(&self.contender.settings.identity)
        {
            lease.spec.holder_identity = Some(String::new());
            lease.spec.lease_duration_seconds = Some(1);
            if let Err(e) = self.contender.write(&lease).await {
                debug!("cannot release the Lease: {e}");
            }
        }
    }
}

impl Contender {
    fn leads(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn path(&self) -> String {
        format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.settings.namespace)
    }

    async fn read(&self) -> Result<Lease, RequestFailure> {
        self.client.get(&format!("{}/{NAME}", self.path())).await
    }

    async fn write(&self, lease: &Lease) -> Result<Lease, RequestFailure> {
        let text = serde_json::to_vec(lease).map_err(|e| RequestFailure::Unreachable(e.to_string()))?;
        if lease.metadata.resource_version.is_empty() {
            self.client.ask(Method::POST, &self.path(), Some((JSON, text))).await
        } else {
            // The API server refuses it if the Lease has changed since it was read.
            self.client.ask(Method::PUT, &format!("{}/{NAME}", self.path()), Some((JSON, text))).await
        }
    }

    /// Takes or renews the Lease that was read.
    async fn take(&self, mut lease: Lease) -> Result<(), RequestFailure> {
        let started = Instant::now();
        let now = Some(micro_time());
        let spec = &mut lease.spec;
        if spec.holder_identity.as_deref() != Some(&self.settings.identity) {
            spec.holder_identity = Some(self.settings.identity.clone());
            spec.acquire_time.clone_from(&now);
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
        }
        spec.lease_duration_seconds = Some(i64::try_from(self.settings.duration.as_secs().max(1)).unwrap_or(i64::MAX));
        spec.renew_time = now;
        let written = self.write(&lease).await?;
        // Receivers that have seen the leadership lapse must be notified.
        let lapsed = !self.leads();
        // The time counts from before the request. Others count from when they see the renewal, which is later.
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(started + self.settings.deadline);
        let number = written.spec.lease_transitions.unwrap_or(0);
        self.term.send_if_modified(|term| {
            let is_new = term.as_ref().is_none_or(|term| term.number != number);
            if is_new {
                info!(term = number, name = self.settings.identity, "this controller leads");
                *term = Some(Term { name: self.settings.identity.clone(), number });
            }
            is_new || lapsed
        });
        Ok(())
    }

    fn step_down(&self, why: &str) {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.term.send_if_modified(|term| {
            let led = term.take().is_some();
            if led {
                warn!("this controller no longer leads: {why}");
            }
            led
        });
    }
}

async fn contend(contender: Arc<Contender>) {
    let mut observed: Option<Observed> = None;
    let mut last_error = String::new();
    loop {
        let result = step(&contender, &mut observed).await;
        if let Err(e) = &result {
            let text = e.to_string();
            if text != last_error {
                warn!("cannot renew the Lease {}/{NAME}: {text}", contender.settings.namespace);
                last_error = text;
            }
        } else {
            last_error.clear();
        }
        if !contender.leads() {
            contender.step_down("its Lease was not renewed in time");
        }
        let interval = contender.settings.interval;
        tokio::select! {
            () = sleep(interval) => {}
            () = contender.term.closed() => return,
        }
    }
}

/// Reads the Lease, and renews or takes it if possible.
async fn step(contender: &Contender, observed: &mut Option<Observed>) -> Result<(), RequestFailure> {
    let _guard = contender.lock.lock().await;
    let lease = match contender.read().await {
        Err(e) if e.is_not_found() => {
            let metadata = Metadata {
                name: NAME.to_owned(),
                namespace: contender.settings.namespace.clone(),
                resource_version: String::new(),
            };
            let (api_version, kind) = ("coordination.k8s.io/v1".to_owned(), "Lease".to_owned());
            return contender.take(Lease { api_version, kind, metadata, spec: Spec::default() }).await;
        }
        other => other?,
    };
    let holder = lease.spec.holder_identity.as_deref().unwrap_or_default();
    if holder == contender.settings.identity {
        return contender.take(lease).await;
    }
    if contender.leads() {
        contender.step_down("another controller has the Lease");
    }
    let version = &lease.metadata.resource_version;
    let seen = match observed {
        Some(o) if o.version == *version => o,
        _ => observed.insert(Observed { version: version.clone(), at: Instant::now() }),
    };
    let duration = lease.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let duration = duration.map_or(contender.settings.duration, Duration::from_secs);
    if holder.is_empty() || seen.at.elapsed() >= duration {
        return match contender.take(lease).await {
            // Another process was faster.
            Err(e) if e.is_conflict() => Ok(()),
            other => other,
        };
    }
    Ok(())
}

/// The time as Kubernetes writes it in Leases: RFC 3339 with microseconds.
fn micro_time() -> String {
    format!("{:.6}", Timestamp::now())
}
