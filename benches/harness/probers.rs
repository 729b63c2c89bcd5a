//! The probes of many nodes whether a gateway lives, as they come from those nodes: one by one, evenly spread, each
//! from its own node's addresses, in the tunnel's packets.

use super::cluster;
use egret::datapath::names::{HEALTH, PROBER, TUNNEL_PORT, TUNNEL_VNI, of_mac};
use egret::model::tunnel_mac;
use egret_nft::mac::Mac;
use lab::host::Namespaces;
use lab::{EXT4, Lab};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use serde_json::Value;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use std::{fs, thread};

/// EtherType of IPv6, include/uapi/linux/if_ether.h.
const ETH_P_IPV6: u16 = 0x86dd;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const ECHO_REQUEST: u8 = 128;
/// "The VNI is there" (RFC 7348).
const VNI_VALID: u32 = 0x0800_0000;

/// The outside host in the place of all the nodes that ask.
pub struct Asker {
    namespaces: Namespaces,
    gateway: Ipv4Addr,
    sink: Ipv4Addr,
    /// What a UDP packet carries, with whose address it is sent.
    probes: Vec<(Ipv4Addr, Vec<u8>)>,
}

/// What asking took.
pub struct Asked {
    /// How many probes were sent.
    pub probes: u64,
    /// The time of processors that it took, on both ends: a packet's whole way through its namespaces is gone by the
    /// thread that sends it, or by the processors' own threads for what is left over.
    pub processor_time: Duration,
}

impl Asker {
    /// For so many of [`cluster::write_nodes`]' nodes. They ask `gateway`; `sink` drops what comes at the first
    /// occasion.
    pub fn new(lab: &Lab, gateway: &str, sink: &str, count: usize) -> Asker {
        let to = tunnel_mac::of_node(gateway);
        let probe =
            |n| (cluster::node_address(n), tunnelled(&echo_request(tunnel_mac::of_node(&cluster::node_name(n)), to)));
        let (gateway, sink) = (lab.node(gateway), lab.node(sink));
        // The way of the answers, which ends there.
        gateway.ip(&format!("route add 10.64.0.0/16 via {EXT4}"));
        let ext = lab.host("ext");
        ext.nft(&format!(
            "table ip answers {{ counter heard {{ }}; chain in {{ type filter hook prerouting priority -300; \
             udp dport {TUNNEL_PORT} counter name heard drop; }}; }}"
        ));
        sink.nft(&format!(
            "table netdev sink {{ chain in {{ type filter hook ingress device eth0 priority 0; \
             udp dport {TUNNEL_PORT} drop; }}; }}"
        ));
        let probes = (0..count).map(probe).collect();
        Asker { namespaces: ext.namespaces(), gateway: gateway.ipv4(), sink: sink.ipv4(), probes }
    }

    /// All ask the gateway, or the sink, each once in an interval.
    pub fn ask(&self, gateway: bool, interval: Duration, time: Duration) -> Asked {
        let to = SockaddrIn::from(std::net::SocketAddrV4::new(if gateway { self.gateway } else { self.sink }, 0));
        let pause = interval / self.probes.len() as u32;
        self.namespaces.within(|| {
            // Of a raw socket of this protocol, the IPv4 header comes from the program; the kernel fills in the length
            // and the checksum (raw(7)).
            let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
            let raw = raw.expect("a raw socket");
            let packets: Vec<Vec<u8>> = self.probes.iter().map(|(from, udp)| ipv4(*from, to.ip(), udp)).collect();
            let mut sent = 0;
            let before = self.processor_time();
            let begin = Instant::now();
            for packet in packets.iter().cycle() {
                let due = begin + pause * sent;
                if due > begin + time {
                    break;
                }
                thread::sleep(due.saturating_duration_since(Instant::now()));
                sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty()).expect("a probe is sent");
                sent += 1;
            }
            Asked { probes: sent.into(), processor_time: self.processor_time() - before }
        })
    }

    /// This thread's, and that of the threads that take over when packets come too fast.
    fn processor_time(&self) -> Duration {
        let threads = fs::read_dir("/proc").expect("/proc").flatten();
        let is_softirq = |d: &fs::DirEntry| {
            fs::read_to_string(d.path().join("comm")).is_ok_and(|name| name.starts_with("ksoftirqd/"))
        };
        let softirq = threads.filter(is_softirq).map(|d| run_time(&d.path().join("schedstat")));
        softirq.sum::<Duration>() + run_time("/proc/thread-self/schedstat".as_ref())
    }

    /// How many answers have come since this was last called.
    pub fn answers(&self) -> u64 {
        let reset = ["nft", "-j", "reset", "counter", "ip", "answers", "heard"];
        let text = self.namespaces.within(|| lab::host::checked(&reset, None));
        let all: Value = serde_json::from_str(&text).expect("nft's JSON");
        let objects = all["nftables"].as_array().into_iter().flatten();
        objects.filter_map(|o| o["counter"]["packets"].as_u64()).sum()
    }
}

/// How long a process or a thread has run so far: the first number of its `schedstat`, in nanoseconds
/// (Documentation/scheduler/sched-stats.rst).
pub fn run_time(schedstat: &std::path::Path) -> Duration {
    let text = fs::read_to_string(schedstat).unwrap_or_else(|e| panic!("{}: {e}", schedstat.display()));
    Duration::from_nanos(text.split_whitespace().next().and_then(|n| n.parse().ok()).expect("nanoseconds"))
}

/// An Ethernet frame with an ICMPv6 echo request between two ends of the tunnel.
fn echo_request(from: Mac, to: Mac) -> Vec<u8> {
    let [source, destination] = [of_mac(PROBER, from), of_mac(HEALTH, to)].map(|a| a.octets());
    let mut message = [ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1];
    let length = message.len() as u8;
    let pseudo = [&source[..], &destination, &[0, 0, 0, length, 0, 0, 0, ICMPV6], &message].concat();
    message[2..4].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    let header = [0x60, 0, 0, 0, 0, length, ICMPV6, 255];
    [&to[..], &from, &ETH_P_IPV6.to_be_bytes(), &header, &source, &destination, &message].concat()
}

/// The Internet's checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// VXLAN and UDP around a frame. As Linux sends it over IPv4, without a checksum; its source port is a hash of the
/// flow.
fn tunnelled(frame: &[u8]) -> Vec<u8> {
    let vxlan = [VNI_VALID.to_be_bytes(), (TUNNEL_VNI << 8).to_be_bytes()].concat();
    let length = (8 + vxlan.len() + frame.len()) as u16;
    let udp = [50_000_u16, TUNNEL_PORT, length, 0].map(u16::to_be_bytes).concat();
    [&udp[..], &vxlan, frame].concat()
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, UDP, 0, 0];
    [&header[..], &from.octets(), &to.octets(), payload].concat()
}
