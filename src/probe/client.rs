//! The client: it asks at once when it begins, then at an interval, and prints each answer as a line of JSON.

use super::{ProbeMethod, ProbeRecord, address_in, tls};
use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// The longest answer that is read, bytes.
const LONGEST: usize = 64 << 10;

/// How long a request on an open connection may wait: TCP sends a lost packet again after ever longer times (RFC 6298,
/// 5.5), so it is late after a short pause, and not lost.
const HELD_PATIENCE: Duration = Duration::from_secs(15);

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The server's addresses, each asked on its own.
    pub to: Vec<SocketAddr>,
    /// The value of the header `Host`, and the name for TLS.
    pub host: String,
    /// The path of the request.
    pub path: String,
    /// Whether to speak TLS.
    pub tls: bool,
    /// How to ask.
    pub methods: Vec<ProbeMethod>,
    /// The time from one request to the next.
    pub interval: Duration,
    /// How long to wait for an answer.
    pub patience: Duration,
    /// How many requests to send by each method; 0: no end.
    pub count: u64,
}

/// Who is told of each answer.
pub type Tell = Arc<dyn Fn(&ProbeRecord) + Send + Sync>;

/// Asks until all requests are asked.
pub async fn run(options: Options, tell: Tell) {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for &to in &options.to {
        for &method in &options.methods {
            tasks.spawn(ask(options.clone(), to, method, begun, Arc::clone(&tell)));
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn ask(options: Options, to: SocketAddr, method: ProbeMethod, begun: Instant, tell: Tell) {
    let mut held = None;
    let mut asked = 0;
    loop {
        let at = Instant::now();
        let patience = if method == ProbeMethod::Held { options.patience.max(HELD_PATIENCE) } else { options.patience };
        let answer = timeout(patience, async {
            match method {
                ProbeMethod::Tcp => on_new_connection(&options, to).await,
                ProbeMethod::Udp => by_datagram(to).await,
                ProbeMethod::Held => on_held_connection(&options, to, &mut held).await,
            }
        });
        let answer = answer.await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer")));
        let ipv6 = to.is_ipv6();
        let (at, took) = (milliseconds(at - begun), milliseconds(at.elapsed()));
        let (saw, error) = match answer {
            Ok(address) => (Some(address), None),
            Err(e) => {
                held = None;
                (None, Some(format!("{e:#}")))
            }
        };
        tell(&ProbeRecord { at, took, method, ipv6, resent: resent(), saw, error });
        asked += 1;
        if asked == options.count {
            return;
        }
        let next = begun + Duration::from_millis(at) + options.interval;
        sleep(next.saturating_duration_since(Instant::now())).await;
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// `RetransSegs` of this network namespace, RFC 4022, in `/proc/net/snmp`: a line of names, then a line of numbers.
fn resent() -> u64 {
    let text = std::fs::read_to_string("/proc/self/net/snmp").unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, numbers) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let mut pairs = names.split(' ').zip(numbers.split(' '));
    pairs.find(|(name, _)| *name == "RetransSegs").and_then(|(_, number)| number.parse().ok()).unwrap_or(0)
}

/// Prints an answer as a line of JSON.
pub fn print(answer: &ProbeRecord) {
    if let Ok(line) = serde_json::to_string(answer) {
        // One write a line; a reader that is gone is no reason to end.
        let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
    }
}

async fn connect(options: &Options, to: SocketAddr) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(to).await.context("no connection")?;
    stream.set_nodelay(true).context("TCP_NODELAY")?;
    match options.tls {
        true => speak(tls::connect(stream, &options.host).await?).await,
        false => speak(stream).await,
    }
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await.context("HTTP")?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn request(sender: &mut SendRequest<Empty<Bytes>>, options: &Options, is_last: bool) -> anyhow::Result<IpAddr> {
    let mut request = Request::builder()
        .uri(&options.path)
        .header(HOST, &options.host)
        .header(USER_AGENT, concat!("egret/", env!("CARGO_PKG_VERSION")));
    if is_last {
        request = request.header(CONNECTION, "close");
    }
    let request = request.body(Empty::new()).context("the path is none")?;
    let response = sender.send_request(request).await.context("HTTP")?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LONGEST).collect().await;
    let body = body.map_err(|e| anyhow::anyhow!("the answer broke off: {e}"))?.to_bytes();
    if !status.is_success() {
        bail!("the server answers {status}");
    }
    address_in(&String::from_utf8_lossy(&body)).context("the answer has no address")
}

async fn on_new_connection(options: &Options, to: SocketAddr) -> anyhow::Result<IpAddr> {
    request(&mut connect(options, to).await?, options, true).await
}

/// Asks on the connection that is there. A connection that ends is reported before the next one is made, because an
/// error drops it.
async fn on_held_connection(
    options: &Options,
    to: SocketAddr,
    held: &mut Option<SendRequest<Empty<Bytes>>>,
) -> anyhow::Result<IpAddr> {
    if held.is_none() {
        *held = Some(connect(options, to).await?);
    }
    let sender = held.as_mut().context("no connection")?;
    request(sender, options, false).await
}

async fn by_datagram(to: SocketAddr) -> anyhow::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await.context("no socket")?;
    socket.connect(to).await.context("no route")?;
    socket.send(b"?").await.context("cannot send")?;
    let mut answer = [0; 1500];
    let size = socket.recv(&mut answer).await.context("no answer")?;
    address_in(&String::from_utf8_lossy(&answer[..size])).context("the answer has no address")
}
