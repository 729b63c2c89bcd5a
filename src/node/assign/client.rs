//! The client of the assign hook: one HTTP/1.1 request on each connection, over TCP or a Unix socket.

use super::HookRequest;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// How long a request may take. A cloud's interface takes seconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// The longest answer that is read, bytes.
const LONGEST: usize = 64 << 10;
/// The largest number of characters of an answer that a status shows.
const SHOWN: usize = 200;

/// Where the hook listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookUrl {
    /// A Unix socket.
    Unix(PathBuf),
    /// A server.
    Http {
        /// Host and port, as in the URL.
        authority: String,
        /// The path.
        path: String,
    },
}

impl FromStr for HookUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{text:?} is no assign hook; write unix:/PATH or http://HOST:PORT/PATH");
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(HookUrl::Unix(path.into())) } else { Err(wrong()) };
        }
        let uri: hyper::Uri = text.parse().map_err(|_| wrong())?;
        let authority = uri.authority().filter(|a| uri.scheme_str() == Some("http") && !a.as_str().contains('@'));
        let authority = authority.ok_or_else(wrong)?.to_string();
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(HookUrl::Http { authority, path })
    }
}

/// Why a request has failed.
#[derive(Debug)]
pub enum HookFailure {
    /// The hook has refused it.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The first line of the answer.
        text: String,
    },
    /// There was no answer.
    NoAnswer(String),
}

impl fmt::Display for HookFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HookFailure::Refused { status, text } if text.is_empty() => write!(f, "it answers with status {status}"),
            HookFailure::Refused { status, text } => write!(f, "it answers with status {status}: {text}"),
            HookFailure::NoAnswer(why) => write!(f, "it does not answer: {why}"),
        }
    }
}

/// Sends a request. The hook has done it if it answers with a status of success.
pub async fn post(target: &HookUrl, request: &HookRequest) -> Result<(), HookFailure> {
    match tokio::time::timeout(PATIENCE, exchange(target, request)).await {
        Ok(answer) => answer,
        Err(_) => Err(HookFailure::NoAnswer(format!("nothing within {} s", PATIENCE.as_secs()))),
    }
}

async fn exchange(target: &HookUrl, request: &HookRequest) -> Result<(), HookFailure> {
    match target {
        HookUrl::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(|e| no_answer("no connection", &e))?;
            on(stream, "localhost", "/", request).await
        }
        HookUrl::Http { authority, path } => {
            let with_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            let to = if with_port { authority.clone() } else { format!("{authority}:80") };
            let stream = TcpStream::connect(to).await.map_err(|e| no_answer("no connection", &e))?;
            on(stream, authority, path, request).await
        }
    }
}

async fn on<S>(stream: S, host: &str, path: &str, request: &HookRequest) -> Result<(), HookFailure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |e: hyper::Error| no_answer("the connection failed", &e);
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
    let connection = tokio::spawn(connection);
    let body = serde_json::to_vec(request).unwrap_or_default();
    let message = hyper::Request::post(path)
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .header(CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| no_answer("no request", &e))?;
    let answer = async {
        let response = sender.send_request(message).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        if status.is_success() {
            return Ok(());
        }
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        Err(HookFailure::Refused { status: status.as_u16(), text: first_line(&body) })
    };
    let answer = answer.await;
    connection.abort();
    answer
}

fn no_answer(what: &str, e: &dyn fmt::Display) -> HookFailure {
    HookFailure::NoAnswer(format!("{what}: {e}"))
}

/// The first line of an answer, as a status may show it.
fn first_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_a_socket_or_a_server() {
        let target = |text: &str| text.parse::<HookUrl>();
        assert_eq!(target("unix:/run/hook.sock"), Ok(HookUrl::Unix("/run/hook.sock".into())));
        let http = |authority: &str, path: &str| HookUrl::Http { authority: authority.into(), path: path.into() };
        assert_eq!(target("http://127.0.0.1:9000/assign?a=b"), Ok(http("127.0.0.1:9000", "/assign?a=b")));
        assert_eq!(target("http://[::1]:9000"), Ok(http("[::1]:9000", "/")));
        for wrong in ["", "unix:run", "https://hook", "/run/hook.sock", "http://", "http://user:secret@hook/"] {
            assert!(target(wrong).unwrap_err().contains("unix:/PATH"), "{wrong}");
        }
    }

    #[test]
    fn an_answers_first_line_is_shown_without_control_characters() {
        assert_eq!(first_line(b"\n  no \x1b[31mpermission \nmore"), "no [31mpermission");
        assert_eq!(first_line(&[b'x'; 1000]).len(), SHOWN);
        assert_eq!(first_line(b""), "");
    }
}
