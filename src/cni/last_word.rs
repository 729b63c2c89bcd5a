//! The daemon's last word: which namespaces a policy can select pods of, left in `RUN_DIR/last-word.json` for a
//! plugin that finds the daemon away.

use super::run_dir::LAST_WORD as FILE;
use crate::careful;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use std::{fs, io};

/// It is at most so long, bytes: it names namespaces.
const LONGEST: u64 = 64 << 20;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastWord {
    /// `/proc/sys/kernel/random/boot_id` when it was written: a word from before a boot says nothing, for the
    /// routes that the quarantine needs are gone.
    pub boot_id: String,
    /// Namespaces in which a policy can select a pod.
    pub selectable: BTreeSet<String>,
    /// If some policy could select pods of namespaces that the daemon has not seen yet: the namespaces that are
    /// known to be free. `None`: every namespace that is not in `selectable` is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<BTreeSet<String>>,
}

impl LastWord {
    /// Whether a policy can select a pod of `namespace`.
    pub fn can_select(&self, namespace: &str) -> bool {
        match &self.free {
            None => self.selectable.contains(namespace),
            Some(free) => !free.contains(namespace),
        }
    }

    /// Reads the word of this boot; `None` if the daemon has not spoken since.
    ///
    /// # Errors
    /// The file is there and cannot be read or understood.
    pub fn load(directory: &Path) -> io::Result<Option<LastWord>> {
        let bytes = match careful::read(&directory.join(FILE), LONGEST) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let word: LastWord = serde_json::from_slice(&bytes)?;
        Ok(if word.boot_id == boot_id()? { Some(word) } else { None })
    }

    /// Takes back what was said, as well as it can be.
    pub fn take_back(directory: &Path) {
        let _ = careful::put_aside(&directory.join(FILE));
    }

    /// Writes the word, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store(&self, directory: &Path) -> io::Result<()> {
        let temporary = directory.join(format!(".{FILE}"));
        fs::write(&temporary, serde_json::to_vec(self)?)?;
        fs::rename(&temporary, directory.join(FILE))
    }
}

/// This boot's id, <https://docs.kernel.org/admin-guide/sysctl/kernel.html#random>.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
