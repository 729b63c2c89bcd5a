//! All that is known of the directory, brought up to date step by step.

use super::area::{Area, STATUS, is_hidden, is_manifest, status_of};
use super::file::{self, Contents, Reading, Signature, signature};
use super::lost::Lost;
use super::manifest::Reader;
use super::merge::{Part, merge};
use super::names::Names;
use super::object::{GatewayStatus, Object};
use super::watch::{Dirty, Watched};
use crate::model::Cluster;
use crate::model::selector::Name;
use inotify::EventOwned;
use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tracing::debug;

/// How deep directories are followed; links can make circles.
const MAX_DEPTH: usize = 16;

/// The directory.
pub struct Store {
    root: PathBuf,
    /// Only this node's pods are read, and no statuses of policies.
    node: Option<String>,
    /// By path relative to `root`.
    files: BTreeMap<Box<Path>, FileState>,
    /// What is wrong with files, ready to be told.
    faults: BTreeMap<PathBuf, Vec<String>>,
    /// Signatures of files that the last look at everything found changed. They are believed, and the files read, when
    /// the next one finds the same.
    pending: BTreeMap<PathBuf, Signature>,
    /// The same, of the look before.
    pending_before: BTreeMap<PathBuf, Signature>,
    /// What is wrong with directories, by path.
    directories: BTreeMap<PathBuf, String>,
    /// Objects that are defined twice, as of the last snapshot.
    twice: Vec<String>,
    /// The device, the inode and the birth of the `root` that the files are of.
    identity: Option<Identity>,
    /// `root` was not there the last time.
    missing: bool,
    /// Policies that were in force when this daemon started, and in no file.
    lost: Lost,
    names: Names,
    watched: Watched,
    hasher: RandomState,
    /// The number of the last walk through directories.
    walk: u32,
}

/// Inodes' numbers are used again at once, so their birth counts too, where the file system tells it.
type Identity = (u64, u64, Option<SystemTime>);

/// There can be tens of thousands: what most of them do not have stands elsewhere.
#[derive(Default)]
struct FileState {
    contents: Contents,
    /// Of what was read last.
    signature: Option<Signature>,
    /// The walk that saw it last.
    walk: u32,
    /// It can have changed since it was read without another signature.
    racy: bool,
}

/// What came of bringing the store up to date.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Objects may have changed.
    pub changed: bool,
    /// Files are being written; look again soon.
    pub unsettled: bool,
    /// The directory is not there.
    pub missing: bool,
}

impl Store {
    /// An empty store.
    pub fn new(root: PathBuf, node: Option<String>, watched: Watched) -> Self {
        Store {
            root,
            node,
            files: BTreeMap::new(),
            faults: BTreeMap::new(),
            pending: BTreeMap::new(),
            pending_before: BTreeMap::new(),
            directories: BTreeMap::new(),
            twice: Vec::new(),
            lost: Lost::default(),
            identity: None,
            missing: false,
            names: Names::default(),
            watched,
            hasher: RandomState::new(),
            walk: 0,
        }
    }

    /// Finds out what an event of inotify means.
    pub fn note(&mut self, event: &EventOwned, dirty: &mut Dirty) {
        self.watched.note(&self.root, event, dirty);
    }

    /// Looks again at what is dirty.
    pub fn refresh(&mut self, dirty: &Dirty) -> Outcome {
        let mut outcome = Outcome::default();
        let metadata = fs::metadata(&self.root);
        let identity = match &metadata {
            Ok(m) if m.is_dir() => (m.dev(), m.ino(), m.created().ok()),
            other => {
                let why = match other {
                    Err(e) => e.to_string(),
                    Ok(_) => "not a directory".into(),
                };
                self.complain(Path::new(""), format!("{why}; what was last read of it is kept until it is back"));
                self.missing = true;
                return Outcome { missing: true, ..outcome };
            }
        };
        let replaced = self.missing || self.identity.is_some_and(|before| before != identity);
        if dirty.everything || replaced {
            let before = self.files.len();
            self.pending_before = std::mem::take(&mut self.pending);
            self.visit(Path::new(""), dirty.complete || replaced, &mut outcome);
            let any = self.files.iter().any(|(p, f)| f.walk == self.walk && status_of(p).is_none());
            if replaced && !any {
                self.complain(
                    Path::new(""),
                    "another directory is in its place, without any manifest; what was last read is kept until there \
                     is one"
                        .into(),
                );
            } else {
                self.identity = Some(identity);
                self.missing = false;
                self.sweep(Path::new(""), &mut outcome);
            }
            if self.files.len() > before + 1000 {
                // A tree that grew leaf by leaf has a third of its room empty; one built at once has none.
                self.files = std::mem::take(&mut self.files).into_iter().collect();
            }
        } else {
            for path in &dirty.directories {
                self.visit(path, true, &mut outcome);
                self.sweep(path, &mut outcome);
            }
            for path in &dirty.files {
                let area = path.parent().and_then(|p| Area::of(p, self.node.is_none()));
                if area == Some(Area::Manifests) || status_of(path).is_some() {
                    self.check(path, true, &mut outcome);
                }
            }
        }
        outcome
    }

