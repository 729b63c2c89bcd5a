//! New connections a second from a pod to a server outside.

use lab::host::Namespaces;
use lab::{EXT4, Lab, Pod};
use nix::libc;
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that open connections.
const CLIENTS: usize = 2;
const PORT: u16 = 9100;

/// What the host outside serves: a port that takes connections and closes them.
pub struct Service(Arc<TcpListener>);

impl Service {
    /// Starts it.
    pub fn start(lab: &Lab) -> Service {
        let host = lab.host("ext");
        let listener = Arc::new(host.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).expect("listen"));
        for _ in 0..CLIENTS {
            let listener = Arc::clone(&listener);
            thread::spawn(move || while listener.accept().is_ok() {});
        }
        Service(listener)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = shutdown(self.0.as_raw_fd(), Shutdown::Both);
    }
}

/// Connections a second, in that many seconds: made, and reset at once, so that no port waits.
pub fn a_second(pod: &Pod, seconds: u64) -> f64 {
    let (namespaces, ends, count): (Namespaces, AtomicBool, Mutex<u64>) =
        (pod.namespaces(), AtomicBool::new(false), Mutex::new(0));
    let begin = Instant::now();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                namespaces.enter();
                let mut own = 0;
                while !ends.load(Ordering::Relaxed) {
                    let stream = TcpStream::connect(SocketAddr::from((EXT4, PORT))).expect("a connection");
                    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("SO_LINGER");
                    own += 1;
                }
                *count.lock().expect("a lock") += own;
            });
        }
        thread::sleep(Duration::from_secs(seconds));
        ends.store(true, Ordering::Relaxed);
    });
    count.into_inner().expect("a lock") as f64 / begin.elapsed().as_secs_f64()
}
