//! Connections to the daemons that trace.
//!
//! In a cluster the command runs `egretd trace` in the daemon's container, as `kubectl exec` does, with the user's own
//! rights. On a host without Kubernetes it opens the daemon's socket.

use crate::cluster::kube::Client;
use crate::ctl::daemon;
use crate::model::trace::{Armed, GO, TraceEvent, TraceSpec, VERB};
use anyhow::{Context, anyhow, bail};
use egret_cni::protocol::PROTOCOL;
use egret_cni::run_dir::SOCKET;
use kube::api::AttachedProcess;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long a daemon may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest complaint that is read, bytes.
const COMPLAINT: u64 = 4096;

/// A connection to a daemon.
pub struct Stream {
    lines: Lines<Box<dyn AsyncBufRead + Send + Unpin>>,
    write: Box<dyn AsyncWrite + Send + Unpin>,
    /// What the command in the container complains of.
    complaints: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Keeps the connection to the API server.
    _process: Option<AttachedProcess>,
}

#[derive(Serialize)]
struct Line<'a> {
    version: u32,
    verb: &'static str,
    #[serde(flatten)]
    request: &'a TraceSpec,
}

impl Stream {
    /// Runs `egretd trace` in the daemon's container on the node.
    ///
    /// # Errors
    /// There is no such pod, or the user may not.
    pub async fn of_node(client: &Client, node: &str) -> anyhow::Result<Self> {
        let (mut process, _) = daemon::exec(client, node, &["egretd", "trace"], true).await?;
        let broken = || anyhow!("the API server gives no connection to the command");
        let read = BufReader::new(process.stdout().ok_or_else(broken)?);
        let write = Box::new(process.stdin().ok_or_else(broken)?);
        let complaints = process.stderr().map(|stderr| Box::new(stderr) as Box<dyn AsyncRead + Send + Unpin>);
        let read: Box<dyn AsyncBufRead + Send + Unpin> = Box::new(read);
        Ok(Stream { lines: read.lines(), write, complaints, _process: Some(process) })
    }

    /// Opens the socket of the daemon with this run directory.
    ///
    /// # Errors
    /// The daemon does not run, or the user may not.
    pub async fn of_socket(run_dir: &Path) -> anyhow::Result<Self> {
        let path = run_dir.join(SOCKET);
        let stream = UnixStream::connect(&path).await.with_context(|| {
            format!(
                "cannot ask the daemon of this host at {}; run the command on the pod's node, as root",
                path.display()
            )
        })?;
        let (read, write) = stream.into_split();
        let read: Box<dyn AsyncBufRead + Send + Unpin> = Box::new(BufReader::new(read));
        Ok(Stream { lines: read.lines(), write: Box::new(write), complaints: None, _process: None })
    }

    /// Asks for a trace, and waits until it has begun.
    ///
    /// # Errors
    /// The daemon refuses, or does not answer.
    pub async fn ask(&mut self, request: &TraceSpec) -> anyhow::Result<Armed> {
        self.line(&serde_json::to_string(&Line { version: PROTOCOL, verb: VERB, request })?).await?;
        match timeout(PATIENCE, self.next()).await {
            Ok(Ok(Some(TraceEvent::Armed(armed)))) => Ok(armed),
            Ok(Ok(Some(TraceEvent::Refused { message }))) => bail!("{message}"),
            Ok(Ok(None)) => bail!("{}", self.complaint().await),
            Ok(Ok(Some(_))) => bail!("the daemon's answer cannot be read"),
            Ok(Err(e)) => Err(e),
            Err(_) => bail!("no answer within {} s", PATIENCE.as_secs()),
        }
    }

    /// Lets the daemon send the probe.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn go(&mut self) -> anyhow::Result<()> {
        self.line(GO).await
    }

    /// The next event; `None` at the end. It is cancel-safe.
    ///
    /// # Errors
    /// The connection broke, or the daemon is of another version.
    pub async fn next(&mut self) -> anyhow::Result<Option<TraceEvent>> {
        let Some(line) = self.lines.next_line().await.context("the connection to the daemon broke")? else {
            return Ok(None);
        };
        let event = serde_json::from_str(&line);
        Ok(Some(event.context("the daemon does not know traces; use the kubectl-egret of its release")?))
    }

    async fn line(&mut self, text: &str) -> anyhow::Result<()> {
        let line = format!("{text}\n");
        self.write.write_all(line.as_bytes()).await.context("the connection to the daemon broke")?;
        self.write.flush().await.context("the connection to the daemon broke")
    }

    async fn complaint(&mut self) -> String {
        let mut text = String::new();
        if let Some(complaints) = &mut self.complaints {
            let _ = timeout(PATIENCE, complaints.take(COMPLAINT).read_to_string(&mut text)).await;
        }
        match text.trim() {
            "" => "the daemon has closed the connection; it may be ending".to_owned(),
            text => format!("egretd says: {text}"),
        }
    }
}
