//! The entry of `egret-cni` in the node's network configuration. It is put into the first file by name that a runtime
//! can use, because runtimes choose that file (go-cni's `loadFromConfDir`, ocicni's `loadNetworks`).

use super::directory::{Directory, FileContents};
use super::network::{Entry, Kind, Network, replacement};
use anyhow::{Context, Result, anyhow};
use std::collections::BTreeMap;
use std::path::Path;

/// Another program may write at the same time: after so many attempts, wait for it.
const ROUNDS: usize = 5;

/// The state of the network configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigurationState {
    /// The runtime's plugin chain has the entry, in this file.
    Ready(String),
    /// No file can be used by a runtime.
    Missing,
    /// Another program is writing a file.
    BeingWritten,
    /// The file that the runtime uses cannot be extended.
    NotExtensible {
        /// The file's name.
        file: String,
        /// Why it cannot be extended.
        reason: String,
    },
}

/// The result of [`put`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryResult {
    /// The state of the configuration after the call.
    pub state: ConfigurationState,
    /// Whether the entry was written.
    pub changed: bool,
    /// Files that runtimes cannot use and that sort before the used one, each with the reason.
    pub skipped: Vec<String>,
}

/// Makes sure that the runtime's plugin chain has the entry.
///
/// # Errors
/// A file cannot be written, or the directory cannot be read.
pub fn put(path: &Path, entry: Entry<'_>) -> Result<EntryResult> {
    let mut outcome = EntryResult { state: ConfigurationState::Missing, changed: false, skipped: Vec::new() };
    let Some(directory) = Directory::open(path)? else { return Ok(outcome) };
    for _ in 0..ROUNDS {
        outcome.skipped.clear();
        match pass(&directory, entry, !outcome.changed, &mut outcome.skipped)? {
            // Check again: the file may have been changed since it was read.
            Pass::Written => outcome.changed = true,
            Pass::Again => {}
            Pass::Done(state) => {
                outcome.state = state;
                return Ok(outcome);
            }
        }
    }
    outcome.state = ConfigurationState::BeingWritten;
    Ok(outcome)
}

/// What one pass over the directory did.
enum Pass {
    Done(ConfigurationState),
    Written,
    Again,
}

/// Reads the directory once, and writes the entry if it is missing. `may_write`: one call writes the entry only once;
/// if another program removes it at once, the next call puts it back.
fn pass(directory: &Directory, entry: Entry<'_>, may_write: bool, skipped: &mut Vec<String>) -> Result<Pass> {
    let mut replacements = BTreeMap::new();
    let mut first: Option<First> = None;
    for name in directory.names()? {
        let Some(kind) = Kind::of(&name) else { continue };
        let found = match directory.read(&name) {
            Ok(Some(found)) => found,
            Ok(None) => continue,
            Err(reason) => {
                if first.is_none() {
                    skipped.push(format!("{}: {reason}", directory.path(&name).display()));
                }
                continue;
            }
        };
        let file = match found.text().and_then(|text| Ok(Network::read(text, kind)?.stands_for())) {
            Ok(file) => file,
            // The file may become the first one when it is complete. Do not extend another one meanwhile.
            Err(_) if first.is_none() && found.is_young() => return Ok(Pass::Done(ConfigurationState::BeingWritten)),
            Err(reason) => {
                if first.is_none() {
                    skipped.push(format!("{}: {reason}", directory.path(&name).display()));
                }
                continue;
            }
        };
        if file.is_some() {
            replacements.insert(name, found.bytes);
        } else if first.is_none() {
            first = Some(First { name, kind, found });
        }
    }
    let (wanted, state) = match &first {
        None => (None, ConfigurationState::Missing),
        Some(first) => match extend(directory, first, entry, &replacements, may_write)? {
            Extension::Done => (None, ConfigurationState::Ready(first.name.clone())),
            Extension::Replacement(name) => (Some(name.clone()), ConfigurationState::Ready(name)),
            Extension::Written => return Ok(Pass::Written),
            Extension::Again => return Ok(Pass::Again),
            Extension::Impossible(reason) => {
                (None, ConfigurationState::NotExtensible { file: first.name.clone(), reason })
            }
        },
    };
    // Remove replacement lists whose file is gone or not the first any more.
    let mut removed = false;
    for name in replacements.keys().filter(|name| Some(*name) != wanted.as_ref()) {
        removed |= directory.remove(name)?;
    }
    Ok(if removed { Pass::Again } else { Pass::Done(state) })
}

