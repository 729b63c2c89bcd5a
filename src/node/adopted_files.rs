//! Files about adopted pods: `RUN_DIR/adopted/INDEX.json`, where INDEX is the index of the veth's end on the host.
//!
//! The cluster may drop such a pod while its container continues to send, and a daemon that starts then knows the pod
//! from its file alone. The file is written before the pod's chain is created, and removed when its veth is gone.
//! Only the daemon reads and writes these files; the plugin does not know adopted pods.

use super::pods::Interface;
use crate::model::ObjectKey;
use crate::model::selector::Labels;
use egret_cni::careful;
use egret_cni::run_dir::{self, ADOPTED};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

/// The largest file, bytes. It contains the labels of an API object, which has at most 1.5 MiB.
const LONGEST: u64 = 2 << 20;

/// An adopted pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    pub pod: ObjectKey,
    /// The host's end of its veth pair.
    pub interface: Interface,
    pub addresses: Vec<IpAddr>,
    /// Its uid, empty if the cluster gives none.
    pub uid: Box<str>,
    /// Its labels when the cluster last had it; `None` if it never had.
    pub labels: Option<Labels>,
}

/// The file's content. The run directory may outlive a reboot, after which interface indexes are invalid; `boot`
/// tells.
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
    #[serde(default, skip_serializing_if = "str::is_empty")]
    uid: Box<str>,
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
            uid: pod.uid.clone(),
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
            uid: e.uid,
            labels: e.labels.map(|labels| labels.into_iter().collect()),
        }
    }
}

/// The files on disk.
#[derive(Debug)]
pub struct AdoptedFiles {
    run_dir: PathBuf,
    boot: String,
    /// The pods in the files, by index; `None` for a file of an earlier boot.
    files: BTreeMap<u32, Option<Arc<Remembered>>>,
}

impl AdoptedFiles {
    /// Reads the files that an earlier daemon has written since this boot. A missing directory is an empty one. A
    /// file that cannot be read or parsed is logged and ignored.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(run_dir: &Path, boot: String) -> io::Result<(Self, Vec<Remembered>)> {
        let mut written = AdoptedFiles { run_dir: run_dir.to_owned(), boot, files: BTreeMap::new() };
        let mut pods = Vec::new();
        for path in run_dir::entries(run_dir, ADOPTED)? {
            let name = path.file_name().unwrap_or_default();
            if name.as_encoded_bytes().first() == Some(&b'.') {
                // A daemon that was killed while it wrote left the file.
                let _ = fs::remove_file(&path);
                continue;
            }
            let entry = match careful::read(&path, LONGEST)
                .and_then(|bytes| Ok(serde_json::from_slice::<Entry>(&bytes)?))
            {
                Ok(entry) if *name == *format!("{}.json", entry.index) => entry,
                Ok(entry) => {
                    tracing::warn!(file = %path.display(), entry.index, "ignored file of an adopted pod: its name is another index");
                    continue;
                }
                Err(e) => {
                    tracing::warn!(file = %path.display(), "ignored file of an adopted pod: {e}");
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

    /// Makes the next [`update`](Self::update) write all files, because they may be gone.
    pub fn invalidate(&mut self) {
        self.files.values_mut().for_each(|file| *file = None);
    }

    /// Writes the missing and changed files of these pods, and removes the files of others.
    ///
    /// # Errors
    /// A file cannot be written or removed; the next call tries again.
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