    /// Goes through a directory and all below it.
    fn visit(&mut self, path: &Path, complete: bool, outcome: &mut Outcome) {
        self.walk += 1;
        self.directories.retain(|p, _| !p.starts_with(path));
        self.enter(path, complete, outcome);
    }

    fn enter(&mut self, path: &Path, complete: bool, outcome: &mut Outcome) {
        let Some(area) = Area::of(path, self.node.is_none()) else { return };
        if path.components().count() > MAX_DEPTH {
            return self.complain(path, format!("is more than {MAX_DEPTH} directories deep, and is not read"));
        }
        // Watching comes first: what is written after the listing is told.
        match self.watched.arm(&self.root, path, area) {
            Ok(false) => return debug!("{}: is there under another name already", self.root.join(path).display()),
            Err(e) if !is_gone(&e) => self.complain(
                path,
                format!(
                    "cannot be watched: {e}; changes are seen within ten seconds only. Is fs.inotify.max_user_watches \
                     high enough?"
                ),
            ),
            _ => {}
        }
        if let Err(e) = self.list(path, area, complete, outcome)
            && !is_gone(&e)
        {
            self.complain(path, format!("cannot be read: {e}; what was last read of it is kept"));
            let walk = self.walk;
            let below = self.files.range_mut::<Path, _>((Bound::Included(path), Bound::Unbounded));
            below.take_while(|(p, _)| p.starts_with(path)).for_each(|(_, file)| file.walk = walk);
        }
    }

    fn list(&mut self, path: &Path, area: Area, complete: bool, outcome: &mut Outcome) -> io::Result<()> {
        let mut has_something = false;
        for entry in fs::read_dir(self.root.join(path))? {
            let entry = entry?;
            let name = entry.file_name();
            if is_hidden(&name) {
                continue;
            }
            has_something |= name != STATUS;
            let below = path.join(&name);
            let is_directory = match entry.file_type()? {
                t if t.is_symlink() => fs::metadata(entry.path()).is_ok_and(|m| m.is_dir()),
                t => t.is_dir(),
            };
            let is_file = match area {
                Area::Manifests => is_manifest(&name),
                Area::StatusParent => false,
                Area::Statuses => is_manifest(&name) && status_of(&below).is_some(),
            };
            if is_directory {
                self.enter(&below, complete, outcome);
            } else if is_file {
                self.check(&below, complete || area == Area::Statuses, outcome);
            }
        }
        if area == Area::Manifests {
            self.lost.note(path, has_something);
        }
        Ok(())
    }

    /// Forgets the files below `path` that the last walk did not see.
    fn sweep(&mut self, path: &Path, outcome: &mut Outcome) {
        let walk = self.walk;
        let below = self.files.range::<Path, _>((Bound::Included(path), Bound::Unbounded));
        let below = below.take_while(|(p, _)| p.starts_with(path));
        let gone: Vec<PathBuf> = below.filter(|(_, f)| f.walk != walk).map(|(p, _)| p.to_path_buf()).collect();
        for path in gone {
            self.remove(&path, outcome);
        }
        let root = &self.root;
        self.watched.disarm(path, |p| root.join(p).is_dir());
    }

    fn remove(&mut self, path: &Path, outcome: &mut Outcome) {
        self.faults.remove(path);
        self.pending.remove(path);
        if let Some(file) = self.files.remove(path) {
            outcome.changed |= file.contents.len() > 0 || self.lost.is_any();
        }
    }

    /// Looks whether a file changed, and reads it if so.
    fn check(&mut self, path: &Path, complete: bool, outcome: &mut Outcome) {
        let full = self.root.join(path);
        let metadata = match fs::metadata(&full) {
            Ok(m) => m,
            Err(e) if is_gone(&e) && full.symlink_metadata().is_err() => return self.remove(path, outcome),
            Err(e) => {
                let what = if is_gone(&e) { "is a link to nothing".into() } else { format!("cannot be read: {e}") };
                return self.blame(path, None, vec![(1, what)]);
            }
        };
        let signature = signature(&metadata, &self.hasher);
        if let Some(file) = self.files.get_mut(path) {
            file.walk = self.walk;
            if file.signature == Some(signature) && !file.racy {
                self.pending.remove(path);
                return;
            }
        }
        if !complete && self.pending_before.get(path) != Some(&signature) {
            self.pending.insert(path.into(), signature);
            outcome.unsettled = true;
            return;
        }
        self.read(path, &full, outcome);
    }

