//! What is known of a pod's interface, and the file that keeps it: `RUN_DIR/attachments/CONTAINER@IFNAME.json`.
//!
//! The file is written before anything is done for the pod and removed after everything is undone, by the daemon,
//! or by the plugin while the daemon is away. So it survives either of them, and a DEL that comes late finds only
//! what its own (container id, interface) did.

use super::run_dir::{self, ATTACHMENTS};
use crate::careful;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Names an attachment: the container (sandbox) and its interface, as the runtime calls them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AttachmentId {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

/// One interface of one pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// Who it belongs to.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// The network's name in the runtime's configuration. GC speaks for one network alone.
    #[serde(default)]
    pub network: String,
    /// The pod, from `CNI_ARGS`.
    pub pod: PodRef,
    /// The pod's addresses, from `prevResult`.
    pub addresses: Vec<IpAddr>,
    /// The interface's other end on the host; absent if it has none (macvlan, SR-IOV).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<HostInterface>,
}

/// A pod, as `CNI_ARGS` names it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRef {
    /// `K8S_POD_NAMESPACE`.
    pub namespace: String,
    /// `K8S_POD_NAME`.
    pub name: String,
    /// `K8S_POD_UID`, where the runtime gives it; else empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// The host's end of a pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostInterface {
    /// Its interface index on the host.
    pub index: u32,
    /// The interface index of the pod's end, in the pod's namespace: the host's end names it in `IFLA_LINK`, which
    /// proves that the two belong together.
    pub peer_index: u32,
}

impl AttachmentId {
    fn path(&self, run_dir: &Path) -> PathBuf {
        run_dir.join(ATTACHMENTS).join(format!("{}@{}.json", self.container_id, self.ifname))
    }

    /// Where the file is written before it takes its name. Always the same, so that what a writer killed in the
    /// middle leaves does not outlive the attachment.
    fn unfinished(&self, run_dir: &Path) -> PathBuf {
        run_dir.join(ATTACHMENTS).join(format!(".{}@{}", self.container_id, self.ifname))
    }

    /// Reads the attachment, or `None` if there is none of this id.
    ///
    /// # Errors
    /// The file cannot be read. A file that holds no attachment counts as absent, for it was cut short before it had any
    /// effect; and so does what is no file.
    pub fn load(&self, run_dir: &Path) -> io::Result<Option<Attachment>> {
        match read(&self.path(run_dir)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other,
        }
    }

    /// Removes the file; that it is not there is no error.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self, run_dir: &Path) -> io::Result<()> {
        for path in [self.unfinished(run_dir), self.path(run_dir)] {
            careful::put_aside(&path)?;
        }
        Ok(())
    }
}

impl Attachment {
    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store(&self, run_dir: &Path) -> io::Result<()> {
        let (path, unfinished) = (self.id.path(run_dir), self.id.unfinished(run_dir));
        let bytes = serde_json::to_vec(self)?;
        careful::replace(&path, &unfinished, &bytes).or_else(|e| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                run_dir::make_within(run_dir, ATTACHMENTS)?;
                careful::replace(&path, &unfinished, &bytes)
            }
            _ => Err(e),
        })
    }
}

/// An attachment is at most so long, bytes: its names are of 253 bytes at most, and it has few addresses.
const LONGEST: u64 = 64 << 10;

/// Reads a file; `None`: it holds no attachment.
fn read(path: &Path) -> io::Result<Option<Attachment>> {
    match careful::read(path, LONGEST) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        // A link (ELOOP), a socket (ENXIO), a directory, a pipe, or too long.
        Err(_) if path.symlink_metadata().is_ok_and(|there| !there.is_file() || there.len() > LONGEST) => {
            tracing::warn!(file = %path.display(), "it is passed over: it is no file of an attachment's");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Reads all attachments, the oldest first: of two that name one interface, whose index was used again, the newer one has
/// it. Files that hold none are passed over.
///
/// # Errors
/// The directory cannot be read; that it is not there, or is none, is no error. Nor is an entry that is no regular file, or
/// cannot be read: it is one entry, and is told of.
pub fn load_all(run_dir: &Path) -> io::Result<Vec<Attachment>> {
    let mut all = Vec::new();
    for path in run_dir::entries(run_dir, ATTACHMENTS)? {
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().first() == Some(&b'.')) {
            continue;
        }
        match read(&path).and_then(|attachment| Ok((attachment, path.symlink_metadata()?.modified()?))) {
            Ok((attachment, written)) => all.extend(attachment.map(|attachment| (written, attachment))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => tracing::warn!(file = %path.display(), "it is passed over: {e}"),
        }
    }
    all.sort_by_key(|(written, _)| *written);
    Ok(all.into_iter().map(|(_, attachment)| attachment).collect())
}
