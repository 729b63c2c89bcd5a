//! A kernel that lacks a part. `make vm-test` runs this, in a machine whose modules may be taken away.

use lab::{Lab, host, manifests};
use std::fs;
use std::thread;
use std::time::Duration;

/// Keeps modprobe from loading vxlan, until it is dropped.
struct WithoutVxlan;

const SETTING: &str = "/etc/modprobe.d/egret-test.conf";

impl WithoutVxlan {
    fn new() -> Self {
        fs::create_dir_all("/etc/modprobe.d").expect("make a directory");
        fs::write(SETTING, "install vxlan /bin/false\n").expect("write modprobe's setting");
        host::checked(&["modprobe", "-r", "vxlan"], None);
        WithoutVxlan
    }
}

impl Drop for WithoutVxlan {
    fn drop(&mut self) {
        let _ = fs::remove_file(SETTING);
    }
}

#[test]
#[ignore = "takes a module away from the whole machine: make vm-test T='--ignored refusals'"]
fn a_kernel_without_vxlan_is_named_once_and_tried_again() {
    let without = WithoutVxlan::new();
    let lab = Lab::new();
    lab.write_manifest("gateway.yaml", &manifests::gateway("default", &["192.0.2.50"]));
    lab.start_controller();
    let daemon = lab.start_node("n1");
    let status = || {
        let file = lab.manifests().path().join("status/egressnodes/n1.yaml");
        fs::read_to_string(file).unwrap_or_default()
    };
    lab.wait_until("the condition is false", Duration::from_secs(20), || {
        let status = status();
        status.contains("type: DatapathReady") && status.contains("CONFIG_VXLAN")
    });
    assert!(status().contains("reason: KernelRefuses") && status().contains("status: \"False\""), "{}", status());
    let lines = || daemon.log().matches("CONFIG_VXLAN").count();
    let before = lines();
    thread::sleep(Duration::from_secs(8));
    assert_eq!(lines(), before, "the log repeats itself:\n{}", daemon.log());
    // The module is there now: within a pause, which is at most a minute.
    drop(without);
    lab.wait_until("the node is in sync", Duration::from_secs(70), || !status().contains("status: \"False\""));
    assert!(status().contains("reason: InSync"), "{}", status());
}
