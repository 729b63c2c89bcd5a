//! `egretd check`: whether this kernel and this host have what Egret needs, one line a need.
//!
//! What the kernel can do is tried, in a network namespace that is made for it and goes with it. The host's own
//! settings are only read.

mod host;
mod links;
mod nf_tables;
mod others;
mod trial;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// Something that Egret needs, or is better with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// What it is.
    pub name: &'static str,
    /// Whether it is there.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do, and what it is for; empty if nothing is to be done.
    pub remedy: String,
}

/// Whether a need is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It is.
    Ok,
    /// It is not, and part of Egret works less well or not at all.
    Warn,
    /// It is not, and Egret cannot work.
    Missing,
}

impl Need {
    fn ok(name: &'static str, found: impl ToString) -> Self {
        Need { name, state: State::Ok, found: found.to_string(), remedy: String::new() }
    }

    fn warn(name: &'static str, found: impl ToString, remedy: impl ToString) -> Self {
        Need { name, state: State::Warn, found: found.to_string(), remedy: remedy.to_string() }
    }

    fn missing(name: &'static str, found: impl ToString, remedy: impl ToString) -> Self {
        Need { name, state: State::Missing, found: found.to_string(), remedy: remedy.to_string() }
    }

    /// From trying it: what it is when it is there, and what to do when it is not.
    fn tried<E: fmt::Display>(name: &'static str, result: Result<(), E>, there: &str, remedy: &str) -> Self {
        match result {
            Ok(()) => Need::ok(name, there),
            Err(e) => Need::missing(name, format!("the kernel says: {e}"), remedy),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Ok => "ok",
            State::Warn => "warn",
            State::Missing => "MISSING",
        };
        write!(f, "{state:<8}{:<22}{}", self.name, self.found)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// Everything that Egret needs, with what there is of it.
pub fn check() -> Vec<Need> {
    let mut all = host::kernel();
    all.extend(trial::run());
    all.extend(host::settings());
    all.extend(others::read());
    all
}

/// Prints a line for each need. Fails if one is missing without which Egret cannot work.
pub fn run() -> ExitCode {
    let needs = check();
    let mut out = std::io::stdout().lock();
    for need in &needs {
        // Who does not listen any more still gets the exit code.
        let _ = writeln!(out, "{need}");
    }
    match needs.iter().any(|n| n.state == State::Missing) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_need_is_one_line() {
        let line = Need::tried("VXLAN", Err("no such device"), "with GBP", "build it").to_string();
        assert_eq!(line, "MISSING VXLAN                 the kernel says: no such device; build it");
        assert_eq!(Need::ok("kernel", "6.18").to_string(), "ok      kernel                6.18");
    }

    mod needs_root {
        use super::*;

        /// Where these tests run, Egret's others run too: all that is needed is there. And it leaves nothing behind.
        #[test]
        fn this_machine_is_fit_and_stays_as_it_is() {
            let interfaces = || {
                let mut all: Vec<_> =
                    std::fs::read_dir("/sys/class/net").unwrap().map(|e| e.unwrap().file_name()).collect();
                all.sort();
                all
            };
            let own = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
            let before = (interfaces(), own());
            let needs = check();
            needs.iter().for_each(|n| println!("{n}"));
            assert!(needs.iter().all(|n| n.state != State::Missing));
            assert_eq!((interfaces(), own()), before);
        }
    }
}
