//! What is written down of adopted pods: `RUN_DIR/adopted/INDEX.json`, INDEX being that of the veth's end on the host.
//!
//! The cluster may forget such a pod while its container goes on sending; a daemon that starts then learns of it from here
//! alone. The file is written before the pod's chain is made, and removed when its veth is gone. Only the daemon reads and
//! writes these files; a plugin knows nothing of these pods.

use super::pods::Interface;
use crate::careful;
use crate::cni::run_dir::{self, ADOPTED};
use crate::model::ObjectKey;
use crate::model::selector::Labels;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

/// A file is at most so long, bytes: an object of the Kubernetes API, whose labels it holds, is of 1.5 MiB at most.
const LONGEST: u64 = 2 << 20;

/// What is to be known of an adopted pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The pod.
    pub pod: ObjectKey,
    /// The host's end of its veth pair.
    pub interface: Interface,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its labels when the cluster last knew it; `None`: it never did.
    pub labels: Option<Labels>,
}

/// The file. Indexes of interfaces mean nothing after a reboot, which the run directory may outlive.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    boot: String,
    namespace: String,
    name: String,
    interface: String,
    index: u32,
    peer_index: u32,
    addresses: Vec<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<BTreeMap<String, String>>,
}

impl Entry {
    fn new(boot: &str, pod: &Remembered) -> Self {
        let own = |labels: &Labels| labels.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Entry {
            boot: boot.to_owned(),
            namespace: pod.pod.namespace.to_string(),
            name: pod.pod.name.to_string(),
            interface: pod.interface.name.clone(),
            index: pod.interface.index,
            peer_index: pod.interface.peer_index,
            addresses: pod.addresses.clone(),
            labels: pod.labels.as_ref().map(own),
        }
    }
}

impl From<Entry> for Remembered {
    fn from(e: Entry) -> Self {
        Remembered {
            pod: ObjectKey::new(&e.namespace, &e.name),
            interface: Interface { name: e.interface, index: e.index, peer_index: e.peer_index },
            addresses: e.addresses,
            labels: e.labels.map(|labels| labels.into_iter().collect()),
        }
    }
}

/// The files that there are.
#[derive(Debug)]
pub struct Written {
    run_dir: PathBuf,
    boot: String,
    /// What they hold, by index. `None`: nothing of this boot.
    files: BTreeMap<u32, Option<Arc<Remembered>>>,
}

impl Written {
    /// Reads what an earlier daemon wrote since this boot.
    ///
    /// # Errors
    /// The directory cannot be read; that it is not there, or is none, is no error. Nor is an entry that is no regular file,
    /// or holds something else: it is one entry, and is told of.
    pub fn load(run_dir: &Path, boot: String) -> io::Result<(Self, Vec<Remembered>)> {
        let mut written = Written { run_dir: run_dir.to_owned(), boot, files: BTreeMap::new() };
        let mut pods = Vec::new();
        for path in run_dir::entries(run_dir, ADOPTED)? {
            let name = path.file_name().unwrap_or_default();
            if name.as_encoded_bytes().first() == Some(&b'.') {
                // A writer that was killed left it.
                let _ = fs::remove_file(&path);
                continue;
            }
            let entry = match careful::read(&path, LONGEST)
                .and_then(|bytes| Ok(serde_json::from_slice::<Entry>(&bytes)?))
            {
                Ok(entry) if *name == *format!("{}.json", entry.index) => entry,
                Ok(entry) => {
                    tracing::warn!(file = %path.display(), entry.index, "it is passed over: it has another file's name");
                    continue;
                }
                Err(e) => {
                    tracing::warn!(file = %path.display(), "it is passed over: {e}");
                    continue;
                }
            };
            let (index, is_of_now) = (entry.index, entry.boot == written.boot);
            let pod = is_of_now.then(|| Remembered::from(entry));
            written.files.insert(index, pod.clone().map(Arc::new));
            pods.extend(pod);
        }
        Ok((written, pods))
    }

    /// The files may be gone: the next [`update`](Self::update) writes all of them.
    pub fn is_lost(&mut self) {
        self.files.values_mut().for_each(|file| *file = None);
    }

    /// Writes files for these pods where they are not there, and removes others'.
    ///
    /// # Errors
    /// One cannot be written or removed; it is tried again the next time.
    pub fn update<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<Remembered>>) -> io::Result<()> {
        let mut result = Ok(());
        let mut gone: BTreeSet<u32> = self.files.keys().copied().collect();
        for pod in pods {
            let index = pod.interface.index;
            gone.remove(&index);
            let before = self.files.get(&index).and_then(Option::as_ref);
            if before.is_some_and(|before| Arc::ptr_eq(before, pod) || before == pod) {
                continue;
            }
            match self.write(pod) {
                Ok(()) => drop(self.files.insert(index, Some(pod.clone()))),
                Err(e) => result = Err(e),
            }
        }
        for index in gone {
            match careful::put_aside(&self.path(index)) {
                Ok(()) => drop(self.files.remove(&index)),
                Err(e) => result = Err(e),
            }
        }
        result
    }

    fn path(&self, index: u32) -> PathBuf {
        self.run_dir.join(ADOPTED).join(format!("{index}.json"))
    }

    fn write(&self, pod: &Remembered) -> io::Result<()> {
        let path = self.path(pod.interface.index);
        let unfinished = path.with_file_name(format!(".{}", pod.interface.index));
        let bytes = serde_json::to_vec(&Entry::new(&self.boot, pod))?;
        careful::replace(&path, &unfinished, &bytes).or_else(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                run_dir::make_within(&self.run_dir, ADOPTED)?;
                careful::replace(&path, &unfinished, &bytes)
            }
            _ => Err(e),
        })
    }
}
