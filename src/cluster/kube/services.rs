//! Reads once, for `egretd why`: the Services of the cluster, and the endpoints of those to which an address may
//! belong.

use super::client::{Client, RequestFailure, escaped};
use crate::cluster::decode::kubernetes::SERVICE_NAME;
use crate::cluster::decode::manifest::{Reader, StatusPath};
use crate::cluster::kind::Kind;
use crate::cluster::names::Names;
use crate::cluster::object::Object;
use crate::model::backends::may_lead_to;
use crate::model::target::Target;
use crate::model::{Endpoints, ObjectKey, Service};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::sync::Arc;

/// All Services, and the endpoints of some.
pub type ServicesAndEndpoints = (BTreeMap<ObjectKey, Arc<Service>>, BTreeMap<ObjectKey, Arc<Endpoints>>);

/// Reads all Services, and the endpoints of those to which packets to `target` may belong.
pub(super) async fn find(client: &Client, target: &Target) -> Result<ServicesAndEndpoints, RequestFailure> {
    let mut names = Names::default();
    // An invalid object is left out.
    let mut decode = |kind, text: &RawValue| {
        let mut reader = Reader { names: &mut names, node: None, statuses: StatusPath::InFiles };
        reader.read_object(kind, text.get().as_bytes()).ok()?.object.ok()?
    };
    let (mut services, mut endpoints) = (BTreeMap::new(), BTreeMap::new());
    for text in client.list::<Box<RawValue>>(Kind::Service.path(), "").await?.items {
        if let Some(Object::Service(key, service)) = decode(Kind::Service, &text) {
            services.insert(key, service);
        }
    }
    for (service, _) in services.iter().filter(|(_, service)| may_lead_to(service, target)) {
        for text in endpoints_of(client, service).await? {
            if let Some(Object::EndpointSlice(key, found)) = decode(Kind::EndpointSlice, &text) {
                endpoints.insert(key, found);
            }
        }
    }
    Ok((services, endpoints))
}

async fn endpoints_of(
    client: &Client,
    ObjectKey { namespace, name }: &ObjectKey,
) -> Result<Vec<Box<RawValue>>, RequestFailure> {
    let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
    let selector = format!("labelSelector={}%3D{name}", escaped(SERVICE_NAME));
    match client.list(&path, &selector).await {
        // discovery.k8s.io/v1 came with Kubernetes 1.21.
        Err(e) if e.is_not_found() => {}
        other => return other.map(|listed| listed.items),
    }
    match client.get(&format!("/api/v1/namespaces/{namespace}/endpoints/{name}")).await {
        Ok(one) => Ok(vec![one]),
        Err(e) if e.is_not_found() => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}
