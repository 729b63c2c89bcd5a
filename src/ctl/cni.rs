//! CNIs that move packets past netfilter, by their own objects. Egret decides in nf_tables; what does not pass there
//! leaves as if Egret were not there (docs/limits.md).

use super::problem::{Problem, Severity};
use super::site::{SiteObjects, Wanted};
use crate::model::marks::Marks;
use serde_json::Value;

const CILIUM: Wanted = Wanted {
    path: "/api/v1/namespaces/kube-system/configmaps/cilium-config",
    kind: "ConfigMap",
    name: "cilium-config",
};
const FELIX: Wanted = Wanted {
    path: "/apis/crd.projectcalico.org/v1/felixconfigurations/default",
    kind: "FelixConfiguration",
    name: "default",
};
const CALICO: Wanted =
    Wanted { path: "/apis/operator.tigera.io/v1/installations/default", kind: "Installation", name: "default" };
const OPENSHIFT: Wanted =
    Wanted { path: "/apis/operator.openshift.io/v1/networks/cluster", kind: "Network", name: "cluster" };
const OVN: Wanted = Wanted {
    path: "/apis/apps/v1/namespaces/ovn-kubernetes/daemonsets/ovnkube-node",
    kind: "DaemonSet",
    name: "ovnkube-node",
};
const DATAPLANE_V2: Wanted =
    Wanted { path: "/apis/apps/v1/namespaces/kube-system/daemonsets/anetd", kind: "DaemonSet", name: "anetd" };
const CALICO_NODE: [Wanted; 2] = [
    // The manifests', and the operator's.
    Wanted {
        path: "/apis/apps/v1/namespaces/kube-system/daemonsets/calico-node",
        kind: "DaemonSet",
        name: "calico-node",
    },
    Wanted {
        path: "/apis/apps/v1/namespaces/calico-system/daemonsets/calico-node",
        kind: "DaemonSet",
        name: "calico-node",
    },
];
const FLANNEL: Wanted = Wanted {
    path: "/apis/apps/v1/namespaces/kube-flannel/daemonsets/kube-flannel-ds",
    kind: "DaemonSet",
    name: "kube-flannel-ds",
};
const AWS: Wanted =
    Wanted { path: "/apis/apps/v1/namespaces/kube-system/daemonsets/aws-node", kind: "DaemonSet", name: "aws-node" };
const KINDNET: Wanted =
    Wanted { path: "/apis/apps/v1/namespaces/kube-system/daemonsets/kindnet", kind: "DaemonSet", name: "kindnet" };

/// The objects that tell which CNI there is.
pub const OBJECTS: [Wanted; 11] =
    [CILIUM, FELIX, CALICO, CALICO_NODE[0], CALICO_NODE[1], OPENSHIFT, OVN, DATAPLANE_V2, FLANNEL, AWS, KINDNET];

/// What there is of CNIs.
#[derive(Clone, Debug, Default)]
pub struct Cni {
    /// The CNIs that were recognised.
    pub names: Vec<&'static str>,
    /// What is wrong with them.
    pub problems: Vec<Problem>,
}

fn bypass(cni: &str, message: &str) -> Problem {
    Problem::new(Severity::Error, format!("CNI {cni}"), "BypassesNetfilter", message)
}

