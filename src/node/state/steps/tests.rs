use super::*;
use std::collections::BTreeMap;

const INPUTS: [Input; 11] = [
    Input::Pass,
    Input::Cluster,
    Input::PodAddresses,
    Input::Liveness,
    Input::PeerReturned,
    Input::Host,
    Input::PluginRecords,
    Input::Facts,
    Input::Coming,
    Input::Addresses,
    Input::NeverInSync,
];

#[test]
fn each_step_stands_once_and_below_those_that_it_needs() {
    let mut above = BTreeSet::new();
    for row in &STEPS {
        for need in row.needs {
            assert!(above.contains(need), "{:?} needs {need:?}", row.step);
        }
        assert!(above.insert(row.step), "{:?} stands twice", row.step);
        assert!(!row.on.is_empty() && !row.applies.is_empty(), "{:?}", row.step);
    }
}

#[test]
fn each_input_that_a_step_raises_makes_another_step_pending() {
    for row in &STEPS {
        for input in row.raises {
            assert!(on(*input).any(|step| step != row.step), "{:?} raises {input:?}", row.step);
        }
    }
    for input in INPUTS {
        assert!(on(input).next().is_some(), "no step runs on {input:?}");
    }
}

/// A pass ends because no step makes itself pending, not even by way of others.
#[test]
fn no_step_raises_its_own_inputs() {
    let raised: BTreeMap<Step, BTreeSet<Step>> =
        STEPS.iter().map(|row| (row.step, row.raises.iter().flat_map(|input| on(*input)).collect())).collect();
    for row in &STEPS {
        let (mut reached, mut open) = (BTreeSet::new(), vec![row.step]);
        while let Some(step) = open.pop() {
            open.extend(raised[&step].iter().filter(|next| reached.insert(**next)));
        }
        assert!(!reached.contains(&row.step), "{:?}", row.step);
    }
}

/// Runs a pass in which each step raises all that it may, and those of `failing` fail.
fn run(pending: &mut Pending, failing: &[Step]) -> Vec<Step> {
    let mut ran = Vec::new();
    pending.begin();
    while let Some(step) = pending.next() {
        let failed = failing.contains(&step);
        if !failed {
            let raises = STEPS.iter().find(|row| row.step == step).map_or(&[][..], |row| row.raises);
            raises.iter().for_each(|input| pending.raise(*input));
        }
        pending.end_step(!failed);
        ran.push(step);
        assert!(ran.len() < 1000, "{ran:?}");
    }
    pending.end();
    ran
}

#[test]
fn a_pass_ends_whatever_its_steps_observe() {
    for input in INPUTS {
        let mut pending = Pending::default();
        pending.raise(input);
        let ran = run(&mut pending, &[]);
        assert_eq!(pending.rows().count(), 0);
        let most = STEPS.iter().map(|row| ran.iter().filter(|step| **step == row.step).count()).max();
        assert!(most <= Some(4), "{ran:?}");
    }
}

#[test]
fn after_a_failure_the_steps_run_that_do_not_need_it_and_all_of_its_inputs_are_tried_again() {
    let mut pending = Pending::default();
    pending.raise(Input::Host);
    let ran = run(&mut pending, &[Step::Routing]);
    assert!(ran.contains(&Step::Addresses) && ran.contains(&Step::Tables) && ran.contains(&Step::Detached));
    assert!(!ran.contains(&Step::FirstOfflinePolicies));
    assert!(run(&mut pending, &[]).contains(&Step::Tunnel));

    pending.raise(Input::Host);
    let ran = run(&mut pending, &[Step::Tunnel]);
    assert!(!ran.contains(&Step::Tables) && !ran.contains(&Step::EndedConnections));
    let ran = run(&mut pending, &[]);
    assert!(ran.contains(&Step::Tables) && ran.contains(&Step::FirstOfflinePolicies));
}

#[test]
fn a_pass_without_a_change_looks_at_the_tables_alone() {
    let mut pending = Pending::default();
    pending.begin();
    let mut ran = Vec::new();
    while let Some(step) = pending.next() {
        pending.end_step(true);
        ran.push(step);
    }
    assert_eq!(
        ran,
        [Step::OfflinePolicies, Step::Tables, Step::TunnelEntrance, Step::EndedConnections, Step::Detached]
    );
}
