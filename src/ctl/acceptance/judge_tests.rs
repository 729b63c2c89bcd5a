use super::*;

const TCP4: Series = Series { method: ProbeMethod::Tcp, ipv6: false };
const TCP6: Series = Series { method: ProbeMethod::Tcp, ipv6: true };
const HELD4: Series = Series { method: ProbeMethod::Held, ipv6: false };

fn pair(v4: &str, v6: &str) -> AddressPair {
    AddressPair { ipv4: v4.parse().ok(), ipv6: v6.parse().ok() }
}

fn egress() -> AddressPair {
    pair("192.0.2.50", "2001:db8::50")
}

/// A pod whose answers came one after the other, 100 ms apart; `-` is none.
fn pod(series: Series, answers: &[&str]) -> PodAnswers {
    let answer = |(n, text): (usize, &&str)| ProbeRecord {
        at: 100 * n as u64,
        took: 5,
        method: series.method,
        ipv6: series.ipv6,
        resent: 0,
        saw: text.parse().ok(),
        error: text.parse::<IpAddr>().is_err().then(|| "no answer".to_owned()),
    };
    PodAnswers { node: "n1".to_owned(), answers: answers.iter().enumerate().map(answer).collect() }
}

fn told(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(|fault| fault.told(|ip| ip.to_string())).collect()
}

#[test]
fn a_new_pod_has_the_egress_ip_from_its_first_packet_on() {
    let good = pod(TCP4, &["192.0.2.50", "192.0.2.50"]);
    assert_eq!(new_pods(&[good], &[TCP4], &egress()), (vec![], 5));
    let leaked = new_pods(&[pod(TCP4, &["192.0.2.11", "192.0.2.50", "192.0.2.50"])], &[TCP4], &egress()).0;
    assert_eq!(told(&leaked), ["a pod on n1 was seen with 192.0.2.11; later packets have the right one (IPv4, TCP)"]);
    let past = new_pods(&[pod(TCP4, &["192.0.2.11", "192.0.2.11"])], &[TCP4], &egress()).0;
    assert_eq!(told(&past), ["a pod on n1 was seen with 192.0.2.11 (IPv4, TCP)"]);
    let lost = new_pods(&[pod(TCP4, &["-", "192.0.2.50"])], &[TCP4], &egress()).0;
    assert!(told(&lost)[0].starts_with("the first packets of a pod on n1 had no answer"), "{lost:?}");
    let mut slow = pod(TCP4, &["192.0.2.50"]);
    slow.answers[0].took = 1020;
    // A machine that is slow loses nothing.
    assert_eq!(new_pods(std::slice::from_ref(&slow), &[TCP4], &egress()), (vec![], 1020));
    slow.answers[0].resent = 1;
    assert!(matches!(new_pods(&[slow], &[TCP4], &egress()).0[..], [Fault::Slow { took: 1020, .. }]));
}

#[test]
fn the_worst_fault_comes_first_and_families_are_judged_apart() {
    let heard = [pod(TCP4, &["-", "-"]), pod(TCP6, &["2001:db8::11"])];
    let faults = new_pods(&heard, &[TCP4, TCP6], &egress()).0;
    assert_eq!(
        told(&faults),
        ["a pod on n1 was seen with 2001:db8::11 (IPv6, TCP)", "a pod on n1 has no answer (IPv4, TCP: no answer)"]
    );
    // A family that the egress IP lacks leaves from nowhere.
    let only4 = pair("192.0.2.50", "");
    let heard = [pod(TCP6, &["2001:db8::50"])];
    assert!(matches!(new_pods(&heard, &[TCP6], &only4).0[..], [Fault::Elsewhere { .. }]));
}

#[test]
fn a_running_pod_may_pause_but_not_be_seen_elsewhere_and_its_connection_lives_on() {
    let (a, b) = (egress(), pair("192.0.2.51", "2001:db8::51"));
    let changed = [pod(TCP4, &["192.0.2.50", "-", "192.0.2.51"])];
    assert_eq!(running_pods(&changed, &[TCP4], &[a.clone(), b.clone()], true), []);
    assert!(matches!(running_pods(&changed, &[TCP4], std::slice::from_ref(&a), true)[..], [Fault::Elsewhere { .. }]));
    let ended = [pod(HELD4, &["192.0.2.50", "-", "192.0.2.50"])];
    assert!(matches!(running_pods(&ended, &[HELD4], std::slice::from_ref(&a), true)[..], [Fault::Ended { .. }]));
    assert_eq!(running_pods(&ended, &[HELD4], std::slice::from_ref(&a), false), []);
}

#[test]
fn an_unselected_pod_never_has_the_egress_ip_and_a_blocked_one_no_answer() {
    let untouched = [pod(TCP4, &["192.0.2.11", "192.0.2.11"])];
    assert_eq!(unselected_pods(&untouched, &[TCP4], &[egress()]), []);
    let touched = [pod(TCP4, &["192.0.2.11", "192.0.2.50"])];
    assert!(matches!(unselected_pods(&touched, &[TCP4], &[egress()])[..], [Fault::Elsewhere { .. }]));
    assert!(matches!(
        unselected_pods(&[pod(TCP4, &["192.0.2.11", "-", "-"])], &[TCP4], &[egress()])[..],
        [Fault::NoAnswer { right_later: false, .. }]
    ));
    assert_eq!(unselected_pods(&[pod(TCP4, &["192.0.2.11", "-", "192.0.2.11"])], &[TCP4], &[egress()]), []);
    assert_eq!(blocked_pods(&[pod(TCP4, &["-", "-"])], &[TCP4]), []);
    assert!(matches!(blocked_pods(&untouched, &[TCP4])[..], [Fault::Elsewhere { .. }]));
}

#[test]
fn a_change_has_arrived_after_three_right_answers_of_every_series() {
    let is_b = |ip: IpAddr, _| ip.to_string() == "192.0.2.51";
    let heard = |answers: &[&str]| [pod(TCP4, answers)];
    assert!(have_settled(&heard(&["192.0.2.50", "192.0.2.51", "192.0.2.51", "192.0.2.51"]), &[TCP4], is_b));
    assert!(!have_settled(&heard(&["192.0.2.51", "-", "192.0.2.51", "192.0.2.51"]), &[TCP4], is_b));
    assert!(!have_settled(&heard(&["192.0.2.51", "192.0.2.51"]), &[TCP4], is_b));
    assert_eq!(unsettled(&heard(&["192.0.2.50", "192.0.2.51"]), &[TCP4], is_b), None);
    let late = unsettled(&heard(&["192.0.2.51", "192.0.2.50"]), &[TCP4], is_b);
    assert!(matches!(late, Some(Fault::Elsewhere { .. })), "{late:?}");
    let silent = unsettled(&heard(&["192.0.2.51", "-"]), &[TCP4], is_b);
    assert!(matches!(silent, Some(Fault::NoAnswer { right_later: false, .. })), "{silent:?}");
    let nothing = unsettled(&heard(&[]), &[TCP4], is_b);
    assert!(matches!(nothing, Some(Fault::NoAnswer { right_later: false, .. })), "{nothing:?}");
    assert_eq!(longest_pause(&heard(&["192.0.2.50", "-", "-", "192.0.2.51", "192.0.2.51"]), &[TCP4]), 300);
}