/// The CNI, and whether it moves packets past netfilter.
pub fn cni(found: &SiteObjects) -> Cni {
    let mut cni = Cni::default();
    let mut add = |name: &'static str, problems: Vec<Problem>| {
        if !cni.names.contains(&name) {
            cni.names.push(name);
        }
        cni.problems.extend(problems);
    };
    if found.one(&DATAPLANE_V2).is_some() {
        let message = "GKE's Dataplane V2 moves packets past netfilter, so all that selected pods send out of the cluster is \
                       blocked; use a cluster without Dataplane V2";
        add("GKE Dataplane V2", vec![bypass("GKE Dataplane V2", message)]);
    } else if let Some(config) = found.one(&CILIUM) {
        add("Cilium", cilium(&config["data"]));
    }
    if let Some(by_ebpf) = calico_by_ebpf(found) {
        add("Calico", if by_ebpf { vec![calico()] } else { calico_marks(found) });
    }
    if let Some(network) = found.one(&OPENSHIFT)
        && network["spec"]["defaultNetwork"]["type"] == "OVNKubernetes"
    {
        let host = &network["spec"]["defaultNetwork"]["ovnKubernetesConfig"]["gatewayConfig"]["routingViaHost"];
        let message = "OVN-Kubernetes in its mode shared gateway moves packets past netfilter, so pods leave with other \
                       addresses than their policies say; set \
                       spec.defaultNetwork.ovnKubernetesConfig.gatewayConfig.routingViaHost: true in the Network cluster";
        add("OVN-Kubernetes", if *host == true { Vec::new() } else { vec![bypass("OVN-Kubernetes", message)] });
    }
    if let Some(set) = found.one(&OVN) {
        let is_local = env(set, "OVN_GATEWAY_MODE").is_some_and(|mode| mode == "local");
        let message = "OVN-Kubernetes in its mode shared gateway moves packets past netfilter, so pods leave with other \
                       addresses than their policies say; install it with the gateway mode local";
        add("OVN-Kubernetes", if is_local { Vec::new() } else { vec![bypass("OVN-Kubernetes", message)] });
    }
    for (wanted, name) in [(FLANNEL, "Flannel"), (AWS, "AWS VPC CNI"), (KINDNET, "kindnet")] {
        if found.one(&wanted).is_some() {
            add(name, Vec::new());
        }
    }
    cni
}

/// Whether Calico uses its eBPF dataplane; `None`: there is no Calico. One place that says so is enough: Felix's variables
/// prevail over its FelixConfiguration, and the operator writes one of them after its Installation.
fn calico_by_ebpf(found: &SiteObjects) -> Option<bool> {
    let felix = found.one(&FELIX).map(|felix| felix["spec"]["bpfEnabled"] == true);
    let operator =
        found.one(&CALICO).map(|installation| installation["spec"]["calicoNetwork"]["linuxDataplane"] == "BPF");
    let nodes = CALICO_NODE.iter().filter_map(|wanted| found.one(wanted));
    let nodes = nodes.map(|set| env(set, "FELIX_BPFENABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")));
    felix.into_iter().chain(operator).chain(nodes).reduce(|one, other| one || other)
}

fn calico() -> Problem {
    bypass(
        "Calico",
        "Calico's eBPF dataplane moves packets past netfilter, so pods leave with other addresses than their policies \
         say; use its iptables or nftables dataplane (bpfEnabled: false in FelixConfiguration default, no variable \
         FELIX_BPFENABLED of calico-node, linuxDataplane: Iptables in the operator's Installation)",
    )
}

/// The bits that Felix takes of its mask, from the lowest on, for each packet of a workload (`StartDataplaneDriver`,
/// felix/dataplane/driver.go). A sixth one is WireGuard's, which is in the way of none of Egret's. With kube-proxy in IPVS
/// mode it takes all others for packets to Services, and clears them before the packets leave.
const FELIX_BITS: usize = 5;

/// What is wrong with the bits of marks that Felix is told to use. By default they are 16 to 20.
fn calico_marks(found: &SiteObjects) -> Vec<Problem> {
    let marks = Marks::default();
    let own = marks.kind_and_index_mask() | marks.egress_id_mask();
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    let nodes = || CALICO_NODE.iter().filter_map(|wanted| found.one(wanted));
    let problem = |(field, variable): (&str, &str)| {
        let by_variable = nodes().find_map(|set| env(set, variable).and_then(number));
        let by_field = || u32::try_from(found.one(&FELIX)?["spec"][field].as_u64()?).ok();
        let mask = by_variable.or_else(by_field)?;
        let taken = (0..32).map(|bit| 1_u32 << bit).filter(|bit| mask & bit != 0).take(FELIX_BITS).sum::<u32>();
        let both = taken & own;
        (both != 0).then(|| {
            let message = format!(
                "Felix changes the bits {both:#x} of packets' marks ({field} {mask:#x}), which are Egret's unless its daemons \
                 have another --mark-shift, so selected pods are blocked or taken for one another; leave {field} and \
                 {variable} out, so that Felix takes the bits 16 to 20"
            );
            Problem::new(Severity::Error, "CNI Calico", "SameMarkBits", message)
        })
    };
    let settings = [("iptablesMarkMask", "FELIX_IPTABLESMARKMASK"), ("nftablesMarkMask", "FELIX_NFTABLESMARKMASK")];
    settings.into_iter().filter_map(problem).collect()
}

