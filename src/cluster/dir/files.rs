//! The files of the directory, read again when they change, and their objects in the store.

use super::area::{Area, STATUS, is_hidden, is_manifest, status_of};
use super::file::{self, Contents, Reading, Signature, signature};
use super::merge::{Defined, Refusals, bring, find, merge};
use super::unreadable::UnreadablePolicies;
use super::watch::{Dirty, Watched};
use crate::cluster::decode::manifest::{Reader, StatusPath};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::refused::Named;
use crate::cluster::store::Store;
use crate::model::{Cluster, PolicyKey};
use inotify::EventOwned;
use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tracing::{debug, warn};

/// The deepest directory that is read; links can form cycles.
const MAX_DEPTH: usize = 16;

/// The files of the directory, and its problems.
pub struct Files {
    store: Store,
    root: PathBuf,
    /// If set, only this node's pods are read, and no statuses of policies.
    node: Option<String>,
    /// By path relative to `root`.
    files: BTreeMap<Box<Path>, FileState>,
    /// Invalid files.
    faults: BTreeMap<PathBuf, FileFaults>,
    /// Signatures of files that the last scan found changed. The file is read when the next scan finds the same
    /// signature.
    pending: BTreeMap<PathBuf, Signature>,
    /// The signatures of the scan before.
    pending_before: BTreeMap<PathBuf, Signature>,
    /// Faults of directories, by path.
    directories: BTreeMap<PathBuf, String>,
    /// Objects that are defined twice in the last snapshot.
    twice: Vec<String>,
    /// The device, inode and creation time of the `root` that was read.
    identity: Option<Identity>,
    /// `root` was missing at the last update.
    missing: bool,
    /// Policies that were in force when this daemon started, but are in no readable file.
    unreadable: UnreadablePolicies,
    names: Names,
    watched: Watched,
    hasher: RandomState,
    /// The number of the last walk.
    walk: u32,
}

/// Inode numbers are reused at once, so the creation time counts too, if the file system has it.
type Identity = (u64, u64, Option<SystemTime>);

/// The state of a file. There can be tens of thousands, so rare data is stored elsewhere.
#[derive(Default)]
struct FileState {
    contents: Contents,
    /// Signature of the file that was read last.
    signature: Option<Signature>,
    /// The last walk that found the file.
    walk: u32,
    /// The file can have changed since it was read without a new signature.
    racy: bool,
}

/// What is wrong with a file.
#[derive(Default)]
struct FileFaults {
    /// The faults, as texts.
    lines: Vec<String>,
    /// The objects that it names.
    named: Vec<Named>,
}

/// The result of an update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UpdateResult {
    /// Objects may have changed.
    pub changed: bool,
    /// Files are being written; update again soon.
    pub unsettled: bool,
    /// The directory is missing.
    pub missing: bool,
}

impl Files {
    /// The state before anything is read.
    pub fn new(root: PathBuf, node: Option<String>, watched: Watched) -> Self {
        Files {
            store: Store::new(node.is_none(), true),
            root,
            node,
            files: BTreeMap::new(),
            faults: BTreeMap::new(),
            pending: BTreeMap::new(),
            pending_before: BTreeMap::new(),
            directories: BTreeMap::new(),
            twice: Vec::new(),
            unreadable: UnreadablePolicies::default(),
            identity: None,
            missing: false,
            names: Names::default(),
            watched,
            hasher: RandomState::new(),
            walk: 0,
        }
    }

    /// Notes the changes that an inotify event reports.
    pub fn note(&mut self, event: &EventOwned, dirty: &mut Dirty) {
        self.watched.note(&self.root, event, dirty);
    }

