//! Pods that ran before Egret came, or that another CNI chain set up: their veth is found from their address.

use super::pods::Interface;
use crate::datapath::pod_veth;
use crate::kernel::route_socket::RouteSocket;
use crate::model::ObjectKey;
use std::net::IpAddr;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// What came of looking for a pod.
#[derive(Debug)]
pub struct Found {
    /// The pod.
    pub pod: ObjectKey,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The host's end of its veth pair.
    pub interface: Option<Interface>,
}

/// Looks for pods, all at the same time.
pub async fn find_all(routes: &RouteSocket, unmanaged: Vec<(ObjectKey, Vec<IpAddr>)>) -> Vec<Found> {
    let mut tasks = JoinSet::new();
    for (pod, addresses) in unmanaged {
        tasks.spawn(find(routes.clone(), pod, addresses));
    }
    tasks.join_all().await
}

/// Looks for pods; each is told through `found`.
pub fn seek(routes: &RouteSocket, unmanaged: Vec<(ObjectKey, Vec<IpAddr>)>, found: &mpsc::UnboundedSender<Found>) {
    for (pod, addresses) in unmanaged {
        let (routes, found) = (routes.clone(), found.clone());
        tokio::spawn(async move {
            // The daemon ends if nobody listens.
            let _ = found.send(find(routes, pod, addresses).await);
        });
    }
}

async fn find(routes: RouteSocket, pod: ObjectKey, addresses: Vec<IpAddr>) -> Found {
    let mut interface = None;
    for address in &addresses {
        match pod_veth::find_pod_veth(&routes, *address).await {
            Ok(Some(veth)) => {
                interface = Some(Interface { name: veth.name, index: veth.index, peer_index: veth.peer_index });
                break;
            }
            Ok(None) => {}
            Err(e) => tracing::warn!(%pod, %address, "the pod's interface could not be looked for: {e:#}"),
        }
    }
    Found { pod, addresses, interface }
}
