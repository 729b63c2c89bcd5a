//! A server for `egretd node --assign-hook`, in the place of a program that asks a cloud.

use super::host::Host;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How the server treats requests.
#[derive(Clone, Debug)]
pub enum Mode {
    /// It does what it is asked, after this time.
    Does(Duration),
    /// It refuses, with this text.
    Refuses(String),
    /// It reads the request and closes the connection.
    Dies,
    /// It reads the request and says nothing.
    Hangs,
}

/// What was asked, and when it was done.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The request.
    pub body: Value,
    /// The node that asked.
    pub node: String,
    /// When the answer of success was written.
    pub done: Option<Instant>,
}

impl Asked {
    /// Whether it is a request of this kind for this address.
    pub fn is(&self, action: &str, address: &str) -> bool {
        self.body["action"] == action && self.body["address"] == address
    }
}

struct Shared {
    mode: Mutex<Mode>,
    asked: Mutex<Vec<Asked>>,
    ends: AtomicBool,
}

/// The server. It ends with this.
pub struct AssignHook {
    shared: Arc<Shared>,
    socket: Option<PathBuf>,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl AssignHook {
    /// A server on a Unix socket of its own.
    pub fn on_socket() -> AssignHook {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("egret-hook-{}-{number}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("a socket");
        listener.set_nonblocking(true).expect("a socket that does not block");
        let shared = Self::serve(move || {
            let stream = listener.accept().ok()?.0;
            stream.set_nonblocking(false).ok()?;
            Some(Box::new(stream))
        });
        AssignHook { shared, socket: Some(path) }
    }

    /// What `--assign-hook` is for the server on its socket.
    pub fn target(&self) -> String {
        format!("unix:{}", self.socket.as_deref().expect("a server on a socket").display())
    }

    /// A server on a port of a host.
    pub fn on_port(host: &Host, port: u16) -> AssignHook {
        let listener = host.within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))).expect("a port");
        listener.set_nonblocking(true).expect("a socket that does not block");
        let shared = Self::serve(move || {
            let stream = listener.accept().ok()?.0;
            stream.set_nonblocking(false).ok()?;
            Some(Box::new(stream))
        });
        AssignHook { shared, socket: None }
    }

    fn serve(accept: impl Fn() -> Option<Box<dyn Stream>> + Send + 'static) -> Arc<Shared> {
        let mode = Mutex::new(Mode::Does(Duration::ZERO));
        let shared = Arc::new(Shared { mode, asked: Mutex::default(), ends: AtomicBool::new(false) });
        let server = Arc::clone(&shared);
        thread::spawn(move || {
            while !server.ends.load(Ordering::Relaxed) {
                match accept() {
                    Some(stream) => {
                        let server = Arc::clone(&server);
                        thread::spawn(move || server.answer(stream));
                    }
                    None => thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        shared
    }

    /// Changes how it treats requests from now on.
    pub fn set(&self, mode: Mode) {
        *self.shared.mode.lock().expect("a lock") = mode;
    }

    /// All that it was asked.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().expect("a lock").clone()
    }

    /// Forgets what it was asked.
    pub fn forget(&self) {
        self.shared.asked.lock().expect("a lock").clear();
    }
}

impl Drop for AssignHook {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Shared {
    fn answer(&self, mut stream: Box<dyn Stream>) {
        let Some(body) = read(&mut *stream) else { return };
        let node = body["node"].as_str().unwrap_or_default().to_owned();
        let number = {
            let mut asked = self.asked.lock().expect("a lock");
            asked.push(Asked { body, node, done: None });
            asked.len() - 1
        };
        let mode = self.mode.lock().expect("a lock").clone();
        let (status, text) = match mode {
            Mode::Does(after) => {
                thread::sleep(after);
                if let Some(asked) = self.asked.lock().expect("a lock").get_mut(number) {
                    asked.done = Some(Instant::now());
                }
                ("200 OK", String::new())
            }
            Mode::Refuses(text) => ("403 Forbidden", text),
            Mode::Dies => return,
            Mode::Hangs => {
                while !self.ends.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(20));
                }
                return;
            }
        };
        let _ =
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}", text.len());
    }
}

/// The body of a request; `None`: the connection ended before.
fn read(stream: &mut dyn Stream) -> Option<Value> {
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let length = stream.read(&mut buffer).ok().filter(|length| *length > 0)?;
        text.extend_from_slice(&buffer[..length]);
        let Some(end) = text.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
        let head = String::from_utf8_lossy(&text[..end]).to_lowercase();
        assert!(head.starts_with("post "), "{head}");
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok())?;
        if let Some(body) = text.get(end + 4..end + 4 + length) {
            return serde_json::from_slice(body).ok();
        }
    }
}
