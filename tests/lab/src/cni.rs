//! What a container runtime does with a conflist: each plugin in turn is executed with the environment and the
//! configuration of the CNI specification, and gets the result of the one before it.
//! <https://www.cni.dev/docs/spec/#section-3-execution-of-network-configurations>

use super::host::Host;
use super::places;
use serde_json::{Map, Value, json};
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where Debian's package containernetworking-plugins has the reference plugins.
const REFERENCE_PLUGINS: &str = "/usr/lib/cni";

/// One interface of one pod, as the runtime names it to plugins.
#[derive(Clone, Debug)]
pub struct Runtime {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_NETNS`; empty: the runtime no longer has one.
    pub netns: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// `runtimeConfig`, for plugins that declare the capability.
    pub capabilities: Value,
}

/// What a plugin says when it fails, <https://www.cni.dev/docs/spec/#error>.
#[derive(Clone, Debug)]
pub struct CniError {
    /// The plugin's type.
    pub plugin: String,
    /// `code` of the JSON on stdout; `None`: there was no such JSON.
    pub code: Option<u64>,
    /// `msg`.
    pub msg: String,
    /// `details`.
    pub details: String,
    /// Everything it wrote.
    pub output: String,
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: code {:?}: {} {}\n{}", self.plugin, self.code, self.msg, self.details, self.output)
    }
}

impl std::error::Error for CniError {}

/// A node's conflist.
#[derive(Clone, Debug)]
pub struct Conflist {
    /// As it would stand in `/etc/cni/net.d`.
    pub json: Value,
}

impl Conflist {
    /// `ptp` and `host-local`, for routed pods.
    pub fn routed(node_dir: &Path, subnets: &[String]) -> Conflist {
        Conflist::new(vec![json!({"type": "ptp", "ipMasq": false, "ipam": host_local(node_dir, subnets)})])
    }

    /// `bridge`, `host-local` and `portmap`, for bridged pods.
    pub fn bridged(node_dir: &Path, subnets: &[String]) -> Conflist {
        Conflist::new(vec![
            json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false,
                   "ipam": host_local(node_dir, subnets)}),
            json!({"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}),
        ])
    }

    /// No plugin at all.
    pub fn empty() -> Conflist {
        Conflist::new(Vec::new())
    }

    fn new(plugins: Vec<Value>) -> Conflist {
        Conflist { json: json!({"cniVersion": "1.0.0", "name": "lab", "plugins": plugins}) }
    }

    /// The same with one more plugin at its end.
    #[must_use]
    pub fn with(mut self, plugin: Value) -> Conflist {
        self.plugins_mut().push(plugin);
        self
    }

    fn plugins_mut(&mut self) -> &mut Vec<Value> {
        self.json["plugins"].as_array_mut().expect("a conflist has plugins")
    }

    /// The plugins' types, in order.
    pub fn types(&self) -> Vec<String> {
        self.plugins().map(|p| p["type"].as_str().unwrap_or_default().to_owned()).collect()
    }

    fn plugins(&self) -> impl DoubleEndedIterator<Item = &Value> {
        self.json["plugins"].as_array().into_iter().flatten()
    }

    /// What a plugin of the list gets on stdin.
    pub fn stdin_of(&self, plugin: &Value, runtime: &Runtime, previous: Option<&Value>) -> Value {
        let mut conf = plugin.clone();
        for key in ["cniVersion", "name"] {
            conf[key] = self.json[key].clone();
        }
        if let Some(Value::Object(declared)) = conf.as_object_mut().and_then(|c| c.remove("capabilities")) {
            let given: Map<String, Value> = declared
                .iter()
                .filter(|(_, wanted)| **wanted == Value::Bool(true))
                .filter_map(|(name, _)| Some((name.clone(), runtime.capabilities.get(name)?.clone())))
                .collect();
            if !given.is_empty() {
                conf["runtimeConfig"] = Value::Object(given);
            }
        }
        if let Some(previous) = previous {
            conf["prevResult"] = previous.clone();
        }
        conf
    }

    /// ADD through the whole list; the last plugin's result.
    ///
    /// # Errors
    /// The first plugin that fails. What the plugins before it did stays, until DEL.
    pub fn add(&self, host: &Host, runtime: &Runtime) -> Result<Value, CniError> {
        let mut result = None;
        for plugin in self.plugins() {
            let stdin = self.stdin_of(plugin, runtime, result.as_ref());
            result = Some(call(host, "ADD", runtime, &stdin)?);
        }
        Ok(result.unwrap_or_default())
    }

    /// DEL, in the reverse order. `previous` is the cached result of ADD.
    ///
    /// # Errors
    /// The first plugin that fails; the ones before it are not called then.
    pub fn del(&self, host: &Host, runtime: &Runtime, previous: Option<&Value>) -> Result<(), CniError> {
        self.plugins().rev().try_for_each(|plugin| self.one("DEL", plugin, host, runtime, previous))
    }

    /// CHECK, in order.
    ///
    /// # Errors
    /// The first plugin that fails.
    pub fn check(&self, host: &Host, runtime: &Runtime, previous: &Value) -> Result<(), CniError> {
        self.plugins().try_for_each(|plugin| self.one("CHECK", plugin, host, runtime, Some(previous)))
    }

    /// DEL of one plugin of the list alone: runtimes repeat a DEL, and plugins of the list may have run already.
    ///
    /// # Errors
    /// The plugin fails.
    pub fn del_only(
        &self,
        kind: &str,
        host: &Host,
        runtime: &Runtime,
        previous: Option<&Value>,
    ) -> Result<(), CniError> {
        let plugin = self.plugins().find(|p| p["type"] == kind).unwrap_or_else(|| panic!("no {kind} in the conflist"));
        self.one("DEL", plugin, host, runtime, previous)
    }

    fn one(
        &self,
        verb: &str,
        plugin: &Value,
        host: &Host,
        runtime: &Runtime,
        previous: Option<&Value>,
    ) -> Result<(), CniError> {
        call(host, verb, runtime, &self.stdin_of(plugin, runtime, previous)).map(drop)
    }
}

fn host_local(node_dir: &Path, subnets: &[String]) -> Value {
    let ranges: Vec<Value> = subnets.iter().map(|s| json!([{"subnet": s}])).collect();
    json!({"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
           "dataDir": node_dir.join("host-local")})
}

/// Where a plugin's program is: Egret's as built by cargo, the others' from Debian's package.
pub fn program(kind: &str) -> PathBuf {
    match kind {
        "egret-cni" => places::program("egret-cni"),
        other => Path::new(REFERENCE_PLUGINS).join(other),
    }
}

/// Executes a plugin inside the node's network namespace; its result, `null` where the verb has none.
///
/// # Errors
/// It ended with another status than 0.
pub fn call(host: &Host, verb: &str, runtime: &Runtime, stdin: &Value) -> Result<Value, CniError> {
    let kind = stdin["type"].as_str().unwrap_or_default();
    let variables = [
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", &runtime.container_id),
        ("CNI_NETNS", &runtime.netns),
        ("CNI_IFNAME", &runtime.ifname),
        ("CNI_ARGS", &runtime.args),
    ];
    let (ok, stdout, stderr) = execute(host, kind, &variables, stdin.to_string().as_bytes());
    let parsed = serde_json::from_str::<Value>(&stdout);
    match (ok, parsed) {
        (true, Ok(result)) => Ok(result),
        (true, Err(_)) if stdout.trim().is_empty() => Ok(Value::Null),
        (_, parsed) => {
            let said = parsed.unwrap_or_default();
            let text = |key: &str| said[key].as_str().unwrap_or_default().to_owned();
            Err(CniError {
                plugin: kind.to_owned(),
                code: said["code"].as_u64(),
                msg: text("msg"),
                details: text("details"),
                output: format!("{stdout}{stderr}"),
            })
        }
    }
}

/// Executes a plugin with exactly these variables (`PATH` and `CNI_PATH` aside) and these bytes on stdin: whether it
/// succeeded, its stdout and its stderr.
pub fn execute(host: &Host, kind: &str, variables: &[(&str, &str)], stdin: &[u8]) -> (bool, String, String) {
    let program = program(kind);
    let egret = super::cni::program("egret-cni");
    let own = egret.parent().expect("a program lies in a directory").display();
    let mut command = Command::new(&program);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("CNI_PATH", format!("{own}:{REFERENCE_PLUGINS}"))
        .envs(variables.iter().copied().filter(|(_, value)| !value.is_empty()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = host.spawn(&mut command).unwrap_or_else(|e| {
        panic!("{}: {e}; tests/setup.sh installs what the lab needs", program.display());
    });
    if let Some(mut pipe) = child.stdin.take() {
        // A plugin may refuse its input before it has read all of it.
        let _ = pipe.write_all(stdin);
    }
    let out = child.wait_with_output().expect("wait for a plugin");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}
