//! Finds the networks of Services in clusters without ServiceCIDR objects (before Kubernetes 1.33).
//!
//! The API server names them when it refuses a Service with an impossible address; kubeadm stores them in a ConfigMap.
//! If neither gives an answer, Egret follows the Services themselves.

use super::client::{Client, JSON, RequestFailure};
use super::watch::{Backoff, Change};
use crate::cluster::decode::kubernetes::network_of;
use crate::model::Inside;
use crate::model::selector::Name;
use http::Method;
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc::Sender;
use tracing::{info, warn};

/// Addresses that no Service can have: "this network" (RFC 1122) and the discard prefix (RFC 6666).
const IMPOSSIBLE: [(&str, &str); 2] = [("IPv4", "0.0.0.1"), ("IPv6", "100::1")];
/// The text before the network in the API server's refusal (`ErrNotInRange` in pkg/registry/core/service/ipallocator).
const RANGE_TEXT: &str = "The range of valid IPs is ";
const KUBEADM: &str = "/api/v1/namespaces/kube-system/configmaps/kubeadm-config";

/// Asks until there is an answer; `None`: nobody knows the networks.
pub async fn find(client: Client, changes: Sender<Change>) {
    let mut backoff = Backoff::default();
    loop {
        match ask(&client).await {
            Ok(found) => {
                match &found {
                    Some(inside) => info!(networks = ?inside.services.keys(), "found the networks of Services"),
                    None => warn!(
                        "the networks of Services are unknown, so every Service is followed instead; name them with \
                         --direct, or give the ServiceAccount the rights in install/rbac.yaml"
                    ),
                }
                // The receiver is gone when the daemon ends.
                return drop(changes.send(Change::ServiceNetworks(found)).await);
            }
            Err(e) => warn!("cannot find the networks of Services, trying again: {e}"),
        }
        tokio::select! {
            () = backoff.wait() => {}
            () = changes.closed() => return,
        }
    }
}

async fn ask(client: &Client) -> Result<Option<Inside>, RequestFailure> {
    let mut inside = Inside::default();
    for (family, address) in IMPOSSIBLE {
        let answer = refusal(client, family, address).await?;
        let from = Name::from("the API server's answer about an impossible Service");
        inside.services.extend(networks(&answer).map(|network| (network, from.clone())));
    }
    if inside.services.is_empty() {
        inside = kubeadm(client).await?;
    }
    Ok(Some(inside).filter(|inside| !inside.services.is_empty()))
}

/// The API server's refusal of a Service with an impossible address. First a dry run: versions before 1.24 allocate no
/// address in it and refuse nothing. Then a real request: 0.0.0.1 cannot be allocated, whatever the networks are.
async fn refusal(client: &Client, family: &str, address: &str) -> Result<String, RequestFailure> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"generateName": "egret-"},
        "spec": {"clusterIP": address, "ipFamilies": [family], "ports": [{"port": 1, "protocol": "TCP"}]},
    });
    for dry in ["?dryRun=All", ""] {
        let path = format!("/api/v1/namespaces/{}/services{dry}", client.namespace());
        let content = Some((JSON, service.to_string().into_bytes()));
        return match client.ask::<Value>(Method::POST, &path, content).await {
            Err(RequestFailure::Refused { code, message, .. }) if code < 500 => Ok(message),
            // Some versions answer with the allocator's error and the code 500.
            Err(RequestFailure::Refused { message, .. }) if message.contains(RANGE_TEXT) => Ok(message),
            Err(e) => Err(e),
            Ok(_) => continue,
        };
    }
    Ok(String::new())
}

/// The networks in the API server's answer.
fn networks(answer: &str) -> impl Iterator<Item = IpNetwork> {
    answer.split(RANGE_TEXT).skip(1).flat_map(|rest| {
        let end = rest.find(|c: char| !(c.is_ascii_hexdigit() || ":./,".contains(c))).unwrap_or(rest.len());
        rest[..end].trim_end_matches('.').split(',').filter_map(network_of)
    })
}

/// The networks that kubeadm stored, if it installed this cluster and Egret may read them.
async fn kubeadm(client: &Client) -> Result<Inside, RequestFailure> {
    #[derive(Deserialize)]
    struct Map {
        #[serde(default)]
        data: Data,
    }
    #[derive(Default, Deserialize)]
    struct Data {
        #[serde(rename = "ClusterConfiguration", default)]
        configuration: String,
    }
    match client.get::<Map>(KUBEADM).await {
        Ok(map) => Ok(configured(&map.data.configuration)),
        Err(RequestFailure::Refused { code: 403 | 404, .. }) => Ok(Inside::default()),
        Err(e) => Err(e),
    }
}

/// The networks in kubeadm's ClusterConfiguration.
fn configured(text: &str) -> Inside {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Configuration {
        networking: Networking,
    }
    #[derive(Default, Deserialize)]
    #[serde(rename_all = "camelCase", default)]
    struct Networking {
        service_subnet: Option<String>,
        pod_subnet: Option<String>,
    }
    let Configuration { networking } = serde_saphyr::from_str(text).unwrap_or_default();
    let from = Name::from("kubeadm's ConfigMap kubeadm-config");
    let all = |text: Option<String>| {
        let networks: Vec<IpNetwork> = text.unwrap_or_default().split(',').filter_map(network_of).collect();
        networks.into_iter().map(|n| (n, from.clone())).collect()
    };
    Inside { services: all(networking.service_subnet), pods: all(networking.pod_subnet) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(answer: &str) -> Vec<String> {
        networks(answer).map(|n| n.to_string()).collect()
    }

    #[test]
    fn networks_are_found_in_the_api_servers_refusal() {
        // 1.20, 1.24, 1.30.
        assert_eq!(
            found(
                "Service \"a\" is invalid: spec.clusterIPs: Invalid value: []string{\"0.0.0.1\"}: failed to allocated \
                 ip:0.0.0.1 with error:provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/16"
            ),
            ["10.96.0.0/16"]
        );
        assert_eq!(
            found(
                "spec.clusterIPs: Invalid value: [\"100::1\"]: failed to allocate IP 100::1: the provided IP \
                   (100::1) is not in the valid range. The range of valid IPs is fd00:96::/108"
            ),
            ["fd00:96::/108"]
        );
        assert_eq!(found("The range of valid IPs is 10.43.0.0/16. Sorry"), ["10.43.0.0/16"]);
        assert!(found("services is forbidden").is_empty());
    }

    #[test]
    fn networks_are_found_in_kubeadms_configuration() {
        let inside = configured(
            "apiServer: {}\nkind: ClusterConfiguration\nnetworking:\n  dnsDomain: cluster.local\n  podSubnet: \
             10.244.0.0/16,fd00:244::/48\n  serviceSubnet: 10.96.0.0/12\n",
        );
        assert_eq!((inside.services.len(), inside.pods.len()), (1, 2));
        assert_eq!(configured("what: [is"), Inside::default());
    }
}
