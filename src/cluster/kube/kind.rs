//! The kinds of objects that are watched, and where the API server has them.

use std::fmt;

/// The media type of lists and objects of which only the metadata are wanted.
pub const METADATA_ONLY: (&str, &str) = (
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
);

/// A kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1`, metadata alone.
    Namespace,
    /// `v1`.
    Node,
    /// `v1`.
    Pod,
    /// `v1`.
    Service,
    /// Egret's.
    EgressGateway,
    /// Egret's.
    EgressPolicy,
    /// Egret's.
    ClusterEgressPolicy,
    /// Egret's.
    EgressNode,
    /// `networking.k8s.io/v1`, from Kubernetes 1.33 on.
    ServiceCidr,
    /// Calico's, where that is installed.
    IpPool,
    /// The API servers' own: of the Service `default/kubernetes`.
    EndpointSlice,
}

impl Kind {
    /// What every reader needs before there can be a snapshot.
    pub const ALWAYS: [Kind; 7] = [
        Kind::Namespace,
        Kind::Node,
        Kind::Pod,
        Kind::EgressGateway,
        Kind::EgressPolicy,
        Kind::ClusterEgressPolicy,
        Kind::EgressNode,
    ];

    /// What is followed where it is there, and tells a node what is inside the cluster.
    pub const OPTIONAL: [Kind; 3] = [Kind::ServiceCidr, Kind::IpPool, Kind::EndpointSlice];

    /// The path of the collection in the API, all namespaces together.
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
            Kind::EndpointSlice => "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
        }
    }

    /// The path of the same objects in API servers that do not have the first one.
    pub fn older_path(self) -> Option<&'static str> {
        // discovery.k8s.io/v1 came with 1.21; that Endpoints are deprecated is said from 1.33 on.
        (self == Kind::EndpointSlice).then_some("/api/v1/namespaces/default/endpoints")
    }

    /// Which objects of the collection are followed, `fieldSelector=…`; `node`: a node's daemon reads them.
    pub fn selector(self, node: Option<&str>) -> String {
        match (self, node) {
            (Kind::Pod, Some(node)) => format!("fieldSelector=spec.nodeName%3D{node}"),
            (Kind::EndpointSlice, _) => "fieldSelector=metadata.name%3Dkubernetes".to_owned(),
            _ => String::new(),
        }
    }

    /// The path of one object in the API.
    pub fn path_of(self, namespace: Option<&str>, name: &str) -> String {
        match (namespace, self.path().rsplit_once('/')) {
            (Some(namespace), Some((group, plural))) => format!("{group}/namespaces/{namespace}/{plural}/{name}"),
            _ => format!("{}/{name}", self.path()),
        }
    }

    /// What is accepted as the answer to a list, and to a watch.
    pub fn accept(self) -> (&'static str, &'static str) {
        match self {
            Kind::Namespace => METADATA_ONLY,
            _ => ("application/json", "application/json"),
        }
    }

    /// Whether it is of Egret's group.
    pub fn is_ours(self) -> bool {
        self.path().starts_with("/apis/egret.dev/")
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::Kind;

    #[test]
    fn objects_lie_below_their_collections() {
        assert_eq!(Kind::Pod.path_of(Some("shop"), "a"), "/api/v1/namespaces/shop/pods/a");
        assert_eq!(
            Kind::EgressPolicy.path_of(Some("shop"), "a"),
            "/apis/egret.dev/v1alpha1/namespaces/shop/egresspolicies/a"
        );
        assert_eq!(Kind::EgressGateway.path_of(None, "g"), "/apis/egret.dev/v1alpha1/egressgateways/g");
    }
}
