//! A plugin's process as a runtime starts it: from before it is there until it is gone.

use lab::cni::{Conflist, Runtime, program};
use lab::{Lab, Pod, manifests};
use serde_json::Value;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What is called again and again.
pub struct Call {
    /// The plugin's program.
    pub program: PathBuf,
    /// Its arguments; plugins get none.
    pub arguments: Vec<&'static str>,
    /// The file that it reads.
    pub stdin: PathBuf,
    /// What the environment tells it.
    pub runtime: Runtime,
}

impl Call {
    /// Of the plugin that the configuration names, for a pod that the main plugin has set up. `name`: of the file with the
    /// configuration.
    pub fn new(lab: &Lab, name: &str, pod: &Pod, configuration: &Value) -> Call {
        let stdin = lab.directory().join(format!("{name}.json"));
        let text = Conflist::empty().stdin_of(configuration, &pod.runtime, pod.result.as_ref()).to_string();
        fs::write(&stdin, text).expect("write a configuration");
        let kind = configuration["type"].as_str().unwrap_or_default();
        Call { program: program(kind), arguments: Vec::new(), stdin, runtime: pod.runtime.clone() }
    }

    /// One call: how long it took, and whether it succeeded.
    pub fn verb(&self, verb: &str) -> (Duration, bool) {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .env_clear()
            .envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("CNI_PATH", "/usr/lib/cni"), ("CNI_COMMAND", verb)])
            .envs([("CNI_CONTAINERID", &self.runtime.container_id), ("CNI_NETNS", &self.runtime.netns)])
            .envs([("CNI_IFNAME", &self.runtime.ifname), ("CNI_ARGS", &self.runtime.args)])
            .stdin(File::open(&self.stdin).expect("a configuration"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let begin = Instant::now();
        let ok = command.spawn().and_then(|mut child| child.wait()).is_ok_and(|status| status.success());
        (begin.elapsed(), ok)
    }
}

/// A pod of n1 as the main plugin leaves it, which the cluster knows as it does before ADD has answered: without
/// addresses. A daemon that knew them would adopt the pod.
pub fn pod_before_add(lab: &Lab, namespace: &str, name: &str, labels: manifests::Labels) -> Pod {
    lab.node("n1").set_conflist(lab.plain_conflist("n1"));
    let mut pod = lab.sandbox("n1", namespace, name, labels);
    pod.attach().unwrap_or_else(|e| panic!("{e}"));
    let before_add = manifests::pod("n1", namespace, name, &pod.uid, labels, &[]);
    lab.manifests().write_object(&format!("pod-{namespace}-{name}.yaml"), &before_add);
    std::thread::sleep(Duration::from_millis(500));
    pod
}
