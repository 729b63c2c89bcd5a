//! The protocol with the daemon: the plugin's requests, and its behaviour when the other side violates the protocol.
//! The test takes the daemon's place; the daemon itself is tested in the lab. Needs root.

use crate::call::Call;
use crate::node::Node;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

const DONE: &str = "{\"version\":1}\n";

/// Answers the n-th connection with the n-th of `answers`, and returns the requests. After that, nothing accepts
/// connections.
fn serve(node: &Node, answers: &'static [&'static str]) -> Receiver<Value> {
    let (asked, requests) = channel();
    std::fs::create_dir_all(node.run_dir()).unwrap();
    let _ = std::fs::remove_file(node.socket());
    let listener = UnixListener::bind(node.socket()).unwrap();
    thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            asked.send(serde_json::from_str(&line).unwrap()).unwrap();
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    requests
}

#[test]
fn the_plugin_sends_the_request_of_its_verb() {
    let node = Node::new();
    let pod = node.pod(5);
    let requests = serve(&node, &[DONE; 4]);
    let ask = |verb: &str| {
        let call = Call::new(&node, verb).pod(&pod);
        let call = call.key("cni.dev/valid-attachments", json!([{"containerID": "a", "ifname": "b"}]));
        let call = call.variable("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=7-7");
        (call.run().success(), requests.recv().unwrap())
    };
    let (stdout, mut request) = ask("ADD");
    assert_eq!(stdout, format!("{}\n", pod.result()));
    let host = request.as_object_mut().unwrap().remove("host").unwrap();
    assert!(host["index"].as_u64() > Some(0) && host["peerIndex"].as_u64() > Some(0));
    let attachment = json!({"version": 1, "verb": "ADD", "containerId": "c1", "ifname": "eth0", "network": "pods",
        "pod": {"namespace": "shop", "name": "web-0", "uid": "7-7"}, "addresses": pod.addresses});
    assert_eq!(request, attachment);
    assert_eq!(ask("CHECK").1["verb"], "CHECK");
    assert_eq!(
        ask("DEL"),
        (String::new(), json!({"version": 1, "verb": "DEL", "containerId": "c1", "ifname": "eth0"}))
    );
    let gc = json!({"version": 1, "verb": "GC", "network": "pods", "valid": [{"containerId": "a", "ifname": "b"}]});
    assert_eq!(ask("GC").1, gc);
    // The daemon writes the attachments' files, not the plugin.
    assert!(node.records().is_empty() && node.rules().is_empty());
}

#[test]
fn the_daemons_refusal_is_printed_with_its_code() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let refusal = "{\"version\":1,\"error\":{\"code\":100,\"msg\":\"no veth\",\"details\":\"use one\"}}\n";
    let answers: &[&str] = Box::leak(Box::new([refusal; 4]));
    let _requests = serve(&node, answers);
    for verb in ["ADD", "DEL", "CHECK", "GC"] {
        let call = Call::new(&node, verb).pod(&pod).key("cni.dev/valid-attachments", json!([]));
        assert_eq!(call.run().failure(), (100, "no veth; use one".to_owned()), "{verb}");
    }
    assert!(node.records().is_empty() && node.rules().is_empty());
}

#[test]
fn a_daemon_that_closes_the_connection_or_sends_garbage_counts_as_away() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    // Each ADD sends two requests.
    const ANSWERS: &[&str] = &[
        "",
        "",
        "{\"version\":1",
        "{\"version\":1",
        "{\"version\":2}\n",
        "{\"version\":2}\n",
        "{\"version\":1,\"error\":{\"code\":1,\"msg\":\"version 1?\"}}\n",
        "{\"version\":2,\"error\":{\"code\":1,\"msg\":\"version 1?\"}}\n",
        "garbage\n",
        "garbage\n",
    ];
    let requests = serve(&node, ANSWERS);
    for round in 0..ANSWERS.len() / 2 {
        let id = format!("c{round}");
        Call::new(&node, "ADD").pod(&pod).container(&id).run().success();
        assert_eq!(node.rules().len(), 2, "round {round}");
        assert_eq!(requests.try_iter().count(), 2, "round {round}");
    }
    // The socket still exists, but no daemon.
    for round in 0..ANSWERS.len() / 2 {
        Call::new(&node, "DEL").container(&format!("c{round}")).run().success();
    }
    assert!(node.records().is_empty() && node.rules().is_empty());
}

#[test]
fn a_daemon_that_returns_meanwhile_gets_the_request() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let requests = serve(&node, &["", DONE]);
    Call::new(&node, "ADD").pod(&pod).run().success();
    let [first, second] = [requests.recv().unwrap(), requests.recv().unwrap()];
    assert_eq!(first, second);
    // The daemon finds the attachment's file, and will lift the quarantine.
    assert_eq!((node.records().len(), node.rules().len()), (1, 2));
}

#[test]
fn add_waits_for_a_daemon_that_is_starting() {
    let node = Node::new();
    node.offline_policies(&["shop"]);
    let pod = node.pod(5);
    let socket = node.socket();
    std::fs::create_dir_all(node.run_dir()).unwrap();
    let start = Instant::now();
    let daemon = thread::spawn(move || {
        thread::sleep(Duration::from_secs(1));
        let (mut stream, _) = UnixListener::bind(socket).unwrap().accept().unwrap();
        BufReader::new(&stream).read_line(&mut String::new()).unwrap();
        stream.write_all(DONE.as_bytes()).unwrap();
    });
    Call::new(&node, "ADD").pod(&pod).run().success();
    daemon.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}

#[test]
fn a_silent_daemon_is_waited_for_a_limited_time() {
    let node = Node::new();
    node.prepare(&["shop"]);
    let pod = node.pod(5);
    let deaf = UnixListener::bind(node.socket()).unwrap();
    let start = Instant::now();
    Call::new(&node, "ADD").pod(&pod).run().success();
    assert!((10..13).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    // As without a daemon: quarantined if a policy can select it.
    assert_eq!((node.records().len(), node.rules().len()), (1, 2));
    let other = node.pod(6);
    Call::new(&node, "ADD").pod(&other).container("c2").of("free").run().success();
    assert_eq!((node.records().len(), node.rules().len()), (2, 2));
    drop(deaf);
}

#[test]
fn a_response_without_an_end_is_rejected() {
    let node = Node::new();
    node.prepare(&[]);
    let pod = node.pod(5);
    let long: &'static str = Box::leak("x".repeat(3 << 20).into_boxed_str());
    let _requests = serve(&node, Box::leak(Box::new([long; 2])));
    Call::new(&node, "ADD").pod(&pod).run().success();
}
