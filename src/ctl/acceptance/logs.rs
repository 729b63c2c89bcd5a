//! What pods say: their logs, followed while they run.

use super::judge::PodAnswers;
use crate::cluster::kube::{Client, RequestFailure};
use crate::probe::ProbeRecord;
use http::Method;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// A log in which nothing is written for so long is opened again.
const QUIET: Duration = Duration::from_secs(60);
/// The pause before a log that cannot be read is tried again.
const AGAIN: Duration = Duration::from_millis(300);

/// The log of a pod. It is followed until this is dropped.
pub struct Log {
    pod: String,
    node: String,
    shared: Arc<Mutex<Shared>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    answers: Vec<ProbeRecord>,
    failure: Option<RequestFailure>,
}

impl Drop for Log {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Log {
    /// Follows the log of a pod that has started.
    pub fn follow(client: &Client, namespace: &str, pod: &str, node: &str) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}/log?follow=true");
        let task = tokio::spawn(follow(client.clone(), path, Arc::clone(&shared)));
        Log { pod: pod.to_owned(), node: node.to_owned(), shared, task }
    }

    /// How many answers there are now.
    pub fn count(&self) -> usize {
        self.lock().answers.len()
    }

    /// The answers after the first `from`.
    pub fn answers_since(&self, from: usize) -> PodAnswers {
        let answers = self.lock().answers.get(from..).unwrap_or_default().to_vec();
        PodAnswers { node: self.node.clone(), answers }
    }

    /// Why the log cannot be read now.
    pub fn failure(&self) -> Option<(String, RequestFailure)> {
        self.lock().failure.clone().map(|failure| (self.pod.clone(), failure))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn follow(client: Client, path: String, shared: Arc<Mutex<Shared>>) {
    loop {
        let failure = read(&client, &path, &shared).await.err();
        shared.lock().unwrap_or_else(PoisonError::into_inner).failure = failure;
        sleep(AGAIN).await;
    }
}

/// Reads the log from its beginning, and passes over what is known.
async fn read(client: &Client, path: &str, shared: &Mutex<Shared>) -> Result<(), RequestFailure> {
    let mut pieces = client.open(Method::GET, path, "*/*", None).await?;
    let (mut line, mut seen) = (Vec::new(), 0);
    while let Some(piece) = pieces.next(QUIET).await? {
        for byte in piece.iter().copied() {
            if byte != b'\n' {
                line.push(byte);
                continue;
            }
            // Lines that are no answers are the program's own log.
            if let Ok(answer) = serde_json::from_slice::<ProbeRecord>(&line) {
                let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
                shared.failure = None;
                if seen >= shared.answers.len() {
                    shared.answers.push(answer);
                }
                seen += 1;
            }
            line.clear();
        }
    }
    Ok(())
}

/// The whole log of a pod that has ended.
///
/// # Errors
/// It cannot be read.
pub async fn whole(client: &Client, namespace: &str, pod: &str, node: &str) -> Result<PodAnswers, RequestFailure> {
    let shared = Mutex::new(Shared::default());
    read(client, &format!("/api/v1/namespaces/{namespace}/pods/{pod}/log"), &shared).await?;
    let answers = shared.into_inner().unwrap_or_else(PoisonError::into_inner).answers;
    Ok(PodAnswers { node: node.to_owned(), answers })
}
