//! Requests to the API server, with time limits and errors for users.

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

/// The time limit of a request.
const TIMEOUT: Duration = Duration::from_secs(10);
/// TCP keepalive: the idle time before probes, their interval and their number. A watch can be idle for minutes, and
/// nothing else would show that its connection is lost.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);
/// The shortest interval between readings of refused credentials.
const RENEW: Duration = Duration::from_secs(2);
/// The longest answer to a request for one object, in bytes: more than etcd stores.
const MAX_ANSWER: usize = 16 << 20;

/// Objects in a page of a list, as kubectl asks for.
const PAGE: usize = 500;

/// The content type of a server-side apply; JSON is YAML.
pub const APPLY: &str = "application/apply-patch+yaml";
/// The content type of a JSON merge patch, RFC 7396.
pub const MERGE: &str = "application/merge-patch+json";
/// The content type of everything else.
pub const JSON: &str = "application/json";

/// A client of the API server. Clones share connections and credentials.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    login: Login,
    current: Mutex<(kube::Client, Instant)>,
    /// Whether the last request did not reach the API server.
    away: AtomicBool,
    /// Notified when a request reaches it again.
    back: Notify,
}

/// A failed request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RequestFailure {
    /// The API server refused it. Nothing was changed.
    #[error("{message} ({code} {reason})")]
    Refused {
        /// The HTTP status.
        code: u16,
        /// Kubernetes' name of the reason, such as `Conflict`.
        reason: String,
        /// The API server's text.
        message: String,
    },
    /// The API server was not reached.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// There was no valid answer. The request may have been executed.
    #[error("the API server gave no answer: {0}")]
    Unknown(String),
}

/// A list of objects.
pub struct List<T> {
    /// The version of the list, and of its items.
    pub api_version: String,
    /// The kind of the list, such as `PodList`.
    pub kind: String,
    /// The objects.
    pub items: Vec<T>,
}

/// A part of a list, `metav1.List`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page<T> {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: PageMetadata,
    // `null` if there are none.
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
struct PageMetadata {
    #[serde(rename = "continue", default)]
    rest: Option<String>,
}

/// The API server's answer to a refused request, `metav1.Status`.
#[derive(Deserialize)]
pub struct Status {
    /// The HTTP status.
    #[serde(default)]
    pub code: u16,
    /// Kubernetes' name of the reason.
    #[serde(default)]
    pub reason: String,
    /// The text.
    #[serde(default)]
    pub message: String,
}

impl From<Status> for RequestFailure {
    fn from(s: Status) -> Self {
        RequestFailure::Refused { code: s.code, reason: s.reason, message: s.message }
    }
}

