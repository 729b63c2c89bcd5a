//! `egretd install` on directories of its own: how it changes each network configuration, what a killed installation
//! leaves, and concurrent writers.

mod interrupted;

use lab::turn::{self, Turn};
use nix::unistd::Uid;
use serde_json::Value;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

const PLAIN: &str = r#"{ "name":"cbr0","unknown": {"b":1.50,"a":1e3},
  "cniVersion": "1.0.0", "plugins":[
    {"type": "flannel", "delegate":{"isDefaultGateway":true} },
    {"type":"portmap","capabilities":{"portMappings":true}}
  ]
}
"#;
const SINGLE: &str = "{\"cniVersion\":\"0.4.0\", \"name\": \"net\", \"type\":\"ptp\", \"mtu\":1400 }\n";

/// A host's directories.
struct Host {
    directory: TempDir,
    _turn: Arc<Turn>,
}

impl Host {
    fn new() -> Host {
        let turn = turn::beside_others();
        let directory = tempfile::tempdir().unwrap();
        for name in ["bin", "conf", "run"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        fs::write(directory.path().join("new-plugin"), "#!/bin/sh\necho new\n").unwrap();
        Host { directory, _turn: turn }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn conf(&self, name: &str) -> PathBuf {
        self.path("conf").join(name)
    }

    /// Writes a configuration with old time stamps.
    fn write(&self, name: &str, text: &str) {
        fs::write(self.conf(name), text).unwrap();
        self.age(name);
    }

    fn age(&self, name: &str) {
        let before = SystemTime::now() - Duration::from_secs(60);
        File::options().append(true).open(self.conf(name)).unwrap().set_modified(before).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.conf(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// The names in a directory.
    fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn arguments(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        let all = [
            ("--cni-bin-dir", path("bin")),
            ("--cni-conf-dir", path("conf")),
            ("--plugin", path("new-plugin")),
            ("--socket", path("run/cni.sock")),
            ("--state-dir", path("state")),
        ];
        let all = all.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]);
        ["install".to_owned(), "--entry".to_owned()].into_iter().chain(all).collect()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_egretd"));
        command.args(self.arguments()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start(&self) -> Child {
        self.command().spawn().unwrap()
    }

    #[track_caller]
    fn install(&self) -> String {
        let out = ended(self.start());
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{said}");
        said
    }

    #[track_caller]
    fn fails(&self) -> String {
        let out = ended(self.start());
        assert_eq!(out.status.code(), Some(1));
        String::from_utf8_lossy(&out.stderr).into_owned()
    }

    fn entry(&self) -> String {
        let [socket, state] = ["run/cni.sock", "state"].map(|name| self.path(name).display().to_string());
        format!("{{\"type\": \"egret-cni\", \"socket\": \"{socket}\", \"stateDir\": \"{state}\"}}")
    }

    /// [`PLAIN`] with the entry.
    fn extended(&self) -> String {
        let last = "{\"type\":\"portmap\",\"capabilities\":{\"portMappings\":true}}";
        PLAIN.replace(last, &format!("{last},\n    {}", self.entry()))
    }
}

/// Waits for a process that must not hang.
#[track_caller]
fn ended(mut child: Child) -> Output {
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > Duration::from_secs(10) {
            child.kill().unwrap();
            panic!("it still runs: {:?}", child.wait_with_output());
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn everything_but_the_entry_stays_byte_by_byte_and_a_second_time_nothing_changes() {
    let host = Host::new();
    host.write("10-flannel.conflist", PLAIN);
    fs::set_permissions(host.conf("10-flannel.conflist"), Permissions::from_mode(0o640)).unwrap();
    if Uid::effective().is_root() {
        chown(host.conf("10-flannel.conflist"), Some(7), Some(8)).unwrap();
    }
    host.install();
    assert_eq!(host.read("10-flannel.conflist"), host.extended());
    let metadata = fs::metadata(host.conf("10-flannel.conflist")).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o640);
    if Uid::effective().is_root() {
        assert_eq!((metadata.uid(), metadata.gid()), (7, 8));
    }
    assert_eq!(fs::metadata(host.path("bin/egret-cni")).unwrap().mode() & 0o7777, 0o755);
    let inodes = || ["conf/10-flannel.conflist", "bin/egret-cni"].map(|f| fs::metadata(host.path(f)).unwrap().ino());
    let before = inodes();
    assert!(host.install().contains("already"));
    assert_eq!(inodes(), before);
    assert_eq!((host.names("conf").len(), host.names("bin").len()), (1, 1));
}

#[test]
fn an_entry_with_another_socket_is_updated_in_place() {
    let host = Host::new();
    let old = PLAIN.replace(
        "{\"type\":\"portmap\"",
        "{ \"x\":1, \"type\":\"egret-cni\" , \"socket\" : \"/old\"},{\"type\":\"portmap\"",
    );
    host.write("10-flannel.conflist", &old);
    host.install();
    let socket = host.path("run/cni.sock").display().to_string();
    let state = format!("\"egret-cni\", \"stateDir\": \"{}\"", host.path("state").display());
    assert_eq!(host.read("10-flannel.conflist"), old.replace("/old", &socket).replace("\"egret-cni\"", &state));
}

#[test]
fn the_first_file_that_a_runtime_can_use_gets_the_entry_and_no_other() {
    let host = Host::new();
    let others = [
        ("00-notes.txt", PLAIN),
        ("01-broken.conflist", "{\"name\": "),
        ("02-empty.conflist", ""),
        ("03-no-plugins.conflist", "{\"cniVersion\":\"1.0.0\",\"name\":\"x\",\"plugins\":[]}"),
        ("04-list.conf", PLAIN),
        ("11-later.conflist", PLAIN),
        ("9-after-10.conflist", PLAIN),
        ("A.conflist~", PLAIN),
    ];
    for (name, text) in others {
        host.write(name, text);
    }
    fs::create_dir(host.conf("05-directory.conflist")).unwrap();
    symlink("nowhere", host.conf("06-dangling.conflist")).unwrap();
    host.write("10-flannel.conflist", PLAIN);
    let said = host.install();
    for name in ["01-broken", "02-empty", "03-no-plugins", "04-list", "05-directory", "06-dangling"] {
        assert!(said.contains(name), "{name} is not named in {said}");
    }
    for (name, text) in others {
        assert_eq!(host.read(name), text, "{name}");
    }
    assert_eq!(host.read("10-flannel.conflist"), host.extended());
    assert_eq!(host.names("conf").len(), others.len() + 3);
}

#[test]
fn a_single_plugin_gets_a_list_that_follows_its_changes_and_is_removed_with_it() {
    let host = Host::new();
    host.write("10-net.conf", SINGLE);
    fs::set_permissions(host.conf("10-net.conf"), Permissions::from_mode(0o600)).unwrap();
    host.install();
    assert_eq!(host.names("conf"), ["10-net-egret.conflist", "10-net.conf"]);
    assert_eq!(host.read("10-net.conf"), SINGLE);
    let list = host.read("10-net-egret.conflist");
    assert!(list.contains(SINGLE.trim()), "{list}");
    let json: Value = serde_json::from_str(&list).unwrap();
    assert_eq!((&json["name"], &json["cniVersion"]), (&"net".into(), &"0.4.0".into()));
    assert_eq!(json["plugins"][1]["type"], "egret-cni");
    assert_eq!(fs::metadata(host.conf("10-net-egret.conflist")).unwrap().mode() & 0o7777, 0o600);
    assert!(host.install().contains("already"));

    host.write("10-net.conf", &SINGLE.replace("1400", "9000"));
    host.install();
    assert!(host.read("10-net-egret.conflist").contains("9000"));

    fs::rename(host.conf("10-net.conf"), host.conf("10-net.conf.aside")).unwrap();
    host.write("20-flannel.conflist", PLAIN);
    host.install();
    assert_eq!(host.names("conf"), ["10-net.conf.aside", "20-flannel.conflist"]);
    assert_eq!(host.read("20-flannel.conflist"), host.extended());
}

#[test]
fn a_link_is_not_replaced_and_its_target_is_not_written() {
    let host = Host::new();
    fs::write(host.path("elsewhere"), PLAIN).unwrap();
    symlink(host.path("elsewhere"), host.conf("10-flannel.conflist")).unwrap();
    host.install();
    assert_eq!(fs::read_to_string(host.path("elsewhere")).unwrap(), PLAIN);
    assert!(host.conf("10-flannel.conflist").symlink_metadata().unwrap().is_symlink());
    let list: Value = serde_json::from_str(&host.read("10-flannel-egret.conflist")).unwrap();
    assert_eq!(list["plugins"].as_array().unwrap().len(), 3);
}

#[test]
fn a_configuration_that_cannot_be_extended_stays_and_the_reason_is_reported() {
    let host = Host::new();
    let list = |version: &str| PLAIN.replace("\"cniVersion\": \"1.0.0\", ", version);
    let cases = [
        ("10-a.conflist", list("\"cniVersion\": \"0.2.0\", "), "0.2.0"),
        ("10-a.conflist", list("\"cniVersion\": \"2.0.0\", "), "2.0.0"),
        ("10-a.conflist", list(""), "0.1.0"),
        ("10-a.conf", SINGLE.replace("0.4.0", "0.2.0"), "0.2.0"),
    ];
    for (name, text, reason) in cases {
        host.write(name, &text);
        host.write("20-b.conflist", PLAIN);
        let said = host.fails();
        assert!(said.contains(name) && said.contains(reason), "{said}");
        assert_eq!((host.read(name), host.read("20-b.conflist")), (text, PLAIN.to_owned()));
        assert_eq!(host.names("conf").len(), 2);
        fs::remove_file(host.conf(name)).unwrap();
    }
    host.write("10-net.conf", SINGLE);
    host.write("10-net-egret.conflist", "somebody's");
    assert!(host.fails().contains("10-net-egret.conflist"));
    assert_eq!(host.read("10-net-egret.conflist"), "somebody's");
}

#[test]
fn wrong_directories_and_files_are_named() {
    let host = Host::new();
    host.write("10-flannel.conflist", PLAIN);
    fs::remove_dir(host.path("bin")).unwrap();
    assert!(host.fails().contains("--cni-bin-dir"));
    fs::create_dir(host.path("bin")).unwrap();
    fs::remove_file(host.path("new-plugin")).unwrap();
    assert!(host.fails().contains("--plugin"));
    assert_eq!(host.read("10-flannel.conflist"), PLAIN, "an entry without a plugin would stop all pods");
}

/// The daemon writes the entry when it is in sync. A node whose daemon was never in sync must not be worse off.
#[test]
fn without_the_entry_only_the_program_is_installed_and_nothing_is_waited_for() {
    let host = Host::new();
    host.write("10-flannel.conflist", PLAIN);
    let arguments = host.arguments();
    let mut command = Command::new(env!("CARGO_BIN_EXE_egretd"));
    command.args(arguments.iter().filter(|a| *a != "--entry"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let out = ended(command.spawn().unwrap());
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success() && said.contains("egretd node"), "{said}");
    assert_eq!(host.names("bin"), ["egret-cni"]);
    assert_eq!(host.read("10-flannel.conflist"), PLAIN);
    fs::remove_dir_all(host.path("conf")).unwrap();
    assert!(ended(command.spawn().unwrap()).status.success());
}

#[test]
fn it_waits_for_a_configuration_and_creates_none() {
    let host = Host::new();
    fs::remove_dir(host.path("conf")).unwrap();
    let child = host.start();
    thread::sleep(Duration::from_millis(500));
    assert!(!host.path("conf").exists());
    fs::create_dir(host.path("conf")).unwrap();
    thread::sleep(Duration::from_millis(500));
    assert!(host.names("conf").is_empty());
    // A slow writer is waited for, and the next file is not used instead.
    fs::write(host.conf("10-flannel.conflist"), &PLAIN[..30]).unwrap();
    host.write("20-other.conflist", PLAIN);
    thread::sleep(Duration::from_millis(600));
    fs::write(host.conf("10-flannel.conflist"), PLAIN).unwrap();
    let out = ended(child);
    assert!(out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("waiting for the cluster's CNI"));
    assert_eq!(host.read("10-flannel.conflist"), host.extended());
    assert_eq!(host.read("20-other.conflist"), PLAIN);
}

#[test]
fn the_uninstallation_mark_is_removed() {
    let host = Host::new();
    host.write("10-flannel.conflist", PLAIN);
    fs::write(host.path("run/uninstalled"), "").unwrap();
    host.install();
    assert!(host.names("run").is_empty());
}

/// What another CNI writes is never lost, whether it writes in place or renames, and however often `install` runs
/// meanwhile.
#[test]
fn a_concurrent_writer_wins() {
    let _machine = lab::turn::alone();
    let host = Host::new();
    let version = |i: usize| PLAIN.replace("1.50", &format!("{i}"));
    fs::write(host.conf("10-flannel.conflist"), version(0)).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    host.install();
                }
            });
        }
        let is_there = |i: usize| {
            let text = host.read("10-flannel.conflist");
            serde_json::from_str::<Value>(&text).is_ok_and(|json| json["unknown"]["b"] == i)
        };
        let mut lost = None;
        for i in 1..400 {
            if i % 2 == 0 {
                fs::write(host.conf("10-flannel.conflist"), version(i)).unwrap();
            } else {
                fs::write(host.conf(".new"), version(i)).unwrap();
                fs::rename(host.conf(".new"), host.conf("10-flannel.conflist")).unwrap();
            }
            let begin = Instant::now();
            while !is_there(i) {
                if begin.elapsed() > Duration::from_millis(500) {
                    lost = Some(i);
                    break;
                }
            }
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(lost, None, "{}", host.read("10-flannel.conflist"));
    });
    host.install();
    assert_eq!(host.read("10-flannel.conflist"), host.extended().replace("1.50", "399"));
    assert_eq!(host.names("conf").len(), 1);
}
