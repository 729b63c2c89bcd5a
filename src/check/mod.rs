//! `egretd check`: whether this kernel and this host have what Egret needs, one line a requirement.
//!
//! The kernel's features are tried in a temporary network namespace. The host's own settings are only read.

mod fast_path;
mod host;
mod links;
mod nf_tables;
mod others;
mod trial;

pub use host::KERNEL;

use egret_nft::Nftables;
use egret_nft::netlink::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// One requirement, or recommendation, and what the host has of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Name of the requirement.
    pub name: &'static str,
    /// Whether it is met.
    pub state: NeedState,
    /// What the host has.
    pub found: String,
    /// What to do, and why; empty if there is nothing to do.
    pub remedy: String,
}

/// Whether a requirement is met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NeedState {
    /// Met.
    Ok,
    /// Not met, and a part of Egret works less well or not at all.
    Warn,
    /// Not met, and Egret cannot work.
    Missing,
}

impl Need {
    fn ok(name: &'static str, found: impl ToString) -> Self {
        Need { name, state: NeedState::Ok, found: found.to_string(), remedy: String::new() }
    }

    fn warn(name: &'static str, found: impl ToString, remedy: impl ToString) -> Self {
        Need { name, state: NeedState::Warn, found: found.to_string(), remedy: remedy.to_string() }
    }

    fn missing(name: &'static str, found: impl ToString, remedy: impl ToString) -> Self {
        Need { name, state: NeedState::Missing, found: found.to_string(), remedy: remedy.to_string() }
    }

    /// From a trial's result: `there` describes the feature if it works, `remedy` says what to do if it fails.
    fn tried<E: fmt::Display>(name: &'static str, result: Result<(), E>, there: &str, remedy: &str) -> Self {
        match result {
            Ok(()) => Need::ok(name, there),
            Err(e) => Need::missing(name, format!("error: {e}"), remedy),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            NeedState::Ok => "ok",
            NeedState::Warn => "warn",
            NeedState::Missing => "MISSING",
        };
        write!(f, "{state:<8}{:<22}{}", self.name, self.found)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// A part of the datapath that a kernel can refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The tunnel device.
    Tunnel,
    /// The pair of veths before the tunnel device.
    TunnelVeths,
    /// Routing rules and tables of IPv4.
    RoutingIpv4,
    /// Routing rules and tables of IPv6.
    RoutingIpv6,
    /// The nftables tables.
    Tables,
}

/// The words of this check for a part that the kernel has refused with `error`: what it lacks, and the remedy. Empty if
/// every trial of the part passes.
pub fn lacking(part: Part, error: &str) -> String {
    let needs = match part {
        Part::Tunnel => vec![links::tunnel(Err(error))],
        Part::TunnelVeths => vec![links::veth(Err(error))],
        Part::RoutingIpv4 => vec![links::ipv4(Err(error))],
        Part::RoutingIpv6 => vec![links::ipv6(Err(error))],
        Part::Tables => nf_tables::lacking(),
    };
    let words = needs.iter().map(|need| format!("{}: {}; {}", need.name, need.found, need.remedy));
    words.collect::<Vec<_>>().join(". ")
}

/// Whether devices have an egress hook, by a trial that makes nothing.
///
/// # Errors
/// The trial failed for another reason than a lack of the hook.
pub fn has_egress_hook(nft: &mut Nftables) -> Result<bool, Error> {
    nf_tables::has_egress_hook(nft)
}

/// Checks all requirements.
pub fn check() -> Vec<Need> {
    let mut all = host::kernel();
    all.extend(trial::run());
    all.extend(host::settings());
    all.extend(others::read());
    all.push(fast_path::read());
    all
}

/// Prints a line for each requirement. Fails if Egret cannot work without one that is missing.
pub fn run() -> ExitCode {
    let needs = check();
    let mut out = std::io::stdout().lock();
    for need in &needs {
        // The exit code counts even if the reader has closed the pipe.
        let _ = writeln!(out, "{need}");
    }
    match needs.iter().any(|n| n.state == NeedState::Missing) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirement_is_one_line() {
        let line = Need::tried("VXLAN", Err("no such device"), "with GBP", "build it").to_string();
        assert_eq!(line, "MISSING VXLAN                 error: no such device; build it");
        assert_eq!(Need::ok("kernel", "6.18").to_string(), "ok      kernel                6.18");
    }

    mod needs_root {
        use super::*;

        /// Egret's other tests run here too, so all requirements are met. The check must leave nothing behind.
        #[test]
        fn this_machine_meets_all_requirements_and_is_unchanged() {
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
            assert!(needs.iter().all(|n| n.state != NeedState::Missing));
            assert_eq!((interfaces(), own()), before);
        }
    }
}
