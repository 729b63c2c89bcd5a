//! Traffic that goes on in the background while a test does something to the hosts: a session, a flood; and bulk.

use super::client::{FIRST_PACKET, receive_address};
use super::host::Host;
use super::machine;
use super::server::{ECHO, UDP_WHO};
use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

impl Host {
    /// Opens a TCP session with the echo port and keeps it busy: sixteen bytes there and back, every 10 ms.
    ///
    /// # Errors
    /// The connection cannot be made.
    pub fn session(&self, server: impl Into<IpAddr>) -> io::Result<Session> {
        self.session_at_pace(server, Duration::from_millis(10))
    }

    /// As [`Host::session`], with another pause after each answer.
    ///
    /// # Errors
    /// The connection cannot be made.
    pub fn session_at_pace(&self, server: impl Into<IpAddr>, pace: Duration) -> io::Result<Session> {
        let server = SocketAddr::new(server.into(), ECHO);
        let stream = self.within(|| TcpStream::connect_timeout(&server, Duration::from_secs(3)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        let local = stream.local_addr()?;
        let ends = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let ends = Arc::clone(&ends);
            move || hold(stream, local, pace, &ends)
        });
        Ok(Session { ends, thread })
    }

    /// Sends a UDP packet from each of these ports.
    #[track_caller]
    pub fn udp_from_ports(&self, from: RangeInclusive<u16>, to: SocketAddr) {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        self.within(|| {
            for port in from {
                let socket = UdpSocket::bind((any, port)).unwrap_or_else(|e| panic!("port {port}: {e}"));
                socket.send_to(b"x", to).unwrap_or_else(|e| panic!("from port {port}: {e}"));
            }
        });
    }

