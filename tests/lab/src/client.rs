//! What pods and outside hosts ask a server: who am I?

use super::host::Host;
use super::machine;
use super::server::{UDP_WHO, WHO};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

/// Below the second after which a lost SYN is repeated: an answer in this time is an answer to the first packet.
pub const FIRST_PACKET: Duration = Duration::from_millis(900);
/// Nobody sends a UDP packet again: where an answer is expected, it may take as long as a busy machine needs.
const PATIENCE: Duration = Duration::from_secs(5);

impl Host {
    /// Asks the server by TCP who asks. The error of a connection that gets no answer is `TimedOut`, after less than
    /// a second: only the first packet counts.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn who(&self, server: impl Into<IpAddr>) -> io::Result<IpAddr> {
        self.who_at(SocketAddr::new(server.into(), WHO))
    }

    /// As [`Host::who`], at another port.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn who_at(&self, server: SocketAddr) -> io::Result<IpAddr> {
        let mut stream = machine::asked(|| self.within(|| TcpStream::connect_timeout(&server, FIRST_PACKET)))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        text.parse().map_err(|_| io::Error::other(format!("{server} answered {text:?}")))
    }

    /// Asks the server by one UDP packet who asks.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn udp_who(&self, server: impl Into<IpAddr>) -> io::Result<IpAddr> {
        self.udp_who_at(SocketAddr::new(server.into(), UDP_WHO))
    }

    /// As [`Host::udp_who`], at another port.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn udp_who_at(&self, server: SocketAddr) -> io::Result<IpAddr> {
        self.udp_who_from(0, server)
    }

    /// As [`Host::udp_who`], where the answer is expected: the one packet's answer may be late.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn udp_who_patiently(&self, server: impl Into<IpAddr>) -> io::Result<IpAddr> {
        let server = SocketAddr::new(server.into(), UDP_WHO);
        machine::asked(|| udp_who_within(PATIENCE, &self.udp_socket(server)?))
    }

    /// As [`Self::udp_who_at`], from a port of its own.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub fn udp_who_from(&self, port: u16, server: SocketAddr) -> io::Result<IpAddr> {
        machine::asked(|| udp_who_by(&self.udp_socket_at(port, server)?))
    }

    /// Sends one ICMP echo request and takes the answer.
    ///
    /// # Errors
    /// No answer.
    pub fn ping(&self, server: impl Into<IpAddr>) -> io::Result<()> {
        let server = server.into();
        // Lets sockets of type "ping" be made: the kernel fills in identifier and checksum (ICMP, RFC 792; RFC 4443).
        self.sysctl(&["net.ipv4.ping_group_range=0 2147483647"]);
        let (family, protocol, request) = match server {
            IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 8),
            IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 128),
        };
        machine::asked(|| {
            let fd = self.within(|| socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol))?;
            let socket = UdpSocket::from(fd);
            socket.connect((server, 0))?;
            socket.set_read_timeout(Some(FIRST_PACKET))?;
            socket.send(&[request, 0, 0, 0, 0, 0, 0, 1, b'?'])?;
            machine::receive(&socket, &mut [0; 64]).map(drop)
        })
    }

    /// A UDP socket inside the host, connected to `server`.
    ///
    /// # Errors
    /// No route.
    pub fn udp_socket(&self, server: SocketAddr) -> io::Result<UdpSocket> {
        self.udp_socket_at(0, server)
    }

    fn udp_socket_at(&self, port: u16, server: SocketAddr) -> io::Result<UdpSocket> {
        let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        self.within(|| {
            let socket = machine::bound(|| UdpSocket::bind((any, port)))?;
            socket.connect(server)?;
            Ok(socket)
        })
    }
}

/// Asks the server that a UDP socket is connected to who asks, by one packet.
///
/// # Errors
/// No answer, or a refusal.
pub fn udp_who_by(socket: &UdpSocket) -> io::Result<IpAddr> {
    udp_who_within(FIRST_PACKET, socket)
}

fn udp_who_within(patience: Duration, socket: &UdpSocket) -> io::Result<IpAddr> {
    socket.set_read_timeout(Some(patience))?;
    socket.send(b"who")?;
    receive_address(socket)
}

/// The address in a server's answer.
pub(super) fn receive_address(socket: &UdpSocket) -> io::Result<IpAddr> {
    let mut buffer = [0; 64];
    let size = machine::receive(socket, &mut buffer)?;
    let text = String::from_utf8_lossy(&buffer[..size]);
    text.parse().map_err(|_| io::Error::other(format!("the server answered {text:?}")))
}
