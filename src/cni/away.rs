//! What the plugin does by itself while the daemon is away: it does not stop pods from starting, and it does not let
//! them leak.
//!
//! Everything is recorded in the attachment's file before it is done and undone before the file goes, so that it can
//! be broken off at any line and run again. Plugins run side by side: what reads the files of others before it
//! touches a rule does so under one lock. Of several attachments that name the same address, the one that was added
//! last has it: a DEL may come late, when the address is another pod's already, and must leave that pod's rule.

use super::attachment::{Attachment, AttachmentId, load_all};
use super::last_word::LastWord;
use super::protocol::{Failure, codes};
use super::run_dir;
use super::uninstalled;
use crate::kernel::netlink;
use crate::kernel::quarantine::{Family, Quarantine};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// What became of an ADD.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// The pod may run: free, or in quarantine.
    Recorded,
    /// The daemon left nothing on this boot to hold a pod with; why, in words.
    Unprepared(String),
}

/// ADD.
///
/// # Errors
/// The pod could not be held.
pub fn add(run_dir: &Path, attachment: &Attachment) -> Result<Admission, Failure> {
    let Some(word) = last_word(run_dir) else {
        return Ok(Admission::Unprepared("egretd has not run on this node since it started".into()));
    };
    let can_select = word.can_select(&attachment.pod.namespace);
    if can_select && attachment.host.is_none() {
        return Err(Failure::new(
            codes::NO_HOST_INTERFACE,
            format!("the pod's interface {} has no veth peer on the host", attachment.id.ifname),
            format!(
                "a policy can select pods of namespace {}, and a pod without one cannot be held to it; egretd, which \
                 would know, is away",
                attachment.pod.namespace
            ),
        ));
    }
    let mut quarantine = open()?;
    if can_select {
        for address in &attachment.addresses {
            if !quarantine.is_ready(Family::of(address)).map_err(kernel)? {
                let why = format!("the quarantine's routes, which egretd makes, are not there for {address}");
                return Ok(Admission::Unprepared(why));
            }
        }
    }
    let _lock = lock(run_dir)?;
    if uninstalled::is_marked(run_dir) {
        // What is held now, nobody would lift.
        return Ok(Admission::Recorded);
    }
    let before = attachment.id.load(run_dir).map_err(|e| files(run_dir, &e))?;
    attachment.store(run_dir).map_err(|e| files(run_dir, &e))?;
    for address in &attachment.addresses {
        let done = if can_select { quarantine.hold(address) } else { quarantine.lift(address) };
        done.map_err(kernel)?;
    }
    // A runtime that adds again without a DEL between may come with other addresses.
    let mut left = before.map(|a| a.addresses).unwrap_or_default();
    left.retain(|a| !attachment.addresses.contains(a));
    lift(run_dir, &mut quarantine, &attachment.id, &left)?;
    Ok(Admission::Recorded)
}

/// DEL. That there is nothing to undo is fine.
///
/// # Errors
/// What is there could not be undone.
pub fn del(run_dir: &Path, id: &AttachmentId) -> Result<(), Failure> {
    if id.load(run_dir).map_err(|e| files(run_dir, &e))?.is_none() {
        // Also a file that was cut short.
        return id.forget(run_dir).map_err(|e| files(run_dir, &e));
    }
    let _lock = lock(run_dir)?;
    release(run_dir, &mut open()?, id)
}

/// GC: ends the network's attachments that are not among `valid`.
///
/// # Errors
/// The first one; the others are ended all the same.
pub fn gc(run_dir: &Path, network: &str, valid: &[AttachmentId]) -> Result<(), Failure> {
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
    // All are tried, the first error counts.
    stale.iter().map(&mut end).fold(Ok(()), Result::and)
}

/// CHECK.
///
/// # Errors
/// The pod is not recorded as it is, or can reach the outside though a policy can select it.
pub fn check(run_dir: &Path, attachment: &Attachment, why_away: &str) -> Result<(), Failure> {
    let wrong = |msg: String| Err(Failure::new(codes::NOT_PROGRAMMED, msg, "delete the pod and let it be made anew"));
    match attachment.id.load(run_dir).map_err(|e| files(run_dir, &e))? {
        None => return wrong(format!("there is no record of an ADD for {}", attachment.id.container_id)),
        Some(recorded) if recorded.addresses != attachment.addresses => {
            return wrong(format!(
                "the pod's addresses are {:?}, the record says {:?}",
                attachment.addresses, recorded.addresses
            ));
        }
        Some(_) => {}
    }
    if last_word(run_dir).is_some_and(|word| !word.can_select(&attachment.pod.namespace)) {
        return Ok(());
    }
    let held = open()?.held().map_err(kernel)?;
    if attachment.addresses.iter().all(|a| held.contains(a)) {
        return Ok(());
    }
    Err(Failure::new(
        codes::TRY_AGAIN,
        "the pod is not in quarantine, and only egretd can tell whether it is held to its policy",
        format!("egretd is away: {why_away}"),
    ))
}

/// STATUS.
///
/// # Errors
/// No pod could be added: there is nothing to hold it with.
pub fn status(run_dir: &Path, why_away: &str) -> Result<(), Failure> {
    let unavailable = |msg: &str| {
        let details = format!("egretd is away: {why_away}; start it on this node");
        Err(Failure::new(codes::NOT_AVAILABLE, msg, details))
    };
    if last_word(run_dir).is_none() {
        return unavailable("egretd has not run on this node since it started");
    }
    let mut quarantine = open()?;
    for family in Family::ALL {
        if quarantine.is_ready(family).map_err(kernel)? {
            return Ok(());
        }
    }
    unavailable("the quarantine's routes, which egretd makes, are not there")
}

/// A word that cannot be read says nothing.
fn last_word(run_dir: &Path) -> Option<LastWord> {
    LastWord::load(run_dir).ok().flatten()
}

/// Undoes one attachment, and forgets it. The lock is held.
fn release(run_dir: &Path, quarantine: &mut Quarantine, id: &AttachmentId) -> Result<(), Failure> {
    let Some(attachment) = id.load(run_dir).map_err(|e| files(run_dir, &e))? else { return Ok(()) };
    lift(run_dir, quarantine, id, &attachment.addresses)?;
    id.forget(run_dir).map_err(|e| files(run_dir, &e))
}

/// Lets those of `addresses` out that no attachment but `id` claims. The lock is held.
fn lift(run_dir: &Path, quarantine: &mut Quarantine, id: &AttachmentId, addresses: &[IpAddr]) -> Result<(), Failure> {
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

fn lock(run_dir: &Path) -> Result<File, Failure> {
    run_dir::lock_plugins(run_dir).map_err(|e| files(run_dir, &e))
}

fn open() -> Result<Quarantine, Failure> {
    Quarantine::open().map_err(|e| kernel(e.into()))
}

fn kernel(e: netlink::Error) -> Failure {
    Failure::new(codes::KERNEL, format!("the quarantine's routing rules: {e}"), "egret-cni must run as root")
}

fn files(run_dir: &Path, e: &io::Error) -> Failure {
    Failure::new(codes::IO, format!("egret's records in {}: {e}", run_dir.display()), "egret-cni must run as root")
}
