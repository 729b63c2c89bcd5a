//! Sessions whose source port the gateway changed because another session had it, and idle sessions whose port others
//! want: both survive. Needs root.

use lab::fault_injection::{cordoned, owner_and_other, plugged, wait_holder};
use lab::scene::egress_towards;
use lab::server::{ECHO, UDP_PEER};
use lab::{Lab, Pod, SERVERS, VISITOR, machine};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

/// The source port of sessions that conflict with each other.
const PORT: u16 = 41_234;

/// The pod's end of a session with the server.
fn end(pod: &Pod, server: IpAddr, port: u16) -> SocketAddr {
    let address: IpAddr = if server.is_ipv4() { pod.ipv4().into() } else { pod.ipv6().into() };
    (address, port).into()
}

fn tcp(pod: &Pod, server: SocketAddr, port: u16) -> TcpStream {
    let family = if server.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    pod.within(|| {
        let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
        bind(fd.as_raw_fd(), &SockaddrStorage::from(end(pod, server.ip(), port))).expect("bind");
        connect(fd.as_raw_fd(), &SockaddrStorage::from(server)).expect("connect");
        TcpStream::from(fd)
    })
}

/// A session that is idle until it is checked.
struct Quiet {
    name: String,
    port: u16,
    tcp: TcpStream,
    udp: UdpSocket,
    /// The addresses and ports that the server saw first.
    seen: [SocketAddr; 2],
}

impl Quiet {
    fn open(lab: &Lab, pod: &Pod, server: IpAddr, port: u16) -> Quiet {
        let mut tcp = tcp(pod, (server, ECHO).into(), port);
        tcp.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        round_trip(&mut tcp).expect("an echo");
        let connected = lab.server("ext").lock().expect("a lock").connections();
        let udp = pod.within(|| machine::bound(|| UdpSocket::bind(end(pod, server, port)))).expect("a UDP socket");
        udp.connect((server, UDP_PEER)).expect("a server");
        udp.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
        let seen = [*connected.last().expect("a connection"), peer(&udp).expect("an answer")];
        assert!(seen.iter().all(|seen| seen.ip() == egress_towards(server)), "{seen:?}");
        Quiet { name: format!("{} to {server}", pod.name), port, tcp, udp, seen }
    }

    /// What is wrong with the session, if anything is.
    fn fault(&mut self) -> Option<String> {
        let tcp = round_trip(&mut self.tcp).err().map(|e| format!("TCP: {e}"));
        let udp = match peer(&self.udp) {
            Ok(seen) if seen == self.seen[1] => None,
            other => Some(format!("UDP: {other:?}, and before {}", self.seen[1])),
        };
        let faults: Vec<String> = tcp.into_iter().chain(udp).collect();
        (!faults.is_empty()).then(|| format!("{} (from {:?}): {}", self.name, self.seen, faults.join("; ")))
    }

    fn is_kept(&self) -> bool {
        self.seen.iter().all(|seen| seen.port() == self.port)
    }

    fn is_changed(&self) -> bool {
        self.seen.iter().all(|seen| seen.port() != self.port)
    }
}

fn round_trip(tcp: &mut TcpStream) -> std::io::Result<()> {
    tcp.write_all(b"alive?")?;
    tcp.read_exact(&mut [0; 6])
}

