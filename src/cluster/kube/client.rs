//! Requests to the API server: one at a time, each with its end in sight, errors in words.

use super::kind::METADATA_ONLY;
use super::login::Login;
use crate::cluster::KubeOptions;
use anyhow::Context;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::{Body, ClientBuilder, ConfigExt};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::time::timeout;
use tower::{BoxError, ServiceExt};

/// A request that has no answer after this time gets none.
const PATIENCE: Duration = Duration::from_secs(10);
/// A connection that says nothing for this long is asked, so often, and so many times, whether it lives: a watch says
/// nothing for minutes, and a change that got lost would not be missed.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);
/// Credentials that were refused are read again from where they came from, at most this often.
const RENEW: Duration = Duration::from_secs(2);
/// An answer to a request for one object is at most so long, bytes: more than etcd stores.
const LONGEST_ANSWER: usize = 16 << 20;

/// The content type of a server-side apply; JSON is YAML.
pub const APPLY: &str = "application/apply-patch+yaml";
/// The content type of everything else.
pub const JSON: &str = "application/json";

/// Speaks to the API server. Clones share connections and credentials.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    login: Login,
    current: Mutex<(kube::Client, Instant)>,
    /// Whether the last request found the API server away.
    away: AtomicBool,
    /// Told when it is back.
    back: Notify,
}

/// A request that did not do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The API server says no; nothing was changed.
    #[error("{message} ({code} {reason})")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// Kubernetes' word for it, `Conflict`.
        reason: String,
        /// Its words.
        message: String,
    },
    /// It was not reached.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// It gave no answer, or one that makes no sense; whether it did what was asked is not known.
    #[error("the API server gave no answer: {0}")]
    Unknown(String),
}

/// What the API server says when it refuses, `metav1.Status`.
#[derive(Deserialize)]
pub struct Status {
    /// The HTTP status.
    #[serde(default)]
    pub code: u16,
    /// One word.
    #[serde(default)]
    pub reason: String,
    /// In words.
    #[serde(default)]
    pub message: String,
}

impl From<Status> for Failure {
    fn from(s: Status) -> Self {
        Failure::Refused { code: s.code, reason: s.reason, message: s.message }
    }
}

impl Failure {
    /// The HTTP status of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            Failure::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether there is no such object, or no such kind.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether the object is not as the request expected it.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// Whether the resource version that was asked for is not to be had (any more, or yet).
    pub fn is_wrong_version(&self) -> bool {
        match self {
            Failure::Refused { code, reason, message } => {
                *code == 410
                    || matches!(reason.as_str(), "Expired" | "Gone")
                    || (*code == 504 && message.contains("Too large resource version"))
            }
            _ => false,
        }
    }

    /// Whether there is no API server now that could say yes or no.
    pub fn is_away(&self) -> bool {
        self.code().is_none_or(|code| code >= 500)
    }

    /// Whether the request may have been carried out all the same: 5xx answers come from before and from after.
    pub fn is_uncertain(&self) -> bool {
        match self {
            Failure::Refused { code, .. } => *code >= 500,
            Failure::Unreachable(_) => false,
            Failure::Unknown(_) => true,
        }
    }
}

/// The body of an answer, piece by piece.
pub struct Pieces(http::Response<Body>);

impl Pieces {
    /// The next piece; `None` at the end. Waits at most `patience`.
    ///
    /// # Errors
    /// The connection broke, or nothing came.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<hyper::body::Bytes>, Failure> {
        loop {
            match timeout(patience, self.0.body_mut().frame()).await {
                Err(_) => return Err(Failure::Unknown(format!("nothing came for {} s", patience.as_secs()))),
                Ok(None) => return Ok(None),
                Ok(Some(Err(e))) => return Err(Failure::Unknown(in_words(&e))),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }
}

impl Client {
    /// With the credentials that the options name.
    ///
    /// # Errors
    /// There are none, or they make no sense.
    pub async fn connect(options: &KubeOptions) -> anyhow::Result<Self> {
        let login = Login::of(options);
        let client = build(&login).await?;
        let current = Mutex::new((client, Instant::now()));
        Ok(Client(Arc::new(Inner { login, current, away: AtomicBool::new(false), back: Notify::new() })))
    }

    /// The client of the crate `kube`, with the same credentials.
    pub fn of_kube(&self) -> kube::Client {
        self.current().0.clone()
    }

    fn current(&self) -> MutexGuard<'_, (kube::Client, Instant)> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The namespace that this process is in, or that the kubeconfig file names.
    pub fn namespace(&self) -> String {
        self.current().0.default_namespace().to_owned()
    }