/// Cilium routes in the host's kernel if it is told so, if iptables masquerades, or if it does not replace kube-proxy
/// (`EnableHostLegacyRouting` in `finishKubeProxyReplacementInit`, daemon/cmd/kube_proxy_replacement.go). Without any
/// masquerading it does not.
fn cilium(data: &Value) -> Vec<Problem> {
    let is = |key: &str, value: &str| data[key] == value;
    let replaces_proxy = is("kube-proxy-replacement", "true") || is("kube-proxy-replacement", "strict");
    let legacy = is("enable-host-legacy-routing", "true");
    let masquerades =
        !is("enable-ipv4-masquerade", "false") || is("enable-ipv6", "true") && !is("enable-ipv6-masquerade", "false");
    let by_iptables = masquerades && !is("enable-bpf-masquerade", "true");
    let by_ebpf = replaces_proxy && !by_iptables && !legacy;
    let mut problems = Vec::new();
    if by_ebpf {
        let message = "Cilium's eBPF host routing moves packets past netfilter, so all that selected pods send out of the \
                       cluster is blocked; install Cilium with bpf.hostLegacyRouting=true and bpf.masquerade=false";
        problems.push(bypass("Cilium", message));
    }
    if is("datapath-mode", "netkit") || is("datapath-mode", "netkit-l2") {
        let message = "Cilium connects pods by netkit devices, and Egret enforces on veths, so pods that policies can \
                       select do not start; install Cilium with bpf.datapathMode=veth";
        problems.push(Problem::new(Severity::Error, "CNI Cilium", "NoVeth", message));
    }
    if !is("cni-exclusive", "false") {
        let message = "Cilium removes other plugins from the CNI configuration (cni-exclusive), and Egret's is one; \
                       install Cilium with cni.exclusive=false";
        problems.push(Problem::new(Severity::Error, "CNI Cilium", "RemovesPlugins", message));
    }
    problems
}

