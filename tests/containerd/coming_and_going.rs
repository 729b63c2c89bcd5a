//! Egret is installed on a node where pods run, and removed from one. Needs root.

use crate::site::{Pod, Site, egress, own};

#[test]
fn earlier_pods_are_adopted_and_end_with_plugins_that_did_not_set_them_up() {
    let site = Site::plain();
    site.runtime.wait_network();
    let old = site.visitor("old");
    let gone = site.visitor("gone");
    site.wait_heard_from("old", own(site.node()));
    site.runtime.install();
    // Its DEL comes before any daemon ran.
    gone.end();
    site.start_egret();
    site.wait_heard_from("old", egress());
    let new = site.visitor("new");
    site.assert_left_by_egress("new");
    old.end();
    new.end();
    assert_eq!(site.attachments(), 0);
}

#[test]
fn egret_is_removed_from_a_node_whose_runtime_still_uses_it() {
    let site = Site::with_egret();
    let before = [site.visitor("before-1"), site.visitor("before-2")];
    site.assert_left_by_egress("before-1");
    site.lab.daemon("n1").term();
    let run_dir = site.node().run_dir().display().to_string();
    let state_dir = site.node().state_dir().display().to_string();
    let out = site.runtime.egretd(&["uninstall", "--state-dir", &state_dir, "--run-dir", &run_dir]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    // At once: the runtime may still use the list that it has read.
    let during = site.visitor("during");
    for name in ["before-1", "before-2", "during"] {
        site.wait_heard_from(name, own(site.node()));
    }
    site.runtime.restart();
    site.runtime.wait_network();
    let after = site.visitor("after");
    site.wait_heard_from("after", own(site.node()));
    let [first, second] = before;
    [first, during, after].into_iter().for_each(Pod::end);
    // The runtime has read the directory again: the program can be removed while an earlier pod still runs.
    let out = site.runtime.egretd(&["uninstall", "--state-dir", &state_dir, "--run-dir", &run_dir, "--remove-plugin"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(!site.runtime.bin_dir.join("egret-cni").exists());
    second.end();
}