/// The source that the server sees. The request is repeated, because a datagram may be lost while a gateway node
/// dies.
fn peer(udp: &UdpSocket) -> std::io::Result<SocketAddr> {
    let mut buffer = [0; 64];
    let mut last = std::io::Error::other("not asked");
    for _ in 0..3 {
        udp.send(b"who")?;
        match machine::receive(udp, &mut buffer) {
            Ok(size) => return Ok(String::from_utf8_lossy(&buffer[..size]).parse().expect("an address")),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Opens sessions of all these pods from the same port to the same servers. Returns those whose port was changed, and
/// the others.
fn collide(lab: &Lab, pods: &[Pod]) -> Vec<Quiet> {
    let sessions: Vec<Quiet> =
        pods.iter().flat_map(|pod| SERVERS.map(|server| Quiet::open(lab, pod, server, PORT))).collect();
    let changed = sessions.iter().filter(|session| session.is_changed()).count();
    assert_eq!(changed, sessions.len() - SERVERS.len(), "the first one keeps its port");
    sessions
}

#[track_caller]
fn assert_all_live(what: &str, sessions: &mut [Quiet]) {
    let faults: Vec<String> = sessions.iter_mut().filter_map(Quiet::fault).collect();
    assert!(faults.is_empty(), "{what}: {} of {} broke: {faults:#?}", faults.len(), sessions.len());
}

fn pods(lab: &Lab, nodes: &[&str]) -> Vec<Pod> {
    let named = nodes.iter().enumerate();
    named.map(|(i, node)| lab.add_pod(node, "shop", &format!("visitor-{i}-{node}"), VISITOR)).collect()
}

#[test]
fn every_session_keeps_its_changed_port_in_a_planned_move_and_back() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", "n2", "g1", "g2"]);
    let mut sessions = collide(&lab, &pods);
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    assert_all_live("moved", &mut sessions);
    cordoned(&lab, &owner, false);
    cordoned(&lab, &other, true);
    wait_holder(&lab, &owner);
    thread::sleep(Duration::from_secs(2));
    assert_all_live("moved back", &mut sessions);
    lab.assert_nothing_leaked();
}

#[test]
fn every_session_keeps_its_changed_port_when_a_gateway_node_dies() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", "n2", &other]);
    let mut sessions = collide(&lab, &pods);
    thread::sleep(Duration::from_secs(2));
    plugged(&lab, &owner, false);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    assert_all_live("dead", &mut sessions);
    lab.assert_nothing_leaked();
}

/// Opens a session of each pod with each server, each pod from a port of its own, which it keeps.
fn apart(lab: &Lab, pods: &[Pod]) -> Vec<Quiet> {
    let each = pods.iter().zip(PORT..).flat_map(|(pod, port)| SERVERS.map(|server| (pod, server, port)));
    let sessions: Vec<Quiet> = each.map(|(pod, server, port)| Quiet::open(lab, pod, server, port)).collect();
    assert!(sessions.iter().all(Quiet::is_kept), "nobody else has their ports");
    sessions
}

/// Opens sessions of a new pod from the ports of idle sessions, to the same servers. Then the idle ones are checked.
fn assert_outlive(what: &str, lab: &Lab, newcomer: &Pod, sessions: &mut [Quiet]) -> Vec<Quiet> {
    let ports = sessions.iter().map(|session| (session.port, session.seen[0].is_ipv4()));
    let servers =
        ports.flat_map(|(port, v4)| SERVERS.into_iter().filter(move |s| s.is_ipv4() == v4).map(move |s| (s, port)));
    let mut new: Vec<Quiet> = servers.map(|(server, port)| Quiet::open(lab, newcomer, server, port)).collect();
    let took: Vec<u16> = new.iter().filter(|session| !session.is_changed()).map(|session| session.port).collect();
    assert_all_live(&format!("{what}; the newcomer took the ports {took:?}"), sessions);
    assert!(took.is_empty(), "{what}: the newcomer took the ports {took:?}");
    assert_all_live(what, &mut new);
    new
}

#[test]
fn idle_sessions_keep_their_ports_in_a_planned_move_and_new_ones_get_others() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", &owner, &other, "n2", "n2"]);
    let mut sessions = apart(&lab, &pods[..3]);
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    let _first = assert_outlive("moved", &lab, &pods[3], &mut sessions);
    cordoned(&lab, &owner, false);
    cordoned(&lab, &other, true);
    wait_holder(&lab, &owner);
    thread::sleep(Duration::from_secs(2));
    let _second = assert_outlive("moved back", &lab, &pods[4], &mut sessions);
    lab.assert_nothing_leaked();
}

#[test]
fn idle_sessions_keep_their_ports_when_a_gateway_node_dies_and_new_ones_get_others() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", &other, "n2"]);
    let mut sessions = apart(&lab, &pods[..2]);
    plugged(&lab, &owner, false);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    let _new = assert_outlive("dead", &lab, &pods[2], &mut sessions);
    lab.assert_nothing_leaked();
}

