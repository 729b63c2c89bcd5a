//! `egretd node --assign-hook`: an egress IP is used after the hook has brought it to the node. Needs root.

use lab::assign_hook::{AssignHook, Mode};
use lab::fault_injection::{all_of, answered_after, cordoned, cut, holders, owner_and_other, wait_holder};
use lab::scene::assert_leaves_by_egress;
use lab::survival::{assert_live, sessions};
use lab::{EGRESS4, EGRESS6, Lab, Pod, VISITOR};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const ADDRESSES: [&str; 2] = ["192.0.2.50", "2001:db8::50"];

/// The scene, whose nodes ask a hook on a Unix socket.
fn lab() -> (Lab, AssignHook) {
    let hook = AssignHook::on_socket();
    let lab = Lab::builder().node_arguments(&["--assign-hook", &hook.target()]).scene();
    (lab, hook)
}

/// Counts the packets with the egress IP that a node sends into the network.
fn count_from(lab: &Lab, node: &str) {
    lab.host("fab").nft(&format!(
        "table bridge counted {{
           chain pass {{ type filter hook prerouting priority -301;
             iifname \"p-{node}\" ip saddr {EGRESS4} counter
             iifname \"p-{node}\" ip6 saddr {EGRESS6} counter
           }}
         }}"
    ));
}

fn counted(lab: &Lab) -> u64 {
    lab.host("fab").counted("bridge", "counted")
}

/// When the hook had brought both addresses to the node.
fn assigned(hook: &AssignHook, node: &str) -> Option<Instant> {
    let done = |address| hook.asked().iter().find(|a| a.is("assign", address) && a.node == node).and_then(|a| a.done);
    ADDRESSES.map(done).into_iter().collect::<Option<Vec<_>>>()?.into_iter().max()
}

fn pods(lab: &Lab, nodes: &[&str]) -> Vec<Pod> {
    nodes.iter().map(|node| lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR)).collect()
}

#[test]
fn an_egress_ip_is_assigned_before_it_is_used_and_released_after_a_planned_move() {
    let (lab, hook) = lab();
    let (owner, other) = owner_and_other(&lab);
    assert!(assigned(&hook, &owner).is_some(), "{:?}", hook.asked());
    let asked = hook.asked().into_iter().find(|a| a.is("assign", ADDRESSES[0])).expect("a request");
    assert_eq!((&asked.body["gateway"], &asked.body["interface"]), (&"default".into(), &"eth0".into()));
    let link = lab.node(&owner).ip("-o link show dev eth0");
    assert!(link.contains(asked.body["mac"].as_str().expect("a MAC address")), "{link}: {asked:?}");

    let pods = pods(&lab, &["n1", "n2", &owner, &other]);
    pods.iter().for_each(assert_leaves_by_egress);
    let going_on = sessions(&pods);
    hook.forget();
    hook.set(Mode::Does(Duration::from_secs(2)));
    count_from(&lab, &other);
    let begin = Instant::now();
    cordoned(&lab, &owner, true);
    while assigned(&hook, &other).is_none() {
        assert!(begin.elapsed() < PATIENCE, "{:?}", hook.asked());
        let (held, sent) = (holders(&lab), counted(&lab));
        if assigned(&hook, &other).is_none() {
            assert_eq!((held, sent), (vec![owner.clone()], 0), "after {:?}", begin.elapsed());
        }
        thread::sleep(Duration::from_millis(20));
    }
    wait_holder(&lab, &other);
    lab.wait_until("it is released", PATIENCE, || {
        let released =
            |address| hook.asked().iter().any(|a| a.is("release", address) && a.node == owner && a.done.is_some());
        ADDRESSES.iter().all(|address| released(address))
    });
    assert_live("planned move", going_on);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
    assert!(hook.asked().iter().all(|a| a.body["action"] != "release" || a.node == owner), "{:?}", hook.asked());
}

