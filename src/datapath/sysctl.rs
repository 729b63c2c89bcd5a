//! Settings under /proc/sys/net, of the calling thread's network namespace.

use crate::datapath::names::{DEVICE, OUT_DEVICE, ROUTE_DEVICE, is_vlan_device};
use anyhow::{Context, Result};
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

const NET: &str = "/proc/sys/net";
/// Where the manifests mount the host's `/proc/sys/net`, because that of an unprivileged container is read-only. Both
/// show the network namespace of the process that opens them.
pub const WRITABLE_NET: &str = "/host/proc/sys/net";

/// Reads the setting `key`, with slashes: `ipv4/conf/egret/rp_filter`. `None` if the kernel has no such setting.
///
/// # Errors
/// The setting exists and cannot be read.
pub fn get(key: &str) -> Result<Option<String>> {
    match fs::read_to_string(path(key)) {
        Ok(text) => Ok(Some(text.trim_end().to_owned())),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", path(key).display())),
    }
}

/// Sets `key` to `value`, and returns whether it had another value.
///
/// # Errors
/// The setting cannot be read or written.
pub fn ensure(key: &str, value: &str) -> Result<bool> {
    if get(key)?.as_deref() == Some(value) {
        return Ok(false);
    }
    match fs::write(path(key), value) {
        Err(e) if e.kind() == ErrorKind::ReadOnlyFilesystem => fs::write(Path::new(WRITABLE_NET).join(key), value),
        other => other,
    }
    .with_context(|| {
        format!(
            "cannot write {value} to {}; in a container that is not privileged, mount the host's {NET} at {WRITABLE_NET}",
            path(key).display()
        )
    })?;
    Ok(true)
}

/// Switches off a device's source validation (`rp_filter`), or makes it loose if the host has it on everywhere: the kernel
/// takes the larger one of the device's setting and `all`, and 2 is loose. Returns whether it was otherwise.
///
/// # Errors
/// The setting cannot be read or written.
pub fn loosen_source_validation(device: &str) -> Result<bool> {
    let is_on = get("ipv4/conf/all/rp_filter")?.is_some_and(|all| all != "0");
    ensure(&format!("ipv4/conf/{device}/rp_filter"), if is_on { "2" } else { "0" })
}

/// Checks whether a setting can be written. Opening it for writing changes nothing.
///
/// # Errors
/// The setting cannot be opened for writing.
pub fn writable(key: &str) -> io::Result<()> {
    let open = |path: &Path| OpenOptions::new().write(true).open(path).map(drop);
    match open(&path(key)) {
        Err(e) if e.kind() == ErrorKind::ReadOnlyFilesystem => open(&Path::new(WRITABLE_NET).join(key)).map_err(|_| e),
        other => other,
    }
}

/// Whether this network namespace has IPv6: the kernel supports it, and it is not disabled on every interface.
///
/// # Errors
/// The settings cannot be read.
pub fn ipv6() -> Result<bool> {
    match get("ipv6/conf/all/disable_ipv6")?.as_deref() {
        None => return Ok(false),
        Some("0") => return Ok(true),
        Some(_) => {}
    }
    // It is disabled for all, but a CNI may have enabled it on its pods' interfaces.
    for interface in fs::read_dir(path("ipv6/conf")).context("cannot list /proc/sys/net/ipv6/conf")? {
        let name = interface?.file_name().to_string_lossy().into_owned();
        let own =
            matches!(name.as_str(), "all" | "default" | "lo" | DEVICE | OUT_DEVICE) || ROUTE_DEVICE.contains(&&*name);
        // In /proc/sys a point of a name is a point, too.
        let own = own || is_vlan_device(&name);
        if !own && get(&format!("ipv6/conf/{name}/disable_ipv6"))?.as_deref() == Some("0") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn path(key: &str) -> PathBuf {
    [NET, key].iter().collect()
}
