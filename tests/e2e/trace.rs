//! `kubectl egret trace`: the way of one packet over both nodes, and nothing of it is left afterwards.

use lab::fault_injection::{owner_and_other, plugged};
use lab::scene::{assert_leaves_by_egress, egress_towards};
use lab::survival::{assert_live, assert_short, sessions};
use lab::{EXT4, Lab, Pod, SERVERS, VISITOR, server};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// The command, with the daemons of all nodes: in a lab they are on one host.
fn command(lab: &Lab, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
    command.env_clear().arg("trace").args(arguments);
    command.args(["--cluster", &format!("dir:{}", lab.manifests().path().display())]);
    for node in lab.nodes() {
        command.arg("--run-dir").arg(node.run_dir());
    }
    command
}

/// Exit code, and what the command says.
fn trace(lab: &Lab, arguments: &[&str]) -> (i32, String) {
    let output = command(lab, arguments).output().expect("kubectl-egret");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// The exit code and the result.
#[track_caller]
fn traced(lab: &Lab, arguments: &[&str]) -> (i32, Value) {
    let output = command(lab, arguments).args(["-o", "json"]).output().expect("kubectl-egret");
    let complaints = String::from_utf8_lossy(&output.stderr);
    let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {arguments:?}: {complaints}"));
    (output.status.code().unwrap_or(-1), value)
}

/// The nodes with a table or a device of a trace.
fn traces(lab: &Lab) -> Vec<String> {
    let has = |command: &str, word: &str, node: &lab::Node| node.run(command.split(' ')).contains(word);
    let all =
        lab.nodes().iter().filter(|n| has("nft list tables", "egret-trace", n) || has("ip link", "egret-probe", n));
    all.map(|node| node.name.clone()).collect()
}

fn to(server: IpAddr, port: u16) -> String {
    if port == 0 { server.to_string() } else { SocketAddr::new(server, port).to_string() }
}

/// Who decided on the packet, `NODE CHAIN`, out and back.
fn decided(traced: &Value) -> Vec<String> {
    let hops = traced["way"].as_array().expect("a way");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let of_hop = |hop: &Value| {
        let node = text(&hop["node"]);
        let arrow = if hop["isReply"] == true { "<" } else { ">" };
        let steps = hop["steps"].as_array().expect("steps").clone();
        steps.into_iter().map(move |step| format!("{arrow} {node} {}: {}", text(&step["chain"]), text(&step["rule"])))
    };
    hops.iter().flat_map(of_hop).collect()
}

#[track_caller]
fn assert_passes(decided: &[String], wanted: &[String]) {
    let mut rest = decided.iter();
    for wanted in wanted {
        assert!(rest.any(|step| step.contains(wanted)), "{wanted:?} is not in its place in\n{}", decided.join("\n"));
    }
}

/// Traces a packet of each kind that is answered.
#[track_caller]
fn assert_answered(lab: &Lab, pod: &Pod, owner: &str) {
    let name = format!("{}/{}", pod.namespace, pod.name);
    for server in SERVERS {
        for (port, protocol, what) in
            [(server::WHO, "tcp", "SYN,ACK"), (server::UDP_WHO, "udp", ""), (0, "icmp", "echo-reply")]
        {
            let (code, traced) = traced(lab, &[&name, "--to", &to(server, port), "--protocol", protocol]);
            let about = format!("{name} on {} to {server}, {protocol}: {traced:#}", pod.node.name);
            assert_eq!((code, &traced["outcome"]), (0, &json!("answered")), "{about}");
            assert_eq!(traced["reply"]["what"], what, "{about}");
            assert_eq!(traced["reply"]["from"], server.to_string(), "{about}");
            let egress = &traced["egress"];
            assert_eq!(
                (&egress["node"], &egress["address"]),
                (&json!(owner), &json!(egress_towards(server))),
                "{about}"
            );
            let source = traced["source"].as_str().unwrap_or_default();
            assert!(source.ends_with(&format!(":{}", egress["port"])), "{about}");
            let node = &pod.node.name;
            let mut wanted = vec![format!("> {node} prerouting: "), format!("> {node} known: ")];
            if node != owner {
                wanted.push(format!("> {node} to-tunnel: ether daddr set meta mark map @hop accept"));
                wanted.push(format!("> {owner} to-owner: "));
            }
            wanted.push(format!("> {owner} srcnat: "));
            if port != 0 {
                wanted.push(format!("> {owner} egress-guard-marked: "));
            }
            let decided = decided(&traced);
            assert_passes(&decided, &wanted);
            assert!(decided.iter().all(|step| !step.contains("egret-trace")), "{about}");
            let way: Vec<&str> =
                traced["way"].as_array().expect("a way").iter().filter_map(|h| h["node"].as_str()).collect();
            let there_and_back = if node == owner { vec![owner; 2] } else { vec![node, owner, owner, node] };
            assert_eq!(way, there_and_back, "{about}");
        }
    }
}

#[test]
fn the_way_of_an_answered_packet_is_shown_on_both_nodes() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pods = ["n1", "n2", &owner].map(|node| lab.add_pod(node, "shop", &format!("on-{node}"), VISITOR));
    let going_on = sessions(&pods);
    for pod in &pods {
        assert_answered(&lab, pod, &owner);
    }
    let (code, text) = trace(&lab, &["shop/on-n1", "--to", &to(EXT4.into(), server::WHO)]);
    println!("{text}");
    let out = format!("out by egret: {}", pods[0].ipv4());
    for words in ["192.0.2.100 answered with SYN,ACK after", "it left from 192.0.2.50, port 6", &out, "goto known"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
    assert_eq!(code, 0);
    // A port where nobody listens answers, too; an address that nobody has does not.
    let (code, refused) = traced(&lab, &["shop/on-n1", "--to", "192.0.2.100:7"]);
    assert_eq!((code, &refused["reply"]["what"]), (0, &json!("RST,ACK")), "{refused:#}");
    let (code, silent) = traced(&lab, &["shop/on-n1", "--to", "192.0.2.200:443", "--timeout", "1"]);
    assert_eq!(code, 2, "{silent:#}");
    lab.wait_until("nothing is left of the traces", Duration::from_secs(10), || traces(&lab).is_empty());
    assert_short(assert_live("traced", going_on), 100);
    lab.assert_nothing_leaked();
}

#[test]
fn a_pod_that_no_policy_selects_leaves_from_its_node() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n2", "shop", "free", &[]);
    let (code, free) =
        traced(&lab, &["free", "-n", "shop", "--to", &to(EXT4.into(), server::UDP_WHO), "--protocol", "udp"]);
    assert_eq!((code, &free["outcome"]), (0, &json!("answered")), "{free:#}");
    let egress = &free["egress"];
    assert_eq!((&egress["node"], &egress["address"]), (&json!("n2"), &json!(pod.node.ipv4())), "{free:#}");
}

