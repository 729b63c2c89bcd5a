//! Egret's reports: metrics, logs, `egretd check`, and what its programs need. Needs root.

use lab::fault_injection::owner_and_other;
use lab::scene::{assert_blocked, assert_leaves_by_egress, assert_leaves_by_node};
use lab::server::{UDP_WHO, WHO};
use lab::{EXT4, EXT6, Lab, Node, SERVERS, VISITOR, manifests};
use serde_json::Value;
use std::net::IpAddr;
use std::process::{Command, Output};

const EGRETD: &str = env!("CARGO_BIN_EXE_egretd");

#[test]
fn metrics_count_pods_allocations_and_packets() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let get = |daemon: &str, name: &str, labels: &[(&str, &str)]| lab.metrics(daemon).get(name, labels);
    let pods = |state: &str| get("n1", "egret_node_pods", &[("state", state)]);
    assert_eq!(["selected", "isolated", "free", "unmanaged"].map(pods), [Some(0.0); 4]);
    let visitor = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let other = lab.add_pod("n1", "office", "other", &[]);
    let mut unknown = lab.sandbox_unknown("n1", "shop", "unknown");
    unknown.attach().expect("ADD");
    assert_eq!(["selected", "isolated", "free", "unmanaged"].map(pods), [Some(1.0), Some(1.0), Some(1.0), Some(0.0)]);
    assert_blocked(&unknown);

    let allocations = |daemon: &str, state: &str| get(daemon, "egret_node_allocations", &[("state", state)]);
    assert_eq!(["local", "remote", "unready"].map(|s| allocations("n1", s)), [Some(0.0), Some(1.0), Some(0.0)]);
    assert_eq!(["local", "remote", "unready"].map(|s| allocations(&owner, s)), [Some(1.0), Some(0.0), Some(0.0)]);

    let id = lab.egress_id("shop/visitors").to_string();
    let went = |daemon: &str, role: &str, what: &str| {
        let labels = [("allocation", id.as_str()), ("role", role)];
        get(daemon, &format!("egret_node_allocation_{what}_total"), &labels).unwrap_or(0.0)
    };
    let all = || {
        [("n1", "source"), (owner.as_str(), "gateway")]
            .map(|(node, role)| ["packets", "bytes"].map(|w| went(node, role, w)))
    };
    let before = all();
    let socket = visitor.udp_socket((EXT4, lab::server::UDP_WHO).into()).expect("a socket");
    for _ in 0..20 {
        lab::client::udp_who_by(&socket).expect("an answer");
    }
    let after = all();
    // IPv4 20, UDP 8, "who" 3.
    let more = [0, 1].map(|node| [0, 1].map(|what| after[node][what] - before[node][what]));
    assert_eq!(more, [[20.0, 20.0 * 31.0]; 2], "packets and bytes on the source node and the gateway");

    let dropped = |reason: &str| lab.metrics("n1").dropped(reason);
    assert!(dropped("blocked").is_some_and(|n| n >= 4.0), "the pod that is held: {:?}", dropped("blocked"));
    for reason in [
        "leaked",
        "unmarked",
        "spoofed",
        "foreign",
        "unknown",
        "stale",
        "unsolicited",
        "bandwidth",
        "to_owner",
        "no_hop",
        "not_routed",
    ] {
        assert!(dropped(reason).is_some(), "{reason}");
    }
    for (name, labels) in [
        ("egret_node_cni_duration_seconds_count", &[("verb", "ADD")][..]),
        ("egret_node_apply_duration_seconds_count", &[]),
        ("egret_node_kernel_changes_total", &[]),
    ] {
        assert!(get("n1", name, labels).is_some_and(|n| n >= 3.0), "{name}: {:?}", get("n1", name, labels));
    }
    assert_eq!(get("n1", "egret_node_apply_errors_total", &[]), Some(0.0));
    for (name, labels, wanted) in [
        ("egret_allocations", &[("gateway", "default"), ("kind", "Explicit")][..], 1.0),
        ("egret_policies", &[("condition", "Accepted"), ("status", "True")], 1.0),
        ("egret_allocations_in_cooldown", &[("gateway", "default")], 0.0),
    ] {
        assert_eq!(get("controller", name, labels), Some(wanted), "{name}: {:?}", lab.metrics("controller"));
    }
    assert!(get("controller", "egret_status_writes_total", &[("result", "ok")]).is_some_and(|n| n > 1.0));
    assert_leaves_by_node(&other);
}

