//! What the plugin does itself while the daemon is away: pods still start, and none leaks. A pod that no policy can
//! select starts as if Egret were not installed. A pod that a policy can select starts in quarantine. After a reboot
//! the quarantine's routes are gone, and such a pod waits for the daemon.
//!
//! The attachment's file records everything before it is done, and is removed after everything is undone. A call can
//! therefore be interrupted at any line and repeated. Plugins run in parallel: code that reads other attachments'
//! files before it changes a rule holds one lock. If several attachments name the same address, the last one added
//! owns it: a late DEL must not remove the rule of the pod that has the address now.

use crate::attachment::{Attachment, AttachmentId, load_all};
use crate::offline_policies::OfflinePolicies;
use crate::protocol::{CniError, codes};
use crate::quarantine::Quarantine;
use crate::run_dir;
use crate::uninstalled;
use egret_nft::Family;
use egret_nft::netlink;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// Result of an ADD.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// The pod may start: unrestricted, or in quarantine.
    Recorded,
    /// The pod must be quarantined, but the quarantine's routes or the policies are missing; the reason, in words.
    Unprepared(String),
}

/// ADD.
///
/// # Errors
/// The pod could not be quarantined.
pub fn add(run_dir: &Path, state_dir: &Path, attachment: &Attachment) -> Result<Admission, CniError> {
    let namespace = &attachment.pod.namespace;
    let selected_by = match that_select_in(state_dir, namespace) {
        Ok(selected_by) => selected_by,
        Err(e) => return Ok(Admission::Unprepared(format!("the offline policy snapshot cannot be read: {e}"))),
    };
    let mut quarantine = open()?;
    if let Some(policies) = &selected_by {
        if attachment.host.is_none() {
            return Err(CniError::new(
                codes::NO_HOST_INTERFACE,
                format!("the pod's interface {} has no veth peer on the host", attachment.id.ifname),
                format!(
                    "{policies} can select pods of namespace {namespace}, and a pod without a veth peer cannot be \
                     quarantined; egretd, which knows the pod's labels, is away"
                ),
            ));
        }
        for address in &attachment.addresses {
            if !quarantine.is_ready(Family::of(address)).map_err(kernel)? {
                return Ok(Admission::Unprepared(format!(
                    "{policies} can select pods of namespace {namespace}, and the quarantine's routes, which egretd \
                     installs when it starts, are missing"
                )));
            }
        }
    }
    // A reboot removes the run directory, and the daemon may not have run since.
    run_dir::make(run_dir).map_err(|e| files(run_dir, &e))?;
    let _lock = lock(run_dir)?;
    if uninstalled::is_marked(run_dir) {
        // Nothing would lift a quarantine that is set now.
        return Ok(Admission::Recorded);
    }
    let before = attachment.id.load(run_dir).map_err(|e| files(run_dir, &e))?;
    attachment.store(run_dir).map_err(|e| files(run_dir, &e))?;
    for address in &attachment.addresses {
        let done = if selected_by.is_some() { quarantine.add(address) } else { quarantine.lift(address) };
        done.map_err(kernel)?;
    }
    // A runtime that repeats ADD without a DEL may give other addresses.
    let mut left = before.map(|a| a.addresses).unwrap_or_default();
    left.retain(|a| !attachment.addresses.contains(a));
    lift(run_dir, &mut quarantine, &attachment.id, &left)?;
    Ok(Admission::Recorded)
}

/// DEL. It is no error if there is nothing to undo.
///
/// # Errors
/// The quarantine rules or the record could not be removed.
pub fn del(run_dir: &Path, id: &AttachmentId) -> Result<(), CniError> {
    if id.load(run_dir).map_err(|e| files(run_dir, &e))?.is_none() {
        // An incomplete file also counts as no attachment.
        return id.forget(run_dir).map_err(|e| files(run_dir, &e));
    }
    let _lock = lock(run_dir)?;
    release(run_dir, &mut open()?, id)
}