/// The value of a variable in a workload's containers.
fn env<'v>(workload: &'v Value, name: &str) -> Option<&'v str> {
    let containers = workload["spec"]["template"]["spec"]["containers"].as_array()?;
    let all = containers.iter().filter_map(|container| container["env"].as_array()).flatten();
    all.into_iter().find(|variable| variable["name"] == name)?["value"].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::site::Objects;
    use serde_json::json;

    async fn told(object: Value) -> (Vec<&'static str>, Vec<String>) {
        let cni = cni(&Objects::Dir(vec![object]).read(&OBJECTS).await);
        assert!(cni.problems.iter().all(|p| !p.remedy.is_empty()), "{:?}", cni.problems);
        (cni.names, cni.problems.into_iter().map(|p| format!("{}: {}", p.reason, p.remedy)).collect())
    }

    fn cilium_with(more: &[(&str, &str)]) -> Value {
        let mut data = json!({"cni-exclusive": "false"});
        more.iter().for_each(|(key, value)| data[*key] = (*value).into());
        json!({"kind": "ConfigMap", "metadata": {"namespace": "kube-system", "name": "cilium-config"}, "data": data})
    }

    #[tokio::test]
    async fn cnis_that_bypass_netfilter_are_recognised() {
        let (names, problems) =
            told(cilium_with(&[("kube-proxy-replacement", "true"), ("enable-bpf-masquerade", "true")])).await;
        assert_eq!(names, ["Cilium"]);
        assert!(
            problems[0].contains("BypassesNetfilter: install Cilium with bpf.hostLegacyRouting=true"),
            "{problems:?}"
        );
        let felix =
            json!({"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": {"bpfEnabled": true}});
        assert!(told(felix).await.1[0].contains("iptables or nftables dataplane"));
        let unmasked = [("kube-proxy-replacement", "true"), ("enable-ipv4-masquerade", "false")];
        assert!(told(cilium_with(&unmasked)).await.1[0].contains("BypassesNetfilter"));
        let both = [unmasked[0], unmasked[1], ("enable-ipv6", "true"), ("enable-ipv6-masquerade", "false")];
        assert!(told(cilium_with(&both)).await.1[0].contains("BypassesNetfilter"));
        let netkit = told(cilium_with(&[("datapath-mode", "netkit")])).await.1;
        assert!(netkit[0].contains("NoVeth: install Cilium with bpf.datapathMode=veth"), "{netkit:?}");
        let installation = json!({"kind": "Installation", "metadata": {"name": "default"},
            "spec": {"calicoNetwork": {"linuxDataplane": "BPF"}}});
        assert!(told(installation).await.1[0].contains("linuxDataplane: Iptables"));
        let node = json!({"kind": "DaemonSet", "metadata": {"name": "calico-node"}, "spec": {"template": {"spec": {
            "containers": [{"env": [{"name": "FELIX_BPFENABLED", "value": "true"}]}]}}}});
        assert!(told(node).await.1[0].contains("FELIX_BPFENABLED"));
        let network = json!({"kind": "Network", "metadata": {"name": "cluster"},
            "spec": {"defaultNetwork": {"type": "OVNKubernetes"}}});
        assert!(told(network).await.1[0].contains("routingViaHost: true"));
        let anetd = json!({"kind": "DaemonSet", "metadata": {"name": "anetd"}});
        assert!(told(anetd).await.1[0].contains("without Dataplane V2"));
    }

    #[tokio::test]
    async fn bits_of_marks_that_calico_and_egret_both_use_are_told() {
        let felix = |spec: Value| json!({"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": spec});
        let problems = told(felix(json!({"iptablesMarkMask": 0xffe0_0000_u32}))).await.1;
        assert!(problems[0].starts_with("SameMarkBits: leave iptablesMarkMask and"), "{problems:?}");
        assert_eq!(told(felix(json!({"nftablesMarkMask": 0xff00_0000_u32}))).await.1.len(), 1);
        // One bit of five is enough.
        assert_eq!(told(felix(json!({"iptablesMarkMask": 0xfffe_0000_u32}))).await.1.len(), 1);
        for fits in [0xffff_0000_u32, 0x001f_0000, 0x003f_0000, 0xffff_8000] {
            assert_eq!(told(felix(json!({"iptablesMarkMask": fits, "nftablesMarkMask": fits}))).await.1, [""; 0]);
        }
        let node = json!({"kind": "DaemonSet", "metadata": {"name": "calico-node"}, "spec": {"template": {"spec": {
            "containers": [{"env": [{"name": "FELIX_IPTABLESMARKMASK", "value": "0xff000000"}]}]}}}});
        assert_eq!(told(node).await.1.len(), 1);
    }

    #[tokio::test]
    async fn cnis_that_use_netfilter_are_no_problem() {
        for more in [
            &[
                ("kube-proxy-replacement", "true"),
                ("enable-bpf-masquerade", "true"),
                ("enable-host-legacy-routing", "true"),
            ][..],
            &[("kube-proxy-replacement", "false")],
            // iptables masquerades.
            &[("kube-proxy-replacement", "true")],
            &[
                ("kube-proxy-replacement", "true"),
                ("enable-ipv4-masquerade", "false"),
                ("enable-ipv6", "true"),
                ("enable-ipv6-masquerade", "true"),
            ],
        ] {
            assert_eq!(told(cilium_with(more)).await.1, [""; 0]);
        }
        let exclusive = cilium_with(&[("cni-exclusive", "true")]);
        assert!(told(exclusive).await.1[0].contains("cni.exclusive=false"));
        let felix = json!({"kind": "FelixConfiguration", "metadata": {"name": "default"}, "spec": {}});
        assert_eq!(told(felix).await, (vec!["Calico"], vec![]));
        let node = json!({"kind": "DaemonSet", "metadata": {"name": "calico-node"}});
        assert_eq!(told(node).await, (vec!["Calico"], vec![]));
        let flannel = json!({"kind": "DaemonSet", "metadata": {"name": "kube-flannel-ds"}});
        assert_eq!(told(flannel).await.0, ["Flannel"]);
    }
}