    /// Sends UDP packets to the server that tells who asked, one each `pace`, and takes the answers. With `fresh`,
    /// each from a new port, thus a new connection.
    pub fn flood(&self, server: impl Into<IpAddr>, pace: Duration, fresh: bool) -> Flood {
        let server = SocketAddr::new(server.into(), UDP_WHO);
        let namespaces = self.namespaces();
        let ends = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let ends = Arc::clone(&ends);
            move || {
                namespaces.enter();
                send_without_pause(server, pace, fresh, &ends)
            }
        });
        Flood { ends, thread }
    }

    /// Sends `size` bytes through the echo port and takes them back; how long that took.
    ///
    /// # Errors
    /// No connection, silence for ten seconds, or other bytes than were sent.
    pub fn bulk(&self, server: impl Into<IpAddr>, size: usize) -> io::Result<Duration> {
        let server = SocketAddr::new(server.into(), ECHO);
        let mut stream = self.within(|| TcpStream::connect_timeout(&server, Duration::from_secs(3)))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        let sent: Vec<u8> = (0..size).map(|i| (i * 7 + i / 251) as u8).collect();
        let mut back = vec![0; size];
        let begin = Instant::now();
        let mut writer = stream.try_clone()?;
        thread::scope(|scope| {
            let writing = scope.spawn(|| writer.write_all(&sent));
            stream.read_exact(&mut back)?;
            writing.join().unwrap_or_else(|_| Err(io::Error::other("the writer panicked")))
        })?;
        if back == sent { Ok(begin.elapsed()) } else { Err(io::Error::other("other bytes came back than were sent")) }
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// A TCP session in the background.
pub struct Session {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<SessionReport>,
}

/// How a session went.
#[derive(Clone, Debug)]
pub struct SessionReport {
    /// Round trips.
    pub rounds: u64,
    /// The longest time without an answer.
    pub longest_silence: Duration,
    /// The error that ended it, if it did not live to its end.
    pub broken: Option<String>,
    /// Its address on the client's side.
    pub local: SocketAddr,
}

impl Session {
    /// Ends it; how it went.
    pub fn stop(self) -> SessionReport {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().expect("the session's thread")
    }

    /// Whether it has ended by itself.
    pub fn is_over(&self) -> bool {
        self.thread.is_finished()
    }
}

fn hold(mut stream: TcpStream, local: SocketAddr, pace: Duration, ends: &AtomicBool) -> SessionReport {
    let mut report = SessionReport { rounds: 0, longest_silence: Duration::ZERO, broken: None, local };
    let mut last = Instant::now();
    while !ends.load(Ordering::Relaxed) {
        if let Err(e) = stream.write_all(&[b'x'; 16]) {
            report.broken = Some(e.to_string());
            break;
        }
        let (mut got, mut buffer) = (0, [0; 16]);
        while got < 16 && !ends.load(Ordering::Relaxed) {
            match machine::uninterrupted(|| stream.read(&mut buffer[got..])) {
                Ok(0) => report.broken = Some("closed by the server".to_owned()),
                Ok(size) => got += size,
                Err(e) if is_silence(&e) => {}
                Err(e) => report.broken = Some(e.to_string()),
            }
            report.longest_silence = report.longest_silence.max(last.elapsed());
            if report.broken.is_some() {
                return report;
            }
        }
        report.rounds += u64::from(got == 16);
        thread::sleep(pace);
        last = Instant::now();
    }
    report
}

/// UDP packets without pause, in the background.
pub struct Flood {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<FloodReport>,
}

/// How a flood went.
#[derive(Clone, Debug, Default)]
pub struct FloodReport {
    /// Packets sent; those that the kernel refused to send count too.
    pub sent: u64,
    /// Answers.
    pub answered: u64,
    /// The longest time between two answers.
    pub longest_gap: Duration,
    /// The addresses that the server saw.
    pub seen_as: BTreeSet<IpAddr>,
    /// Packets that the machine lost meanwhile, of whomever.
    pub machine_dropped: u64,
}

impl FloodReport {
    /// Packets without an answer, less what the machine itself lost meanwhile.
    pub fn lost(&self) -> u64 {
        self.unanswered().saturating_sub(self.machine_dropped)
    }

    /// Packets without an answer.
    pub fn unanswered(&self) -> u64 {
        self.sent - self.answered
    }
}

impl Flood {
    /// Ends it, waits for the last answers; how it went.
    pub fn stop(self) -> FloodReport {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().expect("the flood's thread")
    }
}

fn send_without_pause(server: SocketAddr, pace: Duration, fresh: bool, ends: &AtomicBool) -> FloodReport {
    let mut report = FloodReport::default();
    let dropped_before = machine::dropped();
    let open = || {
        let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).expect("a UDP socket");
        socket.connect(server).map(|()| socket)
    };
    let mut last = Instant::now();
    let mut take = |socket: &UdpSocket, until: Instant, one: bool, report: &mut FloodReport| {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            socket.set_read_timeout(Some(left)).expect("a timeout");
            if let Ok(address) = receive_address(socket) {
                report.answered += 1;
                report.longest_gap = report.longest_gap.max(last.elapsed());
                last = Instant::now();
                report.seen_as.insert(address);
                if one {
                    return;
                }
            }
        }
    };
    let mut kept = None;
    while !ends.load(Ordering::Relaxed) {
        let begin = Instant::now();
        report.sent += 1;
        if fresh || kept.is_none() {
            kept = open().ok();
        }
        if let Some(socket) = &kept
            && socket.send(b"who").is_ok()
        {
            let patience = if fresh { FIRST_PACKET } else { pace };
            take(socket, begin + patience, fresh, &mut report);
        }
        thread::sleep((begin + pace).saturating_duration_since(Instant::now()));
    }
    if let (Some(socket), false) = (&kept, fresh) {
        while report.unanswered() > 0 {
            let before = report.answered;
            take(socket, Instant::now() + Duration::from_millis(300), true, &mut report);
            if report.answered == before {
                break;
            }
        }
    }
    report.machine_dropped = machine::dropped() - dropped_before;
    report
}
