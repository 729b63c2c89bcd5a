//! Which of several controllers leads: who holds the Lease, <https://kubernetes.io/docs/concepts/architecture/leases/>.
//!
//! The Lease alone keeps nobody from writing late: a process can be stopped between a look at the clock and the write.
//! What does is told in docs/kubernetes.md, and begins with [`Leadership::confirm`].

use super::client::{Client, Failure, JSON};
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

/// How a Lease is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The namespace of the Lease; empty: the one that this process is in.
    pub namespace: String,
    /// This process, as nobody else is called.
    pub identity: String,
    /// A Lease that has not been renewed for this long can be taken by others.
    pub duration: Duration,
    /// Who cannot renew it for this long leads no longer; shorter than `duration`.
    pub deadline: Duration,
    /// Between looks at it.
    pub interval: Duration,
}

impl Settings {
    /// With the times that Kubernetes' own controllers have.
    pub fn new(namespace: String, identity: String) -> Self {
        let s = Duration::from_secs;
        Settings { namespace, identity, duration: s(15), deadline: s(10), interval: s(2) }
    }

    /// A name that no other process has: the host's, a pod's own, and a random number.
    pub fn unique_identity() -> String {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}-{:08x}", host.trim(), random(1 << 32))
    }
}

/// Tells whether this process leads.
#[derive(Clone)]
pub struct Leadership {
    kept: Arc<Kept>,
    seen: watch::Receiver<Option<Term>>,
}

struct Kept {
    client: Client,
    settings: Settings,
    /// Reading and writing it go together.
    turn: tokio::sync::Mutex<()>,
    /// When leading ends unless the Lease is renewed.
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

/// Another's Lease, and when it was first seen so: clocks of different hosts are not compared.
struct Observed {
    version: String,
    at: Instant,
}

impl Leadership {
    /// Contends for the Lease until nobody listens.
    pub fn start(client: Client, settings: Settings) -> Self {
        let (term, seen) = watch::channel(None);
        let kept = Arc::new(Kept { client, settings, turn: Default::default(), until: Mutex::new(None), term });
        tokio::spawn(contend(kept.clone()));
        Leadership { kept, seen }
    }

    /// Waits until this process leads, or leads no longer.
    pub async fn changed(&mut self) {
        // The sender lives as long as this does.
        let _ = self.seen.changed().await;
    }

    /// The time of leading that this process is in.
    pub fn term(&self) -> Option<Term> {
        let term = self.seen.borrow().clone();
        term.filter(|_| self.kept.leads())
    }

    /// Renews the Lease: who succeeds was the leader after the call, and everyone who comes later sees what was there
    /// before it.
    ///
    /// # Errors
    /// Somebody else has it, or the API server does not say.
    pub async fn confirm(&self) -> anyhow::Result<()> {
        let _turn = self.kept.turn.lock().await;
        let lease = self.kept.read().await?;
        if lease.spec.holder_identity.as_deref() != Some(&self.kept.settings.identity) || self.term().is_none() {
            self.kept.lose("another controller has the Lease");
            anyhow::bail!("another controller leads now");
        }
        Ok(self.kept.take(lease).await?)
    }

    /// Gives the Lease back, so that the next one need not wait.
    pub async fn release(&self) {
        if self.term().is_none() {
            return;
        }
        let _turn = self.kept.turn.lock().await;
        self.kept.lose("it is given back");
        if let Ok(mut lease) = self.kept.read().await
            && lease.spec.holder_identity.as_deref() == Some(&self.kept.settings.identity)
        {
            lease.spec.holder_identity = Some(String::new());
            lease.spec.lease_duration_seconds = Some(1);
            if let Err(e) = self.kept.write(&lease).await {
                debug!("the Lease cannot be given back: {e}");
            }
        }
    }
}

impl Kept {
    fn leads(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    fn path(&self) -> String {
        format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.settings.namespace)
    }

    async fn read(&self) -> Result<Lease, Failure> {
        self.client.get(&format!("{}/{NAME}", self.path())).await
    }

    async fn write(&self, lease: &Lease) -> Result<Lease, Failure> {
        let text = serde_json::to_vec(lease).map_err(|e| Failure::Unreachable(e.to_string()))?;
        if lease.metadata.resource_version.is_empty() {
            self.client.ask(Method::POST, &self.path(), Some((JSON, text))).await
        } else {
            // Refused if the Lease is another one than what was read.
            self.client.ask(Method::PUT, &format!("{}/{NAME}", self.path()), Some((JSON, text))).await
        }
    }

    /// Takes or renews a Lease as it was read.
    async fn take(&self, mut lease: Lease) -> Result<(), Failure> {
        let begun = Instant::now();
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
        // Who has seen it lapse waits to hear that it is kept again.
        let lapsed = !self.leads();
        // Counted from before the request: others count from when they see it, which is later.
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun + self.settings.deadline);
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

    fn lose(&self, why: &str) {
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

async fn contend(kept: Arc<Kept>) {
    let mut observed: Option<Observed> = None;
    let mut trouble = String::new();
    loop {
        let result = turn(&kept, &mut observed).await;
        if let Err(e) = &result {
            let text = e.to_string();
            if text != trouble {
                warn!("the Lease {}/{NAME} cannot be kept: {text}", kept.settings.namespace);
                trouble = text;
            }
        } else {
            trouble.clear();
        }
        if !kept.leads() {
            kept.lose("its Lease was not renewed in time");
        }
        let rest = kept.settings.interval;
        tokio::select! {
            () = sleep(rest) => {}
            () = kept.term.closed() => return,
        }
    }
}

/// One look at the Lease, and what follows from it.
async fn turn(kept: &Kept, observed: &mut Option<Observed>) -> Result<(), Failure> {
    let _turn = kept.turn.lock().await;
    let lease = match kept.read().await {
        Err(e) if e.is_not_found() => {
            let metadata = Metadata {
                name: NAME.to_owned(),
                namespace: kept.settings.namespace.clone(),
                resource_version: String::new(),
            };
            let (api_version, kind) = ("coordination.k8s.io/v1".to_owned(), "Lease".to_owned());
            return kept.take(Lease { api_version, kind, metadata, spec: Spec::default() }).await;
        }
        other => other?,
    };
    let holder = lease.spec.holder_identity.as_deref().unwrap_or_default();
    if holder == kept.settings.identity {
        return kept.take(lease).await;
    }
    if kept.leads() {
        kept.lose("another controller has the Lease");
    }
    let version = &lease.metadata.resource_version;
    let seen = match observed {
        Some(o) if o.version == *version => o,
        _ => observed.insert(Observed { version: version.clone(), at: Instant::now() }),
    };
    let duration = lease.spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
    let duration = duration.map_or(kept.settings.duration, Duration::from_secs);
    if holder.is_empty() || seen.at.elapsed() >= duration {
        return match kept.take(lease).await {
            // Somebody else was quicker.
            Err(e) if e.is_conflict() => Ok(()),
            other => other,
        };
    }
    Ok(())
}

/// As Kubernetes writes times of Leases: RFC 3339 with microseconds.
fn micro_time() -> String {
    format!("{:.6}", Timestamp::now())
}
