//! What comes to the servers, seen by a packet socket outside of the cluster: nothing that a node does to its own rules
//! or counters changes what is seen here.
//!
//! Who sent a packet is told by what translation leaves alone. UDP and ICMP echoes carry it as their content; of TCP,
//! and of the packets that ICMP errors quote, the server's port tells it.

use super::timeline;
use lab::Host;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, recv, socket};
use nix::sys::time::TimeVal;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What the content of pods' packets begins with.
const MAGIC: &[u8; 8] = b"egtfuzz\0";
/// The servers' ports: [`PORTS`] for each pod, from here on.
const FIRST_PORT: u16 = 16384;
/// How many ports each pod has at the servers. Its first one is for UDP, each TCP connection gets the next.
pub const PORTS: u16 = 1024;
/// All of the servers' ports, as nft writes it.
pub const ALL_PORTS: &str = "16384-32767";

/// A flow whose packet an ICMP error quotes is no older: `FLOW` of the traffic, and a second.
const QUOTED: Duration = Duration::from_secs(3);

/// The port at a server for a pod.
pub fn port(pod: usize, number: u16) -> u16 {
    FIRST_PORT + u16::try_from(pod).expect("few pods") * PORTS + number % PORTS
}

/// Who sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The pod's incarnation.
    pub incarnation: usize,
    /// When the flow began.
    pub began: Duration,
}

impl Sender {
    /// As the content of a packet.
    pub fn content(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&(self.incarnation as u64).to_be_bytes());
        bytes[16..].copy_from_slice(&nanos(self.began).to_be_bytes());
        bytes
    }

    /// From the content of a packet.
    fn read(content: &[u8]) -> Option<Sender> {
        let content = content.get(..24).filter(|c| c.starts_with(MAGIC))?;
        let number = |at: usize| content[at..at + 8].try_into().map(u64::from_be_bytes).ok();
        Some(Sender { incarnation: usize::try_from(number(8)?).ok()?, began: Duration::from_nanos(number(16)?) })
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).expect("less than 500 years")
}

/// Who is using which port at the servers.
pub type Users = Arc<Mutex<HashMap<u16, Sender>>>;

/// A packet that came to a server.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When.
    pub at: Duration,
    /// Who sent it.
    pub sender: Sender,
    /// To which server.
    pub server: usize,
    /// From which address.
    pub source: IpAddr,
    /// `UDP`, `TCP`, `ICMP echo`, `ICMP error`.
    pub kind: &'static str,
}

/// A running capture.
pub struct Capture {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Seen>>,
}

impl Capture {
    /// Begins. `begin` is the lab's time 0.
    pub fn start(host: &Host, begin: Instant, users: Users) -> Capture {
        let fd = host.within(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                .expect("a packet socket")
        });
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::RcvBufForce, &(64 << 20)).expect("a big buffer");
        nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReceiveTimeout, &TimeVal::new(0, 50_000))
            .expect("a timeout");
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread = thread::spawn(move || {
            let (mut seen, mut frame) = (Vec::new(), vec![0; 4096]);
            loop {
                match recv(fd.as_raw_fd(), &mut frame, nix::sys::socket::MsgFlags::empty()) {
                    Ok(size) => seen.extend(read(&frame[..size], begin.elapsed(), &users)),
                    Err(_) if ended.load(Ordering::Relaxed) => return seen,
                    Err(_) => {}
                }
            }
        });
        Capture { ends, thread }
    }

    /// Ends it; what it saw.
    pub fn stop(self) -> Vec<Seen> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().expect("the capture's thread")
    }
}

/// An IP packet in parts.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    payload: &'a [u8],
}

fn ip(ethertype: u16, bytes: &[u8]) -> Option<Packet<'_>> {
    match ethertype {
        0x0800 => {
            let length = usize::from(bytes.first()? & 0xf) * 4;
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?).into());
            Some(Packet {
                source: address(12)?,
                destination: address(16)?,
                protocol: *bytes.get(9)?,
                payload: bytes.get(length..)?,
            })
        }
        0x86dd => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?).into());
            Some(Packet {
                source: address(8)?,
                destination: address(24)?,
                protocol: *bytes.get(6)?,
                payload: bytes.get(40..)?,
            })
        }
        _ => None,
    }
}

fn read(frame: &[u8], at: Duration, users: &Users) -> Option<Seen> {
    let ethertype = u16::from_be_bytes(frame.get(12..14)?.try_into().ok()?);
    let packet = ip(ethertype, frame.get(14..)?)?;
    let server = timeline::server(packet.destination)?;
    let word = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let user = |port: u16| users.lock().expect("a lock").get(&port).copied();
    let (sender, kind) = match (packet.protocol, packet.payload.first()?) {
        (17, _) => (Sender::read(packet.payload.get(8..)?)?, "UDP"),
        (6, _) => (user(word(packet.payload, 2)?)?, "TCP"),
        (1, 8) | (58, 128) => (Sender::read(packet.payload.get(8..)?)?, "ICMP echo"),
        // "Port unreachable" is the pod's own word; other errors are nodes'. It quotes a packet of the server's.
        (1, 3) | (58, 1) if packet.payload.get(1) == Some(if packet.protocol == 1 { &3 } else { &4 }) => {
            let quoted = ip(ethertype, packet.payload.get(8..)?)?;
            let sender = user(word(quoted.payload, 0)?)?;
            (Sender { began: sender.began.max(at.saturating_sub(QUOTED)), ..sender }, "ICMP error")
        }
        _ => return None,
    };
    Some(Seen { at, sender, server, source: packet.source, kind })
}
