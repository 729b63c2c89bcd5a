//! A node with a container runtime, and a gateway for its pods to leave by.

use crate::cri::{Cri, CriError, Sandbox};
use crate::runtime::{self, Containerd};
use crate::visitor::{ARGUMENTS, Ear};
use lab::{EGRESS4, EGRESS6, Lab, Node, NodeSpec, Pods, VISITOR, manifests, scene};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The node with the runtime.
pub const NODE: &str = "n1";

/// The lab, the runtime, the ear.
pub struct Site {
    /// What pods were heard to say.
    pub ear: Ear,
    /// The runtime on [`NODE`].
    pub runtime: Containerd,
    /// The lab.
    pub lab: Lab,
    serial: AtomicU64,
    logs: String,
}

/// A pod as a kubelet would start it.
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its sandbox.
    pub id: String,
    manifest: Option<(manifests::Manifests, Vec<(String, String)>)>,
    cri: Cri,
}

impl Site {
    /// The runtime runs, with the conflist that the cluster's CNI has written; Egret is not there yet.
    pub fn plain() -> Site {
        Site::of(Pods::Routed)
    }

    /// As [`Site::plain`], with pods connected in this way.
    pub fn of(pods: Pods) -> Site {
        runtime::check_tools();
        let lab = Lab::builder()
            .nodes(vec![NodeSpec::new(NODE, 11, pods), NodeSpec::gateway("g1", 21, Pods::Routed)])
            .build();
        let ear = Ear::open(lab.host("ext"));
        let image = runtime::pack(&lab, ARGUMENTS);
        let runtime = Containerd::start(&lab, NODE, &image);
        let logs = lab.directory().join("logs").display().to_string();
        let site = Site { ear, runtime, lab, serial: AtomicU64::new(1), logs };
        site.runtime.configure(&site.plain_conflist());
        let addresses = ["192.0.2.50-192.0.2.59", "2001:db8::50-2001:db8::59"];
        site.lab.write_manifest("gateway.yaml", &manifests::gateway("default", &addresses));
        site.lab.write_manifest("policy.yaml", &scene::visitors());
        site.lab.add_namespace("shop", &[("kubernetes.io/metadata.name", "shop")]);
        site.lab.add_namespace("other", &[("kubernetes.io/metadata.name", "other")]);
        site
    }

    /// With Egret: installed, its daemons run, the policy is in force.
    pub fn with_egret() -> Site {
        let site = Site::plain();
        site.runtime.install();
        site.start_egret();
        site
    }

    /// Starts the daemons and waits until the policy is in force.
    pub fn start_egret(&self) {
        self.lab.start();
        let probe = self.lab.add_pod("g1", "shop", "probe", VISITOR);
        self.lab.wait_seen_as(&probe, EGRESS4);
        self.lab.wait_seen_as(&probe, EGRESS6);
        probe.delete();
        self.lab.wait_until("the path is in the node's kernel", Duration::from_secs(10), || {
            self.lab.metrics(NODE).get("egret_node_allocations", &[("state", "remote")]) == Some(1.0)
        });
        self.lab.forget_wire();
    }

    /// The node.
    pub fn node(&self) -> &Node {
        self.lab.node(NODE)
    }

    /// The conflist as the cluster's CNI writes it.
    pub fn plain_conflist(&self) -> String {
        serde_json::to_string_pretty(&self.lab.plain_conflist(NODE).json).expect("JSON")
    }

    /// Starts a pod that the policy selects.
    #[track_caller]
    pub fn visitor(&self, name: &str) -> Pod {
        self.start("shop", name, VISITOR)
    }

    /// Starts a pod.
    #[track_caller]
    pub fn start(&self, namespace: &str, name: &str, labels: manifests::Labels) -> Pod {
        self.try_start(namespace, name, labels).unwrap_or_else(|e| panic!("{namespace}/{name}: {e}"))
    }

    /// Starts a pod once.
    ///
    /// # Errors
    /// The runtime's.
    pub fn try_start(&self, namespace: &str, name: &str, labels: manifests::Labels) -> Result<Pod, CriError> {
        let mut pod = self.planned(namespace, name, labels);
        pod.id = self.run(&pod, 0)?;
        pod.publish(&self.runtime.cri);
        Ok(pod)
    }

    /// Starts a pod as a kubelet does: again with the next attempt after a failure, only sooner. Returns the errors.
    #[track_caller]
    pub fn start_patiently(&self, namespace: &str, name: &str, labels: manifests::Labels) -> (Pod, Vec<CriError>) {
        let mut pod = self.planned(namespace, name, labels);
        let mut errors = Vec::new();
        for attempt in 0..20 {
            match self.run(&pod, attempt) {
                Ok(id) => {
                    pod.id = id;
                    pod.publish(&self.runtime.cri);
                    return (pod, errors);
                }
                Err(e) => errors.push(e),
            }
            std::thread::sleep(Duration::from_millis(250));
        }
        panic!("{namespace}/{name} does not start: {errors:#?}");
    }

    /// Starts a pod on the node's network.
    #[track_caller]
    pub fn start_on_host_network(&self, namespace: &str, name: &str) -> Pod {
        let mut pod = self.planned(namespace, name, &[]);
        pod.manifest = None;
        let sandbox = Sandbox { host_network: true, ..self.sandbox(&pod, 0) };
        pod.id = self.runtime.cri.run(&sandbox).unwrap_or_else(|e| panic!("{namespace}/{name}: {e}"));
        pod
    }

