//! The little of Kubernetes' Container Runtime Interface that a kubelet needs to start and end a pod.

use crate::messages::*;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http2;
use hyper::{HeaderMap, Request};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lab::Node;
use prost::Message;
use std::fmt;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

/// A client of the runtime on a node.
#[derive(Clone)]
pub struct Cri {
    node: Arc<Node>,
    socket: PathBuf,
}

/// What the runtime says when it fails.
#[derive(Debug)]
pub struct CriError(pub String);

impl fmt::Display for CriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a kubelet asks for.
#[derive(Clone, Debug)]
pub struct Sandbox<'a> {
    /// The pod's namespace.
    pub namespace: &'a str,
    /// The pod's name; also its host name.
    pub name: &'a str,
    /// The pod's uid.
    pub uid: &'a str,
    /// How often it was tried before.
    pub attempt: u32,
    /// On the node's network instead of one of its own.
    pub host_network: bool,
    /// The control group for it to lie in.
    pub cgroup: &'a str,
    /// Where its containers' logs go.
    pub logs: &'a str,
}

/// A container as a kubelet makes it of a pod's manifest.
#[derive(Clone, Debug, Default)]
pub struct Container {
    /// Its name.
    pub name: String,
    /// Its image.
    pub image: String,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// What of the host is where in it.
    pub mounts: Vec<(String, String)>,
    /// Capabilities to add.
    pub add: Vec<String>,
    /// Capabilities to drop.
    pub drop: Vec<String>,
    /// The user it runs as.
    pub user: i64,
    /// Whether its root is read-only.
    pub readonly_root: bool,
    /// Whether it can gain privileges.
    pub escalation: bool,
}

/// What of `/proc` a kubelet hides from, and what it lets containers only read that are not privileged
/// (`DefaultMaskedPaths` and `DefaultReadonlyPaths`, pkg/securitycontext/util.go of Kubernetes).
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/scsi",
    "/sys/firmware",
];
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

impl Cri {
    /// Where the runtime listens, as seen from inside the node.
    pub fn new(node: &Arc<Node>, socket: PathBuf) -> Cri {
        Cri { node: Arc::clone(node), socket }
    }

    /// Makes a sandbox and returns its id.
    ///
    /// # Errors
    /// The runtime's; it has undone what it did, and a kubelet would try with the next attempt.
    pub fn run(&self, sandbox: &Sandbox) -> Result<String, CriError> {
        let config = Some(config_of(sandbox));
        let answer: Identified = self.call("RunPodSandbox", &RunPodSandboxRequest { config })?;
        Ok(answer.pod_sandbox_id)
    }

