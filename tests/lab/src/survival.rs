//! Sessions that are to outlive what a test does to gateways.

use super::{Pod, SERVERS, Session, machine};
use std::net::IpAddr;
use std::time::Duration;

/// A session of each pod with the server, both ways, with a name for each.
pub fn sessions(pods: &[Pod]) -> Vec<(String, Session)> {
    sessions_with(pods, SERVERS)
}

/// A session of each pod with these servers.
pub fn sessions_with(pods: &[Pod], servers: [IpAddr; 2]) -> Vec<(String, Session)> {
    let open = |p: &Pod| servers.map(|s| (format!("{} to {s}", p.name), p.session(s).expect("a session")));
    pods.iter().flat_map(open).collect()
}

/// Panics if a session broke; prints how long each was silent, and returns the longest silence.
#[track_caller]
pub fn assert_live(what: &str, sessions: Vec<(String, Session)>) -> Duration {
    let mut longest = Duration::ZERO;
    let mut broken = Vec::new();
    for (name, session) in sessions {
        let report = session.stop();
        println!("{what}: {name}: silent for {:?} of {} rounds", report.longest_silence, report.rounds);
        longest = longest.max(report.longest_silence);
        if report.broken.is_some() {
            broken.push((name, report));
        }
    }
    assert!(broken.is_empty(), "{what}: {broken:#?}");
    longest
}

/// Panics if it took much longer than it should on a machine that does nothing else, in milliseconds. Machines are
/// shared: what is promised is for a measurement to show, and a test must not fail because a processor was busy, or
/// stood still.
#[track_caller]
pub fn assert_short(took: Duration, alone: u64) {
    let stall = machine::longest_stall();
    let allowed = Duration::from_millis(4 * alone + 500) + 4 * stall;
    println!("took {took:?}; allowed are {allowed:?}; no thread ran for {stall:?}");
    assert!(
        took < allowed,
        "{took:?}, and not {alone} ms, nor {allowed:?} on a busy machine that stood still for {stall:?}"
    );
}
