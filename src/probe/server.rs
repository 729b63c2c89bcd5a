//! The server: it answers each HTTP request and each datagram with the source address that it sees.
//!
//! The answer is the address alone, so that programs can read it; the header `Egret-Peer` has the port as well. One line a
//! request goes to standard output: the address and the path.

use anyhow::Context;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;

/// The most connections at a time; more wait.
const MAX_CONNECTIONS: usize = 10_000;
/// How long a client may take for the headers of a request. A connection may be idle for as long.
const REQUEST_TIME: Duration = Duration::from_secs(60);
/// The pause after an error of `accept`, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves TCP and UDP on these addresses, on all if there are none. Returns only with an error.
///
/// # Errors
/// An address cannot be listened on.
pub async fn run(addresses: &[IpAddr], port: u16) -> anyhow::Result<()> {
    let addresses = if addresses.is_empty() { vec![Ipv6Addr::UNSPECIFIED.into()] } else { addresses.to_vec() };
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut last = None;
    for address in addresses {
        let (tcp, udp) = listen(address, port).await?;
        tokio::spawn(serve_datagrams(udp));
        last = Some(tokio::spawn(serve_connections(tcp, Arc::clone(&permits))));
    }
    eprintln!("listening on port {port}, TCP and UDP");
    if let Some(last) = last {
        last.await.context("the server has ended")?;
    }
    Ok(())
}

/// Both sockets. A host without IPv6 listens for IPv4.
async fn listen(address: IpAddr, port: u16) -> anyhow::Result<(TcpListener, UdpSocket)> {
    let mut at = SocketAddr::new(address, port);
    let tcp = match TcpListener::bind(at).await {
        Err(e) if at.ip() == Ipv6Addr::UNSPECIFIED && e.kind() != ErrorKind::AddrInUse => {
            at.set_ip(Ipv4Addr::UNSPECIFIED.into());
            TcpListener::bind(at).await
        }
        other => other,
    };
    let hint = || format!("cannot listen on {at}; choose another with --port");
    Ok((tcp.with_context(hint)?, UdpSocket::bind(at).await.with_context(hint)?))
}

async fn serve_connections(listener: TcpListener, permits: Arc<Semaphore>) {
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                tokio::spawn(async move {
                    serve(stream, canonical(peer)).await;
                    drop(permit);
                });
            }
            Err(e) => {
                eprintln!("accept: {e}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let respond = service_fn(move |request: Request<Incoming>| async move {
        log(peer, request.uri().path_and_query().map_or("/", |path| path.as_str()));
        let mut response = Response::new(Full::new(Bytes::from(format!("{}\n", peer.ip()))));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        if let Ok(peer) = HeaderValue::from_str(&peer.to_string()) {
            response.headers_mut().insert("egret-peer", peer);
        }
        Ok::<_, Infallible>(response)
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    // A client that ends its connection without a word is no error.
    let _ = http
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME)
        .serve_connection(TokioIo::new(stream), respond)
        .await;
}

async fn serve_datagrams(socket: UdpSocket) {
    let mut buffer = [0; 1500];
    loop {
        // An error is an ICMP message about an earlier answer.
        let Ok((_, peer)) = socket.recv_from(&mut buffer).await else { continue };
        log(canonical(peer), "UDP");
        let _ = socket.send_to(canonical(peer).to_string().as_bytes(), peer).await;
    }
}

/// One write, so that lines do not mix.
fn log(peer: SocketAddr, path: &str) {
    let _ = std::io::stdout().write_all(format!("{} {path}\n", peer.ip()).as_bytes());
}

/// An IPv4 peer of a socket for both families as IPv4.
fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

#[cfg(test)]
mod tests {
    use super::super::client::{Options, run as ask};
    use super::*;
    use crate::probe::{ProbeMethod, ProbeRecord};

    #[tokio::test]
    async fn it_answers_by_every_way() {
        let (tcp, udp) = listen(Ipv4Addr::LOCALHOST.into(), 0).await.unwrap();
        let (over_tcp, over_udp) = (tcp.local_addr().unwrap(), udp.local_addr().unwrap());
        tokio::spawn(serve_connections(tcp, Arc::new(Semaphore::new(4))));
        tokio::spawn(serve_datagrams(udp));
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        socket.send_to(b"?", over_udp).await.unwrap();
        let mut answer = [0; 100];
        let (size, _) = socket.recv_from(&mut answer).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&answer[..size]), socket.local_addr().unwrap().to_string());
        let options = Options {
            to: vec![over_tcp],
            host: "server".to_owned(),
            path: "/".to_owned(),
            tls: false,
            methods: vec![ProbeMethod::Tcp, ProbeMethod::Held],
            interval: Duration::ZERO,
            patience: Duration::from_secs(20),
            count: 3,
        };
        let answers = Arc::new(std::sync::Mutex::new(Vec::new()));
        let kept = Arc::clone(&answers);
        let tell = Arc::new(move |answer: &ProbeRecord| kept.lock().unwrap().push((answer.method, answer.saw)));
        tokio::time::timeout(Duration::from_secs(30), ask(options, tell)).await.unwrap();
        let mut answers = answers.lock().unwrap().clone();
        answers.sort();
        let local = Some(IpAddr::from(Ipv4Addr::LOCALHOST));
        assert_eq!(
            answers,
            [
                ProbeMethod::Tcp,
                ProbeMethod::Tcp,
                ProbeMethod::Tcp,
                ProbeMethod::Held,
                ProbeMethod::Held,
                ProbeMethod::Held
            ]
            .map(|method| (method, local))
        );
    }
}
