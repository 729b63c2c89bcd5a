//! Search for the veths of unmanaged pods by the pods' addresses. Such a pod started before Egret was installed, or
//! another CNI chain set it up.

use super::pods::Interface;
use crate::datapath::pod_veth;
use crate::datapath::route_socket::RouteSocket;
use crate::model::ObjectKey;
use std::net::IpAddr;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// The result of a search.
#[derive(Debug)]
pub struct SearchResult {
    pub pod: ObjectKey,
    /// The pod's addresses when the search began.
    pub addresses: Vec<IpAddr>,
    /// The host's end of its veth pair, if it was found.
    pub interface: Option<Interface>,
}

/// Searches for all pods concurrently, and waits for the results.
pub async fn find_all(routes: &RouteSocket, unmanaged: Vec<(ObjectKey, Vec<IpAddr>)>) -> Vec<SearchResult> {
    let mut tasks = JoinSet::new();
    for (pod, addresses) in unmanaged {
        tasks.spawn(find(routes.clone(), pod, addresses));
    }
    tasks.join_all().await
}

/// Searches for pods in the background, and sends each result to `found`.
pub fn spawn_search(
    routes: &RouteSocket,
    unmanaged: Vec<(ObjectKey, Vec<IpAddr>)>,
    found: &mpsc::UnboundedSender<SearchResult>,
) {
    for (pod, addresses) in unmanaged {
        let (routes, found) = (routes.clone(), found.clone());
        tokio::spawn(async move {
            // Without a receiver the daemon is ending.
            let _ = found.send(find(routes, pod, addresses).await);
        });
    }
}

async fn find(routes: RouteSocket, pod: ObjectKey, addresses: Vec<IpAddr>) -> SearchResult {
    let mut interface = None;
    for address in &addresses {
        match pod_veth::find_pod_veth(&routes, *address).await {
            Ok(Some(veth)) => {
                interface = Some(Interface { name: veth.name, index: veth.index, peer_index: veth.peer_index });
                break;
            }
            Ok(None) => {}
            Err(e) => tracing::warn!(%pod, %address, "cannot search for the pod's interface: {e:#}"),
        }
    }
    SearchResult { pod, addresses, interface }
}
