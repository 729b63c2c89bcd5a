//! An HTTP endpoint for metrics and health: `/metrics`, `/healthz`, `/readyz`.
//!
//! Liveness means that the runtime still turns: whoever answers is alive. Readiness is told by the daemon.

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

/// Connections from other hosts and from pods that are served at once, and as many from this host itself, which kubelet's
/// probes come from. Scrapers and probes are few; more are a mistake or an attack, and are closed.
const MAX_CONNECTIONS: usize = 32;
/// A request has this long to arrive.
const REQUEST_TIME: Duration = Duration::from_secs(3);
/// A connection has this long for all of its one request and answer.
const CONNECTION_TIME: Duration = Duration::from_secs(30);
/// <https://prometheus.io/docs/specs/om/open_metrics_spec/#overall-structure>
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the daemon does its work; else why not, in plain words.
pub type Readiness = watch::Receiver<Result<(), String>>;

type Refresh = Box<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What `--metrics-address` names: an address and port, or nothing for no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub Option<SocketAddr>);

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(ListenAddress(None));
        }
        let wrong = |_| format!("{text:?} is no address and port; write [::]:9871 or 127.0.0.1:9871, or \"\" for none");
        text.parse().map(|address| ListenAddress(Some(address))).map_err(wrong)
    }
}

/// What the endpoint shows.
pub struct Endpoint {
    registry: Registry,
    readiness: Readiness,
    refresh: Option<Refresh>,
}

impl Endpoint {
    /// From a registry whose metrics keep themselves up to date.
    pub fn new(registry: Registry, readiness: Readiness) -> Self {
        Endpoint { registry, readiness, refresh: None }
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

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut refusal = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered here\n".into());
            refusal.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
            return refusal;
        }
        match request.uri().path() {
            "/metrics" => self.metrics().await,
            "/healthz" => text(StatusCode::OK, "ok\n".into()),
            "/readyz" => match &*self.readiness.borrow() {
                Ok(()) => text(StatusCode::OK, "ok\n".into()),
                Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            },
            _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz and /readyz\n".into()),
        }
    }

    async fn metrics(&self) -> Response<Full<Bytes>> {
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

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body)
}

fn response(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

/// A running endpoint; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    task: AbortHandle,
}

impl Server {
    /// Where it listens; the port is the real one, also where port 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Listens and serves in a task of its own.
///
/// # Errors
/// The address cannot be listened on: the port is another process's, or the address is not this host's.
pub async fn serve(address: SocketAddr, endpoint: Endpoint) -> io::Result<Server> {
    let listener = match TcpListener::bind(address).await {
        // A host without IPv6 has no [::] to listen on; what was meant is every address.
        Err(e) if e.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await?
        }
        other => other?,
    };
    let address = listener.local_addr()?;
    let task = tokio::spawn(accept(listener, Arc::new(endpoint))).abort_handle();
    Ok(Server { address, task })
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
                tracing::warn!(error = %e, "a connection to the metrics endpoint could not be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, endpoint: Arc<Endpoint>) {
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
        tracing::debug!(error = %e, "a connection to the metrics endpoint ended early");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::gauge::Gauge;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(server: &Server, request: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn started(registry: Registry) -> (Server, watch::Sender<Result<(), String>>) {
        let (ready, readiness) = watch::channel(Err("the first snapshot is not there yet".to_string()));
        let gauge = Gauge::<i64>::default();
        let mut registry = registry;
        registry.register("asked", "Scrapes", gauge.clone());
        let endpoint = Endpoint::new(registry, readiness).before_scrape(move || {
            let gauge = gauge.clone();
            async move {
                gauge.inc();
            }
        });
        (serve("127.0.0.1:0".parse().unwrap(), endpoint).await.unwrap(), ready)
    }

    #[tokio::test]
    async fn health_is_told_apart_from_readiness() {
        let (server, ready) = started(Registry::default()).await;
        assert!(get(&server, "GET /healthz").await.starts_with("HTTP/1.1 200"));
        let answer = get(&server, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("first snapshot"), "{answer}");
        ready.send(Ok(())).unwrap();
        assert!(get(&server, "GET /readyz").await.starts_with("HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn metrics_are_refreshed_before_each_scrape() {
        let (server, _ready) = started(Registry::with_prefix("egret")).await;
        for scrape in 1..3 {
            let answer = get(&server, "GET /metrics").await;
            assert!(answer.contains("openmetrics-text"), "{answer}");
            assert!(answer.contains(&format!("egret_asked {scrape}\n")), "{answer}");
            assert!(answer.ends_with("# EOF\n"), "{answer}");
        }
    }

    #[tokio::test]
    async fn anything_else_is_refused_in_words() {
        let (server, _ready) = started(Registry::default()).await;
        assert!(get(&server, "GET /").await.starts_with("HTTP/1.1 404"));
        assert!(get(&server, "POST /metrics").await.starts_with("HTTP/1.1 405"));
    }

    #[tokio::test]
    async fn who_says_nothing_keeps_nobody_out() {
        let (ready, readiness) = watch::channel(Ok(()));
        let server = serve("[::]:0".parse().unwrap(), Endpoint::new(Registry::default(), readiness)).await.unwrap();
        let port = server.address().port();
        // 127.0.0.2 is not the address that is spoken to, so this is as from elsewhere.
        let connect = async |from: [u8; 4]| {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind((from, 0).into()).unwrap();
            socket.connect(([127, 0, 0, 1], port).into()).await.unwrap()
        };
        let ask = async |mut stream: TcpStream| {
            let mut answer = String::new();
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
            let _ = stream.read_to_string(&mut answer).await;
            answer.starts_with("HTTP/1.1 200")
        };
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            silent.push(connect([127, 0, 0, 2]).await);
        }
        assert!(!ask(connect([127, 0, 0, 2]).await).await, "one too many");
        assert!(ask(connect([127, 0, 0, 1]).await).await, "from this host");
        tokio::time::sleep(REQUEST_TIME + Duration::from_millis(500)).await;
        assert!(ask(connect([127, 0, 0, 2]).await).await, "the silent ones have been closed");
        drop(ready);
    }

    #[test]
    fn an_empty_address_means_no_endpoint() {
        assert_eq!("".parse(), Ok(ListenAddress(None)));
        assert!("9871".parse::<ListenAddress>().unwrap_err().contains("[::]:9871"));
    }
}
