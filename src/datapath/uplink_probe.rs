//! One probe of a target outside the cluster, by the route that egress packets take: an ICMP echo request (RFC 792,
//! RFC 4443) or a TCP connection. The kernel chooses the source address, which is one of the node's own.
//!
//! Each probe opens a socket of its own, so that it sees the routes and addresses of its time, and so that the kernel
//! matches the replies.

use crate::datapath::frames::checksum;
use crate::model::uplink_probes::ProbeTarget;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, setsockopt, socket, sockopt};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;
use tokio::net::{TcpSocket, UdpSocket};

/// Type of an echo request and of its reply, by family.
const ICMP: (u8, u8) = (8, 0);
const ICMPV6: (u8, u8) = (128, 129);
/// Bytes read of a message: an IPv4 header with options, and a reply.
const MESSAGE: usize = 128;

/// Probes a target once. `mark` is the packets' mark, which selects the gateway's own route; 0: the main table. `device` is
/// the interface in a VRF by which the answer comes: other sockets do not receive from a VRF (`tcp_l3mdev_accept`).
///
/// # Errors
/// The target has not answered within `patience`, or the packet could not be sent.
pub async fn probe(target: ProbeTarget, mark: u32, device: Option<&str>, patience: Duration) -> io::Result<()> {
    let answered = async {
        match target {
            ProbeTarget::Icmp(address) => echo(address, mark, device).await,
            ProbeTarget::Tcp(address) => connect(address, mark, device).await,
        }
    };
    tokio::time::timeout(patience, answered).await?
}

/// Opens a connection, and closes it.
async fn connect(to: SocketAddr, mark: u32, device: Option<&str>) -> io::Result<()> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    choose_route(&socket, mark, device)?;
    socket.connect(to).await.map(drop)
}

/// Sends an echo request, and waits for its reply.
async fn echo(to: IpAddr, mark: u32, device: Option<&str>) -> io::Result<()> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let fd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, protocol)?;
    choose_route(&fd, mark, device)?;
    // A raw socket, in tokio's datagram type so that a task can wait for it. A connected one receives from `to` alone.
    let socket = UdpSocket::from_std(fd.into())?;
    socket.connect((to, 0)).await?;
    let nonce = RandomState::new().build_hasher().finish();
    socket.send(&request(to.is_ipv4(), nonce)).await?;
    let mut message = [0; MESSAGE];
    loop {
        let length = socket.recv(&mut message).await?;
        if is_reply(to.is_ipv4(), nonce, &message[..length]) {
            return Ok(());
        }
    }
}

fn choose_route(socket: &impl AsFd, mark: u32, device: Option<&str>) -> io::Result<()> {
    if let Some(device) = device {
        setsockopt(socket, sockopt::BindToDevice, &device.into())?;
    }
    if mark != 0 {
        setsockopt(socket, sockopt::Mark, &mark)?;
    }
    Ok(())
}

/// An echo request whose identifier, sequence number and data are the nonce.
fn request(ipv4: bool, nonce: u64) -> Vec<u8> {
    let mut message = vec![if ipv4 { ICMP.0 } else { ICMPV6.0 }, 0, 0, 0];
    message.extend_from_slice(&nonce.to_be_bytes());
    if ipv4 {
        // For ICMPv6 the kernel fills in the checksum (RFC 3542, section 3.1).
        let sum = checksum(&message).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
    }
    message
}

/// Whether a received message is the reply. An IPv4 raw socket receives the IP header, too (raw(7)).
fn is_reply(ipv4: bool, nonce: u64, received: &[u8]) -> bool {
    let header = if ipv4 { received.first().map_or(0, |byte| usize::from(byte & 0xf) * 4) } else { 0 };
    let kind = if ipv4 { ICMP.1 } else { ICMPV6.1 };
    match received.get(header..) {
        Some([k, 0, _, _, data @ ..]) => *k == kind && *data == nonce.to_be_bytes(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_a_checksum_and_only_its_own_reply_counts() {
        let request4 = request(true, 0x0102_0304_0506_0708);
        assert_eq!(checksum(&request4), 0, "the sum over the message, its checksum included");
        let mut reply4 = [&[0x46_u8, 0][..], &[0; 22], &request4].concat();
        assert!(!is_reply(true, 0x0102_0304_0506_0708, &reply4), "the request itself, on the loopback interface");
        reply4[24] = ICMP.1;
        assert!(is_reply(true, 0x0102_0304_0506_0708, &reply4));
        assert!(!is_reply(true, 0x0102_0304_0506_0709, &reply4));
        let mut reply6 = request(false, 7);
        reply6[0] = ICMPV6.1;
        assert!(is_reply(false, 7, &reply6) && !is_reply(false, 8, &reply6));
        assert!((0..reply6.len()).all(|length| !is_reply(false, 7, &reply6[..length])));
        assert!((0..reply4.len()).all(|length| !is_reply(true, 0x0102_0304_0506_0708, &reply4[..length])));
    }
}
