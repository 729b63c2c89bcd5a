//! The entry in the node's network configuration: in the first file by name that a runtime can use, as the runtimes
//! choose it themselves (go-cni's `loadFromConfDir`, ocicni's `loadNetworks`).

use super::directory::{Directory, Found};
use super::network::{Entry, Kind, Network, stand_in};
use anyhow::{Context, Result, anyhow};
use std::collections::BTreeMap;
use std::path::Path;

/// Somebody else may write at the same time; who writes without pause is waited for.
const ROUNDS: usize = 5;

/// How the configuration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The runtime's chain has the entry, by this file.
    Ready(String),
    /// There is no file that a runtime could use.
    Missing,
    /// A file is being written.
    Unsettled,
    /// The file that the runtime uses cannot be extended.
    LeftAlone {
        /// Its name.
        file: String,
        /// Why.
        reason: String,
    },
}

/// What [`put`] found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How the configuration is now.
    pub state: State,
    /// Whether the entry was written.
    pub changed: bool,
    /// Files before the one that is used which runtimes cannot use, each with the reason.
    pub passed_over: Vec<String>,
}

/// Sees to it that the runtime's chain of plugins has the entry.
///
/// # Errors
/// A file cannot be written, or the directory cannot be read.
pub fn put(path: &Path, entry: Entry<'_>) -> Result<Outcome> {
    let mut outcome = Outcome { state: State::Missing, changed: false, passed_over: Vec::new() };
    let Some(directory) = Directory::open(path)? else { return Ok(outcome) };
    for _ in 0..ROUNDS {
        outcome.passed_over.clear();
        match look(&directory, entry, !outcome.changed, &mut outcome.passed_over)? {
            // Looked at again: the file may have been changed since it was read.
            Look::Written => outcome.changed = true,
            Look::Again => {}
            Look::Settled(state) => {
                outcome.state = state;
                return Ok(outcome);
            }
        }
    }
    outcome.state = State::Unsettled;
    Ok(outcome)
}

enum Look {
    Settled(State),
    Written,
    Again,
}

/// `may_write`: the entry is written once; who undoes it at once is not answered before the next call.
fn look(directory: &Directory, entry: Entry<'_>, may_write: bool, passed_over: &mut Vec<String>) -> Result<Look> {
    let mut stand_ins = BTreeMap::new();
    let mut first: Option<(String, Kind, Found)> = None;
    for name in directory.names()? {
        let Some(kind) = Kind::of(&name) else { continue };
        let found = match directory.read(&name) {
            Ok(Some(found)) => found,
            Ok(None) => continue,
            Err(reason) => {
                if first.is_none() {
                    passed_over.push(format!("{}: {reason}", directory.path(&name).display()));
                }
                continue;
            }
        };
        let file = match found.text().and_then(|text| Ok(Network::read(text, kind)?.stands_for())) {
            Ok(file) => file,
            // The file may well become the first: another one is not touched for it.
            Err(_) if first.is_none() && found.is_young() => return Ok(Look::Settled(State::Unsettled)),
            Err(reason) => {
                if first.is_none() {
                    passed_over.push(format!("{}: {reason}", directory.path(&name).display()));
                }
                continue;
            }
        };
        if file.is_some() {
            stand_ins.insert(name, found.bytes);
        } else if first.is_none() {
            first = Some((name, kind, found));
        }
    }
    let (wanted, settled) = match &first {
        None => (None, State::Missing),
        Some((name, kind, found)) => match extend(directory, name, *kind, found, entry, &stand_ins, may_write)? {
            Extension::Done => (None, State::Ready(name.clone())),
            Extension::StandIn(name) => (Some(name.clone()), State::Ready(name)),
            Extension::Written => return Ok(Look::Written),
            Extension::Again => return Ok(Look::Again),
            Extension::Impossible(reason) => (None, State::LeftAlone { file: name.clone(), reason }),
        },
    };
    // Lists that stood for files which are no longer there, or no longer the first.
    let mut removed = false;
    for name in stand_ins.keys().filter(|name| Some(*name) != wanted.as_ref()) {
        removed |= directory.remove(name)?;
    }
    Ok(if removed { Look::Again } else { Look::Settled(settled) })
}

enum Extension {
    /// The file has the entry.
    Done,
    /// The list of this name has the entry, and stands for the file.
    StandIn(String),
    Written,
    Again,
    Impossible(String),
}

fn extend(
    directory: &Directory,
    name: &str,
    kind: Kind,
    found: &Found,
    entry: Entry<'_>,
    stand_ins: &BTreeMap<String, Vec<u8>>,
    may_write: bool,
) -> Result<Extension> {
    let text = found.text().map_err(|e| anyhow!(e))?;
    let network = Network::read(text, kind).map_err(|e| anyhow!(e))?;
    if let Err(reason) = network.check() {
        return Ok(Extension::Impossible(reason));
    }
    if kind == Kind::List {
        let extended = network.extended(entry);
        if extended == text {
            return Ok(Extension::Done);
        }
        // A link leads to where somebody else keeps the file, perhaps where nobody can write.
        if !found.is_link {
            if !may_write {
                return Ok(Extension::Again);
            }
            let written = directory.replace(name, found, extended.as_bytes())?;
            return Ok(if written { Extension::Written } else { Extension::Again });
        }
    }
    let list = stand_in(name);
    let text = network.standing_for(name, entry);
    match stand_ins.get(&list) {
        Some(there) if there == text.as_bytes() => return Ok(Extension::StandIn(list)),
        _ if !may_write => return Ok(Extension::Again),
        Some(_) => {}
        None if directory.path(&list).symlink_metadata().is_err() => {}
        None => return Ok(Extension::Impossible(format!("{list}, which would stand for it, is somebody else's"))),
    }
    directory.write(&list, text.as_bytes(), found.mode())?;
    Ok(Extension::Written)
}

/// Takes the entry out of every file that has it, also of such as no runtime reads: CNIs put each other's files aside
/// under other names and bring them back. Returns the names of the files that were changed, and what went wrong.
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
        // What runtimes cannot read, they cannot find an entry in.
        let Ok(Some(found)) = directory.read(name) else { return Ok(false) };
        let Ok(text) = found.text() else { return Ok(false) };
        let network = match Network::read(text, Kind::of(name).unwrap_or(Kind::List)) {
            Ok(network) => network,
            Err(e) if Kind::of(name).is_some() && text.contains(super::network::PLUGIN) => {
                return Err(anyhow!(e)).context("the entry must be taken out by hand");
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
            return Err(anyhow!("it is a link, and was not extended by egretd; take the entry out by hand"));
        }
        if directory.replace(name, &found, network.without_entry().as_bytes())? {
            return Ok(true);
        }
    }
    Err(anyhow!("it is being written by somebody else without pause; try again"))
}