#[test]
fn the_chain_that_blocks_a_packet_is_named_with_the_remedy() {
    let lab = Lab::scene();
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    ["g1", "g2"].iter().for_each(|node| plugged(&lab, node, false));
    let blocked = || traced(&lab, &["shop/visitor", "--to", &to(EXT4.into(), server::WHO), "--timeout", "1"]);
    lab.wait_until("the packet is blocked", Duration::from_secs(20), || blocked().1["outcome"] == "dropped");
    lab.forget_wire();
    let (code, blocked) = blocked();
    assert_eq!(code, 2, "{blocked:#}");
    for (field, words) in [
        (
            "message",
            "node n1: chain known of table inet egret dropped it by the rule \"counter name \\\"blocked\\\" drop\"",
        ),
        ("remedy", "packets for 192.0.2.50, 2001:db8::50 are dropped: "),
        ("remedy", "kubectl egret status"),
        ("explanation", "is blocked"),
    ] {
        assert!(blocked[field].as_str().is_some_and(|text| text.contains(words)), "{field}, {words}: {blocked:#}");
    }
    lab.assert_nothing_arrives();
    assert!(traces(&lab).is_empty());
}

#[test]
fn wrong_requests_say_what_to_write() {
    let lab = Lab::scene();
    lab.add_pod("n1", "shop", "visitor", VISITOR);
    for (arguments, words) in [
        (&["shop/nobody", "--to", "192.0.2.100:80"][..], "the cluster has no pod shop/nobody"),
        (&["shop/visitor", "--to", "192.0.2.100", "--protocol", "tcp"], "TCP needs a port; write --to 192.0.2.100:443"),
        (
            &["shop/visitor", "--to", "192.0.2.100:80", "--protocol", "icmp"],
            "ICMP has no ports; write --to 192.0.2.100",
        ),
        (&["shop/visitor", "--to", "192.0.2.100:80/sctp"], "SCTP cannot be traced"),
        (&["shop/visitor", "--to", "192.0.2.100:80", "--protocol", "gre"], "write tcp, udp or icmp"),
        (&["shop/visitor"], "--to"),
    ] {
        let (code, text) = trace(&lab, arguments);
        assert!(code == 1 && text.contains(words), "{arguments:?}: {code}: {text}");
    }
    // The daemon of another node than the pod's.
    let cluster = format!("dir:{}", lab.manifests().path().display());
    let run_dir = lab.node("g1").run_dir();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kubectl-egret"));
    command.env_clear().args(["trace", "shop/visitor", "--to", "192.0.2.100:80", "--cluster", &cluster, "--run-dir"]);
    let output = command.arg(run_dir).output().expect("kubectl-egret");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("that of node g1; run the command on node n1"), "{text}");
    lab.assert_nothing_arrives();
}

