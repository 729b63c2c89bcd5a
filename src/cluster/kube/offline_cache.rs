//! What a node was told last, in files of its own: a daemon that starts while the API server is away goes on from them.
//!
//! Each kind has a file: a line that says whose it is, a line for each object as it was listed, then a line for each
//! change. All of it is written before anybody is told. So the files are never older than what the kernel was made of,
//! and who goes on from them takes nothing away: from something older, a policy that came since would be missing, and
//! its pods would be let out. What cannot be written down makes a file worthless; it is removed, and where one is missing
//! none is used. An object that makes no sense is written down as it is, or as it was when it made sense: a tenant's
//! mistake costs nobody else the files.

use super::decode::{Decoded, Key, Listed, Reading, decode};
use super::kind::Kind;
use super::prune::prune;
use crate::api::EgressNodeStatus;
use crate::cluster::OfflineCache;
use crate::cluster::dir::names::Names;
use crate::model::Inside;
use crate::model::selector::Name;
use egret_cni::careful;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tracing::warn;

/// The form of the files; another one is not read.
const FORM: u32 = 1;
/// A file is written anew when its changes are longer than this and what was listed, bytes.
const CHANGES: u64 = 1 << 20;
/// A file is at most so long, bytes: a hundred times what 5,000 nodes and 10,000 policies take.
const LONGEST: u64 = 1 << 30;
/// The file with the answer about Services' networks.
const SERVICE_NETWORKS: &str = "service-networks";
/// The file with what this node says of itself.
const OWN: &str = "own-status";

/// All the files; where none are to be, `None`.
#[derive(Clone, Debug)]
pub struct Files(Option<OfflineCache>);

impl Files {
    /// In that place, which is made if need be.
    pub fn new(known: Option<OfflineCache>) -> Self {
        let made = known.as_ref().map(|known| fs::create_dir_all(&known.directory));
        if let Some(Err(e)) = made {
            warn!("what is known of the cluster cannot be written down: {e}");
            return Files(None);
        }
        Files(known)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.as_ref().map(|known| known.directory.join(name))
    }

    fn head(&self) -> String {
        let of = self.0.as_ref().map(|known| known.of.as_str()).unwrap_or_default();
        format!("{FORM} {of}\n")
    }

    /// The file of a kind, to be written.
    pub fn book(&self, kind: Kind) -> Book {
        let path = self.path(&kind.to_string());
        Book { kind, path, head: self.head(), draft: None, kept: None, senseless: BTreeSet::new() }
    }

    /// The kind is no longer followed.
    pub fn forget(&self, kind: Kind) {
        self.path(&kind.to_string()).iter().for_each(|path| remove(path));
    }

    /// What was known of a kind.
    pub fn recall(&self, kind: Kind, reading: &Reading, names: &mut Names) -> Option<Listed> {
        let text = self.read(&kind.to_string())?;
        let each = latest(&text).into_values().map(|text| decode(kind, text.as_bytes(), reading, names));
        each.map(|decoded| decoded.ok().map(|d| (d.key.clone(), d))).collect()
    }

    /// Writes down what somebody said of Services' networks.
    pub fn note_service_networks(&self, answer: &Option<Inside>) {
        self.write(SERVICE_NETWORKS, &answer.as_ref().map(Networks::from));
    }

    /// What somebody had said of Services' networks.
    pub fn service_networks(&self) -> Option<Option<Inside>> {
        let text = self.read(SERVICE_NETWORKS)?;
        let networks: Option<Networks> = serde_json::from_str(&text).ok()?;
        Some(networks.map(Inside::from))
    }

    /// Writes down what this node says of itself.
    pub fn note_own(&self, name: &str, status: &EgressNodeStatus) {
        self.write(OWN, &json!({"metadata": {"name": name}, "status": status}));
    }

    /// What this node had said of itself: newer than what the API server had told of it.
    pub fn own(&self, reading: &Reading, names: &mut Names) -> Option<Decoded> {
        decode(Kind::EgressNode, self.read(OWN)?.as_bytes(), reading, names).ok()
    }

