//! The Services of the cluster, and the endpoints of those that an address may be of: for a person who asks, once.

use super::client::{Client, Failure};
use super::decode::EndpointsObject;
use super::kind::Kind;
use super::watch::escaped;
use crate::cluster::dir::kubernetes as k8s;
use crate::cluster::dir::names::Names;
use crate::model::backends::may_lead_to;
use crate::model::target::Target;
use crate::model::{Endpoints, ObjectKey, Service};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::Arc;

/// All Services, and the endpoints of some.
pub type Found = (BTreeMap<ObjectKey, Arc<Service>>, BTreeMap<ObjectKey, Arc<Endpoints>>);

#[derive(Deserialize)]
struct List<T> {
    #[serde(default)]
    metadata: ListMetadata,
    // `null` where there are none.
    items: Option<Vec<T>>,
}

#[derive(Default, Deserialize)]
struct ListMetadata {
    #[serde(rename = "continue", default)]
    rest: String,
}

#[derive(Deserialize)]
struct ServiceObject {
    #[serde(default)]
    metadata: k8s::Metadata,
    #[serde(default)]
    spec: k8s::ServiceSpec,
    #[serde(default)]
    status: k8s::ServiceStatus,
}

/// Reads them, the endpoints of those that packets to `target` may be for.
pub(super) async fn find(client: &Client, target: &Target) -> Result<Found, Failure> {
    let (mut services, mut endpoints) = (BTreeMap::new(), BTreeMap::new());
    let mut names = Names::default();
    for ServiceObject { metadata, spec, status } in all::<ServiceObject>(client, Kind::Service.path(), "").await? {
        // One that makes no sense says nothing of others.
        let Ok(service) = k8s::service(&spec, &mut names) else { continue };
        let exposure = Some(Box::new(k8s::exposure(&spec, &status)));
        services.insert(key(&metadata), Arc::new(Service { exposure, ..service }));
    }
    for (service, _) in services.iter().filter(|(_, service)| may_lead_to(service, target)) {
        for object in endpoints_of(client, service).await? {
            let key = key(&object.metadata);
            endpoints.insert(key.clone(), Arc::new(k8s::endpoints(&object.metadata, &key, &object.parts)));
        }
    }
    Ok((services, endpoints))
}

fn key(metadata: &k8s::Metadata) -> ObjectKey {
    let part = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
    ObjectKey::new(&part(&metadata.namespace), &part(&metadata.name))
}

async fn endpoints_of(
    client: &Client,
    ObjectKey { namespace, name }: &ObjectKey,
) -> Result<Vec<EndpointsObject>, Failure> {
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
    let slices = all(client, &path, &format!("&labelSelector={}%3D{name}", escaped(k8s::SERVICE_NAME))).await;
    match slices {
        // Before 1.21 there are none of this version.
        Err(e) if e.is_not_found() => {}
        other => return other,
    }
    match client.get(&format!("/api/v1/namespaces/{namespace}/endpoints/{name}")).await {
        Ok(one) => Ok(vec![one]),
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

async fn all<T: DeserializeOwned>(client: &Client, path: &str, selector: &str) -> Result<Vec<T>, Failure> {
    let (mut all, mut rest) = (Vec::new(), String::new());
    loop {
        let List { metadata, items } = client.get(&format!("{path}?limit=500{selector}{rest}")).await?;
        all.extend(items.unwrap_or_default());
        if metadata.rest.is_empty() {
            return Ok(all);
        }
        rest = format!("&continue={}", escaped(&metadata.rest));
    }
}
