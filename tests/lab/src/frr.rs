//! FRR on a host of the lab: BGP and BFD, with a directory of its own for all of its files and sockets.

use super::host::Host;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{os::unix::fs::chown, thread};

/// Where Debian's package has the daemons.
const DAEMONS: &str = "/usr/lib/frr";
/// BFD: a neighbour that is silent for 500 ms is gone. A busy machine is silent for 300 ms.
const BFD: &str = "bfd\n profile fast\n  receive-interval 100\n  transmit-interval 100\n  detect-multiplier 5\n";

/// A neighbour of a BGP speaker.
#[derive(Clone, Debug)]
pub struct Neighbour {
    /// Its addresses, one of each family: a session with each.
    pub addresses: [String; 2],
    /// Its AS number.
    pub number: u32,
}

/// A running FRR. Dropping it ends its processes.
pub struct Frr {
    netns: String,
    directory: PathBuf,
    children: Vec<(&'static str, Child)>,
}

impl Frr {
    /// Starts zebra, bfdd and bgpd. `more` is put into both of bgpd's address families, `policy` behind them.
    pub fn start(
        host: &Host,
        directory: &Path,
        own: (u32, &str),
        peers: &[Neighbour],
        more: &str,
        policy: &str,
    ) -> Frr {
        fs::create_dir_all(directory).expect("make FRR's directory");
        let configurations = [
            ("zebra", String::new()),
            ("bfdd", BFD.to_owned()),
            ("bgpd", format!("{}{policy}", bgp(own, peers, more))),
        ];
        let mut files = vec![directory.to_owned()];
        for (name, text) in &configurations {
            let file = directory.join(format!("{name}.conf"));
            fs::write(&file, format!("log stdout\n{text}")).expect("write FRR's configuration");
            files.push(file);
        }
        // FRR drops its rights, and wants to write there.
        let (user, group) = account();
        files.iter().for_each(|file| chown(file, Some(user), Some(group)).expect("chown"));
        let mut frr = Frr { netns: host.netns.clone(), directory: directory.to_owned(), children: Vec::new() };
        for (name, _) in &configurations {
            frr.spawn(host, name);
            if *name == "zebra" {
                frr.wait_for_file("zserv.api");
            }
        }
        frr
    }

    fn spawn(&mut self, host: &Host, name: &'static str) {
        let file = |name: String| self.directory.join(name);
        let log = File::create(file(format!("{name}.log"))).expect("make a log");
        let mut command = Command::new(Path::new(DAEMONS).join(name));
        command.arg("-f").arg(file(format!("{name}.conf"))).arg("-i").arg(file(format!("{name}.pid")));
        command.arg("-z").arg(file("zserv.api".to_owned())).arg("--vty_socket").arg(&self.directory).args(["-P", "0"]);
        if name == "bfdd" {
            command.arg("--bfdctl").arg(file("bfdd.sock".to_owned()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
        let child = host.spawn(&mut command);
        let child = child.unwrap_or_else(|e| panic!("{name}: {e}; tests/setup.sh installs what the lab needs"));
        self.children.push((name, child));
    }

    fn wait_for_file(&self, name: &str) {
        let begin = Instant::now();
        while !self.directory.join(name).exists() {
            assert!(begin.elapsed() < Duration::from_secs(10), "FRR has made no {name}: {}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// What a command of its shell says.
    pub fn say(&self, host: &Host, command: &str) -> String {
        let directory = self.directory.display().to_string();
        let out = host.try_run(["vtysh", "--vty_socket", &directory, "-c", command]);
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Stops all of its daemons, as a crash would: no neighbour is told.
    pub fn kill9(&mut self) {
        for (_, child) in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.children.clear();
    }

    /// What its daemons wrote.
    pub fn log(&self) -> String {
        let read = |(name, _): &(&str, Child)| {
            let text = fs::read_to_string(self.directory.join(format!("{name}.log"))).unwrap_or_default();
            format!("--- {name} in {}\n{text}", self.netns)
        };
        self.children.iter().map(read).collect()
    }
}

impl Drop for Frr {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.log());
        }
        self.kill9();
    }
}

/// The configuration of bgpd. Other timers than the defaults make it announce at once.
fn bgp((number, id): (u32, &str), peers: &[Neighbour], more: &str) -> String {
    let mut text = format!(
        "router bgp {number}\n bgp router-id {id}\n no bgp ebgp-requires-policy\n no bgp default ipv4-unicast\n \
         coalesce-time 0\n timers bgp 3 9\n"
    );
    for Neighbour { addresses, number } in peers {
        for address in addresses {
            for setting in ["timers connect 1", "advertisement-interval 0", "bfd profile fast"] {
                text += &format!(" neighbor {address} remote-as {number}\n neighbor {address} {setting}\n");
            }
        }
    }
    for (at, family) in ["ipv4", "ipv6"].into_iter().enumerate() {
        text += &format!(" address-family {family} unicast\n{more}");
        peers.iter().for_each(|peer| text += &format!("  neighbor {} activate\n", peer.addresses[at]));
        text += " exit-address-family\n";
    }
    text + "!\n"
}

/// The user and group of FRR's package.
fn account() -> (u32, u32) {
    let user = nix::unistd::User::from_name("frr").ok().flatten();
    let user = user.expect("a user frr; tests/setup.sh installs what the lab needs");
    (user.uid.as_raw(), user.gid.as_raw())
}
