//! As much of a kubelet as `kubectl egret test` needs: it starts its pods in the lab, serves their logs, and removes
//! them. The controller of namespaces is here too.

use lab::Lab;
use lab::pod::Pod;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

/// A kubelet's port.
const PORT: u16 = 10250;
/// From one look at the API server to the next.
const PACE: Duration = Duration::from_millis(50);

/// The kubelets of all nodes.
pub struct Kubelets<'l> {
    lab: &'l Lab,
    logs: PathBuf,
    /// By the pod's uid.
    running: BTreeMap<String, (Pod, Child)>,
}

impl<'l> Kubelets<'l> {
    /// Begins to serve logs on every node.
    pub fn new(lab: &'l Lab) -> Self {
        let logs = lab.directory().join("pods");
        std::fs::create_dir_all(&logs).expect("a directory for logs");
        let tls = tls();
        for node in ["n1", "n2", "g1", "g2"] {
            let listener = lab.node(node).within(|| TcpListener::bind(("::", PORT))).expect("a kubelet's port");
            let (tls, logs) = (Arc::clone(&tls), logs.clone());
            thread::spawn(move || {
                while let Ok((stream, _)) = listener.accept() {
                    let (tls, logs) = (Arc::clone(&tls), logs.clone());
                    thread::spawn(move || serve(stream, tls, &logs));
                }
            });
        }
        Kubelets { lab, logs, running: BTreeMap::new() }
    }

    /// Does what kubelets do until the child has ended. Returns its exit code.
    pub fn run_until_ended(&mut self, child: &mut Child, patience: Duration) -> i32 {
        let begin = Instant::now();
        loop {
            self.look();
            if let Some(status) = child.try_wait().expect("wait for the command") {
                return status.code().unwrap_or(-1);
            }
            assert!(begin.elapsed() < patience, "the command has not ended within {patience:?}");
            thread::sleep(PACE);
        }
    }

    /// One look at the API server.
    pub fn look(&mut self) {
        let api = self.lab.api();
        let mut there = BTreeSet::new();
        for namespace in items(&api.get("/api/v1/namespaces?labelSelector=egret.dev%2Ftest%3Dtrue")) {
            let name = text(&namespace["metadata"]["name"]);
            let path = format!("/api/v1/namespaces/{name}");
            let pods = items(&api.get(&format!("{path}/pods")));
            for pod in &pods {
                self.follow(pod);
                there.insert(text(&pod["metadata"]["uid"]));
            }
            if namespace["metadata"]["deletionTimestamp"].is_string() && pods.is_empty() {
                let mut gone = namespace.clone();
                gone["spec"]["finalizers"] = json!([]);
                let _ = api.try_ask("PUT", &format!("{path}/finalize"), Some(("application/json", &gone)));
            }
        }
        // The API server deletes a pod that has ended at once, without its kubelet.
        let gone: Vec<String> = self.running.keys().filter(|uid| !there.contains(*uid)).cloned().collect();
        gone.iter().for_each(|uid| self.stop(uid));
    }

    fn stop(&mut self, uid: &str) {
        if let Some((pod, mut child)) = self.running.remove(uid) {
            let _ = child.kill();
            let _ = child.wait();
            pod.delete();
        }
    }

    fn follow(&mut self, pod: &Value) {
        let (namespace, name) = (text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
        let (path, uid) = (format!("/api/v1/namespaces/{namespace}/pods/{name}"), text(&pod["metadata"]["uid"]));
        if pod["metadata"]["deletionTimestamp"].is_string() {
            self.stop(&uid);
            self.lab.api().delete(&path);
        } else if let Some((_, child)) = self.running.get_mut(&uid) {
            if pod["status"]["phase"] == "Running"
                && let Ok(Some(status)) = child.try_wait()
            {
                let phase = if status.success() { "Succeeded" } else { "Failed" };
                self.write(&path, &json!({"status": {"phase": phase}}));
            }
        } else {
            let started = self.start(pod, &namespace, &name);
            let ips: Vec<Value> = started.0.addresses.iter().map(|ip| json!({"ip": ip})).collect();
            let status = json!({"status": {"phase": "Running", "podIP": ips[0]["ip"], "podIPs": ips}});
            self.running.insert(uid, started);
            self.write(&path, &status);
        }
    }

    fn write(&self, path: &str, status: &Value) {
        let content = Some(("application/merge-patch+json", status));
        // It may be gone.
        let _ = self.lab.api().try_ask("PATCH", &format!("{path}/status"), content);
    }

    /// The sandbox by the node's CNI plugins, then the container: the arguments are Egret's image's.
    fn start(&self, pod: &Value, namespace: &str, name: &str) -> (Pod, Child) {
        let spec = &pod["spec"];
        let mut sandbox = self.lab.sandbox_unknown(&text(&spec["nodeName"]), namespace, name);
        let uid = text(&pod["metadata"]["uid"]);
        sandbox.runtime.args = sandbox.runtime.args.replace(&sandbox.uid, &uid);
        sandbox.attach().unwrap_or_else(|e| panic!("ADD of {namespace}/{name}: {e}"));
        let arguments = spec["containers"][0]["args"].as_array().expect("arguments").iter().map(text);
        let log = File::create(self.logs.join(name)).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_egretd"));
        command.env_clear().args(arguments).stdin(Stdio::null()).stdout(log).stderr(Stdio::null());
        let child = sandbox.spawn(&mut command).expect("start a container");
        (sandbox, child)
    }
}

impl Drop for Kubelets<'_> {
    fn drop(&mut self) {
        for (_, child) in self.running.values_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn items(list: &Value) -> Vec<Value> {
    list["items"].as_array().cloned().unwrap_or_default()
}

fn tls() -> Arc<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["kubelet".to_owned()]).expect("a certificate");
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("TLS")
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into());
    Arc::new(config.expect("TLS"))
}

/// `GET /containerLogs/NAMESPACE/POD/CONTAINER?follow=true`; the end of the connection is the end of the log.
fn serve(stream: TcpStream, tls: Arc<ServerConfig>, logs: &Path) {
    let mut stream = StreamOwned::new(ServerConnection::new(tls).expect("TLS"), stream);
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        request.push(byte[0]);
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    let pod = path.split('/').nth(3).unwrap_or_default();
    let Ok(mut log) = File::open(logs.join(pod)) else { return };
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n");
    loop {
        let mut piece = Vec::new();
        let size = log.read_to_end(&mut piece).unwrap_or(0);
        if stream.write_all(&piece).and_then(|()| stream.flush()).is_err() {
            return;
        }
        if size == 0 && !path.contains("follow=true") {
            stream.conn.send_close_notify();
            let _ = stream.flush();
            return;
        }
        thread::sleep(PACE);
    }
}
