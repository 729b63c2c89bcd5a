use super::*;
use crate::cluster::object::Object;
use serde_json::Value;
use std::fs::OpenOptions;

struct Fixture {
    directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture { directory: tempfile::tempdir().unwrap() }
    }

    fn files(&self, of: &str) -> Files {
        Files::new(Some(OfflineCache { directory: self.directory.path().join("known"), of: of.to_owned() }))
    }

    fn path(&self, kind: Kind) -> PathBuf {
        self.directory.path().join("known").join(kind.to_string())
    }
}

fn read(kind: Kind, object: &Value) -> Decoded {
    decode(kind, object.to_string().as_bytes(), &reading(), &mut Names::default()).unwrap()
}

fn reading() -> Reading {
    Reading { node: Some("n1".into()) }
}

fn list(file: &mut KindFile, objects: &[Value]) {
    file.begin();
    for object in objects {
        file.item(&read(file.kind, object), object.to_string().as_bytes());
    }
    file.finish();
}

fn apply(file: &mut KindFile, object: &Value) {
    file.applied(&read(file.kind, object), object.to_string().as_bytes());
}

fn loaded(files: &Files, kind: Kind) -> Option<Vec<String>> {
    let listed = files.load(kind, &reading(), &mut Names::default())?;
    Some(listed.into_keys().map(|(_, name)| name.to_string()).collect())
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name, "resourceVersion": "7"}, "spec": spec})
}

fn selects(label: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": label}}})
}

#[test]
fn the_list_and_the_changes_since_are_loaded() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut file = files.kind_file(Kind::EgressPolicy);
    assert!(loaded(&files, Kind::EgressPolicy).is_none());
    list(&mut file, &[policy("a", selects("a")), policy("b", selects("b"))]);
    apply(&mut file, &policy("c", selects("c")));
    apply(&mut file, &policy("a", selects("other")));
    file.deleted(&(Some("shop".into()), "b".into()));
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["a", "c"]);
    let listed = files.load(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    let expected = read(Kind::EgressPolicy, &policy("a", selects("other")));
    let found = &listed[&(Some("shop".into()), "a".into())];
    assert_eq!(format!("{:?}", found.object), format!("{:?}", expected.object));
    // An incomplete list changes nothing.
    file.begin();
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["a", "c"]);
    list(&mut file, &[]);
    assert!(loaded(&files, Kind::EgressPolicy).unwrap().is_empty());
}

#[test]
fn a_cache_of_another_owner_is_not_loaded() {
    let fixture = Fixture::new();
    list(&mut fixture.files("n1 before").kind_file(Kind::Namespace), &[json!({"metadata": {"name": "shop"}})]);
    assert!(loaded(&fixture.files("n1 after"), Kind::Namespace).is_none());
    assert_eq!(loaded(&fixture.files("n1 before"), Kind::Namespace).unwrap(), ["shop"]);
}

#[test]
fn a_truncated_line_does_not_count() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut file = files.kind_file(Kind::EgressPolicy);
    list(&mut file, &[policy("a", selects("a"))]);
    let mut file = OpenOptions::new().append(true).open(fixture.path(Kind::EgressPolicy)).unwrap();
    file.write_all(b"shop/b\t{\"metadata\":{\"na").unwrap();
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["a"]);
}

#[test]
fn an_invalid_object_keeps_its_last_good_state() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut file = files.kind_file(Kind::EgressPolicy);
    let wrong = policy("a", json!({"podSelector": 7}));
    list(&mut file, &[policy("a", selects("a"))]);
    apply(&mut file, &wrong);
    let listed = files.load(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    assert!(matches!(listed.values().next().unwrap().object, Ok(Some(Object::Policy(..)))));
    // The list does not have its last good state.
    list(&mut file, &[wrong, policy("b", selects("b"))]);
    apply(&mut file, &policy("c", selects("c")));
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["a", "b", "c"]);
    assert_eq!(item(&files, "a"), item_of(&policy("a", selects("a"))));
}

/// A loaded policy, as text.
fn item(files: &Files, name: &str) -> String {
    let listed = files.load(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    let decoded = &listed[&(Some("shop".into()), name.into())];
    format!("{:?}", decoded.object)
}

fn item_of(policy: &Value) -> String {
    let decoded = read(Kind::EgressPolicy, policy);
    format!("{:?}", decoded.object)
}

#[test]
fn an_object_that_was_never_valid_affects_no_other_object_of_the_file() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    // An earlier daemon's file may be older than the last good state.
    list(&mut files.kind_file(Kind::EgressPolicy), &[policy("a", selects("a"))]);
    let mut file = files.kind_file(Kind::EgressPolicy);
    let wrong = |priority: &str| policy("a", json!({"podSelector": 7, "priority": priority}));
    list(&mut file, &[wrong("one\ntwo"), policy("b", selects("b"))]);
    assert_eq!(item(&files, "a"), item_of(&wrong("one\ntwo")));
    assert_eq!(item(&files, "b"), item_of(&policy("b", selects("b"))));
    // Its readable parts are the current ones.
    apply(&mut file, &wrong("two"));
    assert_eq!(item(&files, "a"), item_of(&wrong("two")));
    list(&mut file, &[wrong("three")]);
    assert_eq!(item(&files, "a"), item_of(&wrong("three")));
    apply(&mut file, &policy("a", selects("a")));
    apply(&mut file, &wrong("four"));
    list(&mut file, &[wrong("five")]);
    assert_eq!(item(&files, "a"), item_of(&policy("a", selects("a"))));
    file.deleted(&(Some("shop".into()), "a".into()));
    assert!(loaded(&files, Kind::EgressPolicy).unwrap().is_empty());
    // An object without a name makes the file invalid.
    let path = fixture.path(Kind::EgressPolicy);
    fs::write(&path, fs::read_to_string(&path).unwrap() + "shop/x\t{}\n").unwrap();
    assert!(loaded(&files, Kind::EgressPolicy).is_none());
}

