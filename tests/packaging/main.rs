//! The manifests: one file, a base for kustomize, a chart. They are what Kubernetes takes, and they are the same thing.

mod manifests;
mod release;

use manifests::{Object, differences, documents, key, render};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Command;

const PLATFORMS: [&str; 4] = ["gke", "k3s", "openshift", "talos"];

fn one_file() -> BTreeMap<String, Value> {
    documents(&manifests::read("install/egret.yaml"))
}

#[test]
fn every_object_is_one_that_kubernetes_takes() {
    let files = ["egret", "uninstall", "metrics-authentication", "kube-vip-annotations"];
    let files = files.map(|file| manifests::read(&format!("install/{file}.yaml"))).into_iter();
    let charts = PLATFORMS.iter().map(|p| render("egret-system", &[&format!("install/chart/platforms/{p}.yaml")]));
    for text in files.chain(charts) {
        for (name, value) in documents(&text) {
            if let Err(e) = Object::check(&value) {
                panic!("{name}: {e}");
            }
        }
    }
}

/// A field that Kubernetes does not know is dropped by it without a word.
#[test]
fn the_check_knows_a_wrong_field_from_a_right_one() {
    let mut object = one_file().remove("DaemonSet egret-system/egret-node").expect("the DaemonSet");
    assert_eq!(Object::check(&object), Ok(()));
    object["spec"]["template"]["spec"]["hostNetworks"] = json!(true);
    assert!(Object::check(&object).is_err_and(|e| e.contains("hostNetworks")), "{:?}", Object::check(&object));
    object["spec"]["template"]["spec"] = json!({"containers": [{"name": 5}]});
    assert!(Object::check(&object).is_err());
}

#[test]
fn the_chart_is_the_same_as_the_one_file() {
    let mut file = one_file();
    // Helm makes it: --create-namespace.
    assert!(file.remove("Namespace egret-system").is_some());
    let mut chart = documents(&render("egret-system", &[]));
    chart.extend(documents(&manifests::read("install/chart/crds/crds.yaml")));
    assert_eq!(differences(&file, &chart), Vec::<String>::new());
}

/// Nobody applies it by chance: it is in neither the one file nor the base.
#[test]
fn uninstalling_is_the_same_by_the_chart_and_by_the_file() {
    let values = std::env::temp_dir().join(format!("egret-uninstall-{}.yaml", std::process::id()));
    std::fs::write(&values, "uninstall: true\n").expect("write");
    let mut chart = documents(&render("egret-system", &[&values.display().to_string()]));
    let _ = std::fs::remove_file(&values);
    for kind in ["Deployment egret-system/egret-controller", "DaemonSet egret-system/egret-node"] {
        assert!(!chart.contains_key(kind), "{kind}");
    }
    chart.retain(|key, _| key.starts_with("DaemonSet"));
    let file = documents(&manifests::read("install/uninstall.yaml"));
    assert_eq!(differences(&file, &chart), Vec::<String>::new());
    assert!(one_file().keys().all(|key| !file.contains_key(key)));
    // What the daemon had, it has: where it is, and what of the host it sees.
    let pod = |object: &Value| object["spec"]["template"]["spec"].clone();
    let (mut node, mut uninstall) =
        (pod(&one_file()["DaemonSet egret-system/egret-node"]), pod(&file.into_values().next().expect("one")));
    for field in ["nodeSelector", "tolerations", "hostNetwork", "securityContext"] {
        assert_eq!(node[field].take(), uninstall[field].take(), "{field}");
    }
    let volumes = node["volumes"].as_array().expect("a list");
    let unknown: Vec<&Value> =
        uninstall["volumes"].as_array().expect("a list").iter().filter(|volume| !volumes.contains(volume)).collect();
    // The daemon's state directory goes itself, for which its parent has to be seen.
    assert!(volumes.iter().any(|volume| volume["hostPath"]["path"] == "/var/lib/egret"));
    assert_eq!(unknown.iter().map(|volume| &volume["hostPath"]["path"]).collect::<Vec<_>>(), ["/var/lib"]);
}

