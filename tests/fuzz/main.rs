//! `make fuzz`: pods, policies, deaths, damage and other people's rule changes at random, with traffic from every
//! pod; and outside an observer who knows which source each packet may have.
//!
//! - `SECONDS=180`: how long. A sequence that has begun is ended, so it takes some seconds more.
//! - `SEED=1`: the first sequence's seed; the next one's is one more. The same seed is the same sequence.
//! - `SEQUENCE='add p0 n1 a; …'`: this one instead, as a found one is printed.
//! - `SHRINK=600`: how many seconds a found sequence may be shrunk for; 0: not at all.
//!
//! The program itself reads them with `FUZZ_` before them: shells have a use of their own for `SECONDS`.
//!
//! What the model takes for right stands in `model.rs` and `timeline.rs`, what can happen in `step.rs`. What
//! docs/limits.md says is open is allowed: a node whose tables somebody flushed, until its daemon has run for some
//! seconds again; flows that are older than their policy; a pod of which neither the object nor the record is left.

mod capture;
mod cluster;
mod generate;
mod model;
mod random;
mod shrink;
mod step;
mod timeline;
mod traffic;
mod verdict;

use std::env;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use step::Step;
use verdict::Fault;

fn main() -> ExitCode {
    match fuzz() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was found.
fn fuzz() -> Result<bool, String> {
    let time = Duration::from_secs(setting("FUZZ_SECONDS", 180)?);
    let shrink = Duration::from_secs(setting("FUZZ_SHRINK", 600)?);
    if let Some(text) = env::var("FUZZ_SEQUENCE").ok().filter(|text| !text.trim().is_empty()) {
        let steps = step::read(&text).map_err(|e| format!("FUZZ_SEQUENCE: {e}"))?;
        return Ok(one("the sequence", &steps, Duration::ZERO));
    }
    let begin = Instant::now();
    let mut seed = setting("FUZZ_SEED", 1)?;
    while begin.elapsed() < time {
        let steps = generate::sequence(seed);
        if step::read(&step::written(&steps)) != Ok(steps.clone()) {
            return Err(format!("seed {seed}: what is written is not what is read"));
        }
        if !one(&format!("seed {seed}"), &steps, shrink) {
            return Ok(false);
        }
        seed += 1;
    }
    Ok(true)
}

fn setting(name: &str, default: u64) -> Result<u64, String> {
    match env::var(name) {
        Ok(text) if !text.is_empty() => text.parse().map_err(|_| format!("{name}={text}: it must be a number")),
        _ => Ok(default),
    }
}

/// Runs one; whether nothing was found.
fn one(name: &str, steps: &[Step], shrink: Duration) -> bool {
    let begin = Instant::now();
    let outcome = verdict::run(steps);
    let packets = format!("{} packets ({} held to an egress IP)", outcome.packets, outcome.held);
    let (count, took) = (steps.len(), begin.elapsed().as_secs_f32());
    let Some(fault) = outcome.faults.first() else {
        println!("{name}: {count} steps, {packets}, {took:.1} s: as promised");
        return true;
    };
    println!("{name}: {count} steps, {packets}, {took:.1} s: NOT as promised");
    outcome.faults.iter().for_each(|fault| println!("  {fault}"));
    if let Some(logs) = &outcome.logs {
        println!("  logs: {}", logs.display());
    }
    let shortest = if shrink.is_zero() { steps.to_vec() } else { shrunk(steps, fault, shrink) };
    println!("To run it again:\n\nmake fuzz SEQUENCE='{}'\n", step::written(&shortest));
    false
}

fn shrunk(steps: &[Step], fault: &Fault, time: Duration) -> Vec<Step> {
    println!("Shrinking it, {} s at most.", time.as_secs());
    shrink::shrink(steps, fault.kind, time, 2)
}
