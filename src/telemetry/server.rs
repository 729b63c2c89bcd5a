//! HTTP endpoints: `/metrics` at one address; `/healthz` and `/readyz` at another, which only this host can reach.
//!
//! Liveness means that the runtime still runs tasks: any response proves it. The daemon sets the readiness.

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

/// The most connections served at once from other hosts and pods, and as many from this host, which kubelet's probes
/// come from. Scrapers and probes are few; connections above the limit are closed.
const MAX_CONNECTIONS: usize = 32;
/// Time limit for receiving a request.
const REQUEST_TIME: Duration = Duration::from_secs(3);
/// Time limit for a whole connection, with its one request and response.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// Pause before an address that could not be bound is tried again. It may come late, for example by DHCP.
const BIND_AGAIN: Duration = Duration::from_secs(5);
/// <https://prometheus.io/docs/specs/om/open_metrics_spec/#overall-structure>
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the daemon does its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It does.
    Ready,
    /// It does not, with the reason.
    NotReady(String),
}

impl Readiness {
    /// Not ready, with the reason.
    pub fn waiting_for(reason: impl Into<String>) -> Self {
        Readiness::NotReady(reason.into())
    }

    /// Why it is not ready.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Readiness::Ready => None,
            Readiness::NotReady(reason) => Some(reason),
        }
    }
}

type Refresh = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// An address and port, or nothing for no endpoint: `--metrics-address` and `--health-address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(ListenAddress(None));
        }
        // Accept `[192.0.2.1]:9871` too: a manifest writes the node's address in brackets, because its family is not
        // known.
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

/// The addresses of the endpoints.
#[derive(Clone, Debug)]
pub struct Addresses {
    /// Address of `/metrics`.
    pub metrics: ListenAddress,
    /// Address of `/healthz` and `/readyz`.
    pub health: ListenAddress,
    /// Authorises readers of the metrics; `None`: anyone may read them.
    pub guard: Option<Guard>,
}

impl Addresses {
    /// Serves both endpoints, each in its own task.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn serve(
        &self,
        metrics: Metrics,
        readiness: watch::Receiver<Readiness>,
    ) -> anyhow::Result<[Option<Server>; 2]> {
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
    /// Metrics of a registry that is always up to date.
    pub fn new(registry: Registry) -> Self {
        Metrics { registry, refresh: None }
    }

    /// Runs `refresh` before each scrape, for figures that are read only when requested, such as counters in the
    /// kernel.
    pub fn before_scrape<F>(mut self, refresh: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.refresh = Some(Box::new(move || Box::pin(refresh())));
        self
    }

    async fn respond(&self) -> Response<Full<Bytes>> {
        if let Some(refresh) = &self.refresh {
            refresh().await;
        }
        let mut body = String::new();
        match encode(&mut body, &self.registry) {
            Ok(()) => response(StatusCode::OK, OPENMETRICS, body),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("cannot encode the metrics: {e}\n")),
        }
    }
}

/// The pages and the TLS of one address.
struct Endpoint {
    pages: Pages,
    tls: Option<TlsAcceptor>,
}

enum Pages {
    Metrics(Metrics, Option<Guard>),
    Health(watch::Receiver<Readiness>),
}

impl Endpoint {
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are supported\n".into());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match (&self.pages, request.uri().path()) {
            (Pages::Metrics(metrics, guard), "/metrics") => {
                let access = match guard {
                    Some(guard) => guard.access(request.headers()).await,
                    None => Access::Allowed,
                };
                if access == Access::Allowed { metrics.respond().await } else { denied(access) }
            }
            (Pages::Health(_), "/healthz") => text(StatusCode::OK, "ok\n".into()),
            (Pages::Health(readiness), "/readyz") => match &*readiness.borrow() {
                Readiness::Ready => text(StatusCode::OK, "ok\n".into()),
                Readiness::NotReady(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            (Pages::Metrics(..), _) => text(StatusCode::NOT_FOUND, "the only page is /metrics\n".into()),
            (Pages::Health(_), _) => text(StatusCode::NOT_FOUND, "the only pages are /healthz and /readyz\n".into()),
        }
    }
}

/// The response to a reader who is not authorised, or cannot be authorised now.
fn denied(access: Access) -> Response<Full<Bytes>> {
    let (status, reason) = match access {
        Access::Forbidden(why) => (StatusCode::FORBIDDEN, why),
        Access::Unknown(why) => (StatusCode::SERVICE_UNAVAILABLE, why),
        Access::Allowed | Access::Unauthenticated => {
            (StatusCode::UNAUTHORIZED, "the metrics need a bearer token that the API server knows".into())
        }
    };
    let mut response = text(status, format!("{reason}\n"));
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
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

/// Serves an endpoint as soon as the address can be bound. A failure stops nothing else: pods do not need metrics.
fn keep_serving(address: SocketAddr, endpoint: Endpoint, flag: &'static str) -> Server {
    let task = async move {
        let mut warned = false;
        let listener = loop {
            match listen(address).await {
                Ok(listener) => break listener,
                Err(e) if !warned => {
                    let retry = BIND_AGAIN.as_secs();
                    tracing::warn!(%address, error = %e, "cannot listen, retrying every {retry} s; see {flag}");
                    warned = true;
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
        // A host without IPv6 cannot bind [::]; bind all IPv4 addresses instead.
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
                // For example out of file descriptors: the connection stays in the backlog, and trying at once would
                // spin.
                tracing::warn!(error = %e, "cannot accept a connection to an endpoint");
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
        Err(_) => tracing::debug!("a connection to the metrics endpoint did not complete the TLS handshake in time"),
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, endpoint: Arc<Endpoint>) {
    let service = service_fn(|request| {
        let endpoint = endpoint.clone();
        async move { Ok::<_, Infallible>(endpoint.respond(request).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(REQUEST_TIME)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(e) = served {
        tracing::debug!(error = %e, "a connection to an endpoint failed");
    }
}

#[cfg(test)]
mod tests;