/// The rules are removed by hand while no daemon can restore them: packets that were about to leave by another way
/// are dropped and counted.
#[test]
fn packets_dropped_by_an_incomplete_datapath_are_counted() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let node = lab.node("n1");
    let counter = |table: &str, name: &str| -> u64 {
        let text = node.run(["nft", "list", "counter", table, "egret", name]);
        let number = text.split("packets ").nth(1).and_then(|t| t.split(' ').next());
        number.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("no packets in {text}"))
    };
    lab.forget_wire();
    for (commands, table, name) in [
        (&["ip rule del pref 72", "ip -6 rule del pref 72"][..], "inet", "leaked"),
        (&["nft flush map netdev egret hop"], "netdev", "no_hop"),
    ] {
        lab.daemon("n1").kill9();
        commands.iter().for_each(|command| drop(node.run(command.split(' '))));
        let before = counter(table, name);
        assert_blocked(&pod);
        assert!(counter(table, name) >= before + SERVERS.len() as u64, "{name}");
        lab.daemon("n1").restart();
        lab.wait_ready("n1");
        assert_leaves_by_egress(&pod);
    }
    lab.assert_nothing_leaked();
}

#[test]
fn logs_are_one_json_object_a_line_on_request() {
    let lab = Lab::builder().node_arguments(&["--log-format", "json", "--log-level", "info,egret::node=debug"]).scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let log = lab.daemon("n1").log();
    // The first line is the lab's own: the command.
    let lines: Vec<Value> = log
        .lines()
        .filter(|line| !line.starts_with("==="))
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect();
    let ready = lines.iter().find(|line| line["message"] == "ready").unwrap_or_else(|| panic!("not ready in {log}"));
    assert_eq!((&ready["level"], &ready["node"]), (&"INFO".into(), &"n1".into()));
    assert!(ready["timestamp"].is_string() && ready["target"].is_string(), "{ready}");
}

fn run(command: &mut Command) -> (Output, String) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output, text)
}

#[test]
fn an_invalid_log_level_is_rejected_with_the_remedy() {
    let (output, text) = run(Command::new(EGRETD).args(["check", "--log-level", "loud=very"]));
    assert!(!output.status.success() && text.contains("loud=very") && text.contains("info"), "{text}");
}

/// What `why` prints about a destination is what its server sees.
#[test]
fn why_explains_a_pods_source_address() {
    let lab = Lab::scene();
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let why = |pod: &str, more: &[&str]| {
        let (output, text) = run(Command::new(EGRETD).args(["why", pod, "--cluster", &cluster]).args(more));
        (output.status.code(), text)
    };
    let narrow = "podSelector: {}\n  priority: 3\n  address: { ipv4: 192.0.2.51 }\n  \
                  egress: [{ ports: [{ protocol: UDP, port: 9001 }] }]";
    lab.write_manifest("narrow.yaml", &manifests::policy("shop", "narrow", narrow));
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let narrow = Some(IpAddr::from([192, 0, 2, 51]));
    lab.wait_for("the narrower policy's address", &narrow, || pod.udp_who(EXT4).ok());

    let (code, text) = why("shop/visitor", &[]);
    assert_eq!(code, Some(0), "{text}");
    let (first, second) = (text.find("1. EgressPolicy shop/narrow"), text.find("2. EgressPolicy shop/visitors"));
    assert!(first.is_some() && first < second && text.contains("app=visitor"), "{text}");

    for (to, seen) in [
        (format!("{EXT4}:{UDP_WHO}/udp"), pod.udp_who(EXT4)),
        (format!("{EXT4}:{WHO}"), pod.who(EXT4)),
        (format!("[{EXT6}]:{WHO}/tcp"), pod.who(EXT6)),
    ] {
        let (_, text) = why("shop/visitor", &["--to", &to]);
        let seen = seen.expect("the server answers");
        assert!(text.contains(&format!("leaves from {seen}: ")), "{to}, seen as {seen}: {text}");
    }
    assert!(pod.udp_who(EXT6).is_err());
    let (_, text) = why("shop/visitor", &["--to", &format!("[{EXT6}]:{UDP_WHO}/udp")]);
    assert!(text.contains("is blocked: EgressPolicy shop/narrow decides"), "{text}");

    for (pod, to, words) in [("shop/nobody", "9.9.9.9", "no pod shop/nobody"), ("visitor", "9.9.9.9", "NAMESPACE/NAME")]
    {
        let (code, text) = why(pod, &["--to", to]);
        assert!(code != Some(0) && text.contains(words), "{text}");
    }
}

