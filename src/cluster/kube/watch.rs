//! Follows one kind of objects: lists them, watches the changes from there on, and lists again when the API server no
//! longer has the changes.
//!
//! Nothing is removed by mistake: a list counts when it is complete, a list that is suddenly empty counts when etcd
//! itself confirms it, and nothing changes while the API server is away.

use super::client::{Client, RequestFailure, Status, escaped};
use super::offline_cache::{Files, KindFile};
use super::progress::Listed;
use super::split::Splitter;
use crate::cluster::decode::{Decoded, Reading, decode};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::Key;
use crate::model::Inside;
use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tokio::time::sleep;
use tracing::{debug, info};

/// The time after which the API server ends a watch. The next one finds changes that were lost unnoticed.
const WATCH: Duration = Duration::from_secs(240);
/// The time after that at which Egret ends the watch itself.
const GRACE: Duration = Duration::from_secs(20);
/// The time limit of a list for its headers and for each further piece.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// The waiting time after a failure: the first one, and the longest one.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// A watch that has worked for this time counts as working.
const WORKED: Duration = Duration::from_secs(5);
/// The waiting time before a list that is suddenly empty is requested again.
const EMPTY_LIST_RETRY: Duration = Duration::from_secs(3);
/// The interval of requests for a kind that does not exist.
const ABSENCE: Duration = Duration::from_secs(240);
/// The longest event, in bytes: ten times what etcd takes.
const MAX_EVENT: usize = 16 << 20;

/// A change for the store.
#[derive(Debug)]
pub enum Change {
    /// All objects of the kind.
    Listed(Kind, Listed),
    /// An object was added or has changed.
    Applied(Kind, Decoded),
    /// An object was deleted.
    Deleted(Kind, Key),
    /// The kind does not exist in this cluster.
    Absent(Kind),
    /// A pod that was looked up by name.
    Found(Decoded),
    /// The networks of Services that no object lists; `None`: nobody knows them.
    ServiceNetworks(Option<Inside>),
    /// Whether the kind can be followed now. If not, the reason.
    State(Kind, Option<Trouble>),
}

/// Why a kind cannot be followed.
#[derive(Debug)]
pub struct Trouble {
    /// The fault and the remedy, for users.
    pub text: String,
    /// Whether the API server is away, and not refusing.
    pub away: bool,
}

/// Follows a kind.
pub struct Watch {
    pub client: Client,
    pub kind: Kind,
    /// The path of the collection.
    pub path: Cow<'static, str>,
    /// The selector of the objects, `fieldSelector=…`.
    pub selector: String,
    pub reading: Reading,
    /// Whether a person reads, and not a daemon with a ServiceAccount.
    pub is_person: bool,
    /// The interned names of the whole source.
    pub names: Arc<Mutex<Names>>,
    /// The offline cache, which is written before a change is sent.
    pub files: Files,
    /// The changes. The task ends when the receiver is dropped.
    pub changes: Sender<Change>,
}

/// Where the API server reads a list.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// In its memory, as it is.
    Cache,
    /// In its memory, when that is as new as this version.
    CacheSince(String),
    /// In etcd.
    Etcd,
}

/// How a watch ended.
enum End {
    /// After its time.
    Expired,
    /// The API server no longer has the changes since then.
    Gone,
    Failed(RequestFailure),
    /// The receiver of changes was dropped.
    Closed,
}

#[derive(Deserialize)]
struct WatchEvent<'a> {
    #[serde(rename = "type", borrow)]
    type_: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct ListMetadata {
    #[serde(rename = "resourceVersion", default)]
    version: String,
    #[serde(rename = "continue", default)]
    rest: Option<String>,
}

#[derive(Deserialize)]
struct Bookmark {
    metadata: ListMetadata,
}