#[test]
fn the_base_for_kustomize_is_the_same_as_the_one_file() {
    let directory = manifests::path("install");
    match Command::new("kubectl").args(["kustomize"]).arg(&directory).output() {
        Ok(out) => {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            let built = documents(&String::from_utf8(out.stdout).expect("UTF-8"));
            assert_eq!(differences(&one_file(), &built), Vec::<String>::new());
        }
        // Without kubectl: a kustomization of resources alone is its resources.
        Err(_) => eprintln!("no kubectl here: kustomization.yaml was read by this test, not by kustomize"),
    }
    let kustomization: Value = manifests::parse(&manifests::read("install/kustomization.yaml")).remove(0);
    let fields: Vec<&String> = kustomization.as_object().expect("a map").keys().collect();
    assert_eq!(fields, ["apiVersion", "kind", "resources"]);
    let mut listed = BTreeMap::new();
    for file in kustomization["resources"].as_array().expect("a list") {
        listed.extend(documents(&manifests::read(&format!("install/{}", file.as_str().expect("a file's name")))));
    }
    assert_eq!(differences(&one_file(), &listed), Vec::<String>::new());
}

#[test]
fn the_charts_values_have_their_effects() {
    let values = json!({
        "image": {"repository": "registry.example/egret", "tag": "t1", "pullSecrets": [{"name": "key"}]},
        "cni": {"binDir": "/x/bin", "confDir": "/x/net.d"}, "logLevel": "debug", "logFormat": "text",
        "openshift": true, "criticalPods": 7, "metricsAuthentication": true, "kubeVipAnnotations": true,
        "admissionPolicy": false,
        "node": {"env": [{"name": "EGRET_DIRECT", "value": "10.0.0.0/8"}], "metricsPort": 1, "healthPort": 3, "privileged": true,
                 "nodeSelector": {"kubernetes.io/os": null, "a": "b"}, "tolerations": [], "affinity": {"nodeAffinity": {}},
                 "podAnnotations": {"c": "d"}, "podLabels": {"e": "f"}, "seLinuxOptions": {"type": "spc_t"},
                 "resources": {"limits": {"memory": "1Gi"}}, "priorityClassName": ""},
        "controller": {"replicas": 1, "env": [{"name": "EGRET_X", "value": "y"}], "metricsPort": 2,
                       "affinity": {"nodeAffinity": {}}, "podLabels": {"g": "h"}}
    });
    let file = std::env::temp_dir().join(format!("egret-values-{}.yaml", std::process::id()));
    std::fs::write(&file, values.to_string()).expect("write");
    let objects = documents(&render("elsewhere", &[&file.display().to_string()]));
    let _ = std::fs::remove_file(&file);
    for (name, object) in &objects {
        assert_eq!(Object::check(object), Ok(()), "{name}");
        let namespace = object["metadata"]["namespace"].as_str();
        // Cilium's Leases are in kube-system, wherever Egret is.
        let of_cilium = name.contains(" kube-system/egret-controller");
        let expected = if of_cilium { "kube-system" } else { "elsewhere" };
        let expected = (!key(object).starts_with("Cluster")).then_some(expected);
        assert_eq!(namespace, expected, "{name}");
        for subject in object["subjects"].as_array().into_iter().flatten() {
            assert_eq!(subject["namespace"], "elsewhere", "{name}");
        }
    }
    assert!(!objects.keys().any(|key| key.starts_with("ValidatingAdmission")), "admissionPolicy is false");
    for file in ["metrics-authentication", "kube-vip-annotations"] {
        let text = manifests::read(&format!("install/{file}.yaml"));
        for (name, object) in documents(&text.replace("egret-system", "elsewhere")) {
            assert_eq!(objects.get(&name), Some(&object), "{name}");
        }
    }
    let quota = &objects["ResourceQuota elsewhere/egret-critical-pods"];
    assert_eq!(quota["spec"]["hard"]["pods"], "7");
    assert!(objects.contains_key("RoleBinding elsewhere/egret-scc"));
    let node = &objects["DaemonSet elsewhere/egret-node"]["spec"]["template"];
    let pod = &node["spec"];
    assert_eq!(node["metadata"]["annotations"]["c"], "d");
    assert_eq!(node["metadata"]["labels"]["e"], "f");
    assert_eq!((&pod["nodeSelector"], &pod["affinity"]), (&json!({"a": "b"}), &json!({"nodeAffinity": {}})));
    assert_eq!((&pod["tolerations"], &pod["priorityClassName"]), (&Value::Null, &Value::Null));
    assert_eq!(pod["imagePullSecrets"], json!([{"name": "key"}]));
    assert_eq!(pod["securityContext"]["seLinuxOptions"]["type"], "spc_t");
    let container = &pod["containers"][0];
    assert_eq!((&container["image"], &pod["initContainers"][0]["image"]), (&container["image"], &container["image"]));
    assert_eq!(container["image"], "registry.example/egret:t1");
    assert_eq!(container["securityContext"]["privileged"], true);
    assert_eq!(
        container["resources"],
        json!({"limits": {"memory": "1Gi"}, "requests": {"cpu": "20m", "memory": "32Mi"}})
    );
    let environment = |name: &str| {
        let all = container["env"].as_array().expect("a list");
        all.iter().find(|e| e["name"] == name).map(|e| e["value"].clone()).unwrap_or_default()
    };
    let wanted = [
        ("EGRET_DIRECT", "10.0.0.0/8"),
        ("EGRET_METRICS_ADDRESS", "[$(EGRET_HOST_ADDRESS)]:1"),
        ("EGRET_HEALTH_ADDRESS", "127.0.0.1:3"),
        ("EGRET_METRICS_AUTHENTICATION", "true"),
        ("EGRET_LOG_LEVEL", "debug"),
        ("EGRET_LOG_FORMAT", "text"),
    ];
    for (name, value) in wanted {
        assert_eq!(environment(name), value, "{name}");
    }
    let paths: Vec<&Value> =
        pod["volumes"].as_array().expect("a list").iter().map(|v| &v["hostPath"]["path"]).collect();
    assert_eq!(paths[..2], ["/x/bin", "/x/net.d"]);
    let controller = &objects["Deployment elsewhere/egret-controller"]["spec"];
    assert_eq!(controller["replicas"], 1);
    assert_eq!(controller["template"]["spec"]["affinity"], json!({"nodeAffinity": {}}));
}

