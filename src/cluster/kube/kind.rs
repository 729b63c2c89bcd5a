//! The paths of the kinds in the API, and which objects of them are read.

use crate::cluster::kind::Kind;

/// The media types of lists and of objects of which only the metadata is read.
pub const METADATA_ONLY: (&str, &str) = (
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
);

impl Kind {
    /// The kinds that every reader needs for a snapshot.
    pub const ALWAYS: [Kind; 7] = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::EgressGateway,
        Kind::EgressPolicy,
        Kind::ClusterEgressPolicy,
        Kind::EgressNode,
    ];

    /// The kinds that tell a node what is inside the cluster, where they exist.
    pub const OPTIONAL: [Kind; 4] = [Kind::ServiceCidr, Kind::IpPool, Kind::CiliumNode, Kind::EndpointSlice];

    /// Whether the cluster may have no such kind.
    pub fn is_optional(self) -> bool {
        Kind::OPTIONAL.contains(&self) || Kind::ANNOUNCEMENTS.contains(&self)
    }

    /// Whether an installation may have no right to read the kind, and does without it.
    pub fn is_dispensable(self) -> bool {
        matches!(self, Kind::CiliumNode | Kind::EndpointSlice) || Kind::ANNOUNCEMENTS.contains(&self)
    }

    /// The path of the collection of all namespaces.
    pub fn path(self) -> &'static str {
        match self {
            Kind::Namespace => "/api/v1/namespaces",
            Kind::Node => "/api/v1/nodes",
            Kind::Pod => "/api/v1/pods",
            Kind::Service => "/api/v1/services",
            Kind::EgressGateway => "/apis/egret.dev/v1alpha1/egressgateways",
            Kind::EgressPolicy => "/apis/egret.dev/v1alpha1/egresspolicies",
            Kind::ClusterEgressPolicy => "/apis/egret.dev/v1alpha1/clusteregresspolicies",
            Kind::EgressNode => "/apis/egret.dev/v1alpha1/egressnodes",
            Kind::ServiceCidr => "/apis/networking.k8s.io/v1/servicecidrs",
            Kind::IpPool => "/apis/crd.projectcalico.org/v1/ippools",
            Kind::CiliumNode => "/apis/cilium.io/v2/ciliumnodes",
            Kind::EndpointSlice => "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
            Kind::Endpoints => "/api/v1/namespaces/default/endpoints",
            Kind::ServiceL2Status => "/apis/metallb.io/v1beta1/servicel2statuses",
            Kind::Lease => "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases",
        }
    }

    /// The path of the same objects in API servers that do not have [`Kind::path`].
    pub fn older_path(self) -> Option<&'static str> {
        // discovery.k8s.io/v1 came with Kubernetes 1.21. Endpoints are deprecated since 1.33.
        (self == Kind::EndpointSlice).then(|| Kind::Endpoints.path())
    }

    /// The selector of the objects that are read, `fieldSelector=…`. `node` is the node whose daemon reads.
    pub fn selector(self, node: Option<&str>) -> String {
        match (self, node) {
            (Kind::Pod, Some(node)) => format!("fieldSelector=spec.nodeName%3D{node}"),
            (Kind::EndpointSlice, _) => "fieldSelector=metadata.name%3Dkubernetes".to_owned(),
            _ => String::new(),
        }
    }

    /// The path of one object.
    pub fn path_of(self, namespace: Option<&str>, name: &str) -> String {
        match (namespace, self.path().rsplit_once('/')) {
            (Some(namespace), Some((group, plural))) => format!("{group}/namespaces/{namespace}/{plural}/{name}"),
            _ => format!("{}/{name}", self.path()),
        }
    }

    /// The media types of the answers to a list and to a watch.
    pub fn accept(self) -> (&'static str, &'static str) {
        match self {
            Kind::Namespace => METADATA_ONLY,
            _ => ("application/json", "application/json"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    #[test]
    fn the_path_of_an_object_is_below_its_collection() {
        assert_eq!(Kind::Pod.path_of(Some("shop"), "a"), "/api/v1/namespaces/shop/pods/a");
        assert_eq!(
            Kind::EgressPolicy.path_of(Some("shop"), "a"),
            "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/a"
        );
        assert_eq!(Kind::EgressGateway.path_of(None, "g"), "/apis/egret.dev/v1alpha1/egressgateways/g");
    }
}