#[test]
fn a_takeover_waits_for_the_hook_and_sends_nothing_meanwhile() {
    let (lab, hook) = lab();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", "n2"]);
    let going_on = sessions(&pods);
    hook.set(Mode::Does(Duration::from_secs(3)));
    hook.forget();
    count_from(&lab, &other);
    cut(&lab, &all_of(&owner));
    let begin = Instant::now();
    while assigned(&hook, &other).is_none() {
        assert!(begin.elapsed() < PATIENCE, "{:?}", hook.asked());
        let sent = counted(&lab);
        assert!(sent == 0 || assigned(&hook, &other).is_some(), "{sent} packets after {:?}", begin.elapsed());
        thread::sleep(Duration::from_millis(20));
    }
    let gap = answered_after(&pods[0], begin);
    println!("with a hook of 3 s: answered after {gap:?}");
    assert!(gap >= Duration::from_secs(3), "{gap:?}");
    lab.wait_until("it is on the other one", PATIENCE, || holders(&lab).contains(&other));
    thread::sleep(Duration::from_secs(2));
    assert_live("takeover", going_on);
    lab.assert_nothing_leaked();
}

#[test]
fn a_hook_that_refuses_hangs_or_dies_blocks_is_told_of_and_is_asked_again() {
    let (lab, hook) = lab();
    let (owner, other) = owner_and_other(&lab);
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let requests = |outcome: &str| {
        lab.metrics(&other).get("egret_node_assign_hook_requests_total", &[("action", "assign"), ("outcome", outcome)])
    };
    hook.set(Mode::Refuses("this machine has no room for a further address".to_owned()));
    cut(&lab, &all_of(&owner));
    lab.wait_until("it is refused", PATIENCE, || requests("refused").is_some_and(|n| n >= 2.0));
    let status = || lab.manifests().statuses();
    lab.wait_until("the statuses say so", PATIENCE, || {
        let text = status();
        text.contains("no room for a further address") && text.contains("192.0.2.50")
    });
    lab.forget_wire();
    assert!(pod.udp_who(lab::EXT4).is_err() && pod.udp_who(lab::EXT6).is_err());
    lab.assert_nothing_arrives();
    hook.set(Mode::Dies);
    lab.wait_until("it gets no answer", PATIENCE, || requests("no_answer").is_some_and(|n| n >= 1.0));
    assert!(!holders(&lab).contains(&other));
    hook.set(Mode::Hangs);
    hook.forget();
    lab.wait_until("it is asked again", 2 * PATIENCE, || !hook.asked().is_empty());
    let before = requests("no_answer").unwrap_or_default();
    lab.wait_until("the time for an answer is over", 2 * PATIENCE, || {
        requests("no_answer").is_some_and(|n| n > before)
    });
    assert!(!holders(&lab).contains(&other));
    hook.set(Mode::Does(Duration::ZERO));
    lab.wait_until("it is on the other one", 2 * PATIENCE, || holders(&lab).contains(&other));
    lab.wait_seen_as(&pod, EGRESS4);
    lab.wait_seen_as(&pod, EGRESS6);
    lab.wait_until("nothing is refused any more", PATIENCE, || !status().contains("no room for a further address"));
    lab.assert_nothing_leaked();
}

#[test]
fn a_restarted_daemon_confirms_what_it_holds_and_keeps_it_whatever_the_hook_says() {
    let (lab, hook) = lab();
    let (owner, _) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", "n2", &owner]);
    let going_on = sessions(&pods);
    hook.set(Mode::Refuses("not now".to_owned()));
    hook.forget();
    lab.daemon(&owner).restart();
    lab.wait_ready(&owner);
    lab.wait_until("it asks", PATIENCE, || {
        hook.asked().iter().any(|a| a.is("assign", ADDRESSES[0]) && a.node == owner)
    });
    thread::sleep(Duration::from_secs(3));
    assert_eq!(holders(&lab), [owner.as_str()]);
    assert_live("restart", going_on);
    pods.iter().for_each(assert_leaves_by_egress);
    lab.assert_nothing_leaked();
}

#[test]
fn a_hook_can_be_a_server_in_the_network() {
    let lab = Lab::builder().node_arguments(&["--assign-hook", "http://192.0.2.100:9555/egress?of=lab"]).build();
    let hook = AssignHook::on_port(lab.host("ext"), 9555);
    let lab = lab.with_scene();
    let (owner, _) = owner_and_other(&lab);
    assert!(assigned(&hook, &owner).is_some(), "{:?}", hook.asked());
}