/// What Prometheus' operator and Grafana get from the chart is what the files say, and by default nothing.
#[test]
fn the_charts_monitoring_equals_the_files() {
    let of_monitoring = |key: &String| {
        ["PodMonitor", "PrometheusRule", "ConfigMap"].iter().any(|kind| key.starts_with(&format!("{kind} ")))
    };
    assert!(!documents(&render("egret-system", &[])).keys().any(of_monitoring));
    let file = std::env::temp_dir().join(format!("egret-monitoring-{}.yaml", std::process::id()));
    let on = json!({"podMonitors": true, "rules": true, "dashboard": true, "labels": {"release": "prometheus"},
                    "endpoint": {"scheme": "https"}});
    std::fs::write(&file, json!({"monitoring": on}).to_string()).expect("write");
    let mut objects = documents(&render("egret-system", &[&file.display().to_string()]));
    let _ = std::fs::remove_file(&file);
    objects.retain(|key, _| of_monitoring(key));
    assert_eq!(objects.len(), 4, "{:?}", objects.keys());
    for (name, object) in &mut objects {
        let labels = object["metadata"].as_object_mut().and_then(|m| m.remove("labels")).expect(name);
        let board = name.starts_with("ConfigMap");
        assert_eq!((&labels["release"], labels["grafana_dashboard"] == "1"), (&json!("prometheus"), board), "{name}");
        let endpoints = object.pointer_mut("/spec/podMetricsEndpoints").and_then(Value::as_array_mut);
        for endpoint in endpoints.into_iter().flatten() {
            assert_eq!(endpoint.as_object_mut().and_then(|e| e.remove("scheme")), Some(json!("https")), "{name}");
        }
    }
    let rules = objects.remove("PrometheusRule egret-system/egret").expect("the alerts");
    assert_eq!(rules["spec"], manifests::parse(&manifests::read("install/prometheus/rules.yaml"))[0]);
    let board = objects.remove("ConfigMap egret-system/egret-dashboard").expect("the board");
    let board: Value = serde_json::from_str(board["data"]["egret.json"].as_str().expect("a text")).expect("JSON");
    let of_file: Value = serde_json::from_str(&manifests::read("install/grafana/egret.json")).expect("JSON");
    assert_eq!(board, of_file);
    let monitors = documents(&manifests::read("install/prometheus/monitors.yaml"));
    assert_eq!(differences(&monitors, &objects), Vec::<String>::new());
    // They find the pods, and the port.
    for (name, monitor) in monitors {
        let pods = ["DaemonSet egret-system/egret-node", "Deployment egret-system/egret-controller"];
        let selector = monitor["spec"]["selector"]["matchLabels"].as_object().expect("labels").clone();
        let found = pods.iter().filter(|key| {
            let template = &one_file()[**key]["spec"]["template"];
            let ports = template["spec"]["containers"][0]["ports"].as_array().cloned().unwrap_or_default();
            selector.iter().all(|(label, value)| &template["metadata"]["labels"][label] == value)
                && ports.iter().any(|port| port["name"] == monitor["spec"]["podMetricsEndpoints"][0]["port"])
        });
        assert_eq!(found.count(), 1, "{name}");
    }
}

