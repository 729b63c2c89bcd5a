//! A real API server with its etcd, on a host of its own in the lab, `api`; and what a person's or a kubelet's client
//! says to it.

use super::daemon::Daemon;
use super::host::Host;
use super::places;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// The API server's address.
pub const API: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The last part of it.
pub const LAST: u8 = 2;
const PORT: u16 = 6443;
/// So long a server may take to be ready. What it makes at its start it tries once a minute, the first time now and
/// then before it can (`SystemNamespacesInterval`, pkg/master/controller.go).
const PATIENCE: Duration = Duration::from_secs(150);
/// After this long, what it should have made is made for it.
const LATE: Duration = Duration::from_secs(10);
/// The namespace that Egret is installed in.
pub const NAMESPACE: &str = "egret-system";

/// An API server. It goes with its lab.
pub struct Api {
    directory: PathBuf,
    /// etcd, to be stopped and started.
    pub etcd: Daemon,
    /// The API server, to be stopped and started.
    pub server: Daemon,
    client: Mutex<mpsc::Sender<Ask>>,
}

struct Ask {
    request: Request<Vec<u8>>,
    answer: mpsc::Sender<Result<(StatusCode, Vec<u8>), String>>,
}

/// Where the programs are; gets them if they are not there.
pub fn programs() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(find_programs)
}

/// Whether the API server is of this version or newer, and has kubectl beside it if that is wanted. A test that returns
/// because of this is named at the end of `make test`.
pub fn has_server(version: (u32, u32), with_kubectl: bool, test: &str) -> bool {
    let output =
        Command::new(programs().join("kube-apiserver")).arg("--version").output().expect("the server's version");
    let text = String::from_utf8_lossy(&output.stdout).trim().trim_start_matches("Kubernetes v").to_owned();
    let mut parts = text.split('.').map(|part| part.parse().unwrap_or(0));
    let is = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    let has = is >= version && (!with_kubectl || programs().join("kubectl").exists());
    if !has {
        let (major, minor) = version;
        let wanted = if with_kubectl { " with kubectl beside it" } else { "" };
        let line = format!("{test}: needs Kubernetes {major}.{minor}{wanted}; this is {text}\n");
        let path = places::kept().join("not-run");
        let file = fs::File::options().create(true).append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("write down which test does not run");
    }
    has
}

fn find_programs() -> PathBuf {
    let script = places::repository().join("tests/kubernetes/apiserver.sh");
    let output = Command::new(&script).output().unwrap_or_else(|e| panic!("{}: {e}", script.display()));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    PathBuf::from(said.trim())
}

impl Api {
    /// Starts both. `more` are further flags of the API server.
    pub fn start(host: &Host, lab: &Path, more: &[&str]) -> Api {
        let directory = lab.join("api");
        let logs = lab.join("logs");
        fs::create_dir_all(&directory).expect("make the API server's directory");
        fs::create_dir_all(&logs).expect("make the logs' directory");
        let programs = programs();
        let tokens = Role::ALL.map(|role| role.token_line()).concat();
        fs::write(directory.join("tokens.csv"), tokens).expect("write the tokens");
        let key = directory.join("accounts.key");
        host.run(["openssl", "genrsa", "-out", &key.display().to_string(), "2048"]);
        let path = |name: &str| directory.join(name).display().to_string();
        let strings = |arguments: &[&str]| arguments.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>();
        let mut arguments = strings(&["--listen-client-urls=http://127.0.0.1:2379"]);
        arguments.extend(strings(&[
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--log-level=warn",
        ]));
        arguments.push(format!("--data-dir={}", path("etcd")));
        let etcd = Daemon::start("etcd", host, &programs.join("etcd"), arguments, logs.join("etcd.log"));
        let mut arguments = strings(&[
            "--etcd-servers=http://127.0.0.1:2379",
            "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--allow-privileged=true",
            "--disable-admission-plugins=ServiceAccount",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--v=0",
        ]);
        arguments.push(format!("--bind-address={API}"));
        arguments.push(format!("--advertise-address={API}"));
        arguments.push(format!("--secure-port={PORT}"));
        arguments.push(format!("--cert-dir={}", path("certs")));
        arguments.push(format!("--token-auth-file={}", path("tokens.csv")));
        arguments.push(format!("--service-account-key-file={}", key.display()));
        arguments.push(format!("--service-account-signing-key-file={}", key.display()));
        arguments.extend(strings(more));
        let program = programs.join("kube-apiserver");
        let server = Daemon::start("apiserver", host, &program, arguments, logs.join("apiserver.log"));
        for role in Role::ALL {
            let text = role.kubeconfig(&directory, PORT);
            fs::write(directory.join(format!("{}.kubeconfig", role.name())), text).expect("write a kubeconfig");
        }
        let client = Mutex::new(client(host, directory.join("admin.kubeconfig")));
        let api = Api { directory, etcd, server, client };
        api.wait_started();
        api
    }

