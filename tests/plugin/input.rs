//! The plugin's input: versions, variables, configurations, and invalid ones. Needs root.

use crate::call::Call;
use crate::node::Node;
use serde_json::{Value, json};
use std::process::Command;

#[test]
fn every_verb_in_every_version() {
    let node = Node::new();
    node.prepare(&[]);
    let pod = node.pod(5);
    let since = |verb: &str| match verb {
        "CHECK" => "0.4.0",
        "GC" | "STATUS" => "1.1.0",
        _ => "0.3.0",
    };
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0", "1.2.0", "2.0.0", "x", ""] {
            // Not a pod of Kubernetes: only the version decides.
            let call = Call::new(&node, verb).pod(&pod).without_variable("CNI_ARGS");
            let call = call.key("cniVersion", json!(version)).key("cni.dev/valid-attachments", json!([]));
            let outcome = call.run();
            let supported = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"].contains(&version);
            if supported && version >= since(verb) {
                let stdout = outcome.success();
                let expected = if verb == "ADD" { format!("{}\n", pod.result()) } else { String::new() };
                assert_eq!(stdout, expected, "{verb} {version}");
            } else {
                let (code, text) = outcome.failure();
                assert_eq!(code, 1, "{verb} {version}: {text}");
                assert!(text.contains(&format!("{version:?}")) || supported, "{text}");
            }
        }
    }
}

#[test]
fn an_error_carries_the_version_of_the_configuration() {
    let node = Node::new();
    let outcome = Call::new(&node, "CHECK").key("cniVersion", json!("0.3.1")).netns("/x".as_ref()).run();
    assert_eq!(serde_json::from_str::<Value>(&outcome.stdout).unwrap()["cniVersion"], "0.3.1");
    assert_eq!(outcome.failure().0, 1);
}

#[test]
fn version_needs_no_input_and_responds_in_the_requested_version() {
    let node = Node::new();
    let supported = json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
    for (input, answered) in [
        (r#"{"cniVersion": "0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion": "9.0.0"}"#, "1.1.0"),
        ("", "1.1.0"),
        ("x", "1.1.0"),
    ] {
        let call = Call::new(&node, "VERSION").input(input);
        let stdout = call.without_variable("CNI_CONTAINERID").without_variable("CNI_IFNAME").run().success();
        let expected = json!({"cniVersion": answered, "supportedVersions": supported});
        assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap(), expected, "{input}");
    }
}

#[test]
fn missing_variables_are_all_named() {
    let node = Node::new();
    for (verb, needed) in [
        ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"][..]),
        ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME"]),
    ] {
        let call = Call::new(&node, verb).without_variable("CNI_CONTAINERID").without_variable("CNI_IFNAME");
        let (code, text) = call.run().failure();
        assert_eq!(code, 4);
        assert!(needed.iter().all(|name| text.contains(name)), "{verb}: {text}");
    }
    assert!(Call::new(&node, "ADD").without_variable("CNI_COMMAND").run().failure().1.contains("CNI_COMMAND"));
    let (code, text) = Call::new(&node, "FROB").run().failure();
    assert!(code == 4 && text.contains("FROB"), "{text}");
}

#[test]
fn variables_that_would_become_paths_are_refused() {
    let node = Node::new();
    for id in ["../../etc/x", ".hidden", "a/b"] {
        assert_eq!(Call::new(&node, "DEL").container(id).run().failure().0, 4, "{id}");
    }
    for name in ["..", "../x", "a b", "a-name-too-long-x"] {
        assert_eq!(Call::new(&node, "DEL").variable("CNI_IFNAME", name).run().failure().0, 4, "{name}");
    }
}

#[test]
fn an_incomplete_pod_and_invalid_arguments() {
    let node = Node::new();
    let pod = node.pod(5);
    for args in ["K8S_POD_NAMESPACE=shop", "K8S_POD_NAME=web-0", "K8S_POD_NAMESPACE", ";;x"] {
        let (code, text) = Call::new(&node, "ADD").pod(&pod).variable("CNI_ARGS", args).run().failure();
        assert!(code == 4 && text.contains("CNI_ARGS"), "{args}: {text}");
    }
}

#[test]
fn another_runtimes_result_passes_through_as_it_was() {
    let node = Node::new();
    let pod = node.pod(5);
    // Numbers, spaces, order and unknown keys: a result that was parsed and written again would differ.
    let odd = r#"{ "cniVersion":"0.3.1","ips" : [{"version":"4","address":"10.244.1.5/32"} ],"z":1.0,"a":1e400,
        "u":"\u00e4" }"#;
    for args in ["", "IgnoreUnknown=1;FOO=BAR"] {
        let call = Call::new(&node, "ADD").pod(&pod).previous(odd).variable("CNI_ARGS", args);
        assert_eq!(call.key("cniVersion", json!("0.3.1")).run().success(), format!("{odd}\n"));
    }
    assert!(node.records().is_empty() && node.rules().is_empty());
    Call::new(&node, "CHECK").pod(&pod).without_variable("CNI_ARGS").run().success();
}

