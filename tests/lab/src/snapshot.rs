//! Texts that users read, kept as files in `tests/snapshots`: what a change does to them shows in its diff.
//! `make snapshots` writes them anew.

use super::places;
use std::{env, fs};

/// With this variable set, a snapshot is written and not compared.
const WRITE: &str = "EGRET_WRITE_SNAPSHOTS";

/// Compares a text with the one that is kept in `tests/snapshots` under this name. Panics if it is another one.
#[track_caller]
pub fn assert(name: &str, text: &str) {
    let path = places::repository().join("tests/snapshots").join(name);
    if env::var_os(WRITE).is_some() {
        return fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let difference = super::kernel::difference(&lines(&kept), &lines(text));
    assert!(kept == text, "not as in {}, which `make snapshots` writes anew:\n{difference}", path.display());
}

/// The text with `TIME` for each time of day as Kubernetes writes them, RFC 3339: `2026-11-30T05:06:07.123456Z`.
pub fn without_times(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(length) = time_at(rest) {
            out += "TIME";
            rest = &rest[length..];
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// The length of the time that the text begins with.
fn time_at(text: &str) -> Option<usize> {
    let shape = "dddd-dd-ddTdd:dd:dd";
    let fits = |(wanted, found): (char, char)| if wanted == 'd' { found.is_ascii_digit() } else { wanted == found };
    let begin = text.get(..shape.len())?;
    if !shape.chars().zip(begin.chars()).all(fits) {
        return None;
    }
    let more = text[shape.len()..].find(|c: char| c != '.' && !c.is_ascii_digit())?;
    let end = shape.len() + more;
    text[end..].starts_with('Z').then_some(end + 1)
}