impl RequestFailure {
    /// The HTTP status of a refusal.
    pub fn code(&self) -> Option<u16> {
        match self {
            RequestFailure::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// Whether there is no such object, or no such kind.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Whether the object has changed since the request was made.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// Whether the API server no longer has the requested resource version, or not yet.
    pub fn is_wrong_version(&self) -> bool {
        match self {
            RequestFailure::Refused { code, reason, message } => {
                *code == 410
                    || matches!(reason.as_str(), "Expired" | "Gone")
                    || (*code == 504 && message.contains("Too large resource version"))
            }
            _ => false,
        }
    }

    /// Whether no API server can decide about requests now.
    pub fn is_away(&self) -> bool {
        self.code().is_none_or(|code| code >= 500)
    }

    /// Whether the request may have been executed: an answer with 5xx may come before or after the change.
    pub fn is_uncertain(&self) -> bool {
        match self {
            RequestFailure::Refused { code, .. } => *code >= 500,
            RequestFailure::Unreachable(_) => false,
            RequestFailure::Unknown(_) => true,
        }
    }
}

/// The body of an answer in pieces.
pub struct Pieces(http::Response<Body>);

impl Pieces {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// The connection broke, or nothing arrived within `limit`.
    pub async fn next(&mut self, limit: Duration) -> Result<Option<hyper::body::Bytes>, RequestFailure> {
        loop {
            match timeout(limit, self.0.body_mut().frame()).await {
                Err(_) => return Err(RequestFailure::Unknown(format!("nothing arrived for {} s", limit.as_secs()))),
                Ok(None) => return Ok(None),
                Ok(Some(Err(e))) => return Err(RequestFailure::Unknown(describe(&e))),
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
    /// Connects with the credentials that the options name.
    ///
    /// # Errors
    /// There are no credentials, or they are invalid.
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

    /// The namespace of this process, or of the kubeconfig file.
    pub fn namespace(&self) -> String {
        self.current().0.default_namespace().to_owned()
    }

    /// Reads the credentials again: Kubernetes replaces them while they are in use.
    async fn renew(&self) {
        if self.current().1.elapsed() < RENEW {
            return;
        }
        match build(&self.0.login).await {
            Ok(client) => *self.current() = (client, Instant::now()),
            Err(e) => {
                self.current().1 = Instant::now();
                tracing::warn!("cannot read the credentials for the API server again: {e:#}");
            }
        }
    }

    /// Waits until a request reaches the API server again, after one that did not.
    pub async fn back(&self) {
        self.0.back.notified().await;
    }

    /// Sends a request. Returns the answer when its headers have arrived.
    ///
    /// # Errors
    /// There is no answer, or the API server refuses the request.
    pub async fn open(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<Pieces, RequestFailure> {
        self.open_within(TIMEOUT, method, path, accept, content).await
    }

    /// Like [`Client::open`], with another time limit: an API server may build a long list before it sends the headers.
    ///
    /// # Errors
    /// As [`Client::open`].
    pub async fn open_within(
        &self,
        limit: Duration,
        method: Method,
        path: &str,
        accept: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<Pieces, RequestFailure> {
        let mut request = Request::builder().method(method).uri(path).header(ACCEPT, accept);
        let mut body = Vec::new();
        if let Some((type_, bytes)) = content {
            request = request.header(CONTENT_TYPE, type_);
            body = bytes;
        }
        let request =
            request.body(Body::from(body)).map_err(|e| RequestFailure::Unreachable(format!("{path}: {e}")))?;
        let client = self.current().0.clone();
        let sent = timeout(limit, client.send(request)).await;
        let away = !matches!(sent, Ok(Ok(_)));
        if self.0.away.swap(away, Ordering::Relaxed) && !away {
            self.0.back.notify_waiters();
        }
        let answer = match sent {
            Err(_) => return Err(RequestFailure::Unknown(format!("nothing arrived for {} s", limit.as_secs()))),
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
    /// As [`Client::open`], or the answer is invalid.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        content: Option<(&str, Vec<u8>)>,
    ) -> Result<T, RequestFailure> {
        read(path, self.open(method, path, JSON, content).await?).await
    }

    /// Reads an object.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, RequestFailure> {
        self.ask(Method::GET, path, None).await
    }

    /// Reads a collection, a page at a time. `selector`: a part of the query, or nothing.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn list<T: DeserializeOwned>(&self, path: &str, selector: &str) -> Result<List<T>, RequestFailure> {
        let mut all = List { api_version: String::new(), kind: String::new(), items: Vec::new() };
        let first = [format!("limit={PAGE}"), selector.to_owned()];
        let first = first.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("&");
        let mut query = first.clone();
        loop {
            let page: Page<T> = self.get(&format!("{path}?{query}")).await?;
            all.items.extend(page.items.unwrap_or_default());
            (all.api_version, all.kind) = (page.api_version, page.kind);
            match page.metadata.rest.filter(|rest| !rest.is_empty()) {
                Some(rest) => query = format!("{first}&continue={}", escaped(&rest)),
                None => return Ok(all),
            }
        }
    }

    /// Reads the metadata of a collection, as etcd has it.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub async fn list_metadata<T: DeserializeOwned>(&self, path: &str) -> Result<T, RequestFailure> {
        read(path, self.open(Method::GET, path, METADATA_ONLY.0, None).await?).await
    }
}

/// Escapes a value for a URL's query. A continue token is base64 with `-`, `_` and `=` today, but that is no part of
/// the API.
pub fn escaped(value: &str) -> String {
    let mut text = String::new();
    for byte in value.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(char::from(byte)),
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

async fn read<T: DeserializeOwned>(path: &str, answer: Pieces) -> Result<T, RequestFailure> {
    let body = whole(answer).await?;
    serde_json::from_slice(&body).map_err(|e| RequestFailure::Unknown(format!("{path}: {e}")))
}

async fn whole(mut pieces: Pieces) -> Result<Vec<u8>, RequestFailure> {
    let mut all = Vec::new();
    while let Some(piece) = pieces.next(TIMEOUT).await? {
        all.extend_from_slice(&piece);
        if all.len() > MAX_ANSWER {
            return Err(RequestFailure::Unknown(format!("an answer is longer than {MAX_ANSWER} bytes")));
        }
    }
    Ok(all)
}

/// The failure of a request without an answer. If there was no connection, it was not sent.
fn unsent(e: &kube::Error) -> RequestFailure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = cause {
        if let Some(e) = error.downcast_ref::<hyper_util::client::legacy::Error>()
            && e.is_connect()
        {
            return RequestFailure::Unreachable(describe(e));
        }
        cause = error.source();
    }
    RequestFailure::Unknown(describe(e))
}

/// The text of an error and its causes, each once.
fn describe(e: &dyn std::error::Error) -> String {
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
    // Headers and body are two writes. Nagle's algorithm would delay the second until the first is acknowledged.
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(TIMEOUT / 2));
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

#[cfg(test)]
mod tests;
