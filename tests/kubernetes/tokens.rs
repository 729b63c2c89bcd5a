//! Bound tokens, as the kubelet requests and replaces them: they expire. Needs root.

use lab::api::{NAMESPACE, Role};
use lab::scene::{VISITOR, assert_leaves_by_egress};
use lab::{Host, Lab, manifests};
use serde_json::{Value, json};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// kube-client reads a token file again fifty seconds after the last read. A token that is replaced in time must be
/// valid for longer than that.
const LIFE: Duration = Duration::from_secs(75);

/// A token of a node's daemon that is valid for this time. The API server makes none of less than ten minutes, so
/// this is one of those with another end, signed again with the server's key.
fn token(lab: &Lab, life: Duration) -> String {
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                         "spec": {"audiences": [], "expirationSeconds": 600}});
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/egret-node/token");
    let answer = lab.api().ask("POST", &path, Some(("application/json", &request)));
    let token = answer["status"]["token"].as_str().expect("a token");
    let parts: Vec<&str> = token.split('.').collect();
    let [head, claims, _] = parts[..] else { panic!("no JSON Web Token: {token}") };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let host = lab.host("api");
    let files = Files::new(lab.api().token_file(Role::Node).parent().expect("a directory"));
    let mut claims: Value = serde_json::from_str(&files.decoded(host, claims)).expect("claims");
    claims["exp"] = (now + life).as_secs().into();
    let signed = format!("{head}.{}", files.encoded(host, claims.to_string().as_bytes()));
    let signature = files.signed(host, &signed);
    format!("{signed}.{}", files.encoded(host, &signature))
}

/// The input and output of openssl. JSON Web Tokens are in base64url without padding, RFC 7515.
struct Files {
    from: PathBuf,
    to: PathBuf,
    key: PathBuf,
}

impl Files {
    fn new(directory: &Path) -> Self {
        let at = |name: &str| directory.join(name);
        Files { from: at("openssl.in"), to: at("openssl.out"), key: at("accounts.key") }
    }

    fn openssl(&self, host: &Host, content: &[u8], arguments: &[&str]) -> Vec<u8> {
        std::fs::write(&self.from, content).expect("write");
        let (from, to) = (self.from.display().to_string(), self.to.display().to_string());
        host.run([&["openssl"][..], arguments, &["-out", &to]].concat().into_iter().chain(match arguments[0] {
            "dgst" => vec![from.as_str()],
            _ => vec!["-in", from.as_str()],
        }));
        std::fs::read(&self.to).expect("read")
    }

    fn encoded(&self, host: &Host, bytes: &[u8]) -> String {
        let text = String::from_utf8(self.openssl(host, bytes, &["base64", "-A"])).expect("base64");
        text.trim_end().trim_end_matches('=').replace('+', "-").replace('/', "_")
    }

    fn decoded(&self, host: &Host, text: &str) -> String {
        let padding = "=".repeat(text.len().wrapping_neg() % 4);
        let text = text.replace('-', "+").replace('_', "/") + &padding;
        String::from_utf8(self.openssl(host, text.as_bytes(), &["base64", "-d", "-A"])).expect("text")
    }

    fn signed(&self, host: &Host, text: &str) -> Vec<u8> {
        self.openssl(host, text.as_bytes(), &["dgst", "-sha256", "-sign", &self.key.display().to_string()])
    }
}

#[test]
fn a_bound_token_expires_and_the_next_one_is_used() {
    let lab = Lab::builder().kubernetes().scene();
    let pod = lab.add_pod("n1", "shop", "visitor", VISITOR);
    let file = lab.api().token_file(Role::Node);
    let daemon = lab.daemon("n1");
    let told = |address: u8| {
        let spec = format!(
            "podSelector: {{ matchLabels: {{ app: visitor }} }}\n  address: {{ ipv4: 192.0.2.{address} }}\n  priority: 9"
        );
        lab.write_manifest("other.yaml", &manifests::policy("shop", "other", &spec));
        lab.wait_seen_as(&pod, Ipv4Addr::new(192, 0, 2, address));
        lab.remove_manifest("other.yaml");
        lab.wait_seen_as(&pod, lab::EGRESS4);
    };
    let refusals = || daemon.log().matches("not accepted").count();

    // Replaced in time, as the kubelet does after four fifths of the lifetime: no request is rejected.
    std::fs::write(&file, token(&lab, LIFE)).expect("write a token");
    daemon.restart();
    lab.wait_ready("n1");
    told(57);
    std::fs::write(&file, token(&lab, Duration::from_secs(600))).expect("write a token");
    thread::sleep(LIFE + Duration::from_secs(2));
    told(58);
    assert_eq!(refusals(), 0, "{}", daemon.log());

    // Replaced too late.
    std::fs::write(&file, token(&lab, Duration::from_secs(10))).expect("write a token");
    daemon.restart();
    lab.wait_ready("n1");
    thread::sleep(Duration::from_secs(12));
    let late = lab.add_pod("n1", "shop", "late", VISITOR);
    assert_leaves_by_egress(&pod);
    std::fs::write(&file, token(&lab, Duration::from_secs(600))).expect("write a token");
    lab.wait_seen_as(&late, lab::EGRESS4);
    told(59);
}