    /// The file with which a role comes to the API server.
    pub fn kubeconfig(&self, role: Role) -> PathBuf {
        self.directory.join(format!("{}.kubeconfig", role.name()))
    }

    /// The same, by another port: that of a proxy.
    pub fn kubeconfig_by(&self, role: Role, port: u16) -> PathBuf {
        let path = self.directory.join(format!("{}-{port}.kubeconfig", role.name()));
        fs::write(&path, role.kubeconfig(&self.directory, port)).expect("write a kubeconfig");
        path
    }

    /// Waits until the server, which has started again, serves everything.
    #[track_caller]
    pub fn wait_ready(&self) {
        self.wait_started();
        self.wait_served();
    }

    #[track_caller]
    fn wait_started(&self) {
        let begin = Instant::now();
        loop {
            assert!(self.server.runs() && self.etcd.runs(), "the API server or etcd has ended by itself");
            // The server makes them by itself, last of all.
            let missing = ["default", "kube-system"].map(|namespace| {
                let answer = self.try_ask("GET", &format!("/api/v1/namespaces/{namespace}"), None);
                let missing = !answer.as_ref().is_ok_and(|(code, _)| *code == StatusCode::OK);
                missing.then(|| format!("{namespace}: {answer:?}")).inspect(|_| {
                    // What it fails to make at its start it tries again once a minute.
                    if begin.elapsed() > LATE {
                        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
                        let _ = self.try_ask("POST", "/api/v1/namespaces", Some(("application/json", &object)));
                    }
                })
            });
            if missing.iter().all(Option::is_none) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "the API server is not ready after {PATIENCE:?}: {missing:?}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Installs Egret's CustomResourceDefinitions and RBAC.
    pub fn install(&self) {
        let root = places::repository();
        self.apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}));
        for file in ["install/crds.yaml", "install/rbac.yaml"] {
            let text = fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
            for object in serde_saphyr::from_multiple::<Value>(&text).unwrap_or_else(|e| panic!("{file}: {e}")) {
                if object["kind"] == "CustomResourceDefinition" {
                    // Created, not applied: before 1.25 there is nothing that could own a CEL rule.
                    let path = path_of(&object);
                    let collection = path.rsplit_once('/').map_or("", |(collection, _)| collection);
                    self.ask("POST", collection, Some(("application/json", &object)));
                } else {
                    self.apply(&object);
                }
            }
        }
        self.wait_served();
    }

    /// Waits until Egret's objects are served: for some seconds after its start the server says that it is starting.
    #[track_caller]
    fn wait_served(&self) {
        let begin = Instant::now();
        for plural in ["egressgateways", "egresspolicies", "clusteregresspolicies", "egressnodes"] {
            while self.try_ask("GET", &format!("/apis/egret.dev/v1alpha1/{plural}"), None).map(|a| a.0)
                != Ok(StatusCode::OK)
            {
                assert!(begin.elapsed() < Duration::from_secs(60), "{plural} are not served");
                thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Stops the server and etcd, as a machine that loses its power does.
    pub fn stop(&self) {
        self.server.kill9();
        self.etcd.kill9();
    }

    /// Starts both again, and waits until the server is ready.
    pub fn start_again(&self) {
        self.etcd.restart();
        self.server.restart();
        self.wait_ready();
    }

    /// Has a role come with another token; the server must be restarted to know it.
    pub fn set_token(&self, role: Role, token: &str) {
        let path = self.directory.join("tokens.csv");
        let text = fs::read_to_string(&path).expect("read the tokens");
        let lines = text.lines().map(|line| match line.split_once(',') {
            Some((_, rest)) if rest.contains(&format!(",{},", role.name())) => format!("{token},{rest}\n"),
            _ => format!("{line}\n"),
        });
        fs::write(&path, lines.collect::<String>()).expect("write the tokens");
    }

    /// The file that a role reads its token from.
    pub fn token_file(&self, role: Role) -> PathBuf {
        self.directory.join(format!("{}.token", role.name()))
    }

    /// An EgressPolicy, or another object of Egret's group.
    #[track_caller]
    pub fn egret(&self, path: &str) -> Value {
        self.get(&format!("/apis/egret.dev/v1alpha1/{path}"))
    }

    /// The server's version, `(1, 20)`.
    pub fn version(&self) -> (u32, u32) {
        let version = self.get("/version");
        let part = |name: &str| {
            let digits: String =
                version[name].as_str().unwrap_or_default().chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or(0)
        };
        (part("major"), part("minor"))
    }

    /// A request as an administrator; the status and the answer.
    ///
    /// # Errors
    /// There was no answer.
    pub fn try_ask(
        &self,
        method: &str,
        path: &str,
        content: Option<(&str, &Value)>,
    ) -> Result<(StatusCode, Value), String> {
        self.try_ask_as("application/json", method, path, content)
    }

    fn try_ask_as(
        &self,
        accept: &str,
        method: &str,
        path: &str,
        content: Option<(&str, &Value)>,
    ) -> Result<(StatusCode, Value), String> {
        let mut request = Request::builder().method(method).uri(path).header("accept", accept);
        let mut body = Vec::new();
        if let Some((type_, value)) = content {
            request = request.header("content-type", type_);
            body = value.to_string().into_bytes();
        }
        let request = request.body(body).expect("a request");
        let (answer, answered) = mpsc::channel();
        self.client.lock().expect("a lock").send(Ask { request, answer }).map_err(|e| e.to_string())?;
        let (code, body) = answered.recv().map_err(|e| e.to_string())??;
        Ok((code, serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// A request that must succeed.
    #[track_caller]
    pub fn ask(&self, method: &str, path: &str, content: Option<(&str, &Value)>) -> Value {
        let (code, answer) = self.try_ask(method, path, content).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
        assert!(code.is_success(), "{method} {path}: {code}: {}", answer["message"]);
        answer
    }

    /// Reads an object or a list.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        self.ask("GET", path, None)
    }

    /// The columns of an object as `kubectl get -o wide` prints them, by name.
    #[track_caller]
    pub fn columns(&self, path: &str) -> BTreeMap<String, String> {
        let accept = "application/json;as=Table;v=v1;g=meta.k8s.io";
        let (code, table) = self.try_ask_as(accept, "GET", path, None).unwrap_or_else(|e| panic!("GET {path}: {e}"));
        assert!(code.is_success(), "GET {path}: {code}: {}", table["message"]);
        let names = table["columnDefinitions"].as_array().into_iter().flatten();
        let cells = table["rows"][0]["cells"].as_array().into_iter().flatten();
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        names.map(|column| text(&column["name"])).zip(cells.map(text)).collect()
    }

    /// Has an object as it is written here, as `kubectl apply` does; of Nodes and Pods the status too, as a kubelet
    /// writes it. Returns it as it is then.
    #[track_caller]
    pub fn apply(&self, object: &Value) -> Value {
        self.try_apply(object).unwrap_or_else(|e| panic!("apply {}: {e}", path_of(object)))
    }

    /// As [`Api::apply`], of what may be refused.
    ///
    /// # Errors
    /// What the API server says.
    pub fn try_apply(&self, object: &Value) -> Result<Value, String> {
        let path = path_of(object);
        let mut main = object.clone();
        let status = main.as_object_mut().and_then(|o| o.remove("status"));
        if object["kind"] == "Pod" {
            main["metadata"].as_object_mut().map(|m| m.remove("uid"));
            main["spec"]["containers"] = json!([{"name": "main", "image": "example.org/none"}]);
        }
        let patch = |path: &str, type_: &str, content: &Value| {
            let (code, answer) = self.try_ask("PATCH", path, Some((type_, content)))?;
            if code.is_success() { Ok(answer) } else { Err(answer["message"].as_str().unwrap_or_default().to_owned()) }
        };
        let answer = if object["kind"] == "Node" {
            // Two addresses of one type are more than an apply of before 1.30 understands.
            let collection = path.rsplit_once('/').map_or("", |(collection, _)| collection);
            match self.try_ask("POST", collection, Some(("application/json", &main)))? {
                (StatusCode::CONFLICT, _) => patch(&path, "application/merge-patch+json", &main)?,
                (_, answer) => answer,
            }
        } else {
            let apply = format!("{path}?fieldManager=test&force=true");
            patch(&apply, "application/apply-patch+yaml", &main)?
        };
        match status {
            Some(status) if matches!(object["kind"].as_str(), Some("Node" | "Pod")) => {
                let content = json!({ "status": status });
                patch(&format!("{path}/status"), "application/merge-patch+json", &content)
            }
            _ => Ok(answer),
        }
    }

    /// Deletes an object, at once; it may be gone.
    #[track_caller]
    pub fn delete(&self, path: &str) {
        let options = json!({"gracePeriodSeconds": 0, "propagationPolicy": "Background"});
        let (code, answer) = self
            .try_ask("DELETE", path, Some(("application/json", &options)))
            .unwrap_or_else(|e| panic!("DELETE {path}: {e}"));
        assert!(code.is_success() || code == StatusCode::NOT_FOUND, "DELETE {path}: {code}: {}", answer["message"]);
    }
}

/// Where an object lies.
pub fn path_of(object: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let (version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
    let plural = match kind.as_str() {
        "EgressPolicy" => "egresspolicies".to_owned(),
        "ClusterEgressPolicy" => "clusteregresspolicies".to_owned(),
        "ValidatingAdmissionPolicy" => "validatingadmissionpolicies".to_owned(),
        other => format!("{}s", other.to_lowercase()),
    };
    let root = if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
    let namespaced = matches!(
        kind.as_str(),
        "Pod" | "Service" | "EgressPolicy" | "ConfigMap" | "ServiceAccount" | "Role" | "RoleBinding" | "Lease"
    );
    let namespace = match object["metadata"]["namespace"].as_str() {
        Some(namespace) if namespaced => format!("/namespaces/{namespace}"),
        None if namespaced => "/namespaces/default".to_owned(),
        _ => String::new(),
    };
    format!("{root}{namespace}/{plural}/{}", text(&object["metadata"]["name"]))
}

/// Who comes to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// May do everything.
    Admin,
    /// The ServiceAccount of the node daemons.
    Node,
    /// The ServiceAccount of the controllers.
    Controller,
    /// May do nothing.
    Nobody,
}

impl Role {
    const ALL: [Role; 4] = [Role::Admin, Role::Node, Role::Controller, Role::Nobody];

    fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Node => "egret-node",
            Role::Controller => "egret-controller",
            Role::Nobody => "nobody",
        }
    }

    /// A line of the static token file: token, user, uid, groups.
    fn token_line(self) -> String {
        let name = self.name();
        match self {
            Role::Admin => format!("{name}-token,{name},{name},\"system:masters\"\n"),
            Role::Nobody => format!("{name}-token,{name},{name}\n"),
            Role::Node | Role::Controller => format!(
                "{name}-token,system:serviceaccount:{NAMESPACE}:{name},{name},\"system:serviceaccounts,\
                 system:serviceaccounts:{NAMESPACE}\"\n"
            ),
        }
    }

    fn kubeconfig(self, directory: &Path, port: u16) -> String {
        let name = self.name();
        let authority = directory.join("certs/apiserver.crt");
        let token = directory.join(format!("{name}.token"));
        fs::write(&token, format!("{name}-token")).expect("write a token");
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name, "namespace": NAMESPACE}}],
            "clusters": [{"name": "lab", "cluster": {
                "server": format!("https://{API}:{port}"), "certificate-authority": authority}}],
            "users": [{"name": name, "user": {"tokenFile": token}}],
        })
        .to_string()
    }
}

