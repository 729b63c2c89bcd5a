//! Pods reach the API server, which is no Node here, whatever the state of the gateways. Needs root.

use super::{PATIENCE, condition};
use lab::api::{API, Role};
use lab::fault_injection::plugged;
use lab::scene::{VISITOR, assert_blocked, assert_leaves_by_egress};
use lab::{EXT4, Lab, Pod};
use serde_json::json;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

fn reaches_the_api_server(pod: &Pod) -> io::Result<()> {
    let api = SocketAddr::new(API.into(), 6443);
    pod.within(|| TcpStream::connect_timeout(&api, Duration::from_millis(900)).map(drop))
}

fn why(lab: &Lab, to: &str) -> String {
    let kubeconfig = lab.api().kubeconfig(Role::Node).display().to_string();
    let arguments = ["why", "shop/visitor", "--to", to, "--cluster", "kube", "--kubeconfig", &kubeconfig];
    lab.host("api").run([env!("CARGO_BIN_EXE_egretd")].into_iter().chain(arguments))
}

#[test]
fn selected_pods_reach_the_api_server_without_a_gateway() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    assert_leaves_by_egress(&pod);
    let told = why(&lab, &API.to_string());
    assert!(told.contains(&format!("{API} goes direct: it is an API server's address")), "{told}");
    let told = why(&lab, "10.96.0.1:443");
    assert!(told.contains(&format!("whose endpoints are inside the cluster: {API}")), "{told}");
    for gateway in ["g1", "g2"] {
        plugged(&lab, gateway, false);
    }
    lab.wait_until("nothing else leaves", Duration::from_secs(10), || pod.who(EXT4).is_err());
    reaches_the_api_server(&pod).expect("a connection to the API server");
    // The pod's own node decides about its packets.
    lab.wait_until("it is said", PATIENCE, || why(&lab, "9.9.9.9").contains("from the pod's node \"n1\" node g"));
    assert!(why(&lab, "9.9.9.9").contains("9.9.9.9 is blocked: EgressPolicy shop/visitors decides"));
    // A restarted daemon without the API server still knows that it is direct.
    lab.api().stop();
    lab.daemon("n1").restart();
    lab.wait_ready("n1");
    assert_blocked(&pod);
    let refused = reaches_the_api_server(&pod).expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "{refused}");
}

#[test]
fn why_explains_a_service_with_endpoints_outside() {
    let lab = Lab::builder().kubernetes().scene();
    let _pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "database", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.77.7", "ports": [{"port": 5432, "targetPort": 5432}]}});
    let endpoints = json!({"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "database", "namespace": "shop"},
        "subsets": [{"addresses": [{"ip": "203.0.113.9"}], "ports": [{"port": 15432}]}]});
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "database-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "database"}},
        "endpoints": [{"addresses": ["203.0.113.9"]}], "ports": [{"name": "", "port": 15432}]});
    lab.api().ask("POST", "/api/v1/namespaces/shop/services", Some(("application/json", &service)));
    lab.api().ask("POST", "/api/v1/namespaces/shop/endpoints", Some(("application/json", &endpoints)));
    // With EndpointSlices, nothing mirrors Endpoints here.
    let slices = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices";
    let _ = lab.api().try_ask("POST", slices, Some(("application/json", &slice)));
    lab.wait_until("the policy is ready", PATIENCE, || {
        condition(&lab, "shop/visitors", "Ready").is_some_and(|c| c.0 == "True")
    });
    let told = why(&lab, "10.96.77.7:5432");
    assert!(told.contains("10.96.77.7, TCP port 5432, is an address of the Service shop/database"), "{told}");
    assert!(told.contains("203.0.113.9, TCP port 15432, leaves from 192.0.2.50"), "{told}");
}