/// Neither pods nor other hosts learn of a node's health, and metrics are not at every address of the host.
#[test]
fn nothing_listens_on_all_addresses_and_kubelet_asks_where_only_the_host_listens() {
    let file = one_file();
    for (object, metrics, health) in
        [("DaemonSet egret-system/egret-node", 9871, 9873), ("Deployment egret-system/egret-controller", 9872, 9874)]
    {
        let container = &file[object]["spec"]["template"]["spec"]["containers"][0];
        let environment = container["env"].as_array().expect("a list");
        let value = |name: &str| environment.iter().find(|e| e["name"] == name).map(|e| &e["value"]);
        let place = |name: &str| environment.iter().position(|e| e["name"] == name);
        assert_eq!(
            value("EGRET_METRICS_ADDRESS"),
            Some(&json!(format!("[$(EGRET_HOST_ADDRESS)]:{metrics}"))),
            "{object}"
        );
        // A variable is known to those after it.
        assert!(place("EGRET_HOST_ADDRESS") < place("EGRET_METRICS_ADDRESS"), "{object}");
        assert_eq!(value("EGRET_HEALTH_ADDRESS"), Some(&json!(format!("127.0.0.1:{health}"))), "{object}");
        let ports = container["ports"].as_array().expect("a list");
        let port = ports.iter().find(|p| p["name"] == "health").map(|p| &p["containerPort"]);
        assert_eq!(port, Some(&json!(health)), "{object}");
        for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
            let get = &container[probe]["httpGet"];
            assert_eq!((&get["host"], &get["port"]), (&json!("127.0.0.1"), &json!("health")), "{object} {probe}");
        }
    }
}

/// What is promised of privileges: no more than these.
#[test]
fn no_container_has_more_privileges_than_it_needs() {
    let file = one_file();
    for (object, capabilities) in [
        ("DaemonSet egret-system/egret-node", json!(["CHOWN", "DAC_OVERRIDE", "FOWNER", "NET_ADMIN", "NET_RAW"])),
        ("Deployment egret-system/egret-controller", Value::Null),
    ] {
        let pod = &file[object]["spec"]["template"]["spec"];
        let all = ["initContainers", "containers"].iter().flat_map(|k| pod[k].as_array().into_iter().flatten());
        for container in all {
            let context = &container["securityContext"];
            let name = &container["name"];
            assert_eq!(context["privileged"], false, "{name}");
            assert_eq!(context["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(context["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(context["capabilities"]["drop"], json!(["ALL"]), "{name}");
            let of_files = json!(["CHOWN", "DAC_OVERRIDE", "FOWNER"]);
            let expected = if name == "install" { &of_files } else { &capabilities };
            assert_eq!(&context["capabilities"]["add"], expected, "{name}");
        }
        assert_eq!((&pod["hostPID"], &pod["hostIPC"]), (&Value::Null, &Value::Null));
    }
}

/// Egret is not held back by Egret: for a pod on the host's network a runtime calls no plugin.
#[test]
fn egrets_own_pods_are_on_the_hosts_network_and_tolerate_the_taint() {
    let file = one_file();
    for object in ["DaemonSet egret-system/egret-node", "Deployment egret-system/egret-controller"] {
        let pod = &file[object]["spec"]["template"]["spec"];
        assert_eq!(pod["hostNetwork"], true, "{object}");
        let tolerations = pod["tolerations"].as_array().expect("a list");
        let tolerates = |t: &Value| t["key"] == "egret.dev/not-ready" || t.get("key").is_none();
        assert!(tolerations.iter().any(|t| t["operator"] == "Exists" && tolerates(t)), "{object}");
    }
}

#[test]
fn the_release_is_named_alike_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    let chart = manifests::parse(&manifests::read("install/chart/Chart.yaml")).remove(0);
    assert_eq!((&chart["version"], &chart["appVersion"]), (&json!(version), &json!(version)));
    // RFC 6761: nobody can ever have this name, so that nobody's image is pulled by accident.
    let image = format!("egret.invalid/egret:v{version}");
    let text = manifests::read("install/egret.yaml") + &manifests::read("install/uninstall.yaml");
    let images: Vec<&str> = text.lines().filter_map(|l| l.trim().strip_prefix("image: ")).collect();
    assert!(images.len() == 5 && images.iter().all(|i| **i == image), "{images:?}");
}

#[test]
fn the_image_is_built_by_the_same_compiler() {
    let toolchain = manifests::read("rust-toolchain.toml");
    let channel = toolchain.lines().find_map(|l| l.strip_prefix("channel = ")).expect("a channel").trim_matches('"');
    let file = manifests::read("Dockerfile");
    assert!(file.contains(&format!("ARG BUILDER=docker.io/library/rust:{channel}-slim-")), "not {channel}:\n{file}");
}