/// Runs an example with a request, where other programs stand for `curl` and `aws`; its answer, and how they were called.
fn example(name: &str, action: &str, address: &str) -> (String, String) {
    let directory =
        std::env::temp_dir().join(format!("egret-example-{}-{name}-{action}-{}", std::process::id(), address.len()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let log = directory.join("log");
    for (program, text) in [("curl", CURL), ("aws", AWS)] {
        let file = directory.join(program);
        std::fs::write(&file, format!("#!/bin/sh\necho \"{program} $*\" >>{}\n{text}", log.display()))
            .expect("a program");
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    }
    let body = format!(
        "{{\"action\": \"{action}\", \"address\": \"{address}\", \"node\": \"g1\", \"mac\": \"02:00:00:00:00:07\"}}"
    );
    let path = format!("{}:{}", directory.display(), std::env::var("PATH").unwrap_or_default());
    let script = format!("{}/install/assign-hook/{name}.sh", env!("CARGO_MANIFEST_DIR"));
    let mut command = std::process::Command::new("bash");
    command.arg(script).env("PATH", path).env("HCLOUD_TOKEN", "secret");
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("bash");
    let request = format!("POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), request.as_bytes()).expect("a request");
    let out = child.wait_with_output().expect("an end");
    let calls = std::fs::read_to_string(&log).unwrap_or_default();
    let _ = std::fs::remove_dir_all(&directory);
    (String::from_utf8_lossy(&out.stdout).into_owned(), calls)
}

const CURL: &str = r#"case "$*" in
*instance-id*) echo 77 ;;
*floating_ips\?*) echo '{"floating_ips":[{"id":5,"ip":"192.0.2.50","type":"ipv4","server":12},{"id":6,"ip":"2001:db8:0:1::","type":"ipv6","server":null}]}' ;;
*floating_ips/5/*) echo '{"action":{"id":9}}' ;;
*floating_ips/6/*) echo '{"action":{"id":8}}' ;;
*actions/9*) echo '{"action":{"status":"success"}}' ;;
*actions/8*) echo '{"action":{"status":"error","error":{"message":"the server is locked"}}}' ;;
*api/token*) echo token ;;
*macs/02:00:00:00:00:07/interface-id*) echo eni-1 ;;
esac
"#;
const AWS: &str = r#"case "$*" in
*describe*) echo eni-2 ;;
*192.0.2.51*) echo "no more addresses for this type"; exit 1 ;;
esac
"#;

#[test]
fn the_example_hooks_ask_their_clouds_and_pass_their_refusals_on() {
    let (answer, calls) = example("hetzner", "assign", "192.0.2.50");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(
        calls.contains("floating_ips/5/actions/assign -d {\"server\": 77}") && calls.contains("actions/9"),
        "{calls}"
    );
    let (answer, _) = example("hetzner", "assign", "2001:db8:0:1::7");
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.ends_with("the server is locked"), "{answer}");
    let (answer, _) = example("hetzner", "assign", "198.51.100.7");
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("198.51.100.7"), "{answer}");
    let (answer, calls) = example("hetzner", "release", "192.0.2.50");
    assert!(answer.starts_with("HTTP/1.1 200 ") && calls.is_empty(), "{answer} {calls}");

    let (answer, calls) = example("aws", "assign", "192.0.2.50");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(calls.contains("assign-private-ip-addresses --allow-reassignment --network-interface-id eni-1"), "{calls}");
    let (answer, calls) = example("aws", "assign", "2001:db8::7");
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let taken =
        calls.find("unassign-ipv6-addresses --network-interface-id eni-2").expect("it is taken off the other one");
    let given = calls.find("assign-ipv6-addresses --network-interface-id eni-1").expect("it is given to this one");
    assert!(taken < given, "{calls}");
    let (answer, _) = example("aws", "assign", "192.0.2.51");
    assert!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("no more addresses"), "{answer}");
    let (answer, calls) = example("aws", "release", "192.0.2.51");
    assert!(answer.starts_with("HTTP/1.1 200 ") && calls.contains("unassign-private-ip-addresses"), "{answer} {calls}");
}
