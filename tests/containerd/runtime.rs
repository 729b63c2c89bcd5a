//! Debian's containerd on a node of the lab: its own root, state and socket, in the node's own network and mount
//! namespaces, so that it meets neither another lab's nor the machine's.

use crate::cri::Cri;
use crate::image::{self, Image};
use lab::host::checked;
use lab::{Daemon, Lab, Node, leftovers};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The state directory, and the one of the cache of results, which no setting of containerd moves: each node has its
/// own there.
const STATE: &str = "/run/containerd";
const RESULTS: &str = "/var/lib/cni";
const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where Debian has the reference plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A container runtime on a node. It and all that it started end when it is dropped.
pub struct Containerd {
    /// Its client.
    pub cri: Cri,
    /// Where it looks for network configurations.
    pub conf_dir: PathBuf,
    /// Where it looks for plugins.
    pub bin_dir: PathBuf,
    node: Arc<Node>,
    lab: String,
    daemon: Daemon,
}

impl Containerd {
    /// Starts it, with the image of which all sandboxes are made. Its directory of configurations is empty.
    pub fn start(lab: &Lab, node: &str, image: &Path) -> Containerd {
        let node = Arc::clone(lab.node(node));
        let [conf_dir, bin_dir, root] = ["conf", "bin", "containerd"].map(|name| {
            let directory = node.directory.join(name);
            fs::create_dir_all(&directory).expect("make a directory");
            directory
        });
        for plugin in fs::read_dir(PLUGINS).expect("the reference plugins").flatten() {
            symlink(plugin.path(), bin_dir.join(plugin.file_name())).expect("a link");
        }
        for directory in [STATE, RESULTS] {
            fs::create_dir_all(directory).expect("make a directory");
        }
        // In memory: images are unpacked as overlays, which do not lie on every file system.
        for directory in [STATE, RESULTS, &root.display().to_string()] {
            node.run(["mount", "-t", "tmpfs", "tmpfs", directory]);
        }
        let config = node.directory.join("containerd.toml");
        fs::write(&config, configuration(&root, &conf_dir, &bin_dir)).expect("write");
        let variable = format!("{}={}", leftovers::VARIABLE, lab.name());
        let arguments = [&variable, "containerd", "--config", &config.display().to_string()].map(str::to_owned);
        let logs = lab.directory().join("logs");
        fs::create_dir_all(&logs).expect("make the logs' directory");
        let log = logs.join(format!("containerd-{}.log", node.name));
        let daemon = Daemon::start("containerd", &node, Path::new("/usr/bin/env"), arguments.into(), log);
        let cri = Cri::new(&node, SOCKET.into());
        let containerd = Containerd { cri, conf_dir, bin_dir, node, lab: lab.name().to_owned(), daemon };
        containerd.wait();
        containerd.import(image, image::POD);
        containerd
    }

    /// Imports an image.
    pub fn import(&self, archive: &Path, name: &str) {
        let archive = archive.display().to_string();
        self.node.run(["ctr", "--address", SOCKET, "-n", "k8s.io", "images", "import", &archive]);
        self.wait_until("the image is there", || self.cri.has_image(name));
    }

    /// Puts a configuration there as it is when a cluster's CNI has written it.
    pub fn configure(&self, text: &str) {
        fs::write(self.conf_dir.join("10-lab.conflist"), text).expect("write");
    }

    /// Runs `egretd` with this runtime's directories.
    pub fn egretd(&self, arguments: &[&str]) -> std::process::Output {
        let mut argv = vec![env!("CARGO_BIN_EXE_egretd").to_owned()];
        argv.extend(arguments.iter().map(|a| (*a).to_owned()));
        argv.extend(["--cni-conf-dir".into(), self.conf_dir.display().to_string()]);
        argv.extend(["--cni-bin-dir".into(), self.bin_dir.display().to_string()]);
        self.node.try_run(argv)
    }

    /// Runs `egretd install --entry`, and waits until the runtime has read what it wrote.
    #[track_caller]
    pub fn install(&self) {
        let socket = self.node.cni_socket().display().to_string();
        let state_dir = self.node.state_dir().display().to_string();
        let out = self.egretd(&["install", "--entry", "--socket", &socket, "--state-dir", &state_dir]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        self.wait_network();
    }

    /// Waits until the runtime says that its network is ready.
    #[track_caller]
    pub fn wait_network(&self) {
        self.wait_until("the network is ready", || matches!(self.cri.network_ready(), Ok(Ok(()))));
    }

    /// Kills it with SIGKILL and starts it again; what it started goes on.
    pub fn restart(&self) {
        self.daemon.restart();
        self.wait();
    }

    /// Everything of a machine's that a reboot ends: the runtime, all pods, `/run`. Its root and the cache of results
    /// stay.
    pub fn die_as_by_reboot(&self) {
        self.daemon.kill9();
        leftovers::end_containers(&self.lab);
        self.node.run(["umount", "--lazy", "--recursive", STATE]);
        self.node.run(["mount", "-t", "tmpfs", "tmpfs", STATE]);
    }

    /// What it said.
    pub fn log(&self) -> String {
        self.daemon.log()
    }

    fn wait(&self) {
        self.wait_until("containerd answers", || self.cri.network_ready().is_ok());
    }

    #[track_caller]
    fn wait_until(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(20), "waited 20 s until {what}; it said:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.daemon.kill9();
        leftovers::end_containers(&self.lab);
    }
}

/// Where what lies, and nothing more than is needed: all else is as Debian has it.
fn configuration(root: &Path, conf_dir: &Path, bin_dir: &Path) -> String {
    let [root, conf_dir, bin_dir] = [root, conf_dir, bin_dir].map(Path::display);
    let image = image::POD;
    format!(
        r#"version = 2
root = "{root}"
state = "{STATE}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[debug]
  level = "warn"
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin_dir}"
    conf_dir = "{conf_dir}"
"#
    )
}

/// Packs the image of pods: this program, which becomes the visitor by these arguments.
pub fn pack(lab: &Lab, arguments: &[&str]) -> PathBuf {
    let program = std::env::current_exe().expect("this program");
    let inside = format!("/{}", program.file_name().expect("its name").display());
    let entrypoint: Vec<&str> = [inside.as_str()].iter().chain(arguments).copied().collect();
    let image = Image { name: image::POD, programs: &[&program], entrypoint: &entrypoint };
    image::pack(&lab.directory().join("pod-image"), lab.name(), &image)
}

/// The runtime's own tools that a test calls: they are there, or `tests/setup.sh` was not run.
pub fn check_tools() {
    checked(&["containerd", "--version"], None);
}
