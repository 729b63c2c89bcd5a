//! Connections on which no policy decided: they began before the policy, or while the rules were missing. Needs root.

use lab::traffic::SessionReport;
use lab::{EGRESS4, EXT4, Flood, Lab, Pod, SERVERS, VISITOR, manifests};
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::Duration;

/// How long a pod must have run to be no new one when a policy begins.
const RUNS: Duration = Duration::from_millis(5500);
const PACE: Duration = Duration::from_millis(20);
/// The egress IPs of these policies.
const KEEPS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 57);
const ENDS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 58);

/// A pod's connections that continue.
struct Going {
    pod: Pod,
    sessions: Vec<lab::Session>,
    flood: Flood,
}

impl Going {
    fn of(pod: Pod) -> Going {
        let sessions = SERVERS.iter().map(|server| pod.session(*server).expect("a session")).collect();
        let flood = pod.flood(EXT4, PACE, false);
        Going { pod, sessions, flood }
    }

    /// The results of its sessions, and the source addresses of its UDP flow.
    fn stop(self) -> (Pod, Vec<SessionReport>, Vec<IpAddr>) {
        let sessions = self.sessions.into_iter().map(lab::Session::stop).collect();
        (self.pod, sessions, self.flood.stop().seen_as.into_iter().collect())
    }

    #[track_caller]
    fn assert_kept(self) {
        let node = self.pod.node.ipv4();
        let (pod, sessions, seen_as) = self.stop();
        assert!(sessions.iter().all(|s| s.broken.is_none()), "{}: {sessions:?}", pod.name);
        assert_eq!(seen_as, [IpAddr::from(node)], "{}", pod.name);
    }

    #[track_caller]
    fn assert_ended(self, address: Ipv4Addr) {
        let node = self.pod.node.ipv4();
        let (pod, sessions, mut seen_as) = self.stop();
        let is_reset = |s: &SessionReport| s.broken.as_ref().is_some_and(|why| why.contains("reset"));
        assert!(sessions.iter().all(is_reset), "{}: {sessions:?}", pod.name);
        seen_as.sort_by_key(|a| *a != IpAddr::from(node));
        assert_eq!(seen_as, [IpAddr::from(node), address.into()], "{}", pod.name);
    }
}

fn begins(lab: &Lab, app: &str, address: Ipv4Addr, more: &str) {
    let v6 = format!("2001:db8::{}", address.octets()[3]);
    let spec = format!(
        "podSelector: {{ matchLabels: {{ app: {app} }} }}\n  address: {{ ipv4: {address}, ipv6: \"{v6}\" }}\n  {more}"
    );
    lab.write_manifest(&format!("{app}.yaml"), &manifests::policy("shop", app, &spec));
}

#[test]
fn a_new_policy_keeps_or_ends_existing_connections() {
    let lab = Lab::scene();
    let pods = ["n1", "n2", "g1", "g2"]
        .map(|node| ["keeps", "ends"].map(|app| lab.add_pod(node, "shop", &format!("{app}-{node}"), &[("app", app)])));
    thread::sleep(RUNS);
    let going = pods.map(|of_node| of_node.map(Going::of));
    thread::sleep(Duration::from_millis(300));
    begins(&lab, "keeps", KEEPS, "");
    begins(&lab, "ends", ENDS, "existingConnections: End");
    for [keeps, ends] in &going {
        lab.wait_seen_as(&keeps.pod, KEEPS);
        lab.wait_seen_as(&ends.pod, ENDS);
    }
    thread::sleep(Duration::from_millis(500));
    for [keeps, ends] in going {
        keeps.assert_kept();
        ends.assert_ended(ENDS);
    }
}

#[test]
fn connections_that_begin_while_the_rules_are_missing_end_when_these_are_restored() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    for node in ["n1", "n2", "g1"] {
        let [kept, visitor] = [("kept", "keeps"), ("visitor", "visitor")]
            .map(|(name, app)| lab.add_pod(node, "shop", &format!("{name}-{node}"), &[("app", app)]));
        thread::sleep(RUNS);
        let kept = Going::of(kept);
        begins(&lab, "keeps", KEEPS, "");
        lab.wait_seen_as(&kept.pod, KEEPS);
        lab.wait_seen_as(&visitor, EGRESS4);

        let daemon = lab.daemon(node);
        daemon.suspend(true);
        lab.node(node).nft("delete table inet egret");
        // While the table is missing, these routes block the pod.
        for command in ["route flush table 7874", "-6 route flush table 7874"] {
            lab.node(node).ip(command);
        }
        let open = Going::of(visitor);
        thread::sleep(Duration::from_millis(300));
        daemon.suspend(false);
        lab.wait_seen_as(&open.pod, EGRESS4);
        thread::sleep(Duration::from_millis(500));
        open.assert_ended(EGRESS4);
        kept.assert_kept();
        lab.remove_manifest("keeps.yaml");
    }
}

#[test]
fn connections_that_began_without_rules_and_daemon_are_ended() {
    let lab = Lab::scene();
    for node in ["n1", "g2"] {
        let visitor = lab.add_pod(node, "shop", &format!("visitor-{node}"), VISITOR);
        lab.daemon(node).kill9();
        lab.node(node).nft("delete table inet egret");
        let open = Going::of(visitor);
        thread::sleep(Duration::from_millis(300));
        lab.daemon(node).restart();
        lab.wait_seen_as(&open.pod, EGRESS4);
        thread::sleep(Duration::from_millis(500));
        open.assert_ended(EGRESS4);
    }
}

#[test]
fn a_daemon_that_is_restarted_ends_no_connection_that_was_kept() {
    let lab = Lab::builder().node_arguments(&["--own-tables=false"]).scene();
    let kept = lab.add_pod("n1", "shop", "kept", &[("app", "keeps")]);
    thread::sleep(RUNS);
    let kept = Going::of(kept);
    begins(&lab, "keeps", KEEPS, "");
    lab.wait_seen_as(&kept.pod, KEEPS);
    let daemon = lab.daemon("n1");
    daemon.kill9();
    daemon.restart();
    lab.wait_ready("n1");
    lab.wait_seen_as(&kept.pod, KEEPS);
    // Another program removes rules, and the daemon notices it.
    lab.node("n1").nft("flush chain inet egret egress-guard");
    thread::sleep(Duration::from_millis(500));
    kept.assert_kept();
}
