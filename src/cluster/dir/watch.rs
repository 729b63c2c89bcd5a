//! The directory's inotify watches, and the meaning of their events.

use super::area::{Area, is_hidden, is_manifest};
use inotify::{EventMask, EventOwned, WatchDescriptor, WatchMask, Watches};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What must be read again. Paths are relative to the root.
#[derive(Debug, Default)]
pub struct Dirty {
    /// The whole directory.
    pub everything: bool,
    /// Whether changed files can be read at once, because they are known to be complete. Otherwise they are read when
    /// two scans find the same signature.
    pub complete: bool,
    /// Directories with everything below them.
    pub directories: BTreeSet<PathBuf>,
    /// Files.
    pub files: BTreeSet<PathBuf>,
}

impl Dirty {
    /// Everything, to be read at once.
    pub fn everything() -> Self {
        Dirty { everything: true, complete: true, ..Dirty::default() }
    }
}

/// The watched directories.
pub struct Watched {
    watches: Watches,
    by_id: HashMap<i32, PathBuf>,
    by_path: BTreeMap<PathBuf, WatchDescriptor>,
}

impl Watched {
    /// Without any directory.
    pub fn new(watches: Watches) -> Self {
        Watched { watches, by_id: HashMap::new(), by_path: BTreeMap::new() }
    }

    /// Watches the directory `path` below `root`, also if it was replaced by another. Returns false if it is watched
    /// under another name already, through a link.
    ///
    /// # Errors
    /// The kernel rejects the watch.
    pub fn arm(&mut self, root: &Path, path: &Path, area: Area) -> io::Result<bool> {
        // A file that was only created or written to is incomplete until its writer closes it. Creation counts for
        // links and directories, which are complete at once.
        let mut mask = WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::DELETE | WatchMask::ONLYDIR;
        if area != Area::Statuses {
            mask |= WatchMask::CREATE | WatchMask::MOVED_FROM | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        }
        let descriptor = self.watches.add(root.join(path), mask)?;
        let id = descriptor.get_watch_descriptor_id();
        // The kernel assigns descriptors by inode: the same directory has the same one.
        if let Some(before) = self.by_id.get(&id).filter(|before| *before != path) {
            if identity(&root.join(before)) == identity(&root.join(path)) {
                return Ok(false);
            }
            self.by_path.remove(before);
        }
        self.by_id.insert(id, path.into());
        if let Some(before) = self.by_path.insert(path.into(), descriptor)
            && before.get_watch_descriptor_id() != id
        {
            self.by_id.remove(&before.get_watch_descriptor_id());
            // The removal fails if the directory no longer exists.
            let _ = self.watches.remove(before);
        }
        Ok(true)
    }

    /// Stops watching the directories at and below `path`, except those for which `keep` returns true.
    pub fn disarm(&mut self, path: &Path, keep: impl Fn(&Path) -> bool) {
        let below = self.by_path.range(path.to_path_buf()..).take_while(|(p, _)| p.starts_with(path));
        let gone: Vec<PathBuf> = below.map(|(p, _)| p).filter(|p| !keep(p)).cloned().collect();
        for path in gone {
            if let Some(descriptor) = self.by_path.remove(&path) {
                self.by_id.remove(&descriptor.get_watch_descriptor_id());
                let _ = self.watches.remove(descriptor);
            }
        }
    }

    /// Notes the change that an event reports.
    pub fn note(&mut self, root: &Path, event: &EventOwned, dirty: &mut Dirty) {
        let id = event.wd.get_watch_descriptor_id();
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            dirty.everything = true;
            return;
        }
        if event.mask.contains(EventMask::IGNORED) {
            if let Some(path) = self.by_id.remove(&id) {
                self.by_path.remove(&path);
            }
            return;
        }
        let Some(directory) = self.by_id.get(&id) else { return };
        let Some(name) = &event.name else {
            // The directory itself was removed or moved.
            match directory.as_os_str().is_empty() {
                true => (dirty.everything, dirty.complete) = (true, true),
                false => drop(dirty.directories.insert(directory.clone())),
            }
            return;
        };
        let path = directory.join(name);
        if name.as_encoded_bytes().starts_with(b"..") {
            // Kubernetes swaps the contents of a mounted ConfigMap by renaming the link `..data`.
            dirty.directories.insert(directory.clone());
        } else if is_hidden(name) {
        } else if event.mask.contains(EventMask::ISDIR) || self.by_path.contains_key(&path) {
            dirty.directories.insert(path);
        } else if is_manifest(name) {
            let complete = !event.mask.contains(EventMask::CREATE)
                || root.join(&path).symlink_metadata().is_ok_and(|m| m.is_symlink() || m.nlink() > 1);
            if complete {
                dirty.files.insert(path);
            }
        } else if root.join(&path).is_dir() {
            // A link to a directory.
            dirty.directories.insert(path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|m| (m.dev(), m.ino()))
}
