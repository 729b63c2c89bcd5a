//! Asking the link for an address, and telling it that the address is here now.

use crate::datapath::uplink::Interface;
pub use crate::kernel::frames::Claim;
use crate::kernel::frames::{
    ETH_P_ARP, ETH_P_IPV6, HOP_LIMIT, NEIGHBOUR_SOLICITATION, advertiser, announcements, arp_claim, arp_sender,
    probe_frame, solicitation_claim,
};
use crate::kernel::icmpv6_filter::accept_types;
use crate::kernel::packet_address::packet_address;
use crate::model::mac::Mac;
use anyhow::{Context, Result};
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

/// How often the sockets are looked at while an answer may come.
const LOOK: Duration = Duration::from_millis(2);
/// How often claims are looked for.
const LOOK_FOR_CLAIMS: Duration = Duration::from_millis(20);
/// Between those that go out at once.
const PAUSE: Duration = Duration::from_millis(1);
/// How often a question is asked; a link may lose one.
const QUESTIONS: u32 = 3;
/// How many questions go out at once. What is in a queue between here and there that has no room for more is lost, and
/// an answer that is lost lets an address be taken that somebody has.
const AT_ONCE: usize = 128;
/// Room for the answers of a few thousand addresses.
const RECEIVE_BUFFER: usize = 8 << 20;
/// The stack of a thread that closes a socket, bytes.
const CLOSING_STACK: usize = 64 << 10;
/// Room for one ARP frame or ICMPv6 message; what is longer is no answer.
const FRAME: usize = 2048;

/// An address on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: IpAddr,
    /// The interface on the link. One without a MAC address has nothing to ask or to tell.
    pub interface: Interface,
    /// What a question says beside to who has the address.
    pub claim: Option<Claim>,
}

/// Tells the links of `targets` that their addresses are here. One announcement may be lost: call it again after some
/// 100 ms. All are tried, whatever becomes of the others.
///
/// # Errors
/// The first that could not be sent.
pub fn announce(targets: &[Target]) -> Result<()> {
    let socket = sender()?;
    let mut first = Ok(());
    for Target { address, interface, .. } in targets {
        let Some(mac) = interface.mac else { continue };
        for frame in announcements(*address, mac) {
            let sent = send(&socket, interface.ifindex, *address, &frame);
            let sent = sent.with_context(|| format!("cannot announce {address} on {}", interface.name));
            first = first.and(sent);
        }
    }
    first
}

