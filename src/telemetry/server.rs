//! HTTP endpoints: `/metrics` at one address, `/healthz` and `/readyz` at another, which only this host reaches.
//!
//! Liveness means that the runtime still turns: whoever answers is alive. Readiness is told by the daemon.

use super::access::{Access, Guard};
use super::tls;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;
use tokio_rustls::TlsAcceptor;

/// Connections from other hosts and from pods that are served at once, and as many from this host itself, which kubelet's
/// probes come from. Scrapers and probes are few; more are a mistake or an attack, and are closed.
const MAX_CONNECTIONS: usize = 32;
/// A request has this long to arrive.
const REQUEST_TIME: Duration = Duration::from_secs(3);
/// A connection has this long for all of its one request and answer.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// An address that cannot be listened on is tried again after this time: it may come late, as one of DHCP's does.
const BIND_AGAIN: Duration = Duration::from_secs(5);
/// <https://prometheus.io/docs/specs/om/open_metrics_spec/#overall-structure>
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the daemon does its work; else why not, in plain words.
pub type Readiness = watch::Receiver<Result<(), String>>;

type Refresh = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What `--metrics-address` and `--health-address` name: an address and port, or nothing for no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(ListenAddress(None));
        }
        // `[192.0.2.1]:9871`, too: in a manifest, where the address is the node's, nobody knows of which family it is.
        let bracketed = text.strip_prefix('[').and_then(|rest| rest.rsplit_once("]:"));
        let parsed = match bracketed.map(|(ip, port)| (ip.parse::<IpAddr>(), port.parse::<u16>())) {
            Some((Ok(ip), Ok(port))) => Some(SocketAddr::new(ip, port)),
            _ => text.parse().ok(),
        };
        let address = parsed.ok_or_else(|| {
            format!("{text:?} is no address and port; write 127.0.0.1:9871 or [::]:9871, or \"\" for none")
        })?;
        Ok(ListenAddress(Some(address)))
    }
}

/// Where a daemon shows itself.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Of `/metrics`.
    pub metrics: ListenAddress,
    /// Of `/healthz` and `/readyz`.
    pub health: ListenAddress,
    /// Asks who reads the metrics; `None`: anybody may.
    pub guard: Option<Guard>,
}

impl Addresses {
    /// Serves both, each in a task of its own.
    ///
    /// # Errors
    /// There can be no TLS.
    pub fn serve(&self, metrics: Metrics, readiness: Readiness) -> anyhow::Result<[Option<Server>; 2]> {
        let metrics = Endpoint {
            pages: Pages::Metrics(metrics, self.guard.clone()),
            tls: self.guard.as_ref().map(|_| tls::self_signed()).transpose()?,
        };
        let health = Endpoint { pages: Pages::Health(readiness), tls: None };
        Ok([
            self.metrics.0.map(|address| keep_serving(address, metrics, "--metrics-address")),
            self.health.0.map(|address| keep_serving(address, health, "--health-address")),
        ])
    }
}

/// The daemon's metrics.
pub struct Metrics {
    registry: Registry,
    refresh: Option<Refresh>,
}

impl Metrics {
    /// From a registry whose metrics keep themselves up to date.
    pub fn new(registry: Registry) -> Self {
        Metrics { registry, refresh: None }
    }

    /// Has `refresh` run to its end before each scrape: for figures that are read when they are asked for, as
    /// counters in the kernel are.
    pub fn before_scrape<F>(mut self, refresh: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.refresh = Some(Box::new(move || Box::pin(refresh())));
        self
    }

    async fn answer(&self) -> Response<Full<Bytes>> {
        if let Some(refresh) = &self.refresh {
            refresh().await;
        }
        let mut body = String::new();
        match encode(&mut body, &self.registry) {
            Ok(()) => response(StatusCode::OK, OPENMETRICS, body),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("the metrics cannot be written: {e}\n")),
        }
    }
}

/// What is shown at one address.
struct Endpoint {
    pages: Pages,
    tls: Option<TlsAcceptor>,
}

