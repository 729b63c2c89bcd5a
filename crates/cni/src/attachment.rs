//! The record of a pod's interface, and its file `RUN_DIR/attachments/CONTAINER@IFNAME.json`.
//!
//! The daemon, or the plugin while the daemon is away, writes the file before it does anything for the pod, and
//! removes it after it has undone everything. The file survives a restart of either, and a late DEL undoes only what
//! its own (container id, interface) did.

use crate::careful;
use crate::run_dir::{self, ATTACHMENTS};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The key of an attachment: the container (sandbox) and its interface, as the runtime names them.
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
    /// The container and interface.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// The network's name in the runtime's configuration. A GC concerns one network only.
    #[serde(default)]
    pub network: String,
    /// The pod, from `CNI_ARGS`.
    pub pod: PodRef,
    /// The pod's addresses, from `prevResult`.
    pub addresses: Vec<IpAddr>,
    /// The interface's veth peer on the host; absent if it has none (macvlan, SR-IOV).
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
    /// `K8S_POD_UID`; empty if the runtime does not set it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// The host end of a pod's veth pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostInterface {
    /// The host end's interface index.
    pub index: u32,
    /// The interface index of the pod's end, in the pod's namespace. The host end's `IFLA_LINK` has it, which proves
    /// that the two are a pair.
    pub peer_index: u32,
}

impl AttachmentId {
    fn path(&self, run_dir: &Path) -> PathBuf {
        run_dir.join(ATTACHMENTS).join(format!("{}@{}.json", self.container_id, self.ifname))
    }

    /// The path under which the file is written before it is renamed. It depends on the id alone, so that the remains
    /// of a killed writer do not outlive the attachment.
    fn unfinished(&self, run_dir: &Path) -> PathBuf {
        run_dir.join(ATTACHMENTS).join(format!(".{}@{}", self.container_id, self.ifname))
    }

    /// Reads the attachment's file; `None` if there is none.
    ///
    /// # Errors
    /// The file cannot be read. A file that cannot be decoded counts as absent: its writer was killed before the
    /// attachment had any effect. So does anything that is no regular file.
    pub fn load(&self, run_dir: &Path) -> io::Result<Option<Attachment>> {
        match read(&self.path(run_dir)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other,
        }
    }

    /// Removes the file. It is no error if there is none.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&self, run_dir: &Path) -> io::Result<()> {
        for path in [self.unfinished(run_dir), self.path(run_dir)] {
            careful::put_aside(&path)?;
        }
        Ok(())
    }
}

impl Attachment {
    /// Writes the file atomically.
    ///
    /// # Errors
    /// The file cannot be written.
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

/// The longest file accepted, in bytes. Names have at most 253 bytes, and a pod has few addresses.
const LONGEST: u64 = 64 << 10;

/// Reads a file; `None` if it holds no attachment.
fn read(path: &Path) -> io::Result<Option<Attachment>> {
    match careful::read(path, LONGEST) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        // A symbolic link (ELOOP), a socket (ENXIO), a directory, a pipe, or a file that is too long.
        Err(_) if path.symlink_metadata().is_ok_and(|there| !there.is_file() || there.len() > LONGEST) => {
            tracing::warn!(file = %path.display(), "it is passed over: it is no file of an attachment's");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Reads all attachments, the oldest first. If two name the same interface, because its index was used again, the
/// newer one owns it. Files that hold no attachment are skipped.
///
/// # Errors
/// The directory cannot be read. A missing directory is no error. An entry that is no regular file or cannot be read
/// is logged and skipped.
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
