//! Follows one kind of objects: a list, then a watch from there on, and again when that is no longer possible.
//!
//! What is told is never less than what is known: a list counts when it has come to its end, one that is suddenly
//! empty when etcd itself has said so, and an API server that is away takes nothing away.

use super::client::{Client, Failure, Status};
use super::decode::{Decoded, Key, Listed, Reading, decode};
use super::kind::Kind;
use super::offline_cache::{Book, Files};
use super::split::Splitter;
use crate::cluster::dir::names::Names;
use crate::model::Inside;
use http::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tokio::time::sleep;
use tracing::{debug, info};

/// The API server is asked to end a watch after about this time; what was lost without a trace is found then.
const WATCH: Duration = Duration::from_secs(240);
/// So long after that a watch that has not ended is given up.
const GRACE: Duration = Duration::from_secs(20);
/// A list of which nothing, or no more, has come for this long is given up.
const LIST_PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait after a failure: at first, and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// What has worked for this long did work.
const WORKED: Duration = Duration::from_secs(5);
/// A list that is suddenly empty is asked for again after this time.
const DISBELIEF: Duration = Duration::from_secs(3);
/// A kind that is not there is looked for again after this time.
const ABSENCE: Duration = Duration::from_secs(240);
/// An object is at most so long, bytes: ten times what etcd takes.
const LONGEST_EVENT: usize = 16 << 20;

/// What is told to the store.
#[derive(Debug)]
pub enum Change {
    /// Everything there is of the kind.
    Listed(Kind, Listed),
    /// One object is there, or is another.
    Applied(Kind, Decoded),
    /// One object is gone.
    Deleted(Kind, Key),
    /// There is no such kind here.
    Absent(Kind),
    /// A pod that was asked for by name.
    Found(Decoded),
    /// The networks inside the cluster that somebody was asked for; `None`: nobody knows them.
    ServiceNetworks(Option<Inside>),
    /// Whether the kind can be followed now, and why not.
    State(Kind, Option<Trouble>),
}

/// Why a kind cannot be followed.
#[derive(Debug)]
pub struct Trouble {
    /// What a person should know, and do.
    pub text: String,
    /// Whether the API server is away, rather than unwilling.
    pub away: bool,
}

/// Follows a kind.
pub struct Watch {
    /// Where.
    pub client: Client,
    /// What.
    pub kind: Kind,
    /// Where the API server has them.
    pub path: Cow<'static, str>,
    /// Which of them, `fieldSelector=…`.
    pub selector: String,
    /// How they are read.
    pub reading: Reading,
    /// Whether a person reads, and not a daemon with a ServiceAccount.
    pub is_person: bool,
    /// The names of the whole source.
    pub names: Arc<Mutex<Names>>,
    /// Where what is told is written down before.
    pub files: Files,
    /// Who is told. If nobody listens, it ends.
    pub changes: Sender<Change>,
}

/// From where a list is read.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    /// The API server's memory, as it is.
    Cache,
    /// The API server's memory, once it is as new as this.
    CacheSince(String),
    /// etcd.
    Store,
}

/// How a watch ended.
enum End {
    /// As it should, after its time.
    Quietly,
    /// The API server no longer knows the changes since then.
    Gone,
    Failed(Failure),
    Unwanted,
}