    /// Makes a container in a sandbox, starts it, and returns its id.
    ///
    /// # Errors
    /// The runtime's.
    pub fn start(&self, id: &str, sandbox: &Sandbox, container: &Container) -> Result<String, CriError> {
        let network = if sandbox.host_network { NODE } else { POD };
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: container.name.clone(), attempt: sandbox.attempt }),
            image: Some(ImageSpec { image: container.image.clone() }),
            args: container.args.clone(),
            envs: container.env.iter().map(|(k, v)| KeyValue { key: k.clone(), value: v.clone() }).collect(),
            mounts: container
                .mounts
                .iter()
                .map(|(host, inside)| Mount { container_path: inside.clone(), host_path: host.clone() })
                .collect(),
            log_path: format!("{}.log", container.name),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    capabilities: Some(Capability {
                        add_capabilities: container.add.clone(),
                        drop_capabilities: container.drop.clone(),
                    }),
                    namespace_options: Some(NamespaceOption { network, pid: CONTAINER, ..NamespaceOption::default() }),
                    run_as_user: Some(Int64Value { value: container.user }),
                    readonly_rootfs: container.readonly_root,
                    no_new_privs: !container.escalation,
                    masked_paths: owned(&MASKED),
                    readonly_paths: owned(&READONLY),
                    // Left out, it is the runtime's default.
                    seccomp: Some(SecurityProfile::default()),
                }),
            }),
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: id.to_owned(),
            config: Some(config),
            sandbox_config: Some(config_of(sandbox)),
        };
        let created: ContainerIdentified = self.call("CreateContainer", &request)?;
        self.call::<Nothing>("StartContainer", &created)?;
        Ok(created.container_id)
    }

    /// Ends a container as a kubelet does: SIGTERM, and after these seconds SIGKILL.
    ///
    /// # Errors
    /// The runtime's.
    pub fn stop_container(&self, id: &str, timeout: i64) -> Result<(), CriError> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout };
        self.call::<Nothing>("StopContainer", &request).map(drop)
    }

    /// A container's exit code, once it has ended.
    ///
    /// # Errors
    /// The runtime's.
    pub fn exit_code(&self, id: &str) -> Result<Option<i32>, CriError> {
        let request = ContainerIdentified { container_id: id.to_owned() };
        let answer: ContainerStatusResponse = self.call("ContainerStatus", &request)?;
        Ok(answer.status.filter(|s| s.state == EXITED).map(|s| s.exit_code))
    }

    /// Ends its processes and takes its network away.
    ///
    /// # Errors
    /// The runtime's.
    pub fn stop(&self, id: &str) -> Result<(), CriError> {
        self.call::<Nothing>("StopPodSandbox", &Identified { pod_sandbox_id: id.to_owned() }).map(drop)
    }

    /// Forgets it.
    ///
    /// # Errors
    /// The runtime's.
    pub fn remove(&self, id: &str) -> Result<(), CriError> {
        self.call::<Nothing>("RemovePodSandbox", &Identified { pod_sandbox_id: id.to_owned() }).map(drop)
    }

    /// All sandboxes' ids.
    ///
    /// # Errors
    /// The runtime's.
    pub fn list(&self) -> Result<Vec<String>, CriError> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", &Nothing {})?;
        Ok(answer.items.into_iter().map(|i| i.id).collect())
    }

    /// Its addresses.
    ///
    /// # Errors
    /// The runtime's.
    pub fn addresses(&self, id: &str) -> Result<Vec<IpAddr>, CriError> {
        let request = Identified { pod_sandbox_id: id.to_owned() };
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &request)?;
        let network = answer.status.and_then(|s| s.network).unwrap_or_default();
        let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|i| i.ip));
        Ok(all.filter_map(|ip| ip.parse().ok()).collect())
    }

    /// Whether the runtime has a network configuration that it can use; else why not.
    ///
    /// # Errors
    /// It does not answer.
    pub fn network_ready(&self) -> Result<Result<(), String>, CriError> {
        let answer: StatusResponse = self.call("Status", &Nothing {})?;
        let conditions = answer.status.map(|s| s.conditions).unwrap_or_default();
        let network = conditions.into_iter().find(|c| c.kind == "NetworkReady");
        Ok(match network {
            Some(c) if c.status => Ok(()),
            Some(c) => Err(format!("{}: {}", c.reason, c.message)),
            None => Err("the runtime does not tell".into()),
        })
    }

    /// Whether the runtime has this image.
    pub fn has_image(&self, name: &str) -> bool {
        let request = ImageStatusRequest { image: Some(ImageSpec { image: name.to_owned() }) };
        let answer = self.call_service::<ImageStatusResponse>("ImageService", "ImageStatus", &request);
        answer.is_ok_and(|a| a.image.is_some())
    }

    fn call<Answer: Message + Default>(&self, method: &str, request: &impl Message) -> Result<Answer, CriError> {
        self.call_service("RuntimeService", method, request)
    }

    /// A unary call of gRPC, <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>.
    fn call_service<Answer: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &impl Message,
    ) -> Result<Answer, CriError> {
        let failed = |e: &dyn fmt::Display| CriError(format!("{method}: {e}"));
        let stream = self.node.within(|| UnixStream::connect(&self.socket)).map_err(|e| failed(&e))?;
        let message = request.encode_to_vec();
        // One byte: not compressed; four: the length.
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).expect("a short message").to_be_bytes());
        body.extend(message);
        let request = Request::post(format!("http://localhost/runtime.v1.{service}/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(Bytes::from(body)))
            .expect("a request");
        let answer = exchange(stream, request).map_err(|e| failed(&e))?;
        let status = ["grpc-status", "grpc-message"].map(|name| {
            let value = answer.trailers.get(name).or_else(|| answer.headers.get(name));
            value.and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
        });
        match &status {
            [ok, _] if ok == "0" => {}
            [code, text] => return Err(CriError(format!("{method}: gRPC status {code}: {}", unescaped(text)))),
        }
        Answer::decode(answer.body.get(5..).unwrap_or_default()).map_err(|e| failed(&e))
    }
}

fn config_of(sandbox: &Sandbox) -> PodSandboxConfig {
    let network = if sandbox.host_network { NODE } else { POD };
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: sandbox.name.to_owned(),
            uid: sandbox.uid.to_owned(),
            namespace: sandbox.namespace.to_owned(),
            attempt: sandbox.attempt,
        }),
        // A kubelet gives none to pods on the host's network: they have the host's.
        hostname: if sandbox.host_network { String::new() } else { sandbox.name.to_owned() },
        log_directory: sandbox.logs.to_owned(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: sandbox.cgroup.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption { network, ..NamespaceOption::default() }),
            }),
        }),
    }
}

struct Raw {
    headers: HeaderMap,
    trailers: HeaderMap,
    body: Bytes,
}

fn exchange(stream: UnixStream, request: Request<Full<Bytes>>) -> anyhow::Result<Raw> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        stream.set_nonblocking(true)?;
        let io = TokioIo::new(tokio::net::UnixStream::from_std(stream)?);
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await?.into_parts();
        let collected = body.collect().await?;
        let trailers = collected.trailers().cloned().unwrap_or_default();
        Ok(Raw { headers: head.headers, trailers, body: collected.to_bytes() })
    })
}

/// `grpc-message` is percent-encoded.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..2).and_then(|h| u8::from_str_radix(std::str::from_utf8(h).ok()?, 16).ok());
        match code {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