#[test]
fn unknown_keys_are_ignored() {
    let node = Node::new();
    let pod = node.pod(5);
    let call = Call::new(&node, "ADD").pod(&pod).without_variable("CNI_ARGS");
    let call = call.key("sokcet", json!(5)).key("runtimeConfig", json!({"portMappings": []})).key("ipam", json!({}));
    call.key("capabilities", json!({"x": true})).key("args", json!({"cni": {}})).run().success();
}

#[test]
fn garbage_of_ten_megabytes() {
    let node = Node::new();
    let pod = node.pod(5);
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for byte in [b'{', b'[', b' ', 0, 0xff] {
            let (code, text) = Call::new(&node, verb).pod(&pod).input(vec![byte; 10 << 20]).run().failure();
            assert!(code == 6 && text.contains("8 MiB"), "{verb}: {text}");
        }
    }
}

#[test]
fn broken_json() {
    let node = Node::new();
    let pod = node.pod(5);
    for verb in ["ADD", "DEL", "CHECK", "GC", "STATUS"] {
        for text in ["", "{", "[]", "5", "null", r#"{"cniVersion": "1.1.0"}}"#, r#"{"cniVersion": 1}"#] {
            assert_eq!(Call::new(&node, verb).pod(&pod).input(text).run().failure().0, 6, "{verb} {text}");
        }
    }
}

#[test]
fn a_known_key_of_a_wrong_type_is_named() {
    let node = Node::new();
    let pod = node.pod(5);
    for (key, value) in [("name", json!(5)), ("socket", json!({})), ("cniVersion", json!([]))] {
        let (code, text) = Call::new(&node, "ADD").pod(&pod).key(key, value).run().failure();
        assert!(code == 6 && text.contains(key), "{text}");
    }
    for previous in ["5", "[]", r#"{"ips": 1}"#, r#"{"ips": [{"address": "10.0.0.300/24"}]}"#] {
        let (code, text) = Call::new(&node, "ADD").pod(&pod).previous(previous).run().failure();
        assert!(code == 6 && text.contains("prevResult"), "{text}");
    }
}

#[test]
fn configurations_that_cannot_work() {
    let node = Node::new();
    let pod = node.pod(5);
    let add = || Call::new(&node, "ADD").pod(&pod);
    for (call, word) in [
        (add().previous("null"), "chain"),
        (add().previous(r#"{"cniVersion": "1.1.0"}"#), "address"),
        (add().previous(r#"{"ips": [], "interfaces": []}"#), "address"),
        (add().key("socket", json!("cni.sock")), "socket"),
        (add().key("socket", json!(format!("/{}", "x".repeat(200)))), "socket"),
        (add().without_key("name"), "name"),
        (Call::new(&node, "GC"), "valid-attachments"),
    ] {
        let (code, text) = call.run().failure();
        assert!(code == 7 && text.contains(word), "{code} {text}");
    }
}

#[test]
fn invalid_namespaces() {
    let node = Node::new();
    let pod = node.pod(5);
    let directory = tempfile::tempdir().unwrap();
    let (file, fifo) = (directory.path().join("file"), directory.path().join("fifo"));
    std::fs::write(&file, "").unwrap();
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let missing = directory.path().join("missing");
    for path in [directory.path(), &file, &fifo, &missing, "/proc/self/ns/uts".as_ref(), "relative".as_ref()] {
        let (code, text) = Call::new(&node, "ADD").pod(&pod).netns(path).run().failure();
        assert!(code == 4 && text.contains(path.to_str().unwrap()), "{code} {text}");
        // A DEL does not read it.
        Call::new(&node, "DEL").pod(&pod).netns(path).run().success();
    }
}

#[test]
fn the_examples_are_valid() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/cni-conf");
    let read = |path: &std::path::Path| -> Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    let entry = read(&std::path::Path::new(directory).join("egret.json"));
    assert_eq!(entry["type"], "egret-cni");
    let mut lists = 0;
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "conflist") {
            let list = read(&path);
            let types: Vec<&str> =
                list["plugins"].as_array().unwrap().iter().filter_map(|p| p["type"].as_str()).collect();
            assert_eq!(types.last(), Some(&"egret-cni"), "{path:?}");
            assert!(["0.3.0", "0.3.1", "0.4.0", "1.0.0"].contains(&list["cniVersion"].as_str().unwrap()), "{path:?}");
            lists += 1;
        }
    }
    assert_eq!(lists, 7);
}
