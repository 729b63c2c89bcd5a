//! The offline cache: the objects that a node has read last, in files. A daemon that starts while the API server is away
//! continues with them.
//!
//! Each kind has a file: a line with the owner, a line for each listed object, then a line for each change. A line is
//! written before the change reaches the store. So the files are never older than the kernel's state, and a daemon that
//! continues with them removes nothing: in an older state, a policy created since would be missing, and its pods would
//! be open. If a line cannot be written, the file is removed; if one file is missing, none is used. An invalid object is
//! written in its last good state, or as it is if there is none: one tenant's mistake must not cost the others the
//! cache.

use super::progress::Listed;
use super::prune::prune;
use crate::api::EgressNodeStatus;
use crate::cluster::OfflineCache;
use crate::cluster::decode::{Decoded, Reading, decode};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::Key;
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

/// The format of the files. Another one is not read.
const FORMAT: u32 = 1;
/// A file is rewritten when its changes are longer than the list and this, in bytes.
const MAX_CHANGES: u64 = 1 << 20;
/// The longest file that is read, in bytes: a hundred times what 5,000 nodes and 10,000 policies take.
const MAX_FILE: u64 = 1 << 30;
/// The file with the networks of Services.
const SERVICE_NETWORKS: &str = "service-networks";
/// The file with this node's own status.
const OWN: &str = "own-status";

/// The directory of the files; `None`: there is no offline cache.
#[derive(Clone, Debug)]
pub struct Files(Option<OfflineCache>);

impl Files {
    /// Creates the directory if it does not exist.
    pub fn new(known: Option<OfflineCache>) -> Self {
        let created = known.as_ref().map(|known| fs::create_dir_all(&known.directory));
        if let Some(Err(e)) = created {
            warn!("cannot create the directory of the offline cache; there is none: {e}");
            return Files(None);
        }
        Files(known)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.as_ref().map(|known| known.directory.join(name))
    }

    /// The first line of each file.
    fn head(&self) -> String {
        let of = self.0.as_ref().map(|known| known.of.as_str()).unwrap_or_default();
        format!("{FORMAT} {of}\n")
    }

    /// The file of a kind, for writing.
    pub fn kind_file(&self, kind: Kind) -> KindFile {
        let path = self.path(&kind.to_string());
        KindFile { kind, path, head: self.head(), draft: None, open: None, invalid: BTreeSet::new() }
    }

    /// Removes the file of a kind that is no longer followed.
    pub fn forget(&self, kind: Kind) {
        self.path(&kind.to_string()).iter().for_each(|path| remove(path));
    }

    /// Loads the objects of a kind.
    pub fn load(&self, kind: Kind, reading: &Reading, names: &mut Names) -> Option<Listed> {
        let text = self.read(&kind.to_string())?;
        let each = latest(&text).into_values().map(|text| decode(kind, text.as_bytes(), reading, names));
        each.map(|decoded| decoded.ok().map(|d| (d.key.clone(), d))).collect()
    }

    /// Writes the networks of Services.
    pub fn note_service_networks(&self, answer: &Option<Inside>) {
        self.write(SERVICE_NETWORKS, &answer.as_ref().map(Networks::from));
    }

    /// Loads the networks of Services. Inner `None`: nobody knows them.
    pub fn service_networks(&self) -> Option<Option<Inside>> {
        let text = self.read(SERVICE_NETWORKS)?;
        let networks: Option<Networks> = serde_json::from_str(&text).ok()?;
        Some(networks.map(Inside::from))
    }

    /// Writes this node's own status.
    pub fn note_own(&self, name: &str, status: &EgressNodeStatus) {
        self.write(OWN, &json!({"metadata": {"name": name}, "status": status}));
    }

    /// Loads this node's own status. It is newer than the one that the API server had delivered.
    pub fn own(&self, reading: &Reading, names: &mut Names) -> Option<Decoded> {
        decode(Kind::EgressNode, self.read(OWN)?.as_bytes(), reading, names).ok()
    }

    /// A file's text after the first line, up to its last complete line.
    fn read(&self, name: &str) -> Option<String> {
        let text = String::from_utf8(careful::read(&self.path(name)?, MAX_FILE).ok()?).ok()?;
        let rest = text.strip_prefix(&self.head())?;
        Some(rest[..rest.rfind('\n').map_or(0, |end| end + 1)].to_owned())
    }

    /// Writes a file completely or not at all.
    fn write<T: Serialize>(&self, name: &str, value: &T) {
        let Some(path) = self.path(name) else { return };
        let text = serde_json::to_string(value).map_err(io::Error::from);
        let whole = text.map(|text| format!("{}{text}\n", self.head()));
        if let Err(e) = whole.and_then(|text| careful::replace(&path, &unfinished(&path), text.as_bytes())) {
            discard(&path, &e);
        }
    }
}

/// The file of a kind, for writing.
pub struct KindFile {
    kind: Kind,
    path: Option<PathBuf>,
    head: String,
    /// The file of a list that is not complete yet.
    draft: Option<BufWriter<File>>,
    /// The current file.
    open: Option<OpenFile>,
    /// The objects whose last lines are invalid: they have had no good state since the daemon started.
    invalid: BTreeSet<String>,
}

/// A list and the changes since.
struct OpenFile {
    file: File,
    /// The list's length, in bytes.
    listed: u64,
    /// The changes' length, in bytes.
    changes: u64,
}