/// The file that a runtime uses: the first one that it can read.
struct First {
    name: String,
    kind: Kind,
    found: FileContents,
}

enum Extension {
    /// The file has the entry.
    Done,
    /// The replacement list of this name has the entry.
    Replacement(String),
    Written,
    Again,
    Impossible(String),
}

fn extend(
    directory: &Directory,
    First { name, kind, found }: &First,
    entry: Entry<'_>,
    replacements: &BTreeMap<String, Vec<u8>>,
    may_write: bool,
) -> Result<Extension> {
    let text = found.text().map_err(|e| anyhow!(e))?;
    let network = Network::read(text, *kind).map_err(|e| anyhow!(e))?;
    if let Err(reason) = network.check() {
        return Ok(Extension::Impossible(reason));
    }
    if *kind == Kind::List {
        let extended = network.extended(entry);
        if extended == text {
            return Ok(Extension::Done);
        }
        // The target of a symbolic link may belong to another program, or be read-only.
        if !found.is_link {
            if !may_write {
                return Ok(Extension::Again);
            }
            let written = directory.replace(name, found, extended.as_bytes())?;
            return Ok(if written { Extension::Written } else { Extension::Again });
        }
    }
    let list = replacement(name);
    let text = network.standing_for(name, entry);
    match replacements.get(&list) {
        Some(there) if there == text.as_bytes() => return Ok(Extension::Replacement(list)),
        _ if !may_write => return Ok(Extension::Again),
        Some(_) => {}
        None if directory.path(&list).symlink_metadata().is_err() => {}
        None => {
            return Ok(Extension::Impossible(format!(
                "{list}, which Egret would write in its place, belongs to another program; rename that file"
            )));
        }
    }
    directory.write(&list, text.as_bytes(), found.mode())?;
    Ok(Extension::Written)
}

/// Removes the entry from every file that has it, also from files that runtimes do not read: CNIs rename each other's
/// files and restore them later. Returns the names of the changed files, and the errors.
pub fn remove(path: &Path) -> (Vec<String>, Vec<anyhow::Error>) {
    let (mut changed, mut errors) = (Vec::new(), Vec::new());
    let names = Directory::open(path).and_then(|directory| match directory {
        Some(directory) => Ok(Some((directory.names()?, directory))),
        None => Ok(None),
    });
    match names {
        Ok(None) => {}
        Ok(Some((names, directory))) => {
            for name in names {
                match remove_from(&directory, &name) {
                    Ok(true) => changed.push(name),
                    Ok(false) => {}
                    Err(e) => errors.push(e.context(format!("{}", directory.path(&name).display()))),
                }
            }
        }
        Err(e) => errors.push(e),
    }
    (changed, errors)
}

fn remove_from(directory: &Directory, name: &str) -> Result<bool> {
    for _ in 0..ROUNDS {
        // A runtime finds no entry in a file that it cannot read.
        let Ok(Some(found)) = directory.read(name) else { return Ok(false) };
        let Ok(text) = found.text() else { return Ok(false) };
        let network = match Network::read(text, Kind::of(name).unwrap_or(Kind::List)) {
            Ok(network) => network,
            Err(e) if Kind::of(name).is_some() && text.contains(super::network::PLUGIN) => {
                return Err(anyhow!(e)).context("remove the egret-cni entry by hand");
            }
            Err(_) => return Ok(false),
        };
        if network.stands_for().is_some() && !found.is_link {
            return directory.remove(name);
        }
        if !network.has_entry() {
            return Ok(false);
        }
        if found.is_link {
            return Err(anyhow!(
                "it is a symbolic link, which egretd does not change; remove the egret-cni entry by hand"
            ));
        }
        if directory.replace(name, &found, network.without_entry().as_bytes())? {
            return Ok(true);
        }
    }
    Err(anyhow!("another program keeps writing it; try again"))
}
