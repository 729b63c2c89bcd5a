//! Pods' starts and ends: one, many at once, and the runtime's calls of plugins. Needs root.

use crate::recorder::{self, Recorder};
use crate::site::{Site, end_at_once, own};
use lab::{Pods, VISITOR};
use serde_json::{Value, json};
use std::sync::Arc;

#[test]
fn a_pod_leaves_from_its_egress_ip_from_its_first_packet_on() {
    let site = Site::with_egret();
    let visitor = site.visitor("visitor");
    let other = site.start("shop", "other", &[("app", "other")]);
    site.assert_left_by_egress("visitor");
    site.wait_heard_from("other", own(site.node()));
    assert_eq!(site.attachments(), 2);
    visitor.end();
    other.end();
    assert_eq!(site.attachments(), 0);
    assert!(!site.node().run(["nft", "list", "table", "inet", "egret"]).contains("chain pod-"));
}

/// The reference plugin `bridge` returns before its bridge port forwards, whatever plugins follow.
#[test]
fn pods_on_a_bridge_leave_from_their_egress_ip() {
    let site = Site::of(Pods::Bridged);
    site.runtime.install();
    site.start_egret();
    let pods = ["a", "b"].map(|name| site.visitor(name));
    for pod in &pods {
        site.wait_only_by_egress(&pod.name);
    }
    pods.into_iter().for_each(crate::site::Pod::end);
    assert_eq!(site.attachments(), 0);
}

#[test]
fn many_pods_start_and_end_at_once() {
    let site = Site::with_egret();
    let before = site.node().run(["nft", "-s", "list", "table", "inet", "egret"]);
    for round in 0..2 {
        let names: Vec<String> = (0..24).map(|n| format!("pod-{round}-{n}")).collect();
        let started = site.start_at_once(&names, VISITOR);
        let pods: Vec<_> = started.into_iter().map(|p| Arc::new(p.unwrap_or_else(|e| panic!("{e}")))).collect();
        names.iter().for_each(|name| site.assert_left_by_egress(name));
        assert_eq!(site.attachments(), names.len());
        end_at_once(pods);
        assert_eq!(site.attachments(), 0);
    }
    assert_eq!(site.node().run(["nft", "-s", "list", "table", "inet", "egret"]), before);
    site.lab.assert_nothing_leaked();
}

/// Starts among ends: addresses and interface names are given to the next pod at once.
#[test]
fn pods_that_end_do_not_disturb_pods_that_start() {
    let site = Site::with_egret();
    std::thread::scope(|scope| {
        for series in ["a", "b", "c"] {
            let site = &site;
            scope.spawn(move || {
                for n in 0..6 {
                    let name = format!("{series}-{n}");
                    let pod = site.visitor(&name);
                    site.assert_left_by_egress(&name);
                    // Late and twice, as runtimes do.
                    pod.stop();
                    pod.stop();
                    pod.end();
                }
            });
        }
    });
    assert_eq!(site.attachments(), 0);
    site.lab.assert_nothing_leaked();
}

#[test]
fn the_runtime_calls_plugins_as_expected() {
    let site = Site::plain();
    let mut list: Value = serde_json::from_str(&site.plain_conflist()).expect("JSON");
    list["plugins"].as_array_mut().expect("plugins").push(json!({"type": recorder::TYPE}));
    site.runtime.configure(&list.to_string());
    let recorder = Recorder::put(&site.runtime);
    site.runtime.install();
    site.start_egret();
    let pod = site.visitor("visitor");
    site.assert_left_by_egress("visitor");
    let (id, uid) = (pod.id.clone(), pod.uid.clone());
    let adds = recorder.calls("ADD");
    let [add] = &adds[..] else { panic!("{adds:#?}") };
    let mut args: Vec<&str> = add.variable("CNI_ARGS").split(';').collect();
    args.sort_unstable();
    let infra = format!("K8S_POD_INFRA_CONTAINER_ID={id}");
    let uid = format!("K8S_POD_UID={uid}");
    assert_eq!(args, ["IgnoreUnknown=1", &infra, "K8S_POD_NAME=visitor", "K8S_POD_NAMESPACE=shop", &uid]);
    assert_eq!((add.variable("CNI_CONTAINERID"), add.variable("CNI_IFNAME")), (id.as_str(), "eth0"));
    pod.end();
    let dels = recorder.calls("DEL");
    assert!(dels.len() >= 2, "DEL comes more than once: {dels:#?}");
    assert!(dels[0].input.get("prevResult").is_some_and(|p| !p.is_null()));
    let last = dels.last().expect("a DEL");
    assert_eq!((last.variable("CNI_NETNS"), last.input.get("prevResult")), ("", None), "{dels:#?}");
    for verb in ["CHECK", "GC"] {
        assert!(recorder.calls(verb).is_empty(), "{verb}");
    }
}