#[test]
fn a_file_does_not_grow_with_the_number_of_changes() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut file = files.kind_file(Kind::EgressPolicy);
    list(&mut file, &[policy("a", selects("a")), policy("b", selects("b"))]);
    let long: Vec<String> = (0..20).map(|n| format!("{n:x>50}")).collect();
    for n in 0..3000 {
        let expression = json!({"key": "long", "operator": "In", "values": long});
        let selector = json!({"matchLabels": {"n": n.to_string()}, "matchExpressions": [expression]});
        apply(&mut file, &policy("c", json!({ "podSelector": selector })));
    }
    assert!(fs::metadata(fixture.path(Kind::EgressPolicy)).unwrap().len() < 2 * MAX_CHANGES);
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["a", "b", "c"]);
    file.deleted(&(Some("shop".into()), "a".into()));
    assert_eq!(loaded(&files, Kind::EgressPolicy).unwrap(), ["b", "c"]);
}

#[test]
fn a_pruned_object_is_decoded_to_the_same() {
    let metadata = json!({"name": "a", "namespace": "shop", "uid": "7", "generation": 3,
        "creationTimestamp": "2026-01-31T12:00:00Z", "labels": {"app": "a"}, 
        "annotations": {"x": "y", "egret.dev/egress-gateway": "g", "egret.dev/weight": "3", "egret.dev/max-egress-ips": "7"},
        "managedFields": [{"manager": "m"}], "resourceVersion": "7"});
    let objects = [
        (Kind::Namespace, json!({}), json!({"phase": "Active"})),
        (
            Kind::Node,
            json!({"podCIDRs": ["10.0.0.0/24", "fd00::/64"], "podCIDR": "10.0.0.0/24", "taints": []}),
            json!({"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}], "images": [{"names": ["n"]}]}),
        ),
        (
            Kind::Pod,
            json!({"nodeName": "n1", "hostNetwork": true, "containers": []}),
            json!({"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}),
        ),
        (
            Kind::Service,
            json!({"selector": {"app": "a"}, "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "type": "ClusterIP"}),
            json!({"loadBalancer": {}}),
        ),
        (
            Kind::EgressGateway,
            json!({"nodeSelector": {}, "addresses": ["192.0.2.50"], "nextHop": {"ipv4": "192.0.2.1"}}),
            json!({"nodes": ["g1"], "allocations": [{"id": 1, "kind": "Dedicated", "ipv4": "192.0.2.50", "policies": ["shop/a"]}]}),
        ),
        (
            Kind::EgressPolicy,
            json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}], "priority": 7}),
            json!({"pods": 7}),
        ),
        (Kind::ClusterEgressPolicy, json!({"podSelector": {}, "namespaceSelector": {}}), json!({"pods": 7})),
        (
            Kind::EgressNode,
            json!({}),
            json!({"tunnelAddress": "192.0.2.1", "tunnelMac": "02:00:00:00:00:01", "answers": true, "allocations": [1],
                   "taken": [{"id": 1, "since": 7}], "direct": [{"network": "10.0.0.0/8", "from": "here"}]}),
        ),
        (Kind::ServiceCidr, json!({"cidrs": ["10.96.0.0/16"]}), json!({"conditions": []})),
        (Kind::IpPool, json!({"cidr": "10.0.0.0/8", "natOutgoing": true}), json!({})),
        (
            Kind::CiliumNode,
            json!({"ipam": {"podCIDRs": ["10.0.1.0/24"]}, "addresses": [{"ip": "192.0.2.11"}]}),
            json!({"ipam": {}}),
        ),
    ];
    for (kind, spec, status) in objects {
        let whole = json!({"metadata": metadata, "spec": spec, "status": status});
        let mut kept = Vec::new();
        prune(kind, whole.to_string().as_bytes(), &mut kept).unwrap();
        let (whole, kept) = (read(kind, &whole), read(kind, &serde_json::from_slice(&kept).unwrap()));
        assert!(matches!(whole.object, Ok(Some(_))), "{kind}: {:?}", whole.object);
        assert_eq!(format!("{:?}", kept.object), format!("{:?}", whole.object), "{kind}");
        assert_eq!(kept.key, whole.key, "{kind}");
    }
}

#[test]
fn the_nodes_own_status_and_the_networks_of_services_are_loaded() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    assert!(files.service_networks().is_none() && files.own(&reading(), &mut Names::default()).is_none());
    files.note_service_networks(&None);
    assert_eq!(files.service_networks(), Some(None));
    let from = Name::from("somebody");
    let services = [("10.96.0.0/16".parse().unwrap(), from)].into();
    let answer = Some(Inside { services, ..Inside::default() });
    files.note_service_networks(&answer);
    assert_eq!(files.service_networks(), Some(answer));
    files.note_own("n1", &EgressNodeStatus { allocations: vec![3], ..EgressNodeStatus::default() });
    let own = files.own(&reading(), &mut Names::default()).unwrap();
    assert!(
        matches!(own.object, Ok(Some(Object::EgressNode(name, status))) if &*name == "n1" && status.of_allocations().held == [3])
    );
}