    fn read(&mut self, path: &Path, full: &Path, outcome: &mut Outcome) {
        let file = self.files.entry(path.into()).or_default();
        file.walk = self.walk;
        let mut reader = Reader { names: &mut self.names, node: self.node.as_deref(), status_of: status_of(path) };
        let (signature, racy, length, reading) = match file::read(full, &file.contents, &mut reader, &self.hasher) {
            Ok(read) => read,
            Err(e) => return self.blame(path, None, vec![(1, format!("cannot be read: {e}"))]),
        };
        match reading {
            Reading::Good(contents) => {
                outcome.changed |= file.contents.len() > 0 || contents.len() > 0 || self.lost.is_any();
                if status_of(path).is_none() {
                    self.lost.note(path, length > 0);
                }
                *file = FileState { contents, signature: Some(signature), walk: self.walk, racy };
                self.faults.remove(path);
                self.pending.remove(path);
            }
            Reading::Bad(faults, salvage) => {
                if file.contents.len() == 0 {
                    self.lost.salvaged(salvage);
                }
                file.racy = racy;
                let faults = faults.into_iter().map(|f| (f.line, f.to_string())).collect();
                self.blame(path, Some(signature), faults);
            }
            Reading::Busy => {
                self.pending.insert(path.into(), signature);
                outcome.unsettled = true;
            }
        }
    }

    /// Notes what is wrong with a file. Its contents stay what they were.
    fn blame(&mut self, path: &Path, signature: Option<Signature>, faults: Vec<(u32, String)>) {
        let shown = self.root.join(path);
        let file = self.files.entry(path.into()).or_default();
        file.walk = self.walk;
        file.signature = signature;
        let kept = match file.contents.len() {
            0 => "nothing of this file is used until that is mended",
            _ => "the file's last good state is used until that is mended",
        };
        let lines = faults.into_iter().map(|(line, what)| format!("{}:{line}: {what} ({kept})", shown.display()));
        self.faults.insert(path.into(), lines.collect());
        self.pending.remove(path);
    }

    fn complain(&mut self, path: &Path, what: String) {
        self.directories.insert(path.into(), format!("{}: {what}", self.shown(path).display()));
    }

    /// The whole path. There is no trailing slash for the directory itself.
    fn shown(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    /// What is wrong now, a line each.
    pub fn problems(&self) -> Vec<String> {
        let told = self.directories.values().chain(self.faults.values().flatten()).chain(&self.twice).cloned();
        let lost = self.lost.problems().map(|(path, what)| format!("{}: {what}", self.shown(path).display()));
        told.chain(lost).collect()
    }

    /// Whether there is a part of the directory that is not known at all, so that an object that is not in the
    /// snapshot may be in there.
    pub fn is_incomplete(&self) -> bool {
        self.lost.is_any() || self.is_unread()
    }

    /// Whether there is a part of it that cannot be read, and of which nothing is known.
    fn is_unread(&self) -> bool {
        !self.directories.is_empty()
            || self
                .faults
                .keys()
                .any(|path| status_of(path).is_none() && self.files.get(&**path).is_none_or(|f| f.contents.len() == 0))
    }

    /// The snapshot.
    pub fn snapshot(&mut self) -> Cluster {
        let root = &self.root;
        let twice = &mut self.twice;
        twice.clear();
        let parts = self.files.iter_mut().map(|(path, file)| Part {
            path,
            is_status: status_of(path).is_some(),
            objects: file.contents.objects(),
        });
        let mut cluster = merge(parts, |what, first, second| {
            twice.push(format!(
                "{}:{}: {what} is defined twice; the one at {}:{} counts. Remove one of the two",
                root.join(second.path).display(),
                second.line,
                root.join(first.path).display(),
                first.line
            ));
        });
        self.names.trim();
        let unread = self.is_unread();
        let gateways = cluster.gateways.clone();
        let mut gateway_statuses = Vec::new();
        for (name, gateway_status) in
            self.files.values_mut().flat_map(|file| file.contents.objects()).filter_map(allocations_of)
        {
            if !gateways.contains_key(name) {
                gateway_statuses.push((name, gateway_status.status().allocations.as_slice()));
            }
        }
        self.lost.fill_in(&self.root, &mut cluster, unread, gateway_statuses.into_iter());
        cluster
    }
}

fn allocations_of((_, object): (u32, &mut Object)) -> Option<(&Name, &GatewayStatus)> {
    match object {
        Object::GatewayStatus(name, gateway_status) => Some((name, gateway_status)),
        _ => None,
    }
}

fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