enum Pages {
    Metrics(Metrics, Option<Guard>),
    Health(Readiness),
}

impl Endpoint {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered here\n".into());
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refusal;
        }
        match (&self.pages, request.uri().path()) {
            (Pages::Metrics(metrics, guard), "/metrics") => {
                let access = match guard {
                    Some(guard) => guard.access(request.headers()).await,
                    None => Access::Allowed,
                };
                if access == Access::Allowed { metrics.answer().await } else { refusal(access) }
            }
            (Pages::Health(_), "/healthz") => text(StatusCode::OK, "ok\n".into()),
            (Pages::Health(readiness), "/readyz") => match &*readiness.borrow() {
                Ok(()) => text(StatusCode::OK, "ok\n".into()),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            (Pages::Metrics(..), _) => text(StatusCode::NOT_FOUND, "here is /metrics\n".into()),
            (Pages::Health(_), _) => text(StatusCode::NOT_FOUND, "here are /healthz and /readyz\n".into()),
        }
    }
}

/// What who may not read the metrics, or not now, is told.
fn refusal(access: Access) -> Response<Full<Bytes>> {
    let (status, words) = match access {
        Access::Forbidden(why) => (StatusCode::FORBIDDEN, why),
        Access::Unknown(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
        Access::Allowed | Access::Unauthenticated => {
            (StatusCode::UNAUTHORIZED, "the metrics want a bearer token that the API server knows".into())
        }
    };
    let mut refusal = text(status, format!("{words}\n"));
    if status == StatusCode::UNAUTHORIZED {
        refusal.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    refusal
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body)
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A running endpoint; dropping it stops it.
#[derive(Debug)]
pub struct Server(AbortHandle);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves, from when the address can be listened on. That it cannot stops nothing else: metrics are not what pods need.
fn keep_serving(address: SocketAddr, endpoint: Endpoint, flag: &'static str) -> Server {
    let task = async move {
        let mut told = false;
        let listener = loop {
            match listen(address).await {
                Ok(listener) => break listener,
                Err(e) if !told => {
                    let again = BIND_AGAIN.as_secs();
                    tracing::warn!(%address, error = %e, "cannot listen; tried again every {again} s; {flag} names another address");
                    told = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(BIND_AGAIN).await;
        };
        tracing::info!(%address, flag, "listening");
        accept(listener, Arc::new(endpoint)).await;
    };
    Server(tokio::spawn(task).abort_handle())
}

async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        // A host without IPv6 has no [::] to listen on; what was meant is every address.
        Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        other => other,
    }
}

async fn accept(listener: TcpListener, endpoint: Arc<Endpoint>) {
    let [own, others] = [(); 2].map(|()| Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let is_own = stream.local_addr().is_ok_and(|here| here.ip() == from.ip());
                let free = if is_own { &own } else { &others };
                let Ok(permit) = free.clone().try_acquire_owned() else { continue };
                let endpoint = endpoint.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    let _ = tokio::time::timeout(CONNECTION_TIME, connection(stream, endpoint)).await;
                });
            }
            Err(e) => {
                // Out of file descriptors, say: the connection waits in the backlog, and trying at once would spin.
                tracing::warn!(error = %e, "a connection to an endpoint could not be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, endpoint: Arc<Endpoint>) {
    let Some(tls) = &endpoint.tls else { return http(stream, endpoint).await };
    match tokio::time::timeout(REQUEST_TIME, tls.accept(stream)).await {
        Ok(Ok(stream)) => http(stream, endpoint.clone()).await,
        Ok(Err(e)) => tracing::debug!(error = %e, "a connection to the metrics endpoint is not TLS"),
        Err(_) => tracing::debug!("a connection to the metrics endpoint began no TLS in time"),
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, endpoint: Arc<Endpoint>) {
    let service = service_fn(|request| {
        let endpoint = endpoint.clone();
        async move { Ok::<_, Infallible>(endpoint.answer(request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(REQUEST_TIME)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(e) = served {
        tracing::debug!(error = %e, "a connection to an endpoint ended early");
    }
}

#[cfg(test)]
mod tests;
