//! The offline policy snapshot: in which namespaces a policy can select pods, left in
//! `STATE_DIR/offline-policies.json` for a plugin that finds the daemon away.
//!
//! It outlives a reboot, so that after one only pods that a policy can select wait for the daemon, and all others
//! start. A node whose daemon has never been in sync has no such file: nothing is known that a pod could be held to.
//! A plugin is told the pod's namespace and name, not its labels (`CNI_ARGS`), so it decides by namespace.

use crate::careful;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The file's name in the state directory.
const FILE: &str = "offline-policies.json";
/// The form of the file that this build reads and writes.
const FORM: u32 = 1;
/// A cluster of 10,000 namespaces takes some 600 kB.
const MAX_BYTES: u64 = 64 << 20;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OfflinePolicies {
    form: u32,
    /// The namespaces in which a policy can select a pod, each with some of these policies' names.
    pub selectable: BTreeMap<String, Vec<String>>,
    /// Policies that can select pods of namespaces that the daemon has not seen. `None`: every namespace that is not
    /// in `selectable` is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<Elsewhere>,
}

/// Policies that go by labels of namespaces, and so may select in namespaces that are made later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Elsewhere {
    /// Some of these policies' names.
    pub policies: Vec<String>,
    /// The namespaces that are known, and in which no policy can select a pod.
    pub free: BTreeSet<String>,
}

impl OfflinePolicies {
    /// A snapshot.
    pub fn new(selectable: BTreeMap<String, Vec<String>>, elsewhere: Option<Elsewhere>) -> Self {
        OfflinePolicies { form: FORM, selectable, elsewhere }
    }

    /// Some of the policies that can select a pod of `namespace`; `None` if none can.
    pub fn that_select_in(&self, namespace: &str) -> Option<&[String]> {
        if let Some(policies) = self.selectable.get(namespace) {
            return Some(policies);
        }
        let elsewhere = self.elsewhere.as_ref()?;
        (!elsewhere.free.contains(namespace)).then_some(&elsewhere.policies)
    }

    /// Whether a daemon of this node has left a snapshot, and so has been in sync once.
    pub fn is_there(state_dir: &Path) -> bool {
        path(state_dir).symlink_metadata().is_ok()
    }

    /// Reads the snapshot; `None` if no daemon of this node has been in sync yet.
    ///
    /// # Errors
    /// The file is there and cannot be read or understood; the text names it.
    pub fn load(state_dir: &Path) -> io::Result<Option<OfflinePolicies>> {
        let path = path(state_dir);
        let about = |e: &dyn std::fmt::Display| io::Error::other(format!("{}: {e}", path.display()));
        let bytes = match careful::read(&path, MAX_BYTES) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|e| about(&e))?,
        };
        let snapshot: OfflinePolicies = serde_json::from_slice(&bytes).map_err(|e| about(&e))?;
        if snapshot.form != FORM {
            let form = snapshot.form;
            return Err(about(&format!("its form is {form}, and this egret-cni reads {FORM}; install one release")));
        }
        Ok(Some(snapshot))
    }

    /// Writes the snapshot, whole or not at all, and returns when it is on the disk.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn store(&self, state_dir: &Path) -> io::Result<()> {
        fs::create_dir_all(state_dir)?;
        fs::set_permissions(state_dir, Permissions::from_mode(0o700))?;
        let unfinished = unfinished(state_dir);
        let mut file = careful::create(&unfinished)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, path(state_dir))?;
        File::open(state_dir)?.sync_all()
    }

    /// Empties the snapshot, which cannot be written anew: a plugin that finds it so holds every pod, for which
    /// policies there are is not known to it.
    pub fn invalidate(state_dir: &Path) {
        // Nothing can be done about a file that cannot even be emptied, as on a disk that has become read-only.
        let _ = OpenOptions::new().write(true).truncate(true).open(path(state_dir));
    }

    /// Removes the snapshot; that it is not there is fine.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(state_dir: &Path) -> io::Result<()> {
        careful::put_aside(&unfinished(state_dir))?;
        careful::put_aside(&path(state_dir))
    }
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

fn unfinished(state_dir: &Path) -> PathBuf {
    state_dir.join(format!(".{FILE}"))
}

/// This boot's id, <https://docs.kernel.org/admin-guide/sysctl/kernel.html#random>.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> OfflinePolicies {
        let selectable = BTreeMap::from([("shop".to_owned(), vec!["shop/visitors".to_owned()])]);
        OfflinePolicies::new(selectable, None)
    }

    #[test]
    fn a_namespace_is_free_unless_a_policy_can_select_in_it() {
        let known = snapshot();
        assert_eq!(known.that_select_in("shop").unwrap(), ["shop/visitors"]);
        assert_eq!(known.that_select_in("other"), None);
        let elsewhere = Elsewhere { policies: vec!["all".into()], free: BTreeSet::from(["default".to_owned()]) };
        let unknown = OfflinePolicies { elsewhere: Some(elsewhere), ..known };
        assert_eq!(unknown.that_select_in("default"), None);
        assert_eq!(unknown.that_select_in("later").unwrap(), ["all"]);
        assert_eq!(unknown.that_select_in("shop").unwrap(), ["shop/visitors"]);
    }

    #[test]
    fn what_was_stored_is_loaded_and_what_is_damaged_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("state");
        assert_eq!(OfflinePolicies::load(&state_dir).unwrap(), None);
        fs::create_dir(&state_dir).unwrap();
        fs::write(unfinished(&state_dir), "half").unwrap();
        snapshot().store(&state_dir).unwrap();
        assert_eq!(OfflinePolicies::load(&state_dir).unwrap(), Some(snapshot()));
        for damaged in ["", "{\"form\": 1", "{\"form\": 2, \"selectable\": {}}", "[]"] {
            fs::write(path(&state_dir), damaged).unwrap();
            let error = OfflinePolicies::load(&state_dir).unwrap_err().to_string();
            assert!(error.contains(FILE), "{damaged:?}: {error}");
        }
        OfflinePolicies::remove(&state_dir).unwrap();
        OfflinePolicies::remove(&state_dir).unwrap();
        assert_eq!(OfflinePolicies::load(&state_dir).unwrap(), None);
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(path(directory.path())).unwrap();
        assert!(OfflinePolicies::load(directory.path()).is_err());
        fs::remove_dir(path(directory.path())).unwrap();
        nix::unistd::mkfifo(&path(directory.path()), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(OfflinePolicies::load(directory.path()).is_err());
        assert!(OfflinePolicies::is_there(directory.path()));
    }
}
