//! Converts the objects of other egress systems into Egret's.
//!
//! Each system has a file, which reads its objects and makes drafts of gateways and policies. `combine.rs` puts the
//! drafts together and checks them as the API server and the controller would. What cannot be said in Egret's fields,
//! and what Egret does in another way, becomes a note: a comment above the object, and a line for the user.
//!
//! The code is pure: text and objects come in, objects and notes go out.

mod antrea;
mod calico;
mod cilium;
mod combine;
mod draft;
mod field;
mod input;
mod kube_vip;
mod output;
mod ovn;
mod services;
mod spidernet;
mod static_egress_ip;
#[cfg(test)]
mod tests;

pub use draft::{Note, NoteKind};
pub use field::Invalid;
pub use input::{Object, read};
pub use output::Conversion;

use draft::Draft;

/// A kind of object that [`convert`] reads, for those who list them in the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The group; empty for Kubernetes' core group.
    pub group: &'static str,
    /// The plural, as in the API's paths.
    pub plural: &'static str,
    /// Whether its objects are in namespaces.
    pub is_namespaced: bool,
    /// Why it is read.
    pub needed: Needed,
}

/// Why a kind is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// It is converted, or what is converted refers to it.
    Always,
    /// The same; and where the API server has it, pods may refer to egress gateways of Calico's.
    GatewaysOfCalico,
    /// Its objects are many, and of interest only where Calico has egress gateways.
    ByGatewaysOfCalico,
}

const fn cluster(group: &'static str, plural: &'static str) -> Kind {
    Kind { group, plural, is_namespaced: false, needed: Needed::Always }
}

const fn namespaced(group: &'static str, plural: &'static str) -> Kind {
    Kind { is_namespaced: true, ..cluster(group, plural) }
}

const fn pods(group: &'static str, plural: &'static str) -> Kind {
    Kind { needed: Needed::ByGatewaysOfCalico, ..namespaced(group, plural) }
}

/// All kinds that are read, in the order in which they are listed. Those of Calico's gateways come before pods.
pub const KINDS: [Kind; 23] = [
    cluster("", "namespaces"),
    namespaced("", "services"),
    namespaced(static_egress_ip::GROUPS[0], "staticegressips"),
    namespaced(static_egress_ip::GROUPS[1], "staticegressips"),
    cluster(spidernet::GROUP, "egressgateways"),
    namespaced(spidernet::GROUP, "egresspolicies"),
    cluster(spidernet::GROUP, "egressclusterpolicies"),
    cluster(antrea::GROUP, "externalippools"),
    cluster(antrea::GROUP, "egresses"),
    cluster(antrea::GROUP, "clustergroups"),
    cluster(cilium::GROUP, "ciliumegressgatewaypolicies"),
    cluster(ovn::GROUP, "egressips"),
    namespaced(ovn::GROUP, "egressservices"),
    // A gateway may be in another namespace than its clients.
    Kind { needed: Needed::GatewaysOfCalico, ..cluster("operator.tigera.io", "egressgateways") },
    Kind { needed: Needed::GatewaysOfCalico, ..cluster("projectcalico.org", "egressgatewaypolicies") },
    Kind { needed: Needed::GatewaysOfCalico, ..cluster("crd.projectcalico.org", "egressgatewaypolicies") },
    Kind { is_namespaced: false, ..pods("projectcalico.org", "ippools") },
    Kind { is_namespaced: false, ..pods("crd.projectcalico.org", "ippools") },
    pods("", "pods"),
    pods("apps", "deployments"),
    pods("apps", "statefulsets"),
    pods("apps", "daemonsets"),
    pods("batch", "cronjobs"),
];

/// A system whose objects are converted: its name, and what of its objects becomes what, in [`convert`]'s order.
type System = (&'static str, fn(&[&Object]) -> Result<Draft, Invalid>);

const SYSTEMS: [System; 7] = [
    ("kube-static-egress-ip", static_egress_ip::convert),
    ("EgressGateway of spidernet", spidernet::convert),
    ("Antrea", antrea::convert),
    ("Cilium", cilium::convert),
    ("OVN-Kubernetes", ovn::convert),
    ("Calico", calico::convert),
    ("kube-vip", kube_vip::convert),
];

/// Converts objects. Their order does not matter, except that of several objects with one name the first keeps it.
///
/// # Errors
/// All that is invalid in the input, and what Egret would refuse. Each has the object, the field, the value and the
/// remedy.
pub fn convert(objects: &[Object]) -> Result<Conversion, Vec<Invalid>> {
    let all: Vec<&Object> = objects.iter().collect();
    let (mut drafts, mut faults) = (Vec::new(), Vec::new());
    for (system, convert) in SYSTEMS {
        match convert(&all) {
            Ok(draft) => drafts.push((system, draft)),
            Err(fault) => faults.push(fault),
        }
    }
    if !faults.is_empty() {
        return Err(faults);
    }
    let mut conversion = combine::combine(drafts)?;
    conversion.notes.extend(passed_over(objects));
    Ok(conversion)
}

/// Notes about objects that are of no system, and that no system refers to.
fn passed_over(objects: &[Object]) -> Vec<Note> {
    let mut notes = Vec::new();
    for object in objects {
        let (group, kind) = (object.group(), object.kind());
        // Objects to which others can refer are many, and most are not referred to.
        let referred = matches!((group, kind), ("", "Namespace" | "Service" | "Pod")) || is_workload(group, kind);
        if !referred && !is_of_a_system(object) {
            let text = match group {
                crate::api::GROUP => "it is Egret's own already",
                _ => "it is of no egress system that is known here",
            };
            let object = object.label().to_owned();
            notes.push(Note { kind: NoteKind::PassedOver, object, text: text.to_owned() });
        }
    }
    notes
}

fn is_workload(group: &str, kind: &str) -> bool {
    match group {
        "apps" => matches!(kind, "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet"),
        "batch" => matches!(kind, "Job" | "CronJob"),
        _ => false,
    }
}

fn is_of_a_system(object: &Object) -> bool {
    let kind = object.kind();
    calico::is_ours(object)
        || match object.group() {
            spidernet::GROUP => matches!(kind, "EgressGateway" | "EgressPolicy" | "EgressClusterPolicy"),
            antrea::GROUP => matches!(kind, "Egress" | "ExternalIPPool" | "ClusterGroup"),
            cilium::GROUP => kind == "CiliumEgressGatewayPolicy",
            ovn::GROUP => matches!(kind, "EgressIP" | "EgressService"),
            group => static_egress_ip::GROUPS.contains(&group) && kind == "StaticEgressIP",
        }
}