impl KindFile {
    /// Starts a list.
    pub fn begin(&mut self) {
        let Some(path) = &self.path else { return };
        let created = careful::create(&unfinished(path)).and_then(|file| {
            let mut draft = BufWriter::new(file);
            draft.write_all(self.head.as_bytes()).map(|()| draft)
        });
        match created {
            Ok(draft) => self.draft = Some(draft),
            Err(e) => self.discard(&e),
        }
    }

    /// Adds an object to the list. The last good state of an invalid object is in the previous file.
    pub fn item(&mut self, decoded: &Decoded, text: &[u8]) {
        if self.draft.is_none() {
            return;
        }
        let line = match &decoded.object {
            Ok(Some(_)) => self.valid_line(&decoded.key, text),
            Ok(None) => return,
            Err(_) => match self.last_good(&decoded.key) {
                Some(line) => Ok(line),
                None => self.invalid_line(&decoded.key, text),
            },
        };
        let written = line.and_then(|line| self.draft.as_mut().map_or(Ok(()), |draft| draft.write_all(&line)));
        if let Err(e) = written {
            self.discard(&e);
        }
    }

    fn valid_line(&mut self, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
        self.invalid.remove(&text_of(key));
        line(self.kind, key, text)
    }

    /// The line of an object that is invalid now, in its last good state, from the file that the list will replace.
    fn last_good(&self, key: &Key) -> Option<Vec<u8>> {
        let text_of_key = text_of(key);
        if self.open.is_none() || self.invalid.contains(&text_of_key) {
            return None;
        }
        let text = String::from_utf8(careful::read(self.path.as_ref()?, MAX_FILE).ok()?).ok()?;
        let object = *latest(text.strip_prefix(&self.head)?).get(text_of_key.as_str())?;
        Some(format!("{text_of_key}\t{object}\n").into_bytes())
    }

    /// The line of an invalid object without a last good state. A daemon that loads it refuses it as this one does.
    fn invalid_line(&mut self, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
        let object: serde_json::Value = serde_json::from_slice(text)?;
        self.invalid.insert(text_of(key));
        Ok(format!("{}\t{object}\n", text_of(key)).into_bytes())
    }

    /// Replaces the file by the complete list.
    pub fn finish(&mut self) {
        let Some(path) = &self.path else { return };
        let opened = match self.draft.take() {
            Some(draft) => draft.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| {
                if path.is_dir() {
                    careful::put_aside(path)?;
                }
                fs::rename(unfinished(path), path)?;
                Ok(OpenFile { listed: file.metadata()?.len(), file, changes: 0 })
            }),
            // A write has failed.
            None => return,
        };
        match opened {
            Ok(file) => self.open = Some(file),
            Err(e) => self.discard(&e),
        }
    }

    /// Appends an object that was added or has changed. An invalid one keeps its last good state.
    pub fn applied(&mut self, decoded: &Decoded, text: &[u8]) {
        let line = match decoded.object {
            Ok(Some(_)) => self.valid_line(&decoded.key, text),
            Ok(None) => return self.deleted(&decoded.key),
            Err(_) if self.invalid.contains(&text_of(&decoded.key)) => self.invalid_line(&decoded.key, text),
            Err(_) => return,
        };
        match line {
            Ok(line) => self.append(&line),
            Err(e) => self.discard(&e),
        }
    }

    /// Appends that an object was deleted.
    pub fn deleted(&mut self, key: &Key) {
        self.invalid.remove(&text_of(key));
        self.append(format!("{}\n", text_of(key)).as_bytes());
    }

    fn append(&mut self, line: &[u8]) {
        let Some(open) = &mut self.open else { return };
        let mut written = open.file.write_all(line);
        open.changes += line.len() as u64;
        if open.changes > open.listed + MAX_CHANGES {
            written = written.and_then(|()| self.compact());
        }
        if let Err(e) = written {
            self.discard(&e);
        }
    }

    /// Rewrites the file with the last line of each object.
    fn compact(&mut self) -> io::Result<()> {
        let Some(path) = self.path.clone() else { return Ok(()) };
        let text = String::from_utf8(careful::read(&path, MAX_FILE)?).map_err(io::Error::other)?;
        let rest =
            text.strip_prefix(&self.head).ok_or_else(|| io::Error::other("another process has written to it"))?;
        self.begin();
        for (key, object) in latest(rest) {
            if let Some(draft) = &mut self.draft {
                writeln!(draft, "{key}\t{object}")?;
            }
        }
        self.finish();
        Ok(())
    }

    fn discard(&mut self, e: &io::Error) {
        (self.draft, self.open) = (None, None);
        self.path.iter().for_each(|path| discard(path, e));
    }
}

fn discard(path: &Path, e: &io::Error) {
    warn!(file = %path.display(), "cannot write the offline cache; a daemon that starts while the API server is away must wait for it: {e}");
    remove(path);
}

fn remove(path: &Path) {
    for path in [path, &unfinished(path)] {
        if let Err(e) = careful::put_aside(path) {
            warn!(file = %path.display(), "cannot remove a file of the offline cache that must not be used; remove it: {e}");
        }
    }
}

fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// An object's line. Neither names nor JSON on one line have tabs or line breaks.
fn line(kind: Kind, key: &Key, text: &[u8]) -> io::Result<Vec<u8>> {
    let mut line = format!("{}\t", text_of(key)).into_bytes();
    prune(kind, text, &mut line)?;
    line.push(b'\n');
    Ok(line)
}

fn text_of((namespace, name): &Key) -> String {
    format!("{}/{name}", namespace.as_deref().unwrap_or_default())
}

/// The last line of each object that was not deleted, by key.
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

/// [`Inside`] in the file.
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