    /// Starts as many pods at once as there are names.
    pub fn start_at_once(&self, names: &[String], labels: manifests::Labels) -> Vec<Result<Pod, CriError>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                names.iter().map(|name| scope.spawn(move || self.try_start("shop", name, labels))).collect();
            threads.into_iter().map(|t| t.join().expect("a thread")).collect()
        })
    }

    /// The pod as the cluster knows it before it runs.
    pub fn planned(&self, namespace: &str, name: &str, labels: manifests::Labels) -> Pod {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let pod = Pod {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            uid: format!("00000000-0000-4000-9000-{serial:012x}"),
            id: String::new(),
            manifest: Some((self.lab.manifests().clone(), labels)),
            cri: self.runtime.cri.clone(),
        };
        pod.write(&[]);
        pod
    }

    /// What a kubelet asks the runtime for.
    pub fn sandbox<'a>(&'a self, pod: &'a Pod, attempt: u32) -> Sandbox<'a> {
        Sandbox {
            namespace: &pod.namespace,
            name: &pod.name,
            uid: &pod.uid,
            attempt,
            host_network: false,
            cgroup: self.lab.name(),
            logs: &self.logs,
        }
    }

    /// Has the runtime make a pod's sandbox; returns its id.
    ///
    /// # Errors
    /// The runtime's.
    pub fn run(&self, pod: &Pod, attempt: u32) -> Result<String, CriError> {
        self.runtime.cri.run(&self.sandbox(pod, attempt))
    }

    /// Waits until something new comes from the pod by IPv4 and IPv6, and nothing but that from then on, and that it
    /// comes from these addresses.
    #[track_caller]
    pub fn wait_heard_from(&self, name: &str, addresses: [IpAddr; 2]) {
        let wanted: BTreeSet<IpAddr> = addresses.into();
        self.lab.wait_for(&format!("{name} is heard from"), &wanted, || {
            self.ear.forget(name);
            std::thread::sleep(Duration::from_millis(300));
            self.ear.sources(name)
        });
    }

    /// Panics unless the pod was heard, and only from its policy's addresses, and its first packets were.
    #[track_caller]
    pub fn assert_left_by_egress(&self, name: &str) {
        self.lab.wait_for(&format!("{name} has been heard from"), &egress().into(), || self.ear.sources(name));
        let first = self.ear.of(name).iter().filter(|w| w.number == 0).count();
        assert_eq!(first, 2, "the first packets of {name}: {:?}", self.ear.of(name));
    }

    /// Waits until the pod is heard only from its policy's addresses; and it is heard from nowhere else for a while.
    #[track_caller]
    pub fn wait_only_by_egress(&self, name: &str) {
        self.wait_heard_from(name, egress());
    }

    /// Panics if the pod is heard within half a second.
    #[track_caller]
    pub fn assert_unheard(&self, name: &str) {
        self.ear.forget(name);
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(self.ear.of(name), [], "{name}");
    }

    /// Waits until a container has ended, and returns its exit code.
    #[track_caller]
    pub fn exit_code(&self, container: &str) -> i32 {
        let code = || self.runtime.cri.exit_code(container).expect("a status");
        self.lab.wait_until("the container has ended", Duration::from_secs(10), || code().is_some());
        code().expect("it has ended")
    }

    /// The files of pods' interfaces that Egret has.
    pub fn attachments(&self) -> usize {
        std::fs::read_dir(self.node().run_dir().join("attachments")).into_iter().flatten().count()
    }
}

/// The policy's addresses.
pub fn egress() -> [IpAddr; 2] {
    [EGRESS4.into(), EGRESS6.into()]
}

/// A node's addresses.
pub fn own(node: &Node) -> [IpAddr; 2] {
    [node.ipv4().into(), node.ipv6().into()]
}

impl Pod {
    /// The cluster learns the pod's addresses, as from a kubelet.
    fn publish(&self, cri: &Cri) {
        self.write(&cri.addresses(&self.id).unwrap_or_default());
    }

    fn write(&self, addresses: &[IpAddr]) {
        if let Some((manifests, labels)) = &self.manifest {
            let labels: Vec<(&str, &str)> = labels.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            let object = manifests::pod(NODE, &self.namespace, &self.name, &self.uid, &labels, addresses);
            manifests.write_object(&self.file(), &object);
        }
    }

    fn file(&self) -> String {
        format!("pod-{}-{}.yaml", self.namespace, self.name)
    }

    /// Stops its sandbox; it can be done again.
    #[track_caller]
    pub fn stop(&self) {
        self.cri.stop(&self.id).unwrap_or_else(|e| panic!("{}: {e}", self.name));
    }

    /// Stops and removes its sandbox; the cluster forgets it.
    #[track_caller]
    pub fn end(self) {
        self.try_end().unwrap_or_else(|e| panic!("{}: {e}", self.name));
    }

    /// As [`Pod::end`].
    ///
    /// # Errors
    /// The runtime's.
    pub fn try_end(&self) -> Result<(), CriError> {
        self.cri.stop(&self.id)?;
        self.cri.remove(&self.id)?;
        if let Some((manifests, _)) = &self.manifest {
            manifests.remove(&self.file());
        }
        Ok(())
    }
}

/// Ends pods all at once.
#[track_caller]
pub fn end_at_once(pods: Vec<Arc<Pod>>) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = pods.iter().map(|pod| (&pod.name, scope.spawn(move || pod.try_end()))).collect();
        for (name, thread) in threads {
            thread.join().expect("a thread").unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    });
}