/// One line for each requirement, and a meaningful exit code.
#[test]
fn check_names_missing_features_and_fails() {
    let (output, text) = run(Command::new(EGRETD).arg("check"));
    assert!(output.status.success(), "{text}");
    assert!(text.lines().count() > 10 && !text.contains("MISSING"), "{text}");
    // `setpriv` is in util-linux, which every Debian has.
    let without = ["--bounding-set=-all", "--inh-caps=-all", "--", EGRETD, "check"];
    let (output, text) = run(Command::new("setpriv").args(without));
    assert_eq!(output.status.code(), Some(1), "{text}");
    let missing: Vec<&str> = text.lines().filter(|line| line.starts_with("MISSING")).collect();
    assert!(!missing.is_empty() && missing.iter().all(|line| line.contains("; ")), "{text}");
    assert!(text.lines().all(|l| ["ok ", "warn ", "MISSING "].iter().any(|state| l.starts_with(state))), "{text}");
}

/// They run on any host: no interpreter, no library (`PT_INTERP`, `PT_DYNAMIC` with `DT_NEEDED`).
#[test]
fn programs_need_no_library_and_the_plugin_is_small() {
    for program in [EGRETD, env!("CARGO_BIN_EXE_egret-cni")] {
        let (output, text) = run(Command::new("readelf").args(["--program-headers", "--dynamic", program]));
        assert!(output.status.success(), "readelf is in binutils: {text}");
        assert!(!text.contains("INTERP") && !text.contains("(NEEDED)"), "{program}: {text}");
    }
    let (_, symbols) = run(Command::new("nm").args(["--defined-only", env!("CARGO_BIN_EXE_egret-cni")]));
    let of = |name: &str| symbols.lines().filter(|line| line.contains(name)).count();
    assert!(of("egret") > 10, "the plugin has no symbols");
    assert_eq!(["tokio", "kube_client", "hyper", "rustls"].map(of), [0; 4]);
}

#[test]
fn check_names_firewalls_that_drop_forwarded_packets() {
    let lab = Lab::new();
    let node = lab.node("n1");
    let check = || run_on(node, &[EGRETD, "check"]);
    let warnings = |text: &str| text.lines().filter(|l| l.starts_with("warn")).count();
    let before = check();
    assert!(before.contains("firewall, forwarding") && before.contains("flow tables"), "{before}");
    node.run(["iptables", "-P", "FORWARD", "DROP"]);
    node.nft(
        "table inet fw { chain last { type filter hook forward priority 10; counter reject; }; \
         chain open { type filter hook forward priority 20; counter accept; }; }",
    );
    let text = check();
    for found in ["ip filter FORWARD", "inet fw last"] {
        assert!(text.contains(found), "{found} is not in\n{text}");
    }
    assert!(!text.contains("fw open"), "{text}");
    assert_eq!(warnings(&text), warnings(&before) + 1, "{text}");
    for direction in ["-i", "-o"] {
        node.run(["iptables", "-I", "FORWARD", direction, "egret", "-j", "ACCEPT"]);
    }
    node.nft("insert rule inet fw last iifname egret accept");
    let text = check();
    assert!(text.contains("no chain drops forwarded packets by default"), "who lets it pass is not named:\n{text}");
}

/// The output of a command, whatever its exit code.
fn run_on(node: &Node, command: &[&str]) -> String {
    String::from_utf8_lossy(&node.try_run(command).stdout).into_owned()
}

#[test]
fn egretd_state_prints_the_desired_and_the_observed_state() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let visitor = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&visitor);
    let state = |node: &str| -> Value {
        let run_dir = lab.node(node).run_dir();
        let output =
            Command::new(EGRETD).args(["state", "--json", "--run-dir"]).arg(&run_dir).output().expect("egretd");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    let id = lab.egress_id("shop/visitors").to_string();
    let (source, gateway) = (state("n1"), state(&owner));
    assert_eq!(source["pending"], serde_json::json!({}));
    assert_eq!(source["observed"]["pods"]["selected"], 1);
    assert_eq!(source["observed"]["selected"][0]["egressIds"][0].to_string(), id);
    assert_eq!(source["desired"]["egressIps"][&id]["here"], false);
    assert_eq!(gateway["desired"]["egressIps"][&id]["traffic"], "local");
    assert_eq!(gateway["desired"]["egressIps"][&id]["here"], true);
    assert_eq!(gateway["observed"]["egressIps"][&id]["here"], true);
    assert_eq!(gateway["observed"]["egressIps"][&id]["state"], "Owner");

    let text = Command::new(EGRETD).arg("state").arg("--run-dir").arg(lab.node(&owner).run_dir()).output();
    let text = String::from_utf8_lossy(&text.expect("egretd").stdout).into_owned();
    assert!(text.contains(&format!("egress IP {id} (")) && text.contains("observed here, Owner"), "{text}");

    let nowhere = Command::new(EGRETD).args(["state", "--run-dir", "/nowhere/at/all"]).output().expect("egretd");
    let error = String::from_utf8_lossy(&nowhere.stderr).into_owned();
    assert!(!nowhere.status.success() && error.contains("/nowhere/at/all/cni.sock"), "{error}");
}
