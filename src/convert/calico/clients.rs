//! Namespaces, pods and workloads that use Calico's egress gateways, by annotations.

use super::super::draft::labels;
use super::super::field::{Field, Invalid};
use super::super::input::Object;
use super::gateways::is_workload_of_gateways;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub(super) const PREFIX: &str = "egress.projectcalico.org/";
/// Labels that a controller gives each pod or each revision: they select fewer pods than are meant.
const OF_CONTROLLERS: [&str; 6] = [
    "pod-template-hash",
    "controller-revision-hash",
    "pod-template-generation",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/job-completion-index",
];
/// Kinds with a template of pods, and its path.
const WORKLOADS: [(&str, &str, &str); 6] = [
    ("apps", "Deployment", "spec.template"),
    ("apps", "StatefulSet", "spec.template"),
    ("apps", "DaemonSet", "spec.template"),
    ("apps", "ReplicaSet", "spec.template"),
    ("batch", "Job", "spec.template"),
    ("batch", "CronJob", "spec.jobTemplate.spec.template"),
];

/// Pods that use a gateway.
pub(super) struct Client<'a> {
    pub(super) object: &'a Object,
    pub(super) namespace: Option<&'a str>,
    /// Its pods; `None`: they have no labels by which they could be selected.
    pub(super) pods: Option<LabelSelector>,
    annotations: Field<'a>,
    /// Whether these are all pods of a namespace. The annotations of a pod replace those of its namespace.
    pub(super) is_namespace: bool,
}

impl<'a> Client<'a> {
    /// The annotation `egress.projectcalico.org/NAME`.
    pub(super) fn annotation(&self, name: &str) -> Field<'a> {
        self.annotations.at(&format!("{PREFIX}{name}"))
    }

    fn uses_a_gateway(&self) -> bool {
        ["selector", "egressGatewayPolicy"].iter().any(|name| self.annotation(name).is_present())
    }
}

/// The clients of the input, namespaces first. A pod that belongs to a workload of the input is not among them.
pub(super) fn clients<'a>(objects: &[&'a Object]) -> Result<Vec<Client<'a>>, Invalid> {
    let mut found = Vec::new();
    for object in objects.iter().filter(|object| object.is("", "Namespace")) {
        let annotations = object.field("metadata.annotations");
        let (namespace, pods) = (Some(object.name()), Some(LabelSelector::default()));
        found.push(Client { object, namespace, pods, annotations, is_namespace: true });
    }
    for object in objects {
        if let Some((_, _, path)) = WORKLOADS.iter().find(|(group, kind, _)| object.is(group, kind))
            && !is_workload_of_gateways(object)?
            // A ReplicaSet of a Deployment, a Job of a CronJob.
            && object.field("metadata.ownerReferences").list()?.is_empty()
        {
            let template = object.field(path).at("metadata");
            found.push(client(object, &template, object.field("spec.selector").selector()?)?);
        }
    }
    let mut pods: Vec<Client<'a>> = Vec::new();
    for object in objects.iter().filter(|object| object.is("", "Pod")) {
        let pod = client(object, &object.field("metadata"), None)?;
        let same = |other: &Client<'_>| other.namespace == pod.namespace && other.pods == pod.pods;
        let of_workload = !object.field("metadata.ownerReferences").list()?.is_empty()
            && found
                .iter()
                .any(|other| !other.is_namespace && other.namespace == pod.namespace && other.uses_a_gateway());
        if !of_workload && !pods.iter().any(same) {
            pods.push(pod);
        }
    }
    found.extend(pods);
    found.retain(Client::uses_a_gateway);
    Ok(found)
}

fn client<'a>(
    object: &'a Object,
    metadata: &Field<'a>,
    selector: Option<LabelSelector>,
) -> Result<Client<'a>, Invalid> {
    let own = metadata.at("labels").labels()?.into_iter().filter(|(key, _)| !OF_CONTROLLERS.contains(key));
    let own = Some(labels(own)).filter(|selector| selector.match_labels.is_some());
    let (namespace, annotations) = (object.namespace(), metadata.at("annotations"));
    Ok(Client { object, namespace, pods: selector.or(own), annotations, is_namespace: false })
}