#[derive(Deserialize)]
struct Event<'a> {
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
    /// Runs until nobody listens.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut book = self.files.book(self.kind);
        // The API server's memory may be older than what an earlier controller has written, and what is not there would lose
        // its allocation. There are two controllers, and thousands of nodes.
        let mut from = if self.reading.node.is_none() && self.kind.is_ours() { Origin::Store } else { Origin::Cache };
        // How many there were, as of the last list and all changes since.
        let mut count = 0usize;
        'list: loop {
            let listed = self.list(&from, &mut book).await;
            let (listed, mut version) = match listed {
                Ok(listed) => listed,
                Err(e) => {
                    if e.is_wrong_version() {
                        from = Origin::Store;
                    }
                    if let Some(older) = self.kind.older_path().filter(|path| e.is_not_found() && *path != self.path) {
                        self.path = older.into();
                        continue;
                    }
                    if e.is_not_found() && Kind::OPTIONAL.contains(&self.kind) {
                        book.keep();
                        if self.changes.send(Change::Absent(self.kind)).await.is_err() {
                            return;
                        }
                        tokio::select! {
                            () = sleep(ABSENCE + Duration::from_secs(random(60))) => continue,
                            () = self.changes.closed() => return,
                        }
                    }
                    debug!(kind = %self.kind, "list: {e}");
                    backoff.note(e.is_away());
                    // Who was installed with fewer rights goes on without what they are for.
                    let does_without = self.kind == Kind::EndpointSlice && e.code() == Some(403);
                    if does_without && self.changes.send(Change::Absent(self.kind)).await.is_err() {
                        return;
                    }
                    if self.changes.send(Change::State(self.kind, Some(self.trouble(&e)))).await.is_err() {
                        return;
                    }
                    self.wait(&mut backoff).await;
                    continue;
                }
            };
            if listed.is_empty() && count > 0 && from != Origin::Store {
                info!(kind = %self.kind, before = count, "the list is suddenly empty; asking again");
                from = Origin::Store;
                sleep(DISBELIEF).await;
                continue;
            }
            count = listed.len();
            book.keep();
            let sent = self.changes.send(Change::Listed(self.kind, listed)).await;
            if sent.is_err() || self.changes.send(Change::State(self.kind, None)).await.is_err() {
                return;
            }
            let mut told_down = false;
            loop {
                let begun = Instant::now();
                let end = self.watch(&mut version, &mut count, &mut told_down, &mut book).await;
                let worked = begun.elapsed() >= WORKED;
                if worked {
                    backoff = Backoff::default();
                }
                match end {
                    End::Unwanted => return,
                    End::Quietly if worked => {}
                    End::Quietly => backoff.wait_at_most(BACKOFF.0).await,
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
                        told_down = true;
                        if self.changes.send(Change::State(self.kind, Some(self.trouble(&e)))).await.is_err() {
                            return;
                        }
                        self.wait(&mut backoff).await;
                    }
                }
            }
        }
    }

    /// All of the kind, and as of which version.
    async fn list(&self, from: &Origin, book: &mut Book) -> Result<(Listed, String), Failure> {
        book.begin();
        let mut query = match from {
            Origin::Cache => "resourceVersion=0".to_owned(),
            Origin::CacheSince(version) => format!("resourceVersion={version}&resourceVersionMatch=NotOlderThan"),
            Origin::Store => "limit=500".to_owned(),
        };
        let mut all = Listed::new();
        loop {
            let path = format!("{}?{query}{}", self.path, self.selector_after());
            let accept = self.kind.accept().0;
            let mut body = self.client.open_within(LIST_PATIENCE, Method::GET, &path, accept, None).await?;
            let mut splitter = Splitter::default();
            let mut nameless = None;
            while let Some(piece) = body.next(LIST_PATIENCE).await? {
                let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                splitter.push(&piece, |text| match decode(self.kind, text, &self.reading, &mut names) {
                    Ok(decoded) => {
                        book.item(&decoded, text);
                        all.insert(decoded.key.clone(), decoded);
                    }
                    Err(e) => nameless = Some(e),
                });
            }
            let bad = |e: &dyn std::fmt::Display| Failure::Unknown(format!("{path}: {e}"));
            if let Some(e) = nameless {
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

    /// Follows the changes since `version`.
    async fn watch(&self, version: &mut String, count: &mut usize, told_down: &mut bool, book: &mut Book) -> End {
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
        if std::mem::take(told_down) && self.changes.send(Change::State(self.kind, None)).await.is_err() {
            return End::Unwanted;
        }
        let mut line = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(seconds) + GRACE;
        loop {
            let patience = deadline.saturating_duration_since(Instant::now());
            let piece = tokio::select! {
                piece = body.next(patience) => piece,
                () = self.changes.closed() => return End::Unwanted,
            };
            let piece = match piece {
                Ok(Some(piece)) => piece,
                Ok(None) => return End::Quietly,
                Err(_) if Instant::now() >= deadline => return End::Quietly,
                Err(e) => return End::Failed(e),
            };
            let mut rest = &piece[..];
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                line.extend_from_slice(&rest[..end]);
                rest = &rest[end + 1..];
                let change = match self.event(&line, version, book) {
                    Ok(change) => change,
                    Err(end) => return end,
                };
                line.clear();
                let Some(change) = change else { continue };
                match &change {
                    Change::Deleted(..) => *count = count.saturating_sub(1),
                    // Objects that changed are counted as new ones: it only has to be above zero.
                    _ => *count += 1,
                }
                if self.changes.send(change).await.is_err() {
                    return End::Unwanted;
                }
            }
            line.extend_from_slice(rest);
            if line.len() > LONGEST_EVENT {
                return End::Failed(Failure::Unknown(format!("an event is longer than {LONGEST_EVENT} bytes")));
            }
        }
    }

    fn event(&self, line: &[u8], version: &mut String, book: &mut Book) -> Result<Option<Change>, End> {
        let senseless = |e: serde_json::Error| End::Failed(Failure::Unknown(format!("a watch's event: {e}")));
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        let event: Event = serde_json::from_slice(line).map_err(senseless)?;
        let text = event.object.get();
        match &*event.type_ {
            "ERROR" => {
                let status: Status = serde_json::from_str(text).map_err(senseless)?;
                let failure = Failure::from(status);
                Err(if failure.is_wrong_version() { End::Gone } else { End::Failed(failure) })
            }
            "BOOKMARK" => {
                let bookmark: Bookmark = serde_json::from_str(text).map_err(senseless)?;
                if !bookmark.metadata.version.is_empty() {
                    *version = bookmark.metadata.version;
                }
                Ok(None)
            }
            type_ => {
                let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
                let decoded = decode(self.kind, text.as_bytes(), &self.reading, &mut names).map_err(senseless)?;
                version.clone_from(&decoded.version);
                Ok(Some(if type_ == "DELETED" {
                    book.deleted(&decoded.key);
                    Change::Deleted(self.kind, decoded.key)
                } else {
                    book.applied(&decoded, text.as_bytes());
                    Change::Applied(self.kind, decoded)
                }))
            }
        }
    }

    /// Waits after a failure: until another request has found the API server back, at the latest for its time.
    async fn wait(&self, backoff: &mut Backoff) {
        tokio::select! {
            () = backoff.wait() => {}
            () = self.client.back() => sleep(Duration::from_millis(random(100))).await,
        }
    }

    /// What a failure means.
    fn trouble(&self, e: &Failure) -> Trouble {
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

/// Waits longer after each failure, and not all at the same time.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    /// Nobody answered the last time.
    away: bool,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: BACKOFF.0, away: false }
    }
}

impl Backoff {
    /// Begins anew when somebody answers again, even if the answer is a refusal: an API server that has just started
    /// knows no rights for a moment, and no CustomResourceDefinitions.
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

/// A number below `below`. Nobody's guessing it would matter.
pub fn random(below: u64) -> u64 {
    RandomState::new().build_hasher().finish() % below
}

/// A continue token is base64 with `-`, `_` and `=`, but nothing promises that.
pub fn escaped(token: &str) -> String {
    let mut text = String::new();
    for byte in token.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => text.push(char::from(byte)),
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}
