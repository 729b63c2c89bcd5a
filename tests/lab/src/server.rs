//! A server, outside the cluster or in a pod. It speaks IPv4 and IPv6 on
//! - TCP 8080: tells who asked, and closes;
//! - TCP 9000: echoes;
//! - UDP 9001: tells who asked;
//! - UDP 9002: echoes;
//! - UDP 9003: tells who asked, with the port;
//! - TCP 9004: takes what comes, and counts it;
//! - TCP 9005: sends without end.

use super::host::Host;
use super::machine;
use nix::sys::socket::{Shutdown, shutdown};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// TCP, tells who asked.
pub const WHO: u16 = 8080;
/// TCP, echoes.
pub const ECHO: u16 = 9000;
/// UDP, tells who asked.
pub const UDP_WHO: u16 = 9001;
/// UDP, echoes.
pub const UDP_ECHO: u16 = 9002;

/// UDP, tells who asked, with the port.
pub const UDP_PEER: u16 = 9003;

/// TCP, takes what comes.
pub const SINK: u16 = 9004;
/// TCP, sends without end.
pub const SOURCE: u16 = 9005;

/// A running server; it ends when dropped.
pub struct Server {
    shared: Arc<Shared>,
    listeners: Vec<Arc<TcpListener>>,
    sockets: Vec<Arc<UdpSocket>>,
}

#[derive(Default)]
struct Shared {
    ends: AtomicBool,
    connections: Mutex<Vec<SocketAddr>>,
    sunk: AtomicU64,
}

impl Server {
    /// Starts one in the host. Panics if the ports are taken.
    pub fn start(host: &Host) -> Server {
        let mut server = Server { shared: Arc::default(), listeners: Vec::new(), sockets: Vec::new() };
        server.tcp(host, WHO, |mut stream, peer, _| {
            let _ = stream.write_all(peer.ip().to_string().as_bytes());
        });
        server.tcp(host, ECHO, |stream, peer, shared| {
            shared.connections.lock().expect("a lock").push(peer);
            let shared = Arc::clone(shared);
            thread::spawn(move || echo(stream, &shared));
        });
        server.tcp(host, SINK, |stream, _, shared| {
            let shared = Arc::clone(shared);
            thread::spawn(move || sink(stream, &shared));
        });
        server.tcp(host, SOURCE, |stream, _, shared| {
            let shared = Arc::clone(shared);
            thread::spawn(move || send_on(stream, &shared));
        });
        server.udp(host, UDP_WHO, |_, peer| peer.ip().to_string().into_bytes());
        server.udp(host, UDP_ECHO, |datagram, _| datagram.to_vec());
        server.udp(host, UDP_PEER, |_, peer| peer.to_string().into_bytes());
        server
    }

    /// Starts one more port that tells who asked: for policies that cover some ports only.
    pub fn also_tell_on(&mut self, host: &Host, port: u16) {
        self.tcp(host, port, |mut stream, peer, _| {
            let _ = stream.write_all(peer.ip().to_string().as_bytes());
        });
        self.udp(host, port, |_, peer| peer.ip().to_string().into_bytes());
    }

    /// Who has connected to the echo port, in order.
    pub fn connections(&self) -> Vec<SocketAddr> {
        self.shared.connections.lock().expect("a lock").clone()
    }

    /// How many bytes have come to the port that takes them.
    pub fn sunk(&self) -> u64 {
        self.shared.sunk.load(Ordering::Relaxed)
    }

    fn tcp(&mut self, host: &Host, port: u16, serve: fn(TcpStream, SocketAddr, &Arc<Shared>)) {
        let listener = host.within(|| machine::bound(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))));
        let listener = Arc::new(listener.unwrap_or_else(|e| panic!("listen on TCP {port} on {}: {e}", host.name)));
        self.listeners.push(Arc::clone(&listener));
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                serve(stream, canonical(peer), &shared);
            }
        });
    }

    fn udp(&mut self, host: &Host, port: u16, answer: fn(&[u8], SocketAddr) -> Vec<u8>) {
        let socket = host.within(|| machine::bound(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))));
        let socket = Arc::new(socket.unwrap_or_else(|e| panic!("listen on UDP {port} on {}: {e}", host.name)));
        self.sockets.push(Arc::clone(&socket));
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            let mut buffer = vec![0; 65536];
            while !shared.ends.load(Ordering::Relaxed) {
                // An error is a datagram of ours that came back (ICMP), or the shutdown.
                if let Ok((size, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&answer(&buffer[..size], canonical(peer)), peer);
                }
            }
        });
    }
}

fn echo(mut stream: TcpStream, shared: &Shared) {
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
    let mut buffer = vec![0; 65536];
    while !shared.ends.load(Ordering::Relaxed) {
        match machine::uninterrupted(|| stream.read(&mut buffer)) {
            Ok(0) => return,
            Ok(size) => {
                if stream.write_all(&buffer[..size]).is_err() {
                    return;
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

fn sink(mut stream: TcpStream, shared: &Shared) {
    let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
    let mut buffer = vec![0; 65536];
    while !shared.ends.load(Ordering::Relaxed) {
        match machine::uninterrupted(|| stream.read(&mut buffer)) {
            Ok(0) => return,
            Ok(size) => drop(shared.sunk.fetch_add(size as u64, Ordering::Relaxed)),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

fn send_on(mut stream: TcpStream, shared: &Shared) {
    let _ = stream.set_write_timeout(Some(Duration::from_millis(500)));
    let buffer = vec![0; 65536];
    while !shared.ends.load(Ordering::Relaxed) {
        match machine::uninterrupted(|| stream.write(&buffer)) {
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}

/// An IPv4 peer of a dual-stack socket as IPv4.
fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        for fd in self.listeners.iter().map(|l| l.as_raw_fd()).chain(self.sockets.iter().map(|s| s.as_raw_fd())) {
            // Wakes the thread that waits in accept or recv. An unconnected UDP socket reports ENOTCONN and wakes too.
            let _ = shutdown(fd, Shutdown::Both);
        }
    }
}