    /// A file's text after its head, up to its last whole line.
    fn read(&self, name: &str) -> Option<String> {
        let text = String::from_utf8(careful::read(&self.path(name)?, LONGEST).ok()?).ok()?;
        let rest = text.strip_prefix(&self.head())?;
        Some(rest[..rest.rfind('\n').map_or(0, |end| end + 1)].to_owned())
    }

    /// Writes a file whole or not at all.
    fn write<T: Serialize>(&self, name: &str, value: &T) {
        let Some(path) = self.path(name) else { return };
        let text = serde_json::to_string(value).map_err(io::Error::from);
        let whole = text.map(|text| format!("{}{text}\n", self.head()));
        if let Err(e) = whole.and_then(|text| careful::replace(&path, &unfinished(&path), text.as_bytes())) {
            spoilt(&path, &e);
        }
    }
}

/// The file of a kind, as it is written.
pub struct Book {
    kind: Kind,
    path: Option<PathBuf>,
    head: String,
    /// A list that has not come to its end.
    draft: Option<BufWriter<File>>,
    kept: Option<Kept>,
    /// The objects whose last lines make no sense: no good state of them has been seen since the daemon began.
    senseless: BTreeSet<String>,
}

/// A list and what has changed since.
struct Kept {
    file: File,
    /// The list's length, bytes.
    listed: u64,
    /// The changes' length, bytes.
    changes: u64,
}

impl Book {
    /// A list begins.
    pub fn begin(&mut self) {
        let Some(path) = &self.path else { return };
        let begun = careful::create(&unfinished(path)).and_then(|file| {
            let mut draft = BufWriter::new(file);
            draft.write_all(self.head.as_bytes()).map(|()| draft)
        });
        match begun {
            Ok(draft) => self.draft = Some(draft),
            Err(e) => self.spoil(&e),
        }
    }

    /// An object of the list. One that makes no sense has a last good state, which is not in the list: it is in the file
    /// as it was before.
    pub fn item(&mut self, decoded: &Decoded, text: &[u8]) {
        if self.draft.is_none() {
            return;
        }
        let line = match &decoded.item {
            Ok(Some(_)) => self.sensible(&decoded.key, text),
            Ok(None) => return,
            Err(_) => match self.last_good(&decoded.key) {
                Some(line) => Ok(line),
                None => self.as_it_is(&decoded.key, text),
            },
        };
        let written = line.and_then(|line| self.draft.as_mut().map_or(Ok(()), |draft| draft.write_all(&line)));
        if let Err(e) = written {
            self.spoil(&e);
        }
    }

    fn sensible(&mut self, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
        self.senseless.remove(&word(key));
        line(self.kind, key, text)
    }

    /// The line of an object that makes no sense now and did before, in the file that the list is to replace.
    fn last_good(&self, key: &Key) -> Option<Vec<u8>> {
        let word = word(key);
        if self.kept.is_none() || self.senseless.contains(&word) {
            return None;
        }
        let text = String::from_utf8(careful::read(self.path.as_ref()?, LONGEST).ok()?).ok()?;
        let object = *latest(text.strip_prefix(&self.head)?).get(word.as_str())?;
        Some(format!("{word}\t{object}\n").into_bytes())
    }

    /// The line of an object of which nothing better is known: a daemon that reads it makes of it what this one does.
    fn as_it_is(&mut self, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
        let object: serde_json::Value = serde_json::from_slice(text)?;
        self.senseless.insert(word(key));
        Ok(format!("{}\t{object}\n", word(key)).into_bytes())
    }

