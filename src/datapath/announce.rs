//! Address probes and announcements on the uplinks: ARP and IPv6 neighbour discovery.

pub use crate::datapath::frames::Claim;
use crate::datapath::frames::{
    ETH_P_ARP, ETH_P_IPV6, HOP_LIMIT, NEIGHBOUR_SOLICITATION, advertiser, announcements, arp_claim, arp_sender,
    probe_frame, solicitation_claim,
};
use crate::datapath::icmpv6_filter::accept_types;
use crate::datapath::packet_address::packet_address;
use crate::datapath::uplink::Interface;
use anyhow::{Context, Result};
use egret_nft::mac::Mac;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, recvmsg, sendto,
    setsockopt, socket, sockopt,
};
use std::collections::{BTreeMap, HashMap};
use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

/// The interval at which [`probe`] reads its sockets.
const PROBE_POLL: Duration = Duration::from_millis(2);
/// The interval at which [`listen_for_claims`] reads its sockets.
const CLAIM_POLL: Duration = Duration::from_millis(20);
/// The pause between two batches of probes.
const PAUSE: Duration = Duration::from_millis(1);
/// Probes per address, because a link may lose one.
const PROBES: u32 = 3;
/// Probes per batch. A queue on the way drops what exceeds its room. If a reply were lost, this node would take an
/// address that another host has.
const AT_ONCE: usize = 128;
/// The receive buffer, bytes: room for the replies of a few thousand addresses.
const RECEIVE_BUFFER: usize = 8 << 20;
/// The stack of a thread that closes a socket, bytes.
const CLOSING_STACK: usize = 64 << 10;
/// Bytes read of an ARP frame or ICMPv6 message. The messages of interest are shorter.
const FRAME: usize = 2048;

/// An address on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// The address.
    pub address: IpAddr,
    /// The interface on the link. On an interface without a MAC address nothing is probed or announced.
    pub interface: Interface,
    /// The claim that probes carry for the address's present owner.
    pub claim: Option<Claim>,
}

/// Announces the addresses of `targets` on their links. A link may lose an announcement, so call it again after some
/// 100 ms. A failure does not stop the other announcements.
///
/// # Errors
/// An announcement could not be sent; the error is the first one.
pub fn announce(targets: &[LinkAddress]) -> Result<()> {
    let socket = sender()?;
    let mut first = Ok(());
    for LinkAddress { address, interface, .. } in targets {
        let Some(mac) = interface.mac else { continue };
        for frame in announcements(*address, mac) {
            let sent = send(&socket, interface.ifindex, *address, &frame);
            let sent = sent.with_context(|| format!("cannot announce {address} on {}", interface.name));
            first = first.and(sent);
        }
    }
    first
}

/// Probes the addresses of `targets` on their links. Returns for each the MAC address of another host that answered,
/// or `None` if no host answered within `timeout`, which is extended if there are many targets. Returns as soon as
/// all targets have been answered.
///
/// # Errors
/// A probe could not be sent, because its interface is down or gone.
pub async fn probe(targets: &[LinkAddress], timeout: Duration) -> Result<Vec<Option<Mac>>> {
    let mut answers = vec![None; targets.len()];
    let socket = sender()?;
    // Open the receive sockets before sending, so that no reply is missed.
    let mut receivers = BTreeMap::new();
    for LinkAddress { address, interface, .. } in targets {
        let key = (interface.ifindex, address.is_ipv4());
        if interface.mac.is_some() && !receivers.contains_key(&key) {
            let receiver = if address.is_ipv4() {
                arp_receiver(interface).map(Receiver::Arp)
            } else {
                icmpv6_receiver(interface).map(Receiver::Icmpv6)
            };
            receivers.insert(key, receiver.with_context(|| format!("cannot listen on {}", interface.name))?);
        }
    }
    let mut places: HashMap<(u32, IpAddr), Vec<usize>> = HashMap::new();
    for (place, target) in targets.iter().enumerate() {
        places.entry((target.interface.ifindex, target.address)).or_default().push(place);
    }
    let listen = |answers: &mut [Option<Mac>]| -> Result<()> {
        for ((ifindex, _), receiver) in &receivers {
            while let Some((address, mac)) = receiver.receive()? {
                for place in places.get(&(*ifindex, address)).into_iter().flatten() {
                    if targets[*place].interface.mac != Some(mac) {
                        answers[*place].get_or_insert(mac);
                    }
                }
            }
        }
        Ok(())
    };
    let begin = Instant::now();
    let mut end = begin + timeout;
    let mut probed = 0;
    while Instant::now() < end {
        // The first probe is sent at once, the others within the first half of the time. Many addresses take longer
        // and are probed less often.
        let next = timeout / 2 / PROBES * probed;
        if probed < PROBES && (next..timeout).contains(&begin.elapsed()) {
            let unanswered: Vec<&LinkAddress> =
                targets.iter().zip(&answers).filter(|(_, answer)| answer.is_none()).map(|(target, _)| target).collect();
            for some in unanswered.chunks(AT_ONCE) {
                for LinkAddress { address, interface, claim } in some {
                    let Some(mac) = interface.mac else { continue };
                    send(&socket, interface.ifindex, *address, &probe_frame(*address, mac, *claim))
                        .with_context(|| format!("cannot ask for {address} on {}", interface.name))?;
                }
                if unanswered.len() > AT_ONCE {
                    tokio::time::sleep(PAUSE).await;
                    listen(&mut answers)?;
                }
            }
            probed += 1;
            end = end.max(Instant::now() + timeout / 4);
        }
        tokio::time::sleep(PROBE_POLL).await;
        listen(&mut answers)?;
        if targets.iter().zip(&answers).all(|(target, answer)| answer.is_some() || target.interface.mac.is_none()) {
            break;
        }
    }
    Ok(answers)
}

