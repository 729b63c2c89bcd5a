//! The process in the sandboxes: it sends its pod's name to the outside server from its first moment on. The listener
//! on that server records the packets.

use lab::{EXT4, EXT6, Host, leftovers};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const PORT: u16 = 9100;
/// What a pod sends twenty times a second.
const PAUSE: Duration = Duration::from_millis(50);

/// The arguments with which this test program becomes the visitor.
pub const ARGUMENTS: &[&str] = &["--exact", "visitor::what_runs_in_a_pod", "--nocapture"];

/// Not a test: in a pod it never ends. Elsewhere it does nothing.
#[test]
fn what_runs_in_a_pod() {
    if is_in_a_pod() {
        run();
    }
}

/// Whether this program runs as the visitor in a pod.
pub fn is_in_a_pod() -> bool {
    std::env::var_os(leftovers::VARIABLE).is_some() && std::process::id() == 1
}

/// Sends the pod's name and a number to the server, forever.
pub fn run() -> ! {
    let name = nix::unistd::gethostname().unwrap_or_default().to_string_lossy().into_owned();
    let sockets = [
        (UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)), IpAddr::from(EXT4)),
        (UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)), IpAddr::from(EXT6)),
    ];
    for number in 0_u64.. {
        for (socket, server) in &sockets {
            if let Ok(socket) = socket {
                // Without a route, or blocked: the packet does not arrive, which the test checks.
                let _ = socket.send_to(format!("{name} {number}").as_bytes(), (*server, PORT));
            }
        }
        thread::sleep(PAUSE);
    }
    unreachable!("more than 2^64 times 50 ms")
}

/// The received packets of pods.
pub struct Ear {
    heard: Arc<Mutex<BTreeMap<String, Vec<Word>>>>,
    ends: Arc<AtomicBool>,
}

/// One packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The source address.
    pub source: IpAddr,
    /// The number of the packet among the process's packets, from 0.
    pub number: u64,
}

impl Ear {
    /// Listens on a host.
    pub fn open(host: &Host) -> Ear {
        let ear = Ear { heard: Arc::default(), ends: Arc::default() };
        let socket = host.within(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))).expect("listen");
        socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        let (heard, ends) = (Arc::clone(&ear.heard), Arc::clone(&ear.ends));
        thread::spawn(move || {
            let mut buffer = [0; 512];
            while !ends.load(Ordering::Relaxed) {
                if let Ok((size, peer)) = socket.recv_from(&mut buffer) {
                    note(&heard, &buffer[..size], peer);
                }
            }
        });
        ear
    }

    /// The packets of a pod, in order.
    pub fn of(&self, pod: &str) -> Vec<Word> {
        self.heard.lock().expect("a lock").get(pod).cloned().unwrap_or_default()
    }

    /// The source addresses of a pod's packets.
    pub fn sources(&self, pod: &str) -> BTreeSet<IpAddr> {
        self.of(pod).iter().map(|w| w.source).collect()
    }

    /// Drops the packets of a pod.
    pub fn forget(&self, pod: &str) {
        self.heard.lock().expect("a lock").remove(pod);
    }
}

fn note(heard: &Mutex<BTreeMap<String, Vec<Word>>>, text: &[u8], peer: SocketAddr) {
    let text = String::from_utf8_lossy(text);
    if let Some((name, number)) = text.split_once(' ')
        && let Ok(number) = number.parse()
    {
        let word = Word { source: peer.ip().to_canonical(), number };
        heard.lock().expect("a lock").entry(name.to_owned()).or_default().push(word);
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}
