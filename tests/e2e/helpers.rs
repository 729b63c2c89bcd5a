//! Connections that the kernel's connection tracking helpers expect, if an administrator's rules on the hosts use
//! them. For FTP these are data connections, begun by the server (active) or by the pod (passive). Needs root.

use lab::{Host, Lab, Pod, SERVERS, VISITOR};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

const CONTROL: u16 = 21;
const PATIENCE: Duration = Duration::from_secs(3);
/// Several TCP windows of bytes in each direction.
const SIZE: usize = 300_000;

/// Makes the host's connection tracking follow FTP's control connections.
fn follow_ftp(host: &Host) {
    host.nft(
        "table inet administrators {
           ct helper ftp { type \"ftp\" protocol tcp; }
           chain pre { type filter hook prerouting priority filter; tcp dport 21 ct helper set \"ftp\"; }
         }",
    );
}

fn content(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|i| (i % 251) as u8 ^ seed).collect()
}

/// Sends one end's data, and receives the other end's.
fn exchange(mut data: TcpStream, sends: u8, takes: u8) -> io::Result<()> {
    data.set_read_timeout(Some(PATIENCE))?;
    data.set_write_timeout(Some(PATIENCE))?;
    let mut writer = data.try_clone()?;
    let writing =
        thread::spawn(move || writer.write_all(&content(sends)).and_then(|()| writer.shutdown(Shutdown::Write)));
    let mut got = Vec::new();
    data.read_to_end(&mut got)?;
    writing.join().expect("the writer")?;
    if got == content(takes) { Ok(()) } else { Err(io::Error::other(format!("{} other bytes came", got.len()))) }
}

fn numbers(text: &str) -> Vec<u8> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
}

/// The address in `PORT` or in `227` (RFC 959): its bytes, separated by commas.
fn in_commas(address: SocketAddr) -> String {
    let IpAddr::V4(ip) = address.ip() else { panic!("PORT and PASV are IPv4's") };
    let all = [&ip.octets()[..], &address.port().to_be_bytes()].concat();
    all.iter().map(u8::to_string).collect::<Vec<_>>().join(",")
}

fn from_commas(text: &str) -> SocketAddr {
    let [a, b, c, d, high, low] = numbers(text)[..] else { panic!("no address: {text}") };
    (Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])).into()
}

/// One end of a control connection. The kernel's helper parses the beginning of a line, and knows that only if it has
/// seen the line before. So both ends greet each other first, as usual.
struct Control {
    stream: TcpStream,
    lines: BufReader<TcpStream>,
}

impl Control {
    fn new(stream: TcpStream) -> io::Result<Control> {
        stream.set_read_timeout(Some(PATIENCE))?;
        let lines = BufReader::new(stream.try_clone()?);
        Ok(Control { stream, lines })
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(format!("{line}\r\n").as_bytes())
    }

    fn hear(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

/// The server's part of one session. Returns the client's end of the data connection.
fn serve(control: TcpStream) -> io::Result<IpAddr> {
    let mut control = Control::new(control)?;
    control.say("220 ready")?;
    control.hear()?;
    control.say("230 logged in")?;
    let line = control.hear()?;
    let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
    let client = match verb {
        "PORT" => from_commas(rest),
        "EPRT" => {
            let fields: Vec<&str> = rest.split('|').collect();
            SocketAddr::new(fields[2].parse().expect("an address"), fields[3].parse().expect("a port"))
        }
        _ => return serve_passively(control),
    };
    let data = TcpStream::connect_timeout(&client, PATIENCE)?;
    exchange(data, 1, 2)?;
    Ok(client.ip())
}

fn serve_passively(mut control: Control) -> io::Result<IpAddr> {
    let local = control.stream.local_addr()?.ip().to_canonical();
    let listener = TcpListener::bind((local, 0))?;
    let address = listener.local_addr()?;
    let answer = match local {
        IpAddr::V4(_) => format!("227 Entering Passive Mode ({}).", in_commas(address)),
        IpAddr::V6(_) => format!("229 Entering Extended Passive Mode (|||{}|)", address.port()),
    };
    control.say(&answer)?;
    let (data, client) = accept(&listener)?;
    exchange(data, 1, 2)?;
    Ok(client.ip())
}

/// As `TcpListener::accept`, with a time limit.
fn accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    listener.set_nonblocking(true)?;
    let end = std::time::Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((stream, peer)) => {
                stream.set_nonblocking(false)?;
                return Ok((stream, peer));
            }
            Err(e) if e.kind() != io::ErrorKind::WouldBlock || std::time::Instant::now() > end => return Err(e),
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The pod's part of one session.
fn client(pod: &Pod, server: IpAddr, active: bool) -> io::Result<()> {
    pod.within(|| {
        let mut control = Control::new(TcpStream::connect_timeout(&SocketAddr::new(server, CONTROL), PATIENCE)?)?;
        let own = control.stream.local_addr()?.ip();
        control.hear()?;
        control.say("USER anonymous")?;
        control.hear()?;
        if active {
            let listener = TcpListener::bind((own, 0))?;
            let address = listener.local_addr()?;
            let command = match own {
                IpAddr::V4(_) => format!("PORT {}", in_commas(address)),
                IpAddr::V6(ip) => format!("EPRT |2|{ip}|{}|", address.port()),
            };
            control.say(&command)?;
            return exchange(accept(&listener)?.0, 2, 1);
        }
        control.say(if own.is_ipv4() { "PASV" } else { "EPSV" })?;
        let line = control.hear()?;
        let address = match own {
            IpAddr::V4(_) => from_commas(line.split_once('(').expect("an address").1),
            IpAddr::V6(_) => {
                let port = line.split('|').nth(3).and_then(|port| port.parse().ok()).expect("a port");
                SocketAddr::new(server, port)
            }
        };
        exchange(TcpStream::connect_timeout(&address, PATIENCE)?, 2, 1)
    })
}

#[test]
fn ftp_data_connections_use_the_egress_ip_in_both_modes() {
    let lab = Lab::scene();
    let ext = lab.host("ext");
    let listener = ext.within(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, CONTROL))).expect("listen");
    lab.nodes().iter().for_each(|node| follow_ftp(node));
    let mut wrong = Vec::new();
    for node in lab.nodes() {
        let pod = lab.add_pod(&node.name, "shop", &format!("visitor-{}", node.name), VISITOR);
        for (server, active) in SERVERS.into_iter().flat_map(|server| [(server, true), (server, false)]) {
            let what = format!("{} to {server}, active {active}", pod.name);
            let (seen, done) = thread::scope(|scope| {
                let serving = scope.spawn(|| ext.within(|| accept(&listener).and_then(|(control, _)| serve(control))));
                let done = client(&pod, server, active);
                (serving.join().expect("the server"), done)
            });
            let expected = lab::scene::egress_towards(server);
            if done.is_err() || seen.as_ref().ok() != Some(&expected) {
                wrong.push(format!("{what}: {done:?}, {seen:?}, dropped on its node: {}", node.egret_drops()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    lab.assert_nothing_leaked();
}