/// Listens for probes that carry a claim, and calls `claimed` with each one's address, sender's MAC address (all
/// zeros if unknown) and claim. Returns only with an error.
///
/// # Errors
/// A socket on an interface cannot be opened or read.
pub async fn listen_for_claims(interfaces: &[Interface], mut claimed: impl FnMut(IpAddr, Mac, Claim)) -> Result<()> {
    let mut receivers = Vec::new();
    for interface in interfaces {
        let arp = arp_receiver(interface).with_context(|| format!("cannot listen on {}", interface.name))?;
        let icmpv6 = icmpv6_receiver(interface).with_context(|| format!("cannot listen on {}", interface.name))?;
        accept_types(&icmpv6, &[NEIGHBOUR_SOLICITATION])?;
        receivers.push((arp, icmpv6));
    }
    loop {
        for (arp, icmpv6) in &receivers {
            while let Some((address, mac, claim)) = receive_arp(arp, arp_claim)? {
                claimed(address, mac, claim);
            }
            while let Some((address, mac, claim)) = receive_icmpv6(icmpv6, solicitation_claim)? {
                claimed(address, mac, claim);
            }
        }
        tokio::time::sleep(CLAIM_POLL).await;
    }
}

/// A packet socket. A thread closes it, because the close waits for all processors (`synchronize_net` in
/// `packet_release`, net/packet/af_packet.c), 20 ms or more.
struct PacketSocket(Option<OwnedFd>);

impl PacketSocket {
    /// Opens a socket without a protocol, which only sends. To bind a socket that has a protocol to another one would
    /// wait for all processors, too.
    fn open() -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        socket(AddressFamily::Packet, SockType::Raw, flags, None).map(|socket| PacketSocket(Some(socket)))
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for PacketSocket {
    fn drop(&mut self) {
        let socket = self.0.take();
        // If no thread can be started, the closure is dropped and the socket is closed here.
        let _ = thread::Builder::new().name("close".to_owned()).stack_size(CLOSING_STACK).spawn(|| drop(socket));
    }
}

/// A socket that receives the replies of one interface and family.
enum Receiver {
    Arp(PacketSocket),
    Icmpv6(OwnedFd),
}

impl Receiver {
    /// The address and MAC address in the next reply, `None` if there is none yet.
    fn receive(&self) -> Result<Option<(IpAddr, Mac)>> {
        match self {
            Receiver::Arp(receiver) => receive_arp(receiver, arp_sender),
            Receiver::Icmpv6(receiver) => receive_icmpv6(receiver, advertiser),
        }
    }
}

fn sender() -> Result<PacketSocket> {
    PacketSocket::open().context("cannot open a packet socket; the daemon needs CAP_NET_RAW")
}

fn send(socket: &PacketSocket, ifindex: u32, address: IpAddr, frame: &[u8]) -> nix::Result<()> {
    let ethertype = if address.is_ipv4() { ETH_P_ARP } else { ETH_P_IPV6 };
    let to = packet_address(ifindex, ethertype).ok_or(Errno::ENODEV)?;
    match sendto(socket.as_raw_fd(), frame, &to, MsgFlags::empty()) {
        // The interface's queue is full. The frame counts as lost on the link.
        Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS) => Ok(()),
        Err(e) => Err(e),
    }
}

fn arp_receiver(interface: &Interface) -> nix::Result<PacketSocket> {
    let receiver = PacketSocket::open()?;
    // With CAP_NET_ADMIN the size may exceed net.core.rmem_max.
    if let Some(socket) = &receiver.0 {
        let _ = setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    }
    bind(receiver.as_raw_fd(), &packet_address(interface.ifindex, ETH_P_ARP).ok_or(Errno::ENODEV)?)?;
    Ok(receiver)
}

/// Opens a raw ICMPv6 socket. A packet socket would receive all IPv6 packets of the uplink.
fn icmpv6_receiver(interface: &Interface) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let receiver = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?;
    let _ = setsockopt(&receiver, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    setsockopt(&receiver, sockopt::Ipv6RecvHopLimit, &true)?;
    setsockopt(&receiver, sockopt::BindToDevice, &interface.name.clone().into())?;
    Ok(receiver)
}

/// What `read` finds in the next ARP frame for which it returns a value, `None` if there is none yet.
fn receive_arp<T>(receiver: &PacketSocket, read: fn(&[u8]) -> Option<T>) -> Result<Option<T>> {
    let mut frame = [0; FRAME];
    loop {
        match recv(receiver.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => {
                if let Some(found) = read(&frame[..length]) {
                    return Ok(Some(found));
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e).context("cannot receive ARP; is the interface up?"),
        }
    }
}

/// What `read` finds in the next neighbour discovery message for which it returns a value, `None` if there is none
/// yet.
fn receive_icmpv6<T>(receiver: &OwnedFd, read: fn(&[u8]) -> Option<T>) -> Result<Option<T>> {
    let mut frame = [0; FRAME];
    let mut control = nix::cmsg_space!(i32);
    loop {
        let mut room = [IoSliceMut::new(&mut frame)];
        let received = match recvmsg::<()>(receiver.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty()) {
            Ok(received) => {
                let near = received
                    .cmsgs()
                    .is_ok_and(|mut c| c.any(|c| c == ControlMessageOwned::Ipv6HopLimit(HOP_LIMIT.into())));
                near.then_some(received.bytes)
            }
            Err(Errno::EINTR) => None,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e).context("cannot receive neighbour advertisements; is the interface up?"),
        };
        if let Some(found) = received.and_then(|length| read(&frame[..length])) {
            return Ok(Some(found));
        }
    }
}
