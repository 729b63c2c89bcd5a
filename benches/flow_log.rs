//! What records of connections cost: new connections a second through a remote gateway node, with and without them.

mod harness;

use harness::{Bound, Table, median};
use lab::host::Door;
use lab::{EXT4, Lab, NodeSpec, Pod, Pods, VISITOR};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const ROUNDS: usize = 21;
const SECONDS: u64 = 2;
/// Threads that open connections.
const CLIENTS: usize = 2;
const PORT: u16 = 9100;

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
            figures[at].push(connections(pod));
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

/// What the outside host serves: a port that takes connections and closes them.
struct Service(Arc<TcpListener>);

impl Service {
    fn start(lab: &Lab) -> Service {
        let host = lab.host("ext");
        let listener = Arc::new(host.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).expect("listen"));
        for _ in 0..CLIENTS {
            let listener = Arc::clone(&listener);
            thread::spawn(move || while listener.accept().is_ok() {});
        }
        Service(listener)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = nix::sys::socket::shutdown(std::os::fd::AsRawFd::as_raw_fd(&*self.0), nix::sys::socket::Shutdown::Both);
    }
}

/// Connections a second: made, and reset at once, so that no port waits.
fn connections(pod: &Pod) -> f64 {
    let (door, ends, count): (Door, AtomicBool, Mutex<u64>) = (pod.door(), AtomicBool::new(false), Mutex::new(0));
    let begin = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                door.enter();
                let mut own = 0;
                while !ends.load(Ordering::Relaxed) {
                    let stream = TcpStream::connect(SocketAddr::from((EXT4, PORT))).expect("a connection");
                    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("SO_LINGER");
                    own += 1;
                }
                *count.lock().expect("a lock") += own;
            });
        }
        thread::sleep(Duration::from_secs(SECONDS));
        ends.store(true, Ordering::Relaxed);
    });
    count.into_inner().expect("a lock") as f64 / begin.elapsed().as_secs_f64()
}