/// Begins to wait for the pod's next packet, and returns when the kernel looks for it.
fn wait_for_packet(lab: &Lab, pod: &str, number: usize) -> Child {
    let mut command = command(lab, &[pod, "--to", &to(EXT4.into(), server::WHO), "--wait", "-o", "json"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("kubectl-egret");
    lab.wait_until("the trace has begun", PATIENCE, || {
        let tables = lab.node("n1").run(["nft", "list", "tables"]);
        tables.matches("egret-trace").count() >= number
    });
    child
}

#[test]
fn the_pods_own_next_packet_is_traced() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let pods = ["one", "other"].map(|name| lab.add_pod("n1", "shop", name, VISITOR));
    let children = [wait_for_packet(&lab, "shop/one", 1), wait_for_packet(&lab, "shop/other", 2)];
    // The tables of the owner may come a moment later.
    lab.wait_until("the owner traces, too", PATIENCE, || {
        lab.node(&owner).run(["nft", "list", "tables"]).matches("egret-trace").count() == 2
    });
    pods.iter().for_each(assert_leaves_by_egress);
    for (child, pod) in children.into_iter().zip(&pods) {
        let output = child.wait_with_output().expect("the command ends");
        let traced: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!((output.status.code(), &traced["outcome"]), (Some(0), &json!("answered")), "{traced:#}");
        assert!(traced["source"].as_str().is_some_and(|s| s.starts_with(&format!("{}:", pod.ipv4()))), "{traced:#}");
        assert_eq!(traced["egress"]["node"], owner, "{traced:#}");
    }
    let (code, nothing) =
        traced(&lab, &["shop/one", "--to", &to(EXT4.into(), server::WHO), "--wait", "--timeout", "1"]);
    assert_eq!((code, &nothing["outcome"]), (2, &json!("notSent")), "{nothing:#}");
    assert!(traces(&lab).is_empty());
    lab.assert_nothing_leaked();
}

/// Asks a daemon for a trace as the command does, and does nothing more.
fn ask(pod: &Pod, seconds: u64) -> (BufReader<UnixStream>, Value) {
    let mut stream = UnixStream::connect(pod.node.cni_socket()).expect("the daemon's socket");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    let request = json!({"version": 1, "verb": "TRACE", "node": pod.node.name, "namespace": pod.namespace,
        "pod": pod.name, "source": pod.ipv4(), "destination": EXT4, "protocol": "tcp", "port": server::ECHO,
        "sourcePort": null, "seconds": seconds});
    writeln!(stream, "{request}").expect("a request");
    let mut answers = BufReader::new(stream);
    let first = line(&mut answers);
    (answers, first)
}

fn line(answers: &mut BufReader<UnixStream>) -> Value {
    let mut text = String::new();
    answers.read_line(&mut text).expect("an answer");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
}

#[test]
fn nothing_is_left_of_a_trace_whatever_ends_it() {
    let lab = Lab::scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let going_on = sessions(std::slice::from_ref(&pod));
    let began = Instant::now();
    let (mut forgotten, armed) = ask(&pod, 3600);
    assert_eq!((&armed["event"], &armed["node"]), (&json!("armed"), &json!("n1")), "{armed}");

    let mut killed = wait_for_packet(&lab, "shop/visitor", 2);
    killed.kill().expect("SIGKILL");
    killed.wait().expect("the command ends");
    lab.wait_until("the killed command's tables are gone", PATIENCE, || {
        let of = |node: &str| lab.node(node).run(["nft", "list", "tables"]).matches("egret-trace").count();
        (of("n1"), of("g1"), of("g2")) == (1, 0, 0)
    });

    // As many as run at the same time; then a clear refusal.
    let others: Vec<_> = (0..3).map(|_| ask(&pod, 20)).collect();
    assert!(others.iter().all(|(_, first)| first["event"] == "armed"), "{others:?}");
    let (_, refused) = ask(&pod, 20);
    let message = refused["message"].as_str().unwrap_or_default();
    assert!(message.contains("4 traces run on node n1 already; try again in 30 s"), "{refused}");
    drop(others);
    lab.wait_until("broken connections' tables are gone", PATIENCE, || {
        lab.node("n1").run(["nft", "list", "tables"]).matches("egret-trace").count() == 1
    });

    // Nobody closes this one.
    assert_eq!(traces(&lab), ["n1"]);
    lab.wait_until("the trace ends by itself", Duration::from_secs(40), || traces(&lab).is_empty());
    let lasted = began.elapsed();
    assert!(lasted > Duration::from_secs(25) && lasted < Duration::from_secs(36), "{lasted:?}");
    while line(&mut forgotten)["event"] != "ended" {}

    let (_open, _) = ask(&pod, 30);
    assert_eq!(traces(&lab), ["n1"]);
    lab.daemon("n1").kill9();
    lab.wait_until("the killed daemon's table is gone", PATIENCE, || traces(&lab).is_empty());
    lab.daemon("n1").restart();
    lab.wait_until("the daemon traces again", Duration::from_secs(20), || {
        trace(&lab, &["shop/visitor", "--to", &to(EXT4.into(), server::WHO)]).0 == 0
    });
    assert_short(assert_live("traced", going_on), 100);
    lab.assert_nothing_leaked();
}
