//! What records of connections cost: new connections a second through a remote gateway node, with and without them.

mod harness;

use harness::connections::{self, Service};
use harness::{Bound, Table, median};
use lab::{Lab, NodeSpec, Pod, Pods, VISITOR};
use std::thread;
use std::time::Duration;

const ROUNDS: usize = 21;
const SECONDS: u64 = 2;

fn main() {
    harness::begin("Records of connections: new connections a second through a remote gateway node, IPv4");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("flows.json");
    let (without, with) = (lab(&[]), lab(&["--flow-log", &format!("file:{}", file.display())]));
    let mut figures = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        for turn in 0..2 {
            let at = (turn + round) % 2;
            let (_, pod, _) = [&without, &with][at];
            figures[at].push(connections::a_second(pod, SECONDS));
        }
    }
    // The kernel removes what has expired when somebody reads the table.
    with.0.node("g1").run(["conntrack", "-L"]);
    thread::sleep(Duration::from_secs(2));
    let text = std::fs::read_to_string(&file).expect("records");
    let count = |event: &str| text.lines().filter(|line| line.contains(&format!("\"event\":\"{event}\""))).count();
    println!("{} begun and {} ended connections are recorded\n", count("begin"), count("end"));
    let ratios: Vec<f64> = figures[1].iter().zip(&figures[0]).map(|(with, without)| with / without).collect();
    let mut table = Table::default();
    table.row("without records", format!("{:.0}", median(&figures[0])), 1.0, Bound::None);
    table.row("with records", format!("{:.0}", median(&figures[1])), median(&ratios), Bound::AtLeast(0.9));
    table.print(["New connections", "/s", "of the first"]);
}

/// A lab with Egret on a node and a gateway node, and a pod whose connections end at once in the kernel's table, too.
fn lab(arguments: &[&str]) -> (Lab, Pod, Service) {
    let nodes = vec![NodeSpec::new("n1", 11, Pods::Routed), NodeSpec::gateway("g1", 21, Pods::Routed)];
    let lab = Lab::builder().nodes(nodes).node_arguments(arguments).build();
    lab.node("g1").sysctl(&["net.netfilter.nf_conntrack_tcp_timeout_close=0"]);
    let lab = lab.with_scene();
    // Noting every packet would make both ways look more alike.
    lab.host("fab").nft("delete table bridge wire");
    let pod = lab.add_pod("n1", "shop", "client", VISITOR);
    let service = Service::start(&lab);
    (lab, pod, service)
}
