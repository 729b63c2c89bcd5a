//! A shorter sequence that breaks the same promise: delta debugging (Zeller, Hildebrandt: Simplifying and isolating
//! failure-inducing input, 2002).

use super::step::Step;
use super::verdict;
use std::time::{Duration, Instant};

/// Leaves out what is not needed, as long as there is time. A race may need more than one try to show.
pub fn shrink(steps: &[Step], kind: &str, time: Duration, tries: usize) -> Vec<Step> {
    let begin = Instant::now();
    let mut steps = steps.to_vec();
    let mut size = steps.len().div_ceil(2);
    while size > 0 {
        let mut at = 0;
        let before = steps.len();
        while at < steps.len() {
            if begin.elapsed() > time {
                println!("  no more time to shrink");
                return steps;
            }
            let end = (at + size).min(steps.len());
            let fewer: Vec<Step> = steps[..at].iter().chain(&steps[end..]).copied().collect();
            let again = (0..tries).any(|_| verdict::run(&fewer).faults.iter().any(|fault| fault.kind == kind));
            if again {
                println!("  {} steps do as well", fewer.len());
                steps = fewer;
            } else {
                at = end;
            }
        }
        if size > 1 {
            size /= 2;
        } else if steps.len() == before {
            break;
        }
    }
    steps
}