impl Watch {
    /// Runs until the receiver of changes is dropped.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut file = self.files.kind_file(self.kind);
        // The API server's memory may be older than the last write of an earlier controller. A controller that starts
        // from it could take allocations away. There are two controllers but thousands of nodes, which read the memory.
        let mut from = if self.reading.node.is_none() && self.kind.is_ours() { Origin::Etcd } else { Origin::Cache };
        // The number of objects in the last list and all changes since.
        let mut count = 0usize;
        'list: loop {
            let listed = self.list(&from, &mut file).await;
            let (listed, mut version) = match listed {
                Ok(listed) => listed,
                Err(e) => {
                    if e.is_wrong_version() {
                        from = Origin::Etcd;
                    }
                    match self.not_listed(e, &mut file, &mut backoff).await {
                        ControlFlow::Continue(()) => continue,
                        ControlFlow::Break(()) => return,
                    }
                }
            };
            if listed.is_empty() && count > 0 && from != Origin::Etcd {
                info!(kind = %self.kind, before = count, "the list is suddenly empty; listing again from etcd");
                from = Origin::Etcd;
                sleep(EMPTY_LIST_RETRY).await;
                continue;
            }
            count = listed.len();
            file.finish();
            let sent = self.changes.send(Change::Listed(self.kind, listed)).await;
            if sent.is_err() || self.changes.send(Change::State(self.kind, None)).await.is_err() {
                return;
            }
            let mut reported_down = false;
            loop {
                let started = Instant::now();
                let end = self.watch(&mut version, &mut count, &mut reported_down, &mut file).await;
                let worked = started.elapsed() >= WORKED;
                if worked {
                    backoff = Backoff::default();
                }
                match end {
                    End::Closed => return,
                    End::Expired if worked => {}
                    End::Expired => backoff.wait_at_most(BACKOFF.0).await,
                    End::Gone => {
                        info!(kind = %self.kind, "changes were missed; listing again");
                        backoff.note(false);
                        from = Origin::CacheSince(version);
                        self.wait(&mut backoff).await;
                        continue 'list;
                    }
                    End::Failed(e) => {
                        debug!(kind = %self.kind, "watch: {e}");
                        backoff.note(e.is_away());
                        reported_down = true;
                        if self.changes.send(Change::State(self.kind, Some(self.trouble(&e)))).await.is_err() {
                            return;
                        }
                        self.wait(&mut backoff).await;
                    }
                }
            }
        }
    }

    /// Waits after a failed list until it may be tried again. Breaks when the receiver of changes is dropped.
    async fn not_listed(&mut self, e: RequestFailure, file: &mut KindFile, backoff: &mut Backoff) -> ControlFlow<()> {
        const AGAIN: ControlFlow<()> = ControlFlow::Continue(());
        const END: ControlFlow<()> = ControlFlow::Break(());
        if let Some(older) = self.kind.older_path().filter(|path| e.is_not_found() && *path != self.path) {
            self.path = older.into();
            return AGAIN;
        }
        if e.is_not_found() && self.kind.is_optional() {
            file.finish();
            if self.changes.send(Change::Absent(self.kind)).await.is_err() {
                return END;
            }
            tokio::select! {
                () = sleep(ABSENCE + Duration::from_secs(random(60))) => return AGAIN,
                () = self.changes.closed() => return END,
            }
        }
        debug!(kind = %self.kind, "list: {e}");
        backoff.note(e.is_away());
        // An older installation has no right to read it. Egret continues without it.
        let does_without = self.kind.is_dispensable() && e.code() == Some(403);
        if does_without && self.changes.send(Change::Absent(self.kind)).await.is_err() {
            return END;
        }
        if self.changes.send(Change::State(self.kind, Some(self.trouble(&e)))).await.is_err() {
            return END;
        }
        self.wait(backoff).await;
        AGAIN
    }

    /// All objects of the kind, and their version.
    async fn list(&self, from: &Origin, file: &mut KindFile) -> Result<(Listed, String), RequestFailure> {
        file.begin();
        let mut query = match from {
            Origin::Cache => "resourceVersion=0".to_owned(),
            Origin::CacheSince(version) => format!("resourceVersion={version}&resourceVersionMatch=NotOlderThan"),
            Origin::Etcd => "limit=500".to_owned(),
        };
        let mut all = Listed::new();
        loop {
            let path = format!("{}?{query}{}", self.path, self.selector_after());
            let accept = self.kind.accept().0;
            let mut body = self.client.open_within(LIST_TIMEOUT, Method::GET, &path, accept, None).await?;
            let mut splitter = Splitter::default();
            let mut invalid = None;
            while let Some(piece) = body.next(LIST_TIMEOUT).await? {
                let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                splitter.push(&piece, |text| match decode(self.kind, text, &self.reading, &mut names) {
                    Ok(decoded) => {
                        file.item(&decoded, text);
                        all.insert(decoded.key.clone(), decoded);
                    }
                    Err(e) => invalid = Some(e),
                });
            }
            let bad = |e: &dyn std::fmt::Display| RequestFailure::Unknown(format!("{path}: {e}"));
            if let Some(e) = invalid {
                return Err(bad(&e));
            }
            let metadata = splitter.finish().map_err(|e| bad(&e))?;
            let metadata: ListMetadata = serde_json::from_slice(&metadata).map_err(|e| bad(&e))?;
            match metadata.rest.filter(|rest| !rest.is_empty()) {
                Some(rest) => query = format!("limit=500&continue={}", escaped(&rest)),
                None if metadata.version.is_empty() => return Err(bad(&"the list has no resourceVersion")),
                None => return Ok((all, metadata.version)),
            }
        }
    }

    fn selector_after(&self) -> String {
        if self.selector.is_empty() { String::new() } else { format!("&{}", self.selector) }
    }

    /// Sends the changes since `version`.
    async fn watch(
        &self,
        version: &mut String,
        count: &mut usize,
        reported_down: &mut bool,
        file: &mut KindFile,
    ) -> End {
        let seconds = WATCH.as_secs() + random(60);
        let path = format!(
            "{}?watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={seconds}{}",
            self.path,
            self.selector_after()
        );
        let mut body = match self.client.open(Method::GET, &path, self.kind.accept().1, None).await {
            Ok(body) => body,
            Err(e) if e.is_wrong_version() => return End::Gone,
            Err(e) => return End::Failed(e),
        };
        if std::mem::take(reported_down) && self.changes.send(Change::State(self.kind, None)).await.is_err() {
            return End::Closed;
        }
        let mut line = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(seconds) + GRACE;
        loop {
            let remaining = deadline.saturating_duration_since(Instant::now());
            let piece = tokio::select! {
                piece = body.next(remaining) => piece,
                () = self.changes.closed() => return End::Closed,
            };
            let piece = match piece {
                Ok(Some(piece)) => piece,
                Ok(None) => return End::Expired,
                Err(_) if Instant::now() >= deadline => return End::Expired,
                Err(e) => return End::Failed(e),
            };
            let mut rest = &piece[..];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                line.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                let change = match self.event(&line, version, file) {
                    Ok(change) => change,
                    Err(end) => return end,
                };
                line.clear();
                let Some(change) = change else { continue };
                match &change {
                    Change::Deleted(..) => *count = count.saturating_sub(1),
                    // A changed object counts again: the number matters only when it is zero.
                    _ => *count += 1,
                }
                if self.changes.send(change).await.is_err() {
                    return End::Closed;
                }
            }
            line.extend_from_slice(rest);
            if line.len() > MAX_EVENT {
                return End::Failed(RequestFailure::Unknown(format!("an event is longer than {MAX_EVENT} bytes")));
            }
        }
    }

    fn event(&self, line: &[u8], version: &mut String, file: &mut KindFile) -> Result<Option<Change>, End> {
        let invalid = |e: serde_json::Error| End::Failed(RequestFailure::Unknown(format!("a watch's event: {e}")));
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let event: WatchEvent = serde_json::from_slice(line).map_err(invalid)?;
        let text = event.object.get();
        match &*event.type_ {
            "ERROR" => {
                let status: Status = serde_json::from_str(text).map_err(invalid)?;
                let failure = RequestFailure::from(status);
                Err(if failure.is_wrong_version() { End::Gone } else { End::Failed(failure) })
            }
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(text).map_err(invalid)?;
                if !bookmark.metadata.version.is_empty() {
                    *version = bookmark.metadata.version;
                }
                Ok(None)
            }
            type_ => {
                let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                let decoded = decode(self.kind, text.as_bytes(), &self.reading, &mut names).map_err(invalid)?;
                version.clone_from(&decoded.version);
                Ok(Some(if type_ == "DELETED" {
                    file.deleted(&decoded.key);
                    Change::Deleted(self.kind, decoded.key)
                } else {
                    file.applied(&decoded, text.as_bytes());
                    Change::Applied(self.kind, decoded)
                }))
            }
        }
    }

    /// Waits after a failure, until another request reaches the API server at the latest.
    async fn wait(&self, backoff: &mut Backoff) {
        tokio::select! {
            () = backoff.wait() => {}
            () = self.client.back() => sleep(Duration::from_millis(random(100))).await,
        }
    }

    /// The meaning of a failure, for users.
    fn trouble(&self, e: &RequestFailure) -> Trouble {
        let hint = match e.code() {
            Some(404) if self.kind.is_ours() => {
                "; install the CustomResourceDefinitions: `egretd crds | kubectl apply -f -`"
            }
            Some(403) if self.is_person => "; docs/kubectl.md lists the rights that the commands need",
            Some(403) => "; give the ServiceAccount the rights in install/rbac.yaml",
            Some(401) => "; the credentials are not accepted, they are read again",
            _ => "",
        };
        Trouble { text: format!("{} objects cannot be followed: {e}{hint}", self.kind), away: e.is_away() }
    }
}

/// Waits longer after each failure, by random times, so that nodes do not retry at once.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    /// The last request had no answer.
    away: bool,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: BACKOFF.0, away: false }
    }
}

impl Backoff {
    /// Starts again with the shortest time when there is an answer again, even a refusal: an API server that has just
    /// started has no rights and no CustomResourceDefinitions for a moment.
    fn note(&mut self, away: bool) {
        if std::mem::replace(&mut self.away, away) && !away {
            self.next = BACKOFF.0;
        }
    }

    /// Waits.
    pub async fn wait(&mut self) {
        self.wait_at_most(BACKOFF.1).await;
    }

    async fn wait_at_most(&mut self, most: Duration) {
        let wait = self.next.min(most);
        self.next = (self.next * 2).min(BACKOFF.1);
        let percent = 50 + u32::try_from(random(100)).unwrap_or(0);
        sleep(wait * percent / 100).await;
    }
}

/// A number below `below`, random enough for waiting times and names.
pub fn random(below: u64) -> u64 {
    RandomState::new().build_hasher().finish() % below
}
