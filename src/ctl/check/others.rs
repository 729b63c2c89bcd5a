//! Other systems that give pods an egress IP. Two of them for the same pods get in each other's way.

use super::{Check, CheckState};
use crate::ctl::site::{SiteObjects, Wanted};

const fn of(path: &'static str, kind: &'static str) -> Wanted {
    Wanted { path, kind, name: "" }
}

/// The kinds by which other egress systems are recognised.
pub(super) const OBJECTS: [Wanted; 6] = [
    of("/apis/cilium.io/v2/ciliumegressgatewaypolicies", "CiliumEgressGatewayPolicy"),
    of("/apis/egressgateway.spidernet.io/v1beta1/egresspolicies", "EgressPolicy"),
    of("/apis/crd.antrea.io/v1beta1/egresses", "Egress"),
    of("/apis/k8s.ovn.org/v1/egressips", "EgressIP"),
    of("/apis/staticegressips.nirmata.io/v1alpha1/staticegressips", "StaticEgressIP"),
    of("/apis/projectcalico.org/v3/egressgatewaypolicies", "EgressGatewayPolicy"),
];

/// Whether objects of other egress systems are in use.
pub(super) fn checks(found: &SiteObjects) -> Vec<Check> {
    let (group, name) = ("network", "no other egress system");
    let group_of = |wanted: &Wanted| wanted.path.split('/').nth(2).unwrap_or_default();
    let is_of_group = |wanted: &Wanted, object: &serde_json::Value| {
        // In a directory, kinds of the same name are Egret's.
        object["apiVersion"].as_str().is_none_or(|version| version.starts_with(group_of(wanted)))
    };
    let each = OBJECTS.iter().filter_map(|wanted| {
        let count = found.all(wanted).iter().filter(|object| is_of_group(wanted, object)).count();
        let remedy = format!(
            "leave no pod to both systems; `kubectl egret convert` writes Egret's objects for those of {}",
            group_of(wanted)
        );
        (count > 0).then(|| {
            Check::new(
                group,
                name,
                CheckState::Warning,
                format!("{count} {} of {}", wanted.kind, group_of(wanted)),
                remedy,
            )
        })
    });
    let mut all: Vec<Check> = each.collect();
    if all.is_empty() {
        all.push(Check::ok(group, name, "none found"));
    }
    all
}