/// A thread inside the host that asks what it is told to.
fn client(host: &Host, kubeconfig: PathBuf) -> mpsc::Sender<Ask> {
    let (asks, asked) = mpsc::channel::<Ask>();
    let namespaces = host.namespaces();
    thread::spawn(move || {
        namespaces.enter();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut client = None;
            while let Ok(Ask { request, answer }) = asked.recv() {
                if client.is_none() {
                    client = connect(&kubeconfig).await.ok();
                }
                let result = match &client {
                    Some(client) => send(client, request).await,
                    None => Err("the API server has no certificate yet".to_owned()),
                };
                // A certificate that was read while the server wrote it fits nothing.
                if result.is_err() {
                    client = None;
                }
                let _ = answer.send(result);
            }
        });
    });
    asks
}

async fn connect(kubeconfig: &Path) -> Result<kube::Client, String> {
    let file = Kubeconfig::read_from(kubeconfig).map_err(|e| e.to_string())?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    let mut config = config.map_err(|e| e.to_string())?;
    config.default_retry = false;
    config.try_into().map_err(|e: kube::Error| e.to_string())
}

async fn send(client: &kube::Client, request: Request<Vec<u8>>) -> Result<(StatusCode, Vec<u8>), String> {
    let sent = client.send(request.map(kube::client::Body::from));
    let answer = tokio::time::timeout(Duration::from_secs(20), sent).await.map_err(|e| e.to_string())?;
    let answer = answer.map_err(|e| e.to_string())?;
    let code = answer.status();
    let body = answer.into_body().collect().await.map_err(|e| e.to_string())?;
    Ok((code, body.to_bytes().to_vec()))
}