/// Asks the links of `targets` who has the addresses, and returns for each the MAC address of somebody else who
/// answered, `None` if nobody did until `timeout`, or a little longer if there are many. It returns as soon as all have
/// been answered.
///
/// # Errors
/// An address could not be asked for: an interface is down, or gone.
pub async fn probe(targets: &[Target], timeout: Duration) -> Result<Vec<Option<Mac>>> {
    let mut answers = vec![None; targets.len()];
    let socket = sender()?;
    // The ears before the mouth.
    let mut ears = BTreeMap::new();
    for Target { address, interface, .. } in targets {
        let key = (interface.ifindex, address.is_ipv4());
        if interface.mac.is_some() && !ears.contains_key(&key) {
            let ear = if address.is_ipv4() {
                arp_ear(interface).map(Ear::Arp)
            } else {
                icmpv6_ear(interface).map(Ear::Icmpv6)
            };
            ears.insert(key, ear.with_context(|| format!("cannot listen on {}", interface.name))?);
        }
    }
    let mut places: HashMap<(u32, IpAddr), Vec<usize>> = HashMap::new();
    for (place, target) in targets.iter().enumerate() {
        places.entry((target.interface.ifindex, target.address)).or_default().push(place);
    }
    let listen = |answers: &mut [Option<Mac>]| -> Result<()> {
        for ((ifindex, _), ear) in &ears {
            while let Some((address, mac)) = ear.hear()? {
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
    let mut asked = 0;
    while Instant::now() < end {
        // The first question at once, the others in the first half of the time. Many addresses take longer, and are
        // asked for less often.
        let next = timeout / 2 / QUESTIONS * asked;
        if asked < QUESTIONS && (next..timeout).contains(&begin.elapsed()) {
            let silent: Vec<&Target> =
                targets.iter().zip(&answers).filter(|(_, answer)| answer.is_none()).map(|(target, _)| target).collect();
            for some in silent.chunks(AT_ONCE) {
                for Target { address, interface, claim } in some {
                    let Some(mac) = interface.mac else { continue };
                    send(&socket, interface.ifindex, *address, &probe_frame(*address, mac, *claim))
                        .with_context(|| format!("cannot ask for {address} on {}", interface.name))?;
                }
                if silent.len() > AT_ONCE {
                    tokio::time::sleep(PAUSE).await;
                    listen(&mut answers)?;
                }
            }
            asked += 1;
            end = end.max(Instant::now() + timeout / 4);
        }
        tokio::time::sleep(LOOK).await;
        listen(&mut answers)?;
        if targets.iter().zip(&answers).all(|(target, answer)| answer.is_some() || target.interface.mac.is_none()) {
            break;
        }
    }
    Ok(answers)
}

/// Hears the links' questions that claim addresses, and tells the address, who asks (all zeros: it does not say) and the
/// claim of each. It returns only with an error.
///
/// # Errors
/// An interface cannot be listened on.
pub async fn hear_claims(interfaces: &[Interface], mut tell: impl FnMut(IpAddr, Mac, Claim)) -> Result<()> {
    let mut ears = Vec::new();
    for interface in interfaces {
        let arp = arp_ear(interface).with_context(|| format!("cannot listen on {}", interface.name))?;
        let icmpv6 = icmpv6_ear(interface).with_context(|| format!("cannot listen on {}", interface.name))?;
        accept_types(&icmpv6, &[NEIGHBOUR_SOLICITATION])?;
        ears.push((arp, icmpv6));
    }
    loop {
        for (arp, icmpv6) in &ears {
            while let Some((address, mac, claim)) = hear_arp(arp, arp_claim)? {
                tell(address, mac, claim);
            }
            while let Some((address, mac, claim)) = hear_icmpv6(icmpv6, solicitation_claim)? {
                tell(address, mac, claim);
            }
        }
        tokio::time::sleep(LOOK_FOR_CLAIMS).await;
    }
}

/// A packet socket. To close one the kernel waits for all processors (`synchronize_net` in `packet_release`,
/// net/packet/af_packet.c), 20 ms or more: that is left to a thread, for whoever opened it has more to do.
struct PacketSocket(Option<OwnedFd>);

impl PacketSocket {
    /// It sends, and nothing comes to it: it has no protocol. With one, binding it to another would wait likewise.
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
        // Without a thread it is closed here.
        let _ = thread::Builder::new().name("close".to_owned()).stack_size(CLOSING_STACK).spawn(|| drop(socket));
    }
}

/// A socket that listens.
enum Ear {
    Arp(PacketSocket),
    Icmpv6(OwnedFd),
}

impl Ear {
    /// The next that says whose an address is, `None` if there is none yet.
    fn hear(&self) -> Result<Option<(IpAddr, Mac)>> {
        match self {
            Ear::Arp(ear) => hear_arp(ear, arp_sender),
            Ear::Icmpv6(ear) => hear_icmpv6(ear, advertiser),
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
        // The interface's queue is full: as if the link had lost it.
        Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS) => Ok(()),
        Err(e) => Err(e),
    }
}

fn arp_ear(interface: &Interface) -> nix::Result<PacketSocket> {
    let ear = PacketSocket::open()?;
    // Root may go past net.core.rmem_max.
    if let Some(socket) = &ear.0 {
        let _ = setsockopt(socket, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    }
    bind(ear.as_raw_fd(), &packet_address(interface.ifindex, ETH_P_ARP).ok_or(Errno::ENODEV)?)?;
    Ok(ear)
}

/// A raw ICMPv6 socket: a packet socket would be given all of the uplink's IPv6 packets.
fn icmpv6_ear(interface: &Interface) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ear = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?;
    let _ = setsockopt(&ear, sockopt::RcvBufForce, &RECEIVE_BUFFER);
    setsockopt(&ear, sockopt::Ipv6RecvHopLimit, &true)?;
    setsockopt(&ear, sockopt::BindToDevice, &interface.name.clone().into())?;
    Ok(ear)
}

/// The next ARP packet that says what is looked for, `None` if there is none yet.
fn hear_arp<T>(ear: &PacketSocket, read: fn(&[u8]) -> Option<T>) -> Result<Option<T>> {
    let mut frame = [0; FRAME];
    loop {
        match recv(ear.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            Ok(length) => {
                if let Some(said) = read(&frame[..length]) {
                    return Ok(Some(said));
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e).context("cannot listen for ARP; is the interface up?"),
        }
    }
}

/// The next message of neighbour discovery that says what is looked for, `None` if there is none yet.
fn hear_icmpv6<T>(ear: &OwnedFd, read: fn(&[u8]) -> Option<T>) -> Result<Option<T>> {
    let mut frame = [0; FRAME];
    let mut control = nix::cmsg_space!(i32);
    loop {
        let mut room = [IoSliceMut::new(&mut frame)];
        let heard = match recvmsg::<()>(ear.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty()) {
            Ok(heard) => {
                let near = heard
                    .cmsgs()
                    .is_ok_and(|mut c| c.any(|c| c == ControlMessageOwned::Ipv6HopLimit(HOP_LIMIT.into())));
                near.then_some(heard.bytes)
            }
            Err(Errno::EINTR) => None,
            Err(Errno::EAGAIN) => return Ok(None),
            Err(e) => return Err(e).context("cannot listen for neighbour advertisements; is the interface up?"),
        };
        if let Some(said) = heard.and_then(|length| read(&frame[..length])) {
            return Ok(Some(said));
        }
    }
}
