//! The socket for plugins' requests, and the lock against a second daemon.

use super::node_state::{self, NodeState};
use super::trace::{self, TraceRequest};
use crate::model::trace as wire;
use anyhow::Context;
use egret_cni::careful;
use egret_cni::protocol::{CniError, PROTOCOL, Request, Response, Verb, codes};
use egret_cni::run_dir::{self, DAEMON_LOCK, SOCKET};
use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::WriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};

/// The largest request, bytes. A request is one line, and GC lists every attachment of the node.
const MAX_REQUEST: u64 = 4 << 20;
/// How long to wait for the request on a new connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest number of concurrent connections; further ones wait in the kernel's queue. A node has some hundred
/// pods, and its runtime starts a few of them at a time.
const AT_ONCE: usize = 512;

/// A plugin's request that waits for its response.
pub struct PluginRequest {
    pub verb: Verb,
    /// Where the response goes.
    pub response: oneshot::Sender<Result<(), CniError>>,
}

/// Creates the run directory and waits until no other daemon uses it.
///
/// # Errors
/// The directory cannot be created or locked.
pub async fn lock(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    run_dir::make(run_dir).with_context(|| format!("run directory {}", run_dir.display()))?;
    let path = run_dir.join(DAEMON_LOCK);
    let mut waited = 0;
    loop {
        if let Some(lock) =
            run_dir::lock_daemon(run_dir).with_context(|| format!("{} cannot be locked", path.display()))?
        {
            return Ok(lock);
        }
        if waited % 100 == 0 {
            tracing::warn!(file = %path.display(), "another egretd uses this run directory; waiting for it to end");
        }
        waited += 1;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The socket that accepts plugins' connections.
pub struct Listener {
    pub requests: mpsc::Receiver<PluginRequest>,
    /// Requests of `egretd state`.
    pub states: mpsc::Receiver<oneshot::Sender<NodeState>>,
    /// Requests of `kubectl egret trace`.
    pub traces: mpsc::Receiver<TraceRequest>,
    /// The socket's inode.
    inode: u64,
}

impl Listener {
    /// Whether the socket is still in the run directory.
    pub fn is_there(&self, run_dir: &Path) -> bool {
        fs::metadata(run_dir.join(SOCKET)).is_ok_and(|there| there.ino() == self.inode)
    }
}

/// Opens the socket, and replaces that of an earlier daemon.
///
/// # Errors
/// The socket cannot be created.
pub fn listen(run_dir: &Path) -> anyhow::Result<Listener> {
    let path = run_dir.join(SOCKET);
    // Bind under another name and rename, so that plugins always find a socket and no other user can connect before
    // the mode is set.
    let temporary = run_dir.join(format!(".{SOCKET}"));
    careful::put_aside(&temporary).with_context(|| format!("socket {}", temporary.display()))?;
    let listener = UnixListener::bind(&temporary).with_context(|| format!("socket {}", temporary.display()))?;
    let make_room =
        || if path.symlink_metadata().is_ok_and(|m| m.is_dir()) { careful::put_aside(&path) } else { Ok(()) };
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))
        .and_then(|()| make_room())
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("socket {}", path.display()))?;
    let inode = fs::metadata(&path).with_context(|| format!("socket {}", path.display()))?.ino();
    let (sender, requests) = mpsc::channel(256);
    let (state_sender, states) = mpsc::channel(4);
    let (trace_sender, traces) = mpsc::channel(4);
    let slots = trace::Slots::default();
    let senders = Senders { requests: sender, states: state_sender, traces: trace_sender, slots };
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            // The semaphore is never closed.
            let Ok(place) = room.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let senders = senders.clone();
                    tokio::spawn(async move {
                        let _place = place;
                        if let Err(e) = serve(stream, senders).await {
                            tracing::debug!("a plugin's connection ended early: {e}");
                        }
                    });
                }
                Err(e) => {
                    tracing::error!("a plugin could not connect: {e}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(Listener { requests, states, traces, inode })
}

/// Where requests go.
#[derive(Clone)]
struct Senders {
    requests: mpsc::Sender<PluginRequest>,
    states: mpsc::Sender<oneshot::Sender<NodeState>>,
    traces: mpsc::Sender<TraceRequest>,
    slots: trace::Slots,
}

async fn serve(mut stream: UnixStream, senders: Senders) -> std::io::Result<()> {
    let (read, mut write) = stream.split();
    let mut line = Vec::new();
    let mut reader = BufReader::new(read.take(MAX_REQUEST));
    match tokio::time::timeout(REQUEST_TIMEOUT, reader.read_until(b'\n', &mut line)).await {
        Ok(read) => read?,
        Err(_) => return Ok(()),
    };
    if let Ok(TraceLine { version: PROTOCOL, verb, request }) = serde_json::from_slice(&line)
        && verb == wire::VERB
    {
        return trace::serve(request, reader, write, &senders.traces, &senders.slots).await;
    }
    let is_state_request = |head: &Head| head.version == PROTOCOL && head.verb.as_deref() == Some(node_state::VERB);
    if serde_json::from_slice::<Head>(&line).is_ok_and(|head| is_state_request(&head)) {
        let (response, responded) = oneshot::channel();
        if senders.states.send(response).await.is_err() {
            return Ok(());
        }
        let Ok(state) = responded.await else { return Ok(()) };
        return respond(&mut write, &node_state::StateResponse { version: PROTOCOL, state: Some(state) }).await;
    }
    let result = match serde_json::from_slice::<Request>(&line) {
        Ok(Request { version: PROTOCOL, verb }) => {
            let (response, responded) = oneshot::channel();
            if senders.requests.send(PluginRequest { verb, response }).await.is_err() {
                return Ok(());
            }
            match responded.await {
                Ok(result) => result,
                Err(_) => return Ok(()),
            }
        }
        Ok(Request { version, .. }) => Err(incompatible(version)),
        // Another protocol version may have other verbs.
        Err(e) => match serde_json::from_slice::<Head>(&line) {
            Ok(v) if v.version != PROTOCOL => Err(incompatible(v.version)),
            _ => Err(CniError::new(codes::DECODE, "egretd cannot parse the request", e.to_string())),
        },
    };
    respond(&mut write, &Response { version: PROTOCOL, error: result.err() }).await
}

async fn respond(write: &mut WriteHalf<'_>, response: &impl Serialize) -> std::io::Result<()> {
    let mut bytes = serde_json::to_vec(response)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await
}

/// The line that begins a trace.
#[derive(Deserialize)]
struct TraceLine {
    version: u32,
    verb: String,
    #[serde(flatten)]
    request: wire::TraceSpec,
}

/// The part of a request that all versions of the protocol have.
#[derive(Deserialize)]
struct Head {
    version: u32,
    verb: Option<String>,
}

fn incompatible(version: u32) -> CniError {
    CniError::new(
        codes::INCOMPATIBLE,
        format!("the plugin uses version {version} of the protocol, egretd uses {PROTOCOL}"),
        "install plugin and daemon of one release",
    )
}
