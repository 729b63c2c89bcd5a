//! Protocols without ports: one flow at a time for an egress IP and a server. Needs root.

use lab::fault_injection::owner_and_other;
use lab::{EGRESS4, EXT4, Lab, Pod, VISITOR};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// For experiments, RFC 3692: no helper knows it, and it has no ports.
const PROTOCOL: u8 = 253;

/// Sends a packet of that protocol to the server. The kernel fills in zero fields, and the checksum (raw(7)).
fn send(pod: &Pod) {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, PROTOCOL, 0, 0, 0, 0, 0, 0];
    packet.extend(EXT4.octets());
    packet.extend([7; 32]);
    pod.within(|| {
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw).expect("a socket");
        let to = SockaddrIn::from(SocketAddrV4::new(EXT4, 0));
        sendto(raw.as_raw_fd(), &packet, &to, MsgFlags::empty()).expect("send");
    });
}

fn arrived(lab: &Lab) -> Vec<(std::net::IpAddr, u64)> {
    let of_protocol = lab.wire().into_iter().filter(|s| s.to == EXT4 && s.protocol == PROTOCOL.to_string());
    of_protocol.map(|s| (s.from, s.packets)).collect()
}

#[test]
fn a_second_pods_packets_of_a_protocol_without_ports_are_dropped_and_counted() {
    let lab = Lab::scene();
    let (owner, _) = owner_and_other(&lab);
    let [first, second] = ["n1", "n2"].map(|n| lab.add_pod(n, "shop", &format!("visitor-{n}"), VISITOR));
    let failed = || lab.metrics(&owner).get("egret_node_insert_failed_packets_total", &[]).expect("the metric");
    lab.forget_wire();
    send(&first);
    lab.wait_for("the first pod's packet", &vec![(EGRESS4.into(), 1)], || arrived(&lab));
    let before = failed();
    for _ in 0..3 {
        send(&second);
    }
    lab.wait_until("they are counted", Duration::from_secs(3), || failed() >= before + 3.0);
    send(&first);
    lab.wait_for("only the first pod's packets", &vec![(EGRESS4.into(), 2)], || arrived(&lab));
}