    /// Updates what is dirty.
    pub fn refresh(&mut self, dirty: &Dirty) -> UpdateResult {
        let mut outcome = UpdateResult::default();
        let metadata = fs::metadata(&self.root);
        let identity = match &metadata {
            Ok(m) if m.is_dir() => (m.dev(), m.ino(), m.created().ok()),
            other => {
                let why = match other {
                    Err(e) => e.to_string(),
                    Ok(_) => "not a directory".into(),
                };
                self.add_problem(Path::new(""), format!("{why}; Egret keeps its last state until it is back"));
                self.missing = true;
                return UpdateResult { missing: true, ..outcome };
            }
        };
        let replaced = self.missing || self.identity.is_some_and(|before| before != identity);
        if dirty.everything || replaced {
            let before = self.files.len();
            self.pending_before = std::mem::take(&mut self.pending);
            self.visit(Path::new(""), dirty.complete || replaced, &mut outcome);
            let any = self.files.iter().any(|(p, f)| f.walk == self.walk && status_of(p).is_none());
            if replaced && !any {
                self.add_problem(
                    Path::new(""),
                    "was replaced by a directory without any manifest; Egret keeps the last state until there is one"
                        .into(),
                );
            } else {
                self.identity = Some(identity);
                self.missing = false;
                self.sweep(Path::new(""), &mut outcome);
            }
            if self.files.len() > before + 1000 {
                // A B-tree that grew entry by entry has a third of its space empty; one built at once has none.
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

    /// Walks a directory and everything below it.
    fn visit(&mut self, path: &Path, complete: bool, outcome: &mut UpdateResult) {
        self.walk += 1;
        self.directories.retain(|p, _| !p.starts_with(path));
        self.enter(path, complete, outcome);
    }

    fn enter(&mut self, path: &Path, complete: bool, outcome: &mut UpdateResult) {
        let Some(area) = Area::of(path, self.node.is_none()) else { return };
        if path.components().count() > MAX_DEPTH {
            return self.add_problem(path, format!("is more than {MAX_DEPTH} directories deep, and is not read"));
        }
        // Watch before listing, so that later changes are reported.
        match self.watched.arm(&self.root, path, area) {
            Ok(false) => return debug!("{}: is already watched under another name", self.root.join(path).display()),
            Err(e) if !is_gone(&e) => self.add_problem(
                path,
                format!(
                    "cannot be watched: {e}; Egret sees changes only within ten seconds. Check that \
                     fs.inotify.max_user_watches is high enough"
                ),
            ),
            _ => {}
        }
        if let Err(e) = self.list(path, area, complete, outcome)
            && !is_gone(&e)
        {
            self.add_problem(path, format!("cannot be read: {e}; Egret keeps its last contents"));
            let walk = self.walk;
            let below = self.files.range_mut::<Path, _>((Bound::Included(path), Bound::Unbounded));
            below.take_while(|(p, _)| p.starts_with(path)).for_each(|(_, file)| file.walk = walk);
        }
    }

    fn list(&mut self, path: &Path, area: Area, complete: bool, outcome: &mut UpdateResult) -> io::Result<()> {
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
            self.unreadable.note(path, has_something);
        }
        Ok(())
    }

    /// Removes the files below `path` that the last walk did not find.
    fn sweep(&mut self, path: &Path, outcome: &mut UpdateResult) {
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

    fn remove(&mut self, path: &Path, outcome: &mut UpdateResult) {
        outcome.changed |= self.faults.remove(path).is_some_and(|faults| !faults.named.is_empty());
        self.pending.remove(path);
        if let Some(file) = self.files.remove(path) {
            outcome.changed |= file.contents.len() > 0 || self.unreadable.is_any();
        }
    }

    /// Checks whether a file changed, and reads it if so.
    fn check(&mut self, path: &Path, complete: bool, outcome: &mut UpdateResult) {
        let full = self.root.join(path);
        let metadata = match fs::metadata(&full) {
            Ok(m) => m,
            Err(e) if is_gone(&e) && full.symlink_metadata().is_err() => return self.remove(path, outcome),
            Err(e) => {
                let what =
                    if is_gone(&e) { "is a link to a missing file".into() } else { format!("cannot be read: {e}") };
                outcome.changed |= self.add_faults(path, None, vec![(1, what)], Vec::new());
                return;
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

    fn read(&mut self, path: &Path, full: &Path, outcome: &mut UpdateResult) {
        let file = self.files.entry(path.into()).or_default();
        file.walk = self.walk;
        let statuses = status_of(path).map_or(StatusPath::InFiles, StatusPath::Of);
        let mut reader = Reader { names: &mut self.names, node: self.node.as_deref(), statuses };
        let (signature, racy, length, reading) = match file::read(full, &file.contents, &mut reader, &self.hasher) {
            Ok(read) => read,
            Err(e) => {
                let what = format!("cannot be read: {e}");
                outcome.changed |= self.add_faults(path, None, vec![(1, what)], Vec::new());
                return;
            }
        };
        match reading {
            Reading::Good(contents) => {
                outcome.changed |= file.contents.len() > 0 || contents.len() > 0 || self.unreadable.is_any();
                if status_of(path).is_none() {
                    self.unreadable.note(path, length > 0);
                }
                *file = FileState { contents, signature: Some(signature), walk: self.walk, racy };
                outcome.changed |= self.faults.remove(path).is_some_and(|faults| !faults.named.is_empty());
                self.pending.remove(path);
            }
            Reading::Bad(faults, named) => {
                file.racy = racy;
                let faults = faults.into_iter().map(|f| (f.line, f.to_string())).collect();
                outcome.changed |= self.add_faults(path, Some(signature), faults, named);
            }
            Reading::Busy => {
                self.pending.insert(path.into(), signature);
                outcome.unsettled = true;
            }
        }
    }

    /// Records the faults of a file, which keeps its contents. Returns whether other objects are refused than before.
    fn add_faults(
        &mut self,
        path: &Path,
        signature: Option<Signature>,
        faults: Vec<(u32, String)>,
        named: Vec<Named>,
    ) -> bool {
        let shown = self.root.join(path);
        let file = self.files.entry(path.into()).or_default();
        file.walk = self.walk;
        file.signature = signature;
        let kept = match file.contents.len() {
            0 => "Egret uses nothing of this file until that is corrected",
            _ => "Egret uses the file's last good state until that is corrected",
        };
        let lines = faults.into_iter().map(|(line, what)| format!("{}:{line}: {what} ({kept})", shown.display()));
        let faults = FileFaults { lines: lines.collect(), named };
        self.pending.remove(path);
        let are_any = !faults.named.is_empty();
        self.faults.insert(path.into(), faults).is_some_and(|before| !before.named.is_empty()) || are_any
    }

    fn add_problem(&mut self, path: &Path, what: String) {
        self.directories.insert(path.into(), format!("{}: {what}", self.shown(path).display()));
    }

    /// The full path. The root has no trailing slash.
    fn shown(&self, path: &Path) -> PathBuf {
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }

    /// The current problems, one line each.
    pub fn problems(&self) -> Vec<String> {
        let found =
            self.directories.values().chain(self.faults.values().flat_map(|f| &f.lines)).chain(&self.twice).cloned();
        let unreadable =
            self.unreadable.problems().map(|(path, what)| format!("{}: {what}", self.shown(path).display()));
        found.chain(unreadable).collect()
    }

    /// Whether a part of the directory is unknown, so that it may hold objects that are not in the snapshot.
    pub fn is_incomplete(&self) -> bool {
        self.unreadable.is_any() || self.is_unread()
    }

    /// Whether a part of the directory cannot be read and has no last state.
    fn is_unread(&self) -> bool {
        !self.directories.is_empty()
            || self
                .faults
                .keys()
                .any(|path| status_of(path).is_none() && self.files.get(&**path).is_none_or(|f| f.contents.len() == 0))
    }

    /// Brings the objects into the store, and makes a snapshot if anything has changed.
    pub fn snapshot(&mut self) -> Option<Cluster> {
        let unread = self.is_unread();
        let is_incomplete = self.unreadable.is_possible(&self.root, unread);
        self.twice.clear();
        let objects = self
            .files
            .iter()
            .flat_map(|(path, file)| file.contents.objects().map(|(line, object)| Defined { path, line, object }));
        let all = merge(objects, |what, first, second| {
            self.twice.push(format!(
                "{}:{}: {what} is defined twice; the one at {}:{} counts. Remove one of the two",
                self.root.join(second.path).display(),
                second.line,
                self.root.join(first.path).display(),
                first.line
            ));
        });
        let refused = refusals(&all, &self.unreadable, &self.faults);
        let is_refused = |policy: &PolicyKey| {
            refused.contains_key(&(Kind::of_policy(policy), (policy.namespace.clone(), policy.name.clone())))
        };
        self.unreadable.policies.retain(is_refused);
        bring(&all, &refused, &mut self.store);
        let is_first = !std::mem::replace(&mut self.unreadable.determined, true);
        if is_first && is_incomplete {
            self.unreadable.policies = self.store.allocated_only();
            for ((kind, key), refused) in self.unreadable.refusals() {
                self.store.refuse(kind, key, refused);
            }
        }
        if is_first {
            self.store.compact();
        }
        let snapshot = self.store.news();
        for policy in self.store.fallbacks().filter(|_| is_first) {
            warn!(
                %policy,
                "the policy is in force but in no readable file; Egret uses what is known of it until that is corrected"
            );
        }
        self.names.trim();
        snapshot
    }
}

/// The refused objects of all files.
fn refusals(all: &[Defined<'_>], unreadable: &UnreadablePolicies, faults: &BTreeMap<PathBuf, FileFaults>) -> Refusals {
    let mut refused = unreadable.refusals();
    refused.retain(|(kind, key), _| find(all, *kind, key).is_none());
    for (path, faults) in faults {
        // A definition in another file counts. An object with a last good state is not affected by a fault elsewhere in
        // its file.
        let counts = |named: &&Named| match find(all, named.kind, &named.key) {
            Some(defined) => defined.path == path && named.is_at_fault,
            None => true,
        };
        let named = faults.named.iter().filter(counts);
        refused.extend(named.map(|named| ((named.kind, named.key.clone()), named.refused.clone())));
    }
    refused
}

fn is_gone(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}