fn replicas(lab: &Lab, node: &str) -> Option<f64> {
    lab.metrics(node).get("egret_node_changed_port_replicas", &[])
}

#[test]
fn restarted_daemons_learn_the_changed_ports_again_and_drop_ended_sessions() {
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let pods = pods(&lab, &["n1", "n2", "n1", &other]);
    let mut sessions = collide(&lab, &pods);
    let changed = sessions.iter().filter(|session| session.is_changed()).count();
    // One of them is TCP and one UDP.
    let all = Some(2.0 * changed as f64);
    lab.wait_for("replicas:", &all, || replicas(&lab, &other));
    for node in [&other, &owner] {
        lab.daemon(node).kill9();
        lab.daemon(node).restart();
        lab.wait_ready(node);
        lab.wait_for("replicas:", &all, || replicas(&lab, &other));
    }
    let ended = sessions.split_off(sessions.len() - 2);
    drop(ended);
    lab.wait_for("replicas, two TCP sessions less:", &all.map(|all| all - 2.0), || replicas(&lab, &other));
    plugged(&lab, &owner, false);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    assert_all_live("dead", &mut sessions);
    lab.assert_nothing_leaked();
}

/// Of 100 ports, 43 are taken if a busy client has used 2,000 of this range. This is the same rate as for a client
/// that has made 100 connections a second for two minutes from the usual 28,000 ports, because connections are kept
/// for two minutes.
const RANGE: &str = "net.ipv4.ip_local_port_range=40000 44599";
const CONNECTIONS: usize = 2_000;

/// Opens twenty sessions with each server beside a busy client of the same servers. Returns them, and how many ports
/// were changed.
fn beside_a_busy_client(lab: &Lab) -> (Vec<(TcpStream, SocketAddr)>, usize) {
    let [busy, quiet] = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    [&busy, &quiet].iter().for_each(|pod| pod.sysctl(&[RANGE]));
    let connect = |pod: &Pod, server: IpAddr| pod.within(|| TcpStream::connect((server, ECHO)).expect("a connection"));
    for server in SERVERS {
        (0..CONNECTIONS).for_each(|_| drop(connect(&busy, server)));
    }
    let mut changed = 0;
    let mut open = |server: IpAddr| {
        let mut session = connect(&quiet, server);
        session.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        round_trip(&mut session).expect("an echo");
        let seen = *lab.server("ext").lock().expect("a lock").connections().last().expect("a connection");
        changed += usize::from(seen.port() != session.local_addr().expect("an address").port());
        (session, seen)
    };
    let sessions = SERVERS.iter().flat_map(|server| [*server; 20]).map(&mut open).collect();
    (sessions, changed)
}

fn broken(sessions: &mut [(TcpStream, SocketAddr)]) -> Vec<String> {
    let each = sessions.iter_mut().filter_map(|(tcp, seen)| Some(format!("{seen}: {}", round_trip(tcp).err()?)));
    each.collect()
}

#[test]
fn idle_sessions_beside_a_busy_client_survive_a_planned_move_and_the_next_owners_death() {
    let _machine = lab::turn::alone();
    let lab = Lab::scene();
    let (owner, other) = owner_and_other(&lab);
    let (mut sessions, changed) = beside_a_busy_client(&lab);
    assert!(changed > 0, "no port was changed");
    cordoned(&lab, &owner, true);
    wait_holder(&lab, &other);
    thread::sleep(Duration::from_secs(2));
    let moved = broken(&mut sessions);
    println!("{} sessions, {changed} with another port: {} broke in a planned move", sessions.len(), moved.len());
    cordoned(&lab, &owner, false);
    plugged(&lab, &other, false);
    wait_holder(&lab, &owner);
    thread::sleep(Duration::from_secs(2));
    let dead = broken(&mut sessions);
    println!("{} broke in a death", dead.len());
    assert!(moved.is_empty() && dead.is_empty(), "moved: {moved:#?}, dead: {dead:#?}");
    lab.assert_nothing_leaked();
}
