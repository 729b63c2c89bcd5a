//! Tests of the endpoints over sockets.

use super::*;
use prometheus_client::metrics::gauge::Gauge;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::rustls;

async fn start(address: &str, pages: Pages, tls: Option<TlsAcceptor>) -> (Server, SocketAddr) {
    let listener = listen(address.parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    (Server(tokio::spawn(accept(listener, Arc::new(Endpoint { pages, tls }))).abort_handle()), address)
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, request: &str, more: &str) -> String {
    let mut answer = String::new();
    let _ = stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n{more}\r\n").as_bytes()).await;
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

async fn get(address: SocketAddr, request: &str) -> String {
    ask(TcpStream::connect(address).await.unwrap(), request, "").await
}

fn scrapes() -> Metrics {
    let gauge = Gauge::<i64>::default();
    let mut registry = Registry::with_prefix("egret");
    registry.register("asked", "Scrapes", gauge.clone());
    Metrics::new(registry).before_scrape(move || {
        let gauge = gauge.clone();
        async move {
            gauge.inc();
        }
    })
}

#[tokio::test]
async fn liveness_and_readiness_differ() {
    let (ready, readiness) = watch::channel(Readiness::waiting_for("the first snapshot is not there yet"));
    let (_server, address) = start("127.0.0.1:0", Pages::Health(readiness), None).await;
    assert!(get(address, "GET /healthz").await.starts_with("HTTP/1.1 200"));
    let answer = get(address, "GET /readyz").await;
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("first snapshot"), "{answer}");
    ready.send(Readiness::Ready).unwrap();
    assert!(get(address, "GET /readyz").await.starts_with("HTTP/1.1 200"));
    assert!(get(address, "GET /metrics").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn metrics_are_refreshed_before_each_scrape() {
    let (_server, address) = start("127.0.0.1:0", Pages::Metrics(scrapes(), None), None).await;
    for scrape in 1..3 {
        let answer = get(address, "GET /metrics").await;
        assert!(answer.contains("openmetrics-text"), "{answer}");
        assert!(answer.contains(&format!("egret_asked {scrape}\n")), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_rejected() {
    let (_server, address) = start("127.0.0.1:0", Pages::Metrics(scrapes(), None), None).await;
    assert!(get(address, "GET /").await.starts_with("HTTP/1.1 404"));
    assert!(get(address, "GET /readyz").await.starts_with("HTTP/1.1 404"));
    assert!(get(address, "POST /metrics").await.starts_with("HTTP/1.1 405"));
}

#[tokio::test]
async fn silent_connections_do_not_block_others() {
    let (_ready, readiness) = watch::channel(Readiness::Ready);
    let (_server, address) = start("[::]:0", Pages::Health(readiness), None).await;
    let port = address.port();
    // 127.0.0.2 differs from the server's address, so this counts as another host.
    let connect = async |from: [u8; 4]| {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((from, 0).into()).unwrap();
        socket.connect(([127, 0, 0, 1], port).into()).await.unwrap()
    };
    let answered = async |stream: TcpStream| ask(stream, "GET /healthz", "").await.starts_with("HTTP/1.1 200");
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(connect([127, 0, 0, 2]).await);
    }
    assert!(!answered(connect([127, 0, 0, 2]).await).await, "one too many");
    assert!(answered(connect([127, 0, 0, 1]).await).await, "from this host");
    tokio::time::sleep(REQUEST_TIME + Duration::from_millis(500)).await;
    assert!(answered(connect([127, 0, 0, 2]).await).await, "the silent ones have been closed");
}

/// A scraper that accepts any certificate, as with `insecure_skip_verify`.
#[derive(Debug)]
struct AnyCertificate(rustls::crypto::CryptoProvider);

impl rustls::client::danger::ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &rustls::pki_types::CertificateDer<'_>,
        signed: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

async fn scrape(address: SocketAddr, token: &str) -> String {
    let provider = rustls::crypto::ring::default_provider();
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider.clone()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, TcpStream::connect(address).await.unwrap()).await.unwrap();
    ask(stream, "GET /metrics", &format!("Authorization: Bearer {token}\r\n")).await
}

#[tokio::test]
async fn metrics_with_authentication_are_served_to_permitted_users_only() {
    let away = Arc::new(AtomicBool::new(false));
    let guard = Guard::new(Box::new({
        let away = away.clone();
        move |token| {
            let access = match token.as_str() {
                _ if away.load(Ordering::Relaxed) => Access::Unknown("the API server is away".into()),
                "prometheus" => Access::Allowed,
                "pod" => Access::Forbidden("pod may not".into()),
                _ => Access::Unauthenticated,
            };
            Box::pin(async move { access })
        }
    }));
    let pages = Pages::Metrics(scrapes(), Some(guard));
    let (_server, address) = start("127.0.0.1:0", pages, Some(tls::self_signed().unwrap())).await;
    assert!(scrape(address, "prometheus").await.ends_with("# EOF\n"));
    for (token, status) in [("pod", "403"), ("nobody", "401"), ("", "401")] {
        let answer = scrape(address, token).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && !answer.contains("egret_"), "{answer}");
    }
    // Without TLS there is no response.
    assert!(!get(address, "GET /metrics").await.contains("egret_"));
    away.store(true, Ordering::Relaxed);
    assert!(scrape(address, "another").await.starts_with("HTTP/1.1 503"));
}

#[tokio::test]
async fn binding_an_address_is_retried() {
    // Another socket has the port for a while.
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap();
    let endpoint = Endpoint { pages: Pages::Metrics(scrapes(), None), tls: None };
    let _server = keep_serving(address, endpoint, "--metrics-address");
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(other);
    tokio::time::sleep(BIND_AGAIN + Duration::from_secs(1)).await;
    assert!(get(address, "GET /metrics").await.starts_with("HTTP/1.1 200"));
}

#[test]
fn addresses_are_parsed_with_and_without_brackets() {
    let read = |text: &str| text.parse::<ListenAddress>().map(|a| a.0);
    assert_eq!(read(""), Ok(None));
    for text in ["[::]:9871", "127.0.0.1:9871"] {
        assert_eq!(read(text), Ok(Some(text.parse().unwrap())), "{text}");
    }
    assert_eq!(read("[192.0.2.1]:9871"), Ok(Some("192.0.2.1:9871".parse().unwrap())));
    for text in ["9871", "[192.0.2.1]", "[192.0.2.1]:x", "[]:9871"] {
        assert!(read(text).is_err_and(|e| e.contains("127.0.0.1:9871")), "{text}");
    }
}
