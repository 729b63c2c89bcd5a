//! One call of the plugin, as by a runtime.

use crate::node::{Node, Pod};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

pub struct Call<'a> {
    node: &'a Node,
    variables: BTreeMap<&'static str, OsString>,
    keys: BTreeMap<&'static str, Value>,
    /// A text, because the plugin must return it unchanged.
    previous: Option<String>,
    input: Option<Vec<u8>>,
}

impl<'a> Call<'a> {
    /// A call for container `c1`, interface `eth0`, with a valid configuration for the newest version.
    pub fn new(node: &'a Node, command: &str) -> Self {
        let keys = [
            ("cniVersion", json!("1.1.0")),
            ("name", json!("pods")),
            ("type", json!("egret-cni")),
            ("socket", json!(node.socket())),
            ("stateDir", json!(node.state_dir())),
        ];
        Call { node, variables: BTreeMap::new(), keys: keys.into(), previous: None, input: None }
            .variable("CNI_COMMAND", command)
            .variable("CNI_CONTAINERID", "c1")
            .variable("CNI_IFNAME", "eth0")
            .variable("CNI_PATH", "/opt/cni/bin")
    }

    /// For this pod, of namespace `shop`, with the main plugin's result.
    pub fn pod(self, pod: &Pod) -> Self {
        self.netns(&pod.netns()).previous(&pod.result()).of("shop")
    }

    /// For a pod of this Kubernetes namespace.
    pub fn of(self, namespace: &str) -> Self {
        self.variable("CNI_ARGS", format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=web-0"))
    }

    pub fn variable(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.variables.insert(name, value.into());
        self
    }

    pub fn without_variable(mut self, name: &'static str) -> Self {
        self.variables.remove(name);
        self
    }

    pub fn container(self, id: &str) -> Self {
        self.variable("CNI_CONTAINERID", id)
    }

    pub fn netns(self, path: &Path) -> Self {
        self.variable("CNI_NETNS", path)
    }

    pub fn key(mut self, key: &'static str, value: Value) -> Self {
        self.keys.insert(key, value);
        self
    }

    pub fn without_key(mut self, key: &'static str) -> Self {
        self.keys.remove(key);
        self
    }

    pub fn previous(mut self, text: &str) -> Self {
        self.previous = Some(text.to_owned());
        self
    }

    /// Replaces the configuration by these bytes.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    pub fn run(self) -> CallResult {
        self.run_and(|_| {})
    }

    /// As `run`, and kills the plugin after `time`.
    pub fn run_and_kill(self, time: Duration) {
        self.run_and(|plugin| {
            thread::sleep(time);
            let _ = plugin.kill();
        });
    }

    fn run_and(self, interfere: impl FnOnce(&mut Child) + Send) -> CallResult {
        let input = self.input.unwrap_or_else(|| {
            let mut keys: Vec<String> = self.keys.iter().map(|(k, v)| format!("{k:?}: {v}")).collect();
            keys.extend(self.previous.map(|p| format!("\"prevResult\": {p}")));
            format!("{{{}}}", keys.join(", ")).into_bytes()
        });
        let variables = self.variables;
        let out = self.node.inside(move || {
            let mut plugin = Command::new(env!("CARGO_BIN_EXE_egret-cni"))
                .env_clear()
                .envs(variables)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // The plugin may stop reading an input that is too long. That is no failure of the test.
            let _ = plugin.stdin.take().unwrap().write_all(&input);
            interfere(&mut plugin);
            plugin.wait_with_output().unwrap()
        });
        CallResult {
            status: out.status.code(),
            stdout: String::from_utf8(out.stdout).unwrap(),
            stderr: String::from_utf8(out.stderr).unwrap(),
        }
    }
}

#[derive(Debug)]
pub struct CallResult {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl CallResult {
    /// The output of a call that succeeded without a message.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.status == Some(0) && self.stderr.is_empty(), "{self:?}");
        self.stdout
    }

    /// The code and the texts of the error on stdout, in the specification's format.
    #[track_caller]
    pub fn failure(self) -> (u64, String) {
        assert!(self.status == Some(1) && self.stderr.is_empty(), "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        let known = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
        assert!(known.contains(&text("cniVersion").as_str()) && !text("msg").is_empty(), "{self:?}");
        (error["code"].as_u64().unwrap(), format!("{}; {}", text("msg"), text("details")))
    }
}