/// GC: ends the network's attachments that are not among `valid`.
///
/// # Errors
/// The first error. The other attachments are removed all the same.
pub fn gc(run_dir: &Path, network: &str, valid: &[AttachmentId]) -> Result<(), CniError> {
    let valid: BTreeSet<&AttachmentId> = valid.iter().collect();
    let is_stale = |a: &Attachment| a.network == network && !valid.contains(&a.id);
    if !load_all(run_dir).map_err(|e| files(run_dir, &e))?.iter().any(is_stale) {
        return Ok(());
    }
    let _lock = lock(run_dir)?;
    let mut quarantine = open()?;
    let (stale, others): (Vec<_>, Vec<_>) =
        load_all(run_dir).map_err(|e| files(run_dir, &e))?.into_iter().partition(is_stale);
    let claimed: BTreeSet<&IpAddr> = others.iter().flat_map(|a| &a.addresses).collect();
    let mut end = |a: &Attachment| {
        a.addresses.iter().filter(|x| !claimed.contains(x)).try_for_each(|x| quarantine.lift(x)).map_err(kernel)?;
        a.id.forget(run_dir).map_err(|e| files(run_dir, &e))
    };
    // Try all of them, and return the first error.
    stale.iter().map(&mut end).fold(Ok(()), Result::and)
}

/// CHECK.
///
/// # Errors
/// The pod's record is missing or differs, or the pod is not quarantined though a policy can select it.
pub fn check(run_dir: &Path, state_dir: &Path, attachment: &Attachment, why_offline: &str) -> Result<(), CniError> {
    let wrong =
        |msg: String| Err(CniError::new(codes::NOT_PROGRAMMED, msg, "delete the pod, so that it is created again"));
    match attachment.id.load(run_dir).map_err(|e| files(run_dir, &e))? {
        None => return wrong(format!("no ADD is recorded for container {}", attachment.id.container_id)),
        Some(recorded) if recorded.addresses != attachment.addresses => {
            return wrong(format!(
                "the pod's addresses are {:?}, the record says {:?}",
                attachment.addresses, recorded.addresses
            ));
        }
        Some(_) => {}
    }
    if matches!(that_select_in(state_dir, &attachment.pod.namespace), Ok(None)) {
        return Ok(());
    }
    let held = open()?.complete().map_err(kernel)?;
    if attachment.addresses.iter().all(|a| held.contains(a)) {
        return Ok(());
    }
    Err(CniError::new(
        codes::TRY_AGAIN,
        "the pod is not in quarantine, and only egretd can check whether its policy is applied",
        format!("egretd is away: {why_offline}"),
    ))
}

/// The policies that can select a pod of the namespace, in words; `None` if there are none, or if this node's daemon
/// has never been in sync.
fn that_select_in(state_dir: &Path, namespace: &str) -> io::Result<Option<String>> {
    let Some(snapshot) = OfflinePolicies::load(state_dir)? else { return Ok(None) };
    Ok(snapshot.that_select_in(namespace).map(|policies| match policies {
        [policy] => format!("policy {policy}"),
        _ => format!("policies {}", policies.join(", ")),
    }))
}

/// Undoes one attachment and removes its file. The caller holds the lock.
fn release(run_dir: &Path, quarantine: &mut Quarantine, id: &AttachmentId) -> Result<(), CniError> {
    let Some(attachment) = id.load(run_dir).map_err(|e| files(run_dir, &e))? else { return Ok(()) };
    lift(run_dir, quarantine, id, &attachment.addresses)?;
    id.forget(run_dir).map_err(|e| files(run_dir, &e))
}

/// Lifts the quarantine of those `addresses` that no other attachment than `id` claims. The caller holds the lock.
fn lift(run_dir: &Path, quarantine: &mut Quarantine, id: &AttachmentId, addresses: &[IpAddr]) -> Result<(), CniError> {
    if addresses.is_empty() {
        return Ok(());
    }
    let all = load_all(run_dir).map_err(|e| files(run_dir, &e))?;
    let claimed: BTreeSet<&IpAddr> = all.iter().filter(|a| a.id != *id).flat_map(|a| &a.addresses).collect();
    for address in addresses.iter().filter(|a| !claimed.contains(a)) {
        quarantine.lift(address).map_err(kernel)?;
    }
    Ok(())
}

fn lock(run_dir: &Path) -> Result<File, CniError> {
    run_dir::lock_plugins(run_dir).map_err(|e| files(run_dir, &e))
}

fn open() -> Result<Quarantine, CniError> {
    Quarantine::open().map_err(|e| kernel(e.into()))
}

fn kernel(e: netlink::Error) -> CniError {
    CniError::new(
        codes::KERNEL,
        format!("the quarantine's routing rules cannot be read or changed: {e}"),
        "egret-cni must run as root",
    )
}

fn files(run_dir: &Path, e: &io::Error) -> CniError {
    CniError::new(
        codes::IO,
        format!("the attachment files in {} cannot be read or written: {e}", run_dir.display()),
        "egret-cni must run as root",
    )
}