    /// Reads the credentials again; they are replaced while they are in use.
    async fn renew(&self) {
        if self.current().1.elapsed() < RENEW {
            return;
        }
        match build(&self.0.login).await {
            Ok(client) => *self.current() = (client, Instant::now()),
            Err(e) => {
                self.current().1 = Instant::now();
                tracing::warn!("credentials for the API server cannot be read again: {e:#}");
            }
        }
    }

    /// Waits until the API server, found away by whatever request, answers one.
    pub async fn back(&self) {
        self.0.back.notified().await;
    }

    /// Sends a request and returns the answer once its head is there.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn open(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<Pieces, Failure> {
        self.open_within(PATIENCE, method, path, accept, content).await
    }

    /// The same, with another patience: an API server may make the whole of a long list before it sends the head.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub async fn open_within(
        &self,
        patience: Duration,
        method: Method,
        path: &str,
        accept: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<Pieces, Failure> {
        let mut request = Request::builder().method(method).uri(path).header(ACCEPT, accept);
        let mut body = Vec::new();
        if let Some((type_, bytes)) = content {
            request = request.header(CONTENT_TYPE, type_);
            body = bytes;
        }
        let request = request.body(Body::from(body)).map_err(|e| Failure::Unreachable(format!("{path}: {e}")))?;
        let client = self.current().0.clone();
        let sent = timeout(patience, client.send(request)).await;
        let away = !matches!(sent, Ok(Ok(_)));
        if self.0.away.swap(away, Ordering::Relaxed) && !away {
            self.0.back.notify_waiters();
        }
        let answer = match sent {
            Err(_) => return Err(Failure::Unknown(format!("nothing came for {} s", patience.as_secs()))),
            Ok(Err(e)) => return Err(unsent(&e)),
            Ok(Ok(answer)) => answer,
        };
        let code = answer.status();
        if code.is_success() {
            return Ok(Pieces(answer));
        }
        let body = whole(Pieces(answer)).await.unwrap_or_default();
        if code == StatusCode::UNAUTHORIZED {
            self.renew().await;
        }
        let mut status = serde_json::from_slice::<Status>(&body).unwrap_or_else(|_| {
            let message = String::from_utf8_lossy(&body).trim().chars().take(300).collect();
            Status { code: 0, reason: code.canonical_reason().unwrap_or_default().to_owned(), message }
        });
        status.code = code.as_u16();
        Err(status.into())
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// As [`Client::open`], and an answer that is not what it should be.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<T, Failure> {
        read(path, self.open(method, path, JSON, content).await?).await
    }

    /// Reads an object.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.ask(Method::GET, path, None).await
    }

    /// Reads the metadata of a whole collection, as etcd has it.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn list_metadata<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        read(path, self.open(Method::GET, path, METADATA_ONLY.0, None).await?).await
    }
}

async fn read<T: DeserializeOwned>(path: &str, answer: Pieces) -> Result<T, Failure> {
    let body = whole(answer).await?;
    serde_json::from_slice(&body).map_err(|e| Failure::Unknown(format!("{path}: {e}")))
}

async fn whole(mut pieces: Pieces) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    while let Some(piece) = pieces.next(PATIENCE).await? {
        all.extend_from_slice(&piece);
        if all.len() > LONGEST_ANSWER {
            return Err(Failure::Unknown(format!("an answer is longer than {LONGEST_ANSWER} bytes")));
        }
    }
    Ok(all)
}

/// A request that failed before there was an answer: it was not sent if there was no connection.
fn unsent(e: &kube::Error) -> Failure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = cause {
        if let Some(e) = error.downcast_ref::<hyper_util::client::legacy::Error>()
            && e.is_connect()
        {
            return Failure::Unreachable(in_words(e));
        }
        cause = error.source();
    }
    Failure::Unknown(in_words(e))
}

/// An error with its causes, each said once.
fn in_words(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

async fn build(login: &Login) -> anyhow::Result<kube::Client> {
    let config = login.config().await?;
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    // A request's head and body are two writes; the second one would wait for the first one's acknowledgement.
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(PATIENCE / 2));
    connector.set_keepalive(Some(KEEPALIVE.0));
    connector.set_keepalive_interval(Some(KEEPALIVE.1));
    connector.set_keepalive_retries(Some(KEEPALIVE.2));
    let connector = config.rustls_https_connector_with_connector(connector).context("TLS")?;
    let http = Http::builder(TokioExecutor::new()).build(connector).map_err(BoxError::from);
    let (base, namespace) = (config.base_uri_layer(), config.default_namespace.clone());
    Ok(match config.auth_layer().context("credentials")? {
        Some(credentials) => ClientBuilder::new(http, namespace).with_layer(&credentials).with_layer(&base).build(),
        None => ClientBuilder::new(http, namespace).with_layer(&base).build(),
    })
}
