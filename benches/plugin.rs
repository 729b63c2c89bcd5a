//! CNI ADD as a runtime feels it: from the start of the plugin's process to its end, against other plugins.
//!
//! `egret-cni` speaks to a real `egretd node` with 1,000 policies and 100 pods; each ADD is of a pod whose chains the
//! kernel does not hold, and ends when it does.

mod harness;

use harness::call::{Call, pod_before_add};
use harness::{Bound, Table, cluster, median, ms, pods};
use lab::cni::Runtime;
use lab::{Lab, NodeSpec, Pod, Pods};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

const NODES: usize = 100;
const POLICIES: usize = 1_000;
const PODS: usize = 100;
const ROUNDS: usize = 101;
/// Rounds with a pause before each.
const PAUSED: usize = 31;
/// Long enough for the daemon to give back the memory that a change has taken.
const PAUSE: Duration = Duration::from_millis(1_500);
/// The plugin's entry that has a bound.
const SELECTED: &str = "egret-cni, a selected pod";
/// What the bound is a ratio to.
const TUNING: &str = "tuning, one sysctl";
/// Told to this program itself: end at once.
const NOTHING: &str = "nothing";

fn main() {
    if std::env::args().nth(1).as_deref() == Some(NOTHING) {
        return;
    }
    harness::begin(&format!("CNI ADD, whole process; {POLICIES} policies, {PODS} pods on the node, {NODES} nodes"));
    let lab = Lab::builder()
        .nodes(vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::new("n2", 12, Pods::Routed)])
        .build();
    let directory = lab.manifests().path();
    cluster::write_nodes(directory, NODES - lab.nodes().len());
    cluster::write_policies(&lab, POLICIES);
    cluster::write_gateway(directory, POLICIES, &[&cluster::node_name(0), &cluster::node_name(1)]);
    lab.nodes().iter().for_each(|node| pods::populate(&lab, &node.name, PODS));
    lab.start_node("n1");
    lab.wait_ready("n1");

    let selected = pod(&lab, "selected", POLICIES - 1);
    let other = pod(&lab, "other", usize::MAX);
    let node = lab.node("n1");
    let mut all = vec![
        Contestant::nothing(),
        Contestant::new(&lab, SELECTED, &selected, node.cni_entry()),
        Contestant::new(&lab, "egret-cni, another pod", &other, node.cni_entry()),
        Contestant::new(&lab, TUNING, &other, json!({"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}})),
        Contestant::new(
            &lab,
            "portmap, one port",
            &other,
            json!({"type": "portmap", "snat": true,
            "runtimeConfig": {"portMappings": [{"hostPort": 18080, "containerPort": 80, "protocol": "tcp"}]}}),
        ),
        Contestant::new(&lab, "firewall", &other, json!({"type": "firewall", "backend": "iptables"})),
        Contestant::new(
            &lab,
            "bandwidth",
            &other,
            json!({"type": "bandwidth", "ingressRate": 1_000_000_000, "ingressBurst": 1_000_000_000}),
        ),
    ];
    // Its DEL leaves the host's end as it is: that goes with the pod.
    if let Some(bandwidth) = all.last_mut() {
        let device = other.host_interface();
        bandwidth.after = ["tc", "qdisc", "del", "dev", &device, "root"].map(str::to_owned).into();
    }
    let by_nft = node_by_nft(&lab);
    let mut nft = Vec::new();
    node.within(|| {
        for contestant in &mut all {
            contestant.qualify();
        }
        all.retain(|c| {
            c.refusal.is_none() || {
                println!("{}: {}", c.name, c.refusal.as_deref().unwrap_or_default());
                false
            }
        });
        for _ in 0..ROUNDS {
            for contestant in &mut all {
                let took = contestant.round().unwrap_or_else(|| panic!("{} fails", contestant.name));
                contestant.times.push(took);
            }
        }
    });
    lab.node("n2").within(|| {
        for _ in 0..ROUNDS {
            nft.push(by_nft.round());
        }
    });
    let (mut paused, mut changed, mut paused_tuning) = (Vec::new(), Vec::new(), Vec::new());
    let place = |name| all.iter().position(|c| c.name == name).expect("it runs everywhere");
    let (ours, tuning) = (place(SELECTED), place(TUNING));
    for n in 0..PAUSED {
        for (is_change, who, times) in
            [(false, ours, &mut paused), (true, ours, &mut changed), (false, tuning, &mut paused_tuning)]
        {
            if is_change {
                lab.add_namespace("elsewhere", &[("round", &n.to_string())]);
            }
            std::thread::sleep(PAUSE);
            times.push(node.within(|| all[who].round()).expect("it did before"));
        }
    }
    let reference = median(&all[tuning].times);
    let mut table = Table::default();
    for c in &all {
        let time = median(&c.times);
        let bound = if c.name == SELECTED { Bound::AtMost(1.0) } else { Bound::None };
        table.row(&c.name, ms(time), time.as_secs_f64() / reference.as_secs_f64(), bound);
    }
    for (what, times) in [
        ("`nft -f` with a pod's transaction alone", &nft),
        ("a selected pod, nothing for 1.5 s before it", &paused),
        ("a selected pod, a change of the cluster 1.5 s before it", &changed),
        ("tuning, nothing for 1.5 s before it", &paused_tuning),
    ] {
        let time = median(times);
        table.row(what, ms(time), time.as_secs_f64() / reference.as_secs_f64(), Bound::None);
    }
    table.print(["", "median", "of `tuning`"]);
}

/// A pod with the label of a policy, or of none.
fn pod(lab: &Lab, name: &str, policy: usize) -> Pod {
    let wanted = cluster::policy(policy.min(POLICIES - 1));
    let app = if policy < POLICIES { wanted.name.as_str() } else { "other" };
    pod_before_add(lab, &wanted.namespace, name, &[("app", app)])
}

/// A program that is started again and again.
struct Contestant {
    name: String,
    call: Call,
    /// What has to be done after its DEL so that it can be called again.
    after: Vec<String>,
    /// Why it does not run on this machine.
    refusal: Option<String>,
    times: Vec<Duration>,
}

impl Contestant {
    fn new(lab: &Lab, name: &str, pod: &Pod, configuration: Value) -> Contestant {
        Contestant::of(name, Call::new(lab, name, pod, &configuration))
    }

    fn of(name: &str, call: Call) -> Contestant {
        Contestant { name: name.to_owned(), call, after: Vec::new(), refusal: None, times: Vec::new() }
    }

    fn nothing() -> Contestant {
        let runtime = Runtime {
            container_id: String::new(),
            netns: String::new(),
            ifname: String::new(),
            args: String::new(),
            capabilities: Value::Null,
        };
        let program = std::env::current_exe().expect("this program's path");
        let call = Call { program, arguments: vec![NOTHING], stdin: "/dev/null".into(), runtime };
        Contestant::of("a static program that does nothing", call)
    }

    /// Calls it twice before anything is counted.
    fn qualify(&mut self) {
        if self.round().and_then(|_| self.round()).is_none() {
            self.refusal = Some("is not measured, it does not run here".into());
        }
    }

    /// How long ADD takes; `None` if ADD or DEL fails.
    fn round(&self) -> Option<Duration> {
        let (took, added) = self.call.verb("ADD");
        let (_, deleted) = self.call.verb("DEL");
        if let [program, arguments @ ..] = &self.after[..] {
            let _ = Command::new(program).args(arguments).status();
        }
        (added && deleted).then_some(took)
    }
}

/// What egretd does for a pod, as text for `nft -f`: on a node that has the same tables.
struct ByNft {
    add: PathBuf,
    remove: PathBuf,
}

fn node_by_nft(lab: &Lab) -> ByNft {
    let (from, to) = (lab.node("n1"), lab.node("n2"));
    to.ip("link add egret type vxlan id 7871 dstport 7871 local 192.0.2.12 nolearning gbp");
    to.nft(&from.egret_tables());
    let device = to.ip("-o link show type veth");
    to.ip("link add one-more type veth peer name its-peer");
    assert!(!device.contains("one-more"));
    let pass = "meta mark set meta mark & 0x001fffff accept";
    let add = format!(
        "add chain inet egret pod-500-500 {{ type filter hook ingress device one-more priority filter; policy drop; }}
         add rule inet egret pod-500-500 ip saddr 10.244.2.9 meta mark set 0x7e800000 accept
         add rule inet egret pod-500-500 ip6 saddr fd00:244:2::9 meta mark set 0x7e800000 accept
         add rule inet egret pod-500-500 ip6 saddr fe80::/10 accept
         add rule inet egret pod-500-500 ip6 saddr :: accept
         add rule inet egret pod-500-500 meta protocol != ip meta protocol != ip6 accept
         add rule inet egret pod-500-500 counter name spoofed drop
         add chain inet egret policy-x
         add rule inet egret policy-x ip daddr @hosts4 {pass}
         add rule inet egret policy-x ip daddr @direct4 {pass}
         add rule inet egret policy-x ip6 daddr @hosts6 {pass}
         add rule inet egret policy-x ip6 daddr @direct6 {pass}
         add rule inet egret policy-x fib daddr type local {pass}
         add rule inet egret policy-x ip daddr 203.0.113.0/24 ct mark set 0x454703e8 goto known
         add rule inet egret policy-x {pass}
         add element inet egret pods {{ 0x7e800000 : jump policy-x }}
         add element inet egret egress_id_out {{ 0x454703e8 : 0x80000000 }}
         add element netdev egret hop {{ 0x454703e8 : 02:00:00:00:00:01 }}\n"
    );
    let remove = "delete element netdev egret hop { 0x454703e8 }
                  delete element inet egret egress_id_out { 0x454703e8 }
                  delete element inet egret pods { 0x7e800000 }
                  flush chain inet egret pod-500-500
                  flush chain inet egret policy-x
                  delete chain inet egret pod-500-500
                  delete chain inet egret policy-x\n";
    let write = |name: &str, text: &str| {
        let path = lab.directory().join(name);
        fs::write(&path, text).expect("write a transaction");
        path
    };
    let by = ByNft { add: write("add.nft", &add), remove: write("remove.nft", remove) };
    to.within(|| by.round());
    by
}

impl ByNft {
    fn round(&self) -> Duration {
        let run = |path: &PathBuf| {
            let begin = Instant::now();
            let status = Command::new("nft").arg("-f").arg(path).status().expect("nft");
            assert!(status.success(), "nft -f {}", path.display());
            begin.elapsed()
        };
        let took = run(&self.add);
        run(&self.remove);
        took
    }
}
