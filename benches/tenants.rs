//! What a tenant who lists much costs another tenant of the same node: CNI ADD, the whole process; ADD while the first
//! one changes a list again and again; and the daemon's restart.
//!
//! Each load has a cluster of its own, and they take turns: the same node with the same pods and policies, and lists of
//! different lengths. Each figure is a ratio to the one beside lists of one network.

mod harness;

use harness::call::{Call, pod_before_add};
use harness::{Bound, Table, cluster, median, ms, pods, start};
use lab::{Lab, NodeSpec, Pods};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Pods of the tenant who lists much.
const PODS: usize = 24;
/// Their policies; each selects all of them.
const POLICIES: usize = 4;
/// The other tenant's policy is the first one of the second namespace.
const OTHER: usize = cluster::POLICIES_A_NAMESPACE;
const ROUNDS: usize = 101;
const RESTARTS: usize = 7;
const CHANGES: usize = 9;
/// For how long pods of the other tenant start, one after the other, after each change.
const AFTER_CHANGE: Duration = Duration::from_millis(1_500);
/// How much longer another tenant's ADD may take.
const ADD: f64 = 1.2;

/// What each of the policies lists: rules with so many networks and so many ports each.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    rules: usize,
    networks: usize,
    ports: usize,
}

/// The first one is what the others are compared with.
const LOADS: [Load; 4] = [
    Load { name: "one network", rules: 1, networks: 1, ports: 0 },
    Load { name: "1,000 of networks and ports", rules: 1, networks: 10, ports: 100 },
    Load { name: "25,000 of networks and ports", rules: 10, networks: 25, ports: 100 },
    Load { name: "10,000 networks", rules: 100, networks: 100, ports: 0 },
];

impl Load {
    /// The policies, and the other tenant's. `shift` changes what the first one lists.
    fn manifest(&self, shift: usize) -> String {
        (0..POLICIES).map(|n| self.policy(n, if n == 0 { shift } else { 0 })).collect()
    }

    fn policy(&self, n: usize, shift: usize) -> String {
        let mut text = cluster::policy(n).manifest(&[]);
        text = text.replace(&format!("app: {}\n  address", cluster::policy(n).name), "tier: backend\n  address");
        writeln!(text, "  priority: {n}\n  egress:").expect("text grows");
        for rule in 0..self.rules {
            text += "  - to:\n";
            for network in 0..self.networks {
                // None is another's neighbour: those would be one.
                let at = 0x0b00_0000 + 2 * (((n * self.rules + rule) * self.networks + network) * 16 + shift) as u32;
                writeln!(text, "    - ipBlock: {{ cidr: {}/32 }}", std::net::Ipv4Addr::from(at)).expect("text grows");
            }
            if self.ports > 0 {
                text += "    ports:\n";
            }
            for port in 0..self.ports {
                writeln!(text, "    - {{ protocol: TCP, port: {} }}", 1_000 + 2 * port).expect("text grows");
            }
        }
        text
    }
}

/// A cluster of its own for a load.
struct Beside {
    load: Load,
    lab: Lab,
    call: Call,
    adds: Vec<Duration>,
    longest: Vec<Duration>,
    restarts: Vec<Duration>,
}

impl Beside {
    fn new(load: Load) -> Beside {
        let lab = Lab::builder().nodes(vec![NodeSpec::new("n1", 11, Pods::Routed)]).build();
        let directory = lab.manifests().path();
        cluster::write_nodes(directory, 2);
        for n in [0, OTHER] {
            let name = cluster::policy(n).namespace;
            lab.add_namespace(&name, &[("kubernetes.io/metadata.name", &name)]);
        }
        lab.write_manifest("listed.yaml", &load.manifest(0));
        lab.write_manifest("other.yaml", &cluster::policy(OTHER).manifest(&["203.0.113.0/24"]));
        cluster::write_gateway(directory, OTHER + 1, &[&cluster::node_name(0)]);
        pods::populate(&lab, "n1", PODS);
        start(&lab, lab.node("n1"));
        lab.wait_ready("n1");
        let wanted = cluster::policy(OTHER);
        let pod = pod_before_add(&lab, &wanted.namespace, "selected", &[("app", wanted.name.as_str())]);
        let call = Call::new(&lab, "selected", &pod, &lab.node("n1").cni_entry());
        let this = Beside { load, lab, call, adds: Vec::new(), longest: Vec::new(), restarts: Vec::new() };
        this.assert_listed();
        this
    }

    /// All that is listed is in the kernel, and the pods of the load are selected.
    fn assert_listed(&self) {
        let sets = self.lab.node("n1").run(["nft", "-j", "list", "table", "inet", "egret"]);
        let all = self.load.rules * self.load.networks * POLICIES * self.load.ports.max(1);
        let found = sets.matches("\"11.").count();
        assert!(found >= all, "{found} of {all} elements are in the kernel");
    }

    /// One ADD, and its DEL.
    fn add(&self) -> Duration {
        let (took, added) = self.lab.node("n1").within(|| self.call.verb("ADD"));
        let (_, deleted) = self.lab.node("n1").within(|| self.call.verb("DEL"));
        assert!(added && deleted, "beside {}:\n{}", self.load.name, self.lab.daemon("n1").log());
        took
    }

    /// The longest ADD of those that begin in a while after a change of the first policy's list.
    fn change(&self, shift: usize) -> Duration {
        let begin = Instant::now();
        self.lab.write_manifest("listed.yaml", &self.load.manifest(shift));
        let mut longest = Duration::ZERO;
        while begin.elapsed() < AFTER_CHANGE {
            longest = longest.max(self.add());
        }
        longest
    }

    fn restart(&self) -> Duration {
        self.lab.daemon("n1").kill9();
        start(&self.lab, self.lab.node("n1")).0
    }
}

/// What is measured, the times of it, and what must hold of the ratio.
type Row = (&'static str, fn(&Beside) -> &[Duration], Bound);

fn main() {
    harness::begin(&format!(
        "A tenant who lists much beside another one: {PODS} pods of the node's, {POLICIES} policies for all of them"
    ));
    let mut all = LOADS.map(Beside::new);
    for _ in 0..ROUNDS {
        for beside in &mut all {
            let took = beside.add();
            beside.adds.push(took);
        }
    }
    for n in 0..CHANGES {
        for beside in &mut all {
            let took = beside.change(n + 1);
            beside.longest.push(took);
        }
    }
    for _ in 0..RESTARTS {
        for beside in &mut all {
            let took = beside.restart();
            beside.restarts.push(took);
        }
    }
    let mut table = Table::default();
    let rows: [Row; 3] = [
        ("ADD of another tenant's pod", |b| &b.adds, Bound::AtMost(ADD)),
        ("the longest ADD in the 1.5 s after a change of a list", |b| &b.longest, Bound::None),
        ("restart of the daemon until it answers plugins", |b| &b.restarts, Bound::None),
    ];
    for (what, times, bound) in rows {
        let [first, others @ ..] = &all;
        let reference = median(times(first));
        table.row(&format!("{what}, beside {}", first.load.name), ms(reference), 1.0, Bound::None);
        for beside in others {
            let time = median(times(beside));
            let ratio = time.as_secs_f64() / reference.as_secs_f64();
            table.row(&format!("the same, beside {}", beside.load.name), ms(time), ratio, bound);
        }
    }
    table.print(["", "median", "of the first"]);
}
