use super::*;
use std::collections::BTreeMap;
use std::time::Duration;

fn answer(now: Instant) -> ProbeReply {
    ProbeReply { address: [192, 0, 2, 50].into(), mac: [2, 0, 0, 0, 0, 9], by_node: false, first: now, last: now }
}

fn states(now: Instant) -> [EgressIpState; 8] {
    let relinquished = |answer| EgressIpState::Relinquished { since: 1, at: now, answer };
    [
        EgressIpState::Standby,
        EgressIpState::Conflict(answer(now)),
        EgressIpState::Owner,
        EgressIpState::TakenOver,
        EgressIpState::Contested(answer(now)),
        EgressIpState::InGracePeriod { until: now },
        relinquished(None),
        relinquished(Some(answer(now))),
    ]
}

fn causes(now: Instant) -> [(&'static str, Cause); 13] {
    [
        ("Ended", Cause::Ended),
        ("Reassigned", Cause::Reassigned),
        ("Absent", Cause::Absent),
        ("Answered", Cause::Answered(answer(now))),
        ("Contested", Cause::Contested(answer(now))),
        ("GivenUp assigned", Cause::GivenUp { since: Some(1), at: now }),
        ("GivenUp", Cause::GivenUp { since: None, at: now }),
        ("Taken", Cause::Taken),
        ("NotYet", Cause::NotYet),
        ("OwnerDead", Cause::OwnerDead),
        ("Kept", Cause::Kept),
        ("MovedAway", Cause::MovedAway { until: now + Duration::from_secs(1) }),
        ("Withdrawn", Cause::Withdrawn),
    ]
}

fn short(state: EgressIpState) -> &'static str {
    match state {
        EgressIpState::Relinquished { answer: Some(_), .. } => "Relinquished+answer",
        other => other.name(),
    }
}

/// One row for each cause: the states that it leads to, from the states in the order of [`states`].
const TABLE: [(&str, &str); 13] = [
    ("Ended", "Standby Standby Standby Standby Standby Standby Standby Standby"),
    ("Reassigned", "Standby Conflict Owner TakenOver Contested InGracePeriod Standby Conflict"),
    ("Absent", "Standby Conflict Owner TakenOver Conflict InGracePeriod Relinquished Relinquished+answer"),
    ("Answered", "Conflict Conflict Conflict Conflict Conflict Conflict Relinquished+answer Relinquished+answer"),
    (
        "Contested",
        "Contested Contested Contested Contested Contested Contested Relinquished+answer Relinquished+answer",
    ),
    (
        "GivenUp assigned",
        "Relinquished Relinquished+answer Relinquished Relinquished Relinquished+answer Relinquished Relinquished \
         Relinquished+answer",
    ),
    ("GivenUp", "Standby Conflict Standby Standby Contested Standby Relinquished Relinquished+answer"),
    ("Taken", "Owner Owner Owner TakenOver Owner Owner Owner Owner"),
    ("NotYet", "Standby Conflict Standby TakenOver Contested Standby Relinquished Relinquished+answer"),
    ("OwnerDead", "TakenOver Conflict TakenOver TakenOver Contested TakenOver Relinquished Relinquished+answer"),
    ("Kept", "Owner Owner Owner TakenOver Owner Owner Relinquished Relinquished"),
    (
        "MovedAway",
        "InGracePeriod InGracePeriod InGracePeriod InGracePeriod InGracePeriod InGracePeriod Relinquished Relinquished",
    ),
    ("Withdrawn", "Standby Standby Standby Standby Standby Standby Relinquished Relinquished"),
];

#[test]
fn each_cause_leads_from_each_state_where_the_table_says() {
    let now = Instant::now();
    for ((name, cause), (row, expected)) in causes(now).into_iter().zip(TABLE) {
        assert_eq!(name, row);
        let found: Vec<&str> = states(now).into_iter().map(|state| short(state.after(cause))).collect();
        assert_eq!(found.join(" "), expected, "after {name}");
    }
}

#[test]
fn each_state_can_be_reached_and_left() {
    let now = Instant::now();
    let mut next: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for state in states(now) {
        next.insert(short(state), causes(now).iter().map(|(_, cause)| short(state.after(*cause))).collect());
    }
    for from in states(now).map(short) {
        let (mut reached, mut open) = (BTreeSet::from([from]), vec![from]);
        while let Some(state) = open.pop() {
            open.extend(next[state].iter().filter(|to| reached.insert(to)));
        }
        assert_eq!(reached.len(), states(now).len(), "from {from}");
    }
}

#[test]
fn no_answer_of_another_host_makes_this_node_a_holder() {
    let now = Instant::now();
    for state in states(now) {
        for cause in [Cause::Answered(answer(now)), Cause::Contested(answer(now))] {
            let after = state.after(cause);
            assert!(
                after.answer().is_some() && !matches!(after, EgressIpState::Owner | EgressIpState::TakenOver),
                "{state:?}"
            );
        }
    }
}

#[test]
fn a_grace_period_is_not_prolonged_and_a_relinquishment_lasts_until_the_allocation_changes() {
    let now = Instant::now();
    let later = now + Duration::from_secs(5);
    let leaves = EgressIpState::Owner.after(Cause::MovedAway { until: now });
    assert_eq!(leaves.after(Cause::MovedAway { until: later }), leaves);
    let given_up = EgressIpState::Owner.after(Cause::GivenUp { since: Some(1), at: now });
    for (name, cause) in causes(now) {
        let stays = !matches!(cause, Cause::Ended | Cause::Reassigned | Cause::Taken);
        assert_eq!(matches!(given_up.after(cause), EgressIpState::Relinquished { .. }), stays, "after {name}");
    }
}
