//! What a pod sends all its life: UDP in flows that go on and in new ones, TCP connections, ICMP echoes; to both
//! servers, by both families.

use super::capture::{PORTS, Sender, Users, port};
use super::model::SERVERS;
use lab::host::Namespaces;
use lab::machine;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Between two rounds.
const PACE: Duration = Duration::from_millis(25);
/// So long a flow goes on before it is begun anew.
const FLOW: Duration = Duration::from_secs(2);
/// So many rounds new flows wait for their answers.
const WAITING: usize = 8;
/// New flows take their ports in turn, so that none is taken for an older one of the same port, which connection
/// tracking still knows.
const OWN_PORTS: std::ops::Range<u16> = 2000..62000;

/// A pod's traffic.
pub struct Traffic {
    ends: Arc<AtomicBool>,
    answers: Arc<Answers>,
    threads: Vec<JoinHandle<()>>,
}

/// When the newest flow began that each server has answered, in nanoseconds.
#[derive(Default)]
struct Answers([AtomicU64; 4]);

/// What both threads know.
#[derive(Clone)]
struct Context {
    pod: usize,
    incarnation: usize,
    begin: Instant,
    users: Users,
    ends: Arc<AtomicBool>,
}

impl Context {
    fn sender(&self) -> Sender {
        Sender { incarnation: self.incarnation, began: self.begin.elapsed() }
    }

    fn uses(&self, port: u16) {
        self.users.lock().expect("a lock").insert(port, self.sender());
    }
}

impl Traffic {
    /// Begins. `begin` is the lab's time 0.
    pub fn start(namespaces: &Namespaces, pod: usize, incarnation: usize, begin: Instant, users: &Users) -> Traffic {
        let (ends, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(Answers::default()));
        let context = Context { pod, incarnation, begin, users: Arc::clone(users), ends: Arc::clone(&ends) };
        let datagrams = {
            let (context, namespaces, answers) = (context.clone(), namespaces.clone(), Arc::clone(&answers));
            thread::spawn(move || {
                namespaces.enter();
                send_datagrams(&context, &answers);
            })
        };
        let namespaces = namespaces.clone();
        let connections = thread::spawn(move || {
            namespaces.enter();
            connect(&context);
        });
        Traffic { ends, answers, threads: vec![datagrams, connections] }
    }

    /// Whether the server has answered a flow that began after `since`.
    pub fn answered(&self, server: usize, since: Duration) -> bool {
        u128::from(self.answers.0[server].load(Ordering::Relaxed)) > since.as_nanos()
    }

    /// Ends it.
    pub fn stop(self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a pod's traffic");
        }
    }
}

/// A flow to a server.
struct Flow {
    socket: UdpSocket,
    sender: Sender,
    server: usize,
}

impl Flow {
    fn udp(context: &Context, server: usize, from: u16) -> Option<Flow> {
        let any: IpAddr =
            if SERVERS[server].is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, from)).ok()?;
        socket.connect((SERVERS[server], port(context.pod, 0))).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Flow { socket, sender: context.sender(), server })
    }

    /// A socket of the type "ping": the kernel fills in identifier and checksum.
    fn ping(context: &Context, server: usize) -> Option<Flow> {
        let (family, protocol) = match SERVERS[server] {
            IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
            IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
        };
        let socket = UdpSocket::from(socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol).ok()?);
        socket.connect((SERVERS[server], 0)).ok()?;
        socket.set_nonblocking(true).ok()?;
        Some(Flow { socket, sender: context.sender(), server })
    }

    /// That the kernel refuses to send is as good as a drop.
    fn send(&self) {
        drop(self.socket.send(&self.sender.content()));
    }

    fn send_echo(&self) {
        let kind = if SERVERS[self.server].is_ipv4() { 8 } else { 128 };
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 1];
        message.extend(self.sender.content());
        drop(self.socket.send(&message));
    }

    fn is_answered(&self) -> bool {
        machine::receive(&self.socket, &mut [0; 64]).is_ok()
    }
}

fn send_datagrams(context: &Context, answers: &Answers) {
    context.uses(port(context.pod, 0));
    let mut own_ports = OWN_PORTS.cycle();
    let mut flows = || -> Vec<Flow> {
        let ports = own_ports.by_ref();
        (0..SERVERS.len()).zip(ports).filter_map(|(server, from)| Flow::udp(context, server, from)).collect()
    };
    let mut kept: Vec<Flow> = Vec::new();
    let mut fresh: Vec<Vec<Flow>> = Vec::new();
    let mut renewed = Instant::now();
    for number in 0u32.. {
        if context.ends.load(Ordering::Relaxed) {
            return;
        }
        let round = Instant::now();
        if kept.is_empty() || renewed.elapsed() > FLOW {
            kept = flows();
            renewed = round;
        }
        kept.iter().for_each(Flow::send);
        if number % 2 == 0 {
            let new = flows();
            new.iter().for_each(Flow::send);
            fresh.push(new);
        }
        if number % 8 == 1 {
            (0..SERVERS.len()).filter_map(|server| Flow::ping(context, server)).for_each(|flow| flow.send_echo());
        }
        thread::sleep(PACE.saturating_sub(round.elapsed()));
        for flow in fresh.iter().flatten().filter(|flow| flow.is_answered()) {
            let began = u64::try_from(flow.sender.began.as_nanos()).expect("less than 500 years");
            answers.0[flow.server].fetch_max(began, Ordering::Relaxed);
        }
        if fresh.len() > WAITING {
            fresh.remove(0);
        }
    }
}

fn connect(context: &Context) {
    let numbers = (1..PORTS).cycle();
    for (number, server) in numbers.zip((0..SERVERS.len()).cycle()) {
        if context.ends.load(Ordering::Relaxed) {
            return;
        }
        let at = SocketAddr::new(SERVERS[server], port(context.pod, number));
        context.uses(at.port());
        if let Ok(mut stream) = TcpStream::connect_timeout(&at, Duration::from_millis(300)) {
            drop(stream.set_read_timeout(Some(Duration::from_millis(300))));
            let mut answer = [0; 4];
            drop(stream.write_all(b"fuzz").and_then(|()| stream.read_exact(&mut answer)));
        }
        thread::sleep(PACE);
    }
}
