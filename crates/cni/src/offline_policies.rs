//! The offline policy snapshot: the namespaces in which a policy can select pods, in
//! `STATE_DIR/offline-policies.json`. The daemon writes it; the plugin reads it while the daemon is away.
//!
//! The file outlives a reboot. After one, only pods that a policy can select wait for the daemon; all others start. A
//! node whose daemon has never been in sync has no such file, and no pod waits there. The plugin decides by
//! namespace, because `CNI_ARGS` gives the pod's namespace and name, but not its labels.

use crate::careful;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The file's name in the state directory.
const FILE: &str = "offline-policies.json";
/// The version of the file's format that this build reads and writes.
const FORM: u32 = 1;
/// The longest snapshot accepted, in bytes. 10,000 namespaces take some 600 kB.
const MAX_BYTES: u64 = 64 << 20;

/// Which namespaces a policy can select pods in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OfflinePolicies {
    form: u32,
    /// The namespaces in which a policy can select a pod, each with some of these policies' names.
    /// The namespaces in which a policy can select a pod, each with some of these policies' names.
    pub selectable: BTreeMap<String, Vec<String>>,
    /// Policies that can select pods of namespaces that the daemon has not seen. `None`: no policy can select a pod
    /// of a namespace that is not in `selectable`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<Elsewhere>,
}

/// Policies that select namespaces by label, and so may select namespaces that are created later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elsewhere {
    /// Some of these policies' names.
    pub policies: Vec<String>,
    /// The known namespaces in which no policy can select a pod.
    pub free: BTreeSet<String>,
}

impl OfflinePolicies {
    /// Makes a snapshot in the current format.
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

    /// Whether there is a snapshot, which means that this node's daemon has been in sync at least once.
    pub fn is_there(state_dir: &Path) -> bool {
        path(state_dir).symlink_metadata().is_ok()
    }

    /// Reads the snapshot; `None` if this node's daemon has never been in sync.
    ///
    /// # Errors
    /// The file exists and cannot be read or decoded. The text names the file.
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
            let text =
                format!("its form is {form}, this egret-cni reads {FORM}; install egretd and egret-cni of one release");
            return Err(about(&text));
        }
        Ok(Some(snapshot))
    }

    /// Writes the snapshot atomically, and returns after it has been synced to the disk.
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

    /// Truncates a snapshot that cannot be written again. A plugin that finds it empty does not know the policies and
    /// makes every pod wait.
    pub fn invalidate(state_dir: &Path) {
        // Nothing else can be done if the file cannot be truncated, for example on a file system that became
        // read-only.
        let _ = OpenOptions::new().write(true).truncate(true).open(path(state_dir));
    }

    /// Removes the snapshot. It is no error if there is none.
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

/// The id of this boot, <https://docs.kernel.org/admin-guide/sysctl/kernel.html#random>.
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
    fn namespace_is_free_unless_policy_can_select_in_it() {
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
    fn stored_snapshot_is_loaded_and_damaged_one_is_an_error() {
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
    fn anything_but_a_regular_file_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(path(directory.path())).unwrap();
        assert!(OfflinePolicies::load(directory.path()).is_err());
        fs::remove_dir(path(directory.path())).unwrap();
        nix::unistd::mkfifo(&path(directory.path()), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(OfflinePolicies::load(directory.path()).is_err());
        assert!(OfflinePolicies::is_there(directory.path()));
    }
}
