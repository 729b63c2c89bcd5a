//! Metrics with authentication by the API server. Needs root.

use super::{PATIENCE, documents};
use lab::Lab;

#[test]
fn metrics_can_be_read_with_the_api_servers_permission_only() {
    let lab = Lab::builder().kubernetes().node_arguments(&["--metrics-authentication"]).build();
    lab.start_node("n1");
    lab.wait_ready("n1");
    let read = |token: &str| {
        let header = format!("Authorization: Bearer {token}");
        let curl = ["curl", "-sk", "-w", "\n%{http_code}", "-H", &header, "https://127.0.0.1:7870/metrics"];
        let text = lab.node("n1").run(curl);
        let (body, code) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim_end()));
        assert_eq!(body.contains("egret_node_pods"), code == "200", "{text}");
        code.parse::<u16>().unwrap_or_else(|_| panic!("no status in {text}"))
    };
    // Egret may not send reviews until an administrator grants that right.
    assert_eq!(read("admin-token"), 503);
    for object in documents(include_str!("../../install/metrics-authentication.yaml")) {
        lab.api().apply(&object);
    }
    lab.wait_until("who may read everything reads them", PATIENCE, || read("admin-token") == 200);
    assert_eq!([read("nobody-token"), read("a-token-of-nobodys"), read("")], [403, 401, 401]);
    // Not without TLS.
    let plain = lab.node("n1").try_run([
        "curl",
        "-s",
        "-H",
        "Authorization: Bearer admin-token",
        "http://127.0.0.1:7870/metrics",
    ]);
    assert!(!String::from_utf8_lossy(&plain.stdout).contains("egret_"));
}