    /// The list has come to its end and counts.
    pub fn keep(&mut self) {
        let Some(path) = &self.path else { return };
        let kept = match self.draft.take() {
            Some(draft) => draft.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| {
                if path.is_dir() {
                    careful::put_aside(path)?;
                }
                fs::rename(unfinished(path), path)?;
                Ok(Kept { listed: file.metadata()?.len(), file, changes: 0 })
            }),
            // It was spoilt.
            None => return,
        };
        match kept {
            Ok(kept) => self.kept = Some(kept),
            Err(e) => self.spoil(&e),
        }
    }

    /// An object is there, or is another. One that makes no sense keeps its last good state, here too.
    pub fn applied(&mut self, decoded: &Decoded, text: &[u8]) {
        let line = match decoded.item {
            Ok(Some(_)) => self.sensible(&decoded.key, text),
            Ok(None) => return self.deleted(&decoded.key),
            Err(_) if self.senseless.contains(&word(&decoded.key)) => self.as_it_is(&decoded.key, text),
            Err(_) => return,
        };
        match line {
            Ok(line) => self.append(&line),
            Err(e) => self.spoil(&e),
        }
    }

    /// An object is gone.
    pub fn deleted(&mut self, key: &Key) {
        self.senseless.remove(&word(key));
        self.append(format!("{}\n", word(key)).as_bytes());
    }

    fn append(&mut self, line: &[u8]) {
        let Some(kept) = &mut self.kept else { return };
        let mut written = kept.file.write_all(line);
        kept.changes += line.len() as u64;
        if kept.changes > kept.listed + CHANGES {
            written = written.and_then(|()| self.shorten());
        }
        if let Err(e) = written {
            self.spoil(&e);
        }
    }

    /// Writes the file anew, with the last line of each object.
    fn shorten(&mut self) -> io::Result<()> {
        let Some(path) = self.path.clone() else { return Ok(()) };
        let text = String::from_utf8(careful::read(&path, LONGEST)?).map_err(io::Error::other)?;
        let rest = text.strip_prefix(&self.head).ok_or_else(|| io::Error::other("another one has written to it"))?;
        self.begin();
        for (key, object) in latest(rest) {
            if let Some(draft) = &mut self.draft {
                writeln!(draft, "{key}\t{object}")?;
            }
        }
        self.keep();
        Ok(())
    }

    fn spoil(&mut self, e: &io::Error) {
        (self.draft, self.kept) = (None, None);
        self.path.iter().for_each(|path| spoilt(path, e));
    }
}

fn spoilt(path: &Path, e: &io::Error) {
    warn!(file = %path.display(), "a daemon that starts while the API server is away will have to wait for it: {e}");
    remove(path);
}

fn remove(path: &Path) {
    for path in [path, &unfinished(path)] {
        if let Err(e) = careful::put_aside(path) {
            warn!(file = %path.display(), "it cannot be removed, and must not be used: {e}");
        }
    }
}

fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// An object's line. Neither names nor JSON on one line have tabs or line breaks.
fn line(kind: Kind, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
    let mut line = format!("{}\t", word(key)).into_bytes();
    prune(kind, text, &mut line)?;
    line.push(b'\n');
    Ok(line)
}

fn word((namespace, name): &Key) -> String {
    format!("{}/{name}", namespace.as_deref().unwrap_or_default())
}

/// The objects that are there at last, by their lines' first words.
fn latest(text: &str) -> BTreeMap<&str, &str> {
    let mut latest = BTreeMap::new();
    for line in text.lines() {
        match line.split_once('\t') {
            Some((key, object)) => drop(latest.insert(key, object)),
            None => drop(latest.remove(line)),
        }
    }
    latest
}

/// [`Inside`], as it is written down.
#[derive(Serialize, Deserialize)]
struct Networks {
    pods: BTreeMap<IpNetwork, String>,
    services: BTreeMap<IpNetwork, String>,
}

impl From<&Inside> for Networks {
    fn from(inside: &Inside) -> Self {
        let all = |map: &BTreeMap<IpNetwork, Name>| map.iter().map(|(n, from)| (*n, from.to_string())).collect();
        Networks { pods: all(&inside.pods), services: all(&inside.services) }
    }
}

impl From<Networks> for Inside {
    fn from(networks: Networks) -> Self {
        let all = |map: BTreeMap<IpNetwork, String>| map.into_iter().map(|(n, from)| (n, from.into())).collect();
        Inside { pods: all(networks.pods), services: all(networks.services) }
    }
}

#[cfg(test)]
mod tests;
