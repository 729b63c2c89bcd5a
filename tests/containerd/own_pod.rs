//! The node daemon as the pod of `install/egret.yaml` on a real container runtime: the Dockerfile's image, with only
//! the manifest's privileges, its read-only root, and the kubelet's protections. Needs root.

use crate::cri::{Container, Sandbox};
use crate::image;
use crate::site::{NODE, Pod, Site, egress, own};
use lab::{VISITOR, leftovers, metrics};
use serde_json::Value;
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

/// The user that owns the plugins' directories.
const KUBE: u32 = 998;
/// The plugin's default run directory.
const RUN_DIR: &str = "/run/egret";
/// The parent of the plugin's default state directory.
const VAR_LIB: &str = "/var/lib";

#[test]
fn the_daemonset_of_the_manifest_enforces_policies() {
    let site = Site::plain();
    let manifest = Manifest::read("install/egret.yaml");
    let built = image::by_the_dockerfile(&site.lab.directory().join("egret-image"), &manifest.image);
    assert_eq!(built.added, ["usr/local/bin/egret-cni", "usr/local/bin/egretd"]);
    site.runtime.import(&built.archive, &manifest.image);
    // This node's daemon uses the manifest's directories. The host's own ones stay unchanged.
    let (run_dir, var_lib) = (site.node().run_dir(), site.lab.directory().join("var-lib"));
    fs::create_dir_all(var_lib.join("egret")).expect("make a directory");
    site.node().run(["mount", "--bind", &var_lib.display().to_string(), VAR_LIB]);
    fs::create_dir_all(RUN_DIR).expect("make a directory");
    site.node().run(["mount", "--bind", &run_dir.display().to_string(), RUN_DIR]);
    site.lab.start_controller();
    site.lab.start_node("g1");

    let pod = site.start_on_host_network("egret-system", "egret-node-x7k2p");
    let sandbox = Sandbox { host_network: true, ..site.sandbox(&pod, 0) };
    let start = |kind: &str, attempt: u32| {
        let sandbox = Sandbox { attempt, ..sandbox.clone() };
        let container = manifest.container(kind, &site);
        site.runtime.cri.start(&pod.id, &sandbox, &container).unwrap_or_else(|e| panic!("{kind}: {e}"))
    };
    // `egretd check` tries things in a namespace of its own, for which it needs the right to create one.
    let mut check = manifest.container("containers", &site);
    (check.name, check.args) = ("check".into(), vec!["check".into()]);
    check.add.push("SYS_ADMIN".into());
    let check = site.runtime.cri.start(&pod.id, &sandbox, &check).unwrap_or_else(|e| panic!("check: {e}"));
    let code = site.exit_code(&check);
    let said = fs::read_to_string(site.lab.directory().join("logs/check.log")).unwrap_or_default();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("nf_tables"), "{said}");

    // As kubespray leaves the directories: not owned by root, and closed to other users.
    let conflist = site.runtime.conf_dir.join("10-lab.conflist");
    for (path, mode) in [(&site.runtime.bin_dir, 0o755), (&site.runtime.conf_dir, 0o755), (&conflist, 0o600)] {
        chown(path, Some(KUBE), Some(KUBE)).expect("another owner");
        fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
    }
    let install = start("initContainers", 0);
    assert_eq!(site.exit_code(&install), 0);
    assert!(site.runtime.bin_dir.join("egret-cni").exists());
    let has_entry =
        || fs::read_to_string(site.runtime.conf_dir.join("10-lab.conflist")).is_ok_and(|t| t.contains("egret-cni"));
    assert!(!has_entry(), "the daemon has not been in sync");
    site.runtime.wait_network();

    let node = start("containers", 0);
    site.lab.wait_until("the entry is there", Duration::from_secs(20), has_entry);
    let now = fs::metadata(&conflist).expect("the list");
    assert_eq!((now.uid(), now.gid(), now.mode() & 0o777), (KUBE, KUBE, 0o600), "owner and mode stay");
    let list = fs::read_to_string(site.runtime.conf_dir.join("10-lab.conflist")).expect("the list");
    assert!(list.contains(r#"{"type": "egret-cni", "socket": "/run/egret/cni.sock"}"#), "{list}");
    site.runtime.wait_network();
    let port: SocketAddr = format!("127.0.0.1:{}", manifest.port()).parse().expect("an address");
    let asked = |path: &str| metrics::get(site.node(), port, path).is_ok_and(|(status, _)| status == 200);
    for path in manifest.probes() {
        site.lab.wait_until(&format!("{path} says yes"), Duration::from_secs(20), || {
            assert_eq!(site.runtime.cri.exit_code(&node).expect("a status"), None, "the daemon has ended");
            asked(&path)
        });
    }
    // The policy is in force when a first pod leaves from its egress IP.
    let probe = site.visitor("probe");
    site.wait_heard_from("probe", egress());
    let visitor = site.visitor("visitor");
    site.assert_left_by_egress("visitor");
    // The entry is maintained.
    site.runtime.configure(&site.plain_conflist());
    site.lab.wait_until("the entry is back", Duration::from_secs(2), has_entry);

    // A rollout: the pod's container ends and another one starts. Traffic continues, and a pod that starts meanwhile
    // is quarantined.
    site.runtime.cri.stop_container(&node, 10).unwrap_or_else(|e| panic!("{e}"));
    site.wait_only_by_egress("visitor");
    let between = site.start("shop", "between", VISITOR);
    site.assert_unheard("between");
    let again = start("containers", 1);
    site.wait_heard_from("between", egress());
    site.wait_only_by_egress("visitor");
    [probe, between].into_iter().for_each(Pod::end);
    // Egret is removed with the uninstallation manifest, while no daemon runs.
    let uninstall = Manifest::read("install/uninstall.yaml");
    let start = |attempt: u32| {
        let sandbox = Sandbox { attempt, ..sandbox.clone() };
        let container = uninstall.container("initContainers", &site);
        site.runtime.cri.start(&pod.id, &sandbox, &container).unwrap_or_else(|e| panic!("uninstall: {e}"))
    };
    assert_eq!(site.exit_code(&start(0)), 1);
    site.wait_only_by_egress("visitor");
    site.runtime.cri.stop_container(&again, 10).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(site.exit_code(&start(1)), 0);
    site.wait_heard_from("visitor", own(site.node()));
    assert!(!has_entry());
    assert!(!var_lib.join("egret").exists());
    visitor.end();
    pod.end();
}

/// The DaemonSet's pod.
struct Manifest {
    pod: Value,
    image: String,
}

impl Manifest {
    fn read(file: &str) -> Manifest {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("a manifest");
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
        let daemonset = objects.into_iter().find(|o| o["kind"] == "DaemonSet").expect("the DaemonSet");
        let pod = daemonset["spec"]["template"]["spec"].clone();
        let image = text_of(&pod["containers"][0]["image"]);
        Manifest { pod, image }
    }

    /// The port that the probes ask.
    fn port(&self) -> u64 {
        let container = &self.pod["containers"][0];
        let name = &container["readinessProbe"]["httpGet"]["port"];
        let port = list(&container["ports"]).iter().find(|port| port["name"] == *name).expect("the probes' port");
        port["containerPort"].as_u64().expect("a port")
    }

    fn probes(&self) -> Vec<String> {
        ["startupProbe", "livenessProbe", "readinessProbe"]
            .map(|kind| text_of(&self.pod["containers"][0][kind]["httpGet"]["path"]))
            .into()
    }

    /// As a kubelet on the site's node makes it; its directories are the site's, its cluster the lab's directory.
    fn container(&self, kind: &str, site: &Site) -> Container {
        let container = &self.pod[kind][0];
        let context = &container["securityContext"];
        assert_eq!(context["privileged"], false);
        let cluster = site.lab.manifests().path().display().to_string();
        let host_ip = site.node().ipv4().to_string();
        let value = |variable: &Value| match text_of(&variable["name"]).as_str() {
            "EGRET_CLUSTER" => format!("dir:{cluster}"),
            _ if variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName" => NODE.to_owned(),
            _ if variable["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIP" => host_ip.clone(),
            _ => text_of(&variable["value"]).replace("$(EGRET_HOST_ADDRESS)", &host_ip),
        };
        let mounts = list(&container["volumeMounts"]).iter().map(|mount| {
            let volume = list(&self.pod["volumes"]).iter().find(|v| v["name"] == mount["name"]).expect("a volume");
            let host = match text_of(&volume["hostPath"]["path"]).as_str() {
                "/opt/cni/bin" => site.runtime.bin_dir.display().to_string(),
                "/etc/cni/net.d" => site.runtime.conf_dir.display().to_string(),
                other => other.to_owned(),
            };
            (host, text_of(&mount["mountPath"]))
        });
        let environment = list(&container["env"]).iter().map(|v| (text_of(&v["name"]), value(v)));
        let texts = |value: &Value| list(value).iter().map(text_of).collect();
        Container {
            name: text_of(&container["name"]),
            image: self.image.clone(),
            args: texts(&container["args"]),
            env: environment.chain([(leftovers::VARIABLE.to_owned(), site.lab.name().to_owned())]).collect(),
            mounts: mounts.chain([(cluster.clone(), cluster.clone())]).collect(),
            add: texts(&context["capabilities"]["add"]),
            drop: texts(&context["capabilities"]["drop"]),
            user: self.pod["securityContext"]["runAsUser"].as_i64().expect("a user"),
            readonly_root: context["readOnlyRootFilesystem"] == true,
            escalation: context["allowPrivilegeEscalation"] == true,
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
