use super::*;
use crate::cluster::kube::decode::Item;
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

fn list(book: &mut Book, objects: &[Value]) {
    book.begin();
    for object in objects {
        book.item(&read(book.kind, object), object.to_string().as_bytes());
    }
    book.keep();
}

fn apply(book: &mut Book, object: &Value) {
    book.applied(&read(book.kind, object), object.to_string().as_bytes());
}

fn recalled(files: &Files, kind: Kind) -> Option<Vec<String>> {
    let listed = files.recall(kind, &reading(), &mut Names::default())?;
    Some(listed.into_keys().map(|(_, name)| name.to_string()).collect())
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "shop", "name": name, "resourceVersion": "7"}, "spec": spec})
}

fn selects(label: &str) -> Value {
    json!({"podSelector": {"matchLabels": {"app": label}}})
}

#[test]
fn what_was_listed_and_what_changed_since_is_known_again() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut book = files.book(Kind::EgressPolicy);
    assert!(recalled(&files, Kind::EgressPolicy).is_none());
    list(&mut book, &[policy("a", selects("a")), policy("b", selects("b"))]);
    apply(&mut book, &policy("c", selects("c")));
    apply(&mut book, &policy("a", selects("other")));
    book.deleted(&(Some("shop".into()), "b".into()));
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["a", "c"]);
    let listed = files.recall(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    let expected = read(Kind::EgressPolicy, &policy("a", selects("other")));
    let found = &listed[&(Some("shop".into()), "a".into())];
    assert_eq!(format!("{:?}", found.item), format!("{:?}", expected.item));
    // A list that does not come to its end changes nothing.
    book.begin();
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["a", "c"]);
    list(&mut book, &[]);
    assert!(recalled(&files, Kind::EgressPolicy).unwrap().is_empty());
}

#[test]
fn what_was_anothers_is_not_read() {
    let fixture = Fixture::new();
    list(&mut fixture.files("n1 before").book(Kind::Namespace), &[json!({"metadata": {"name": "shop"}})]);
    assert!(recalled(&fixture.files("n1 after"), Kind::Namespace).is_none());
    assert_eq!(recalled(&fixture.files("n1 before"), Kind::Namespace).unwrap(), ["shop"]);
}

#[test]
fn a_line_that_was_cut_off_was_never_told() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut book = files.book(Kind::EgressPolicy);
    list(&mut book, &[policy("a", selects("a"))]);
    let mut file = OpenOptions::new().append(true).open(fixture.path(Kind::EgressPolicy)).unwrap();
    file.write_all(b"shop/b\t{\"metadata\":{\"na").unwrap();
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["a"]);
}

#[test]
fn an_object_that_makes_no_sense_keeps_its_last_good_state() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut book = files.book(Kind::EgressPolicy);
    let wrong = policy("a", json!({"podSelector": 7}));
    list(&mut book, &[policy("a", selects("a"))]);
    apply(&mut book, &wrong);
    let listed = files.recall(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    assert!(matches!(listed.values().next().unwrap().item, Ok(Some(Item::Policy(..)))));
    // What it was is not in a list.
    list(&mut book, &[wrong, policy("b", selects("b"))]);
    apply(&mut book, &policy("c", selects("c")));
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["a", "b", "c"]);
    assert_eq!(item(&files, "a"), item_of(&policy("a", selects("a"))));
}

/// What is known of a policy, as text.
fn item(files: &Files, name: &str) -> String {
    let listed = files.recall(Kind::EgressPolicy, &reading(), &mut Names::default()).unwrap();
    let decoded = &listed[&(Some("shop".into()), name.into())];
    format!("{:?} {:?}", decoded.item, decoded.readable)
}

fn item_of(policy: &Value) -> String {
    let decoded = read(Kind::EgressPolicy, policy);
    format!("{:?} {:?}", decoded.item, decoded.readable)
}

#[test]
fn an_object_that_never_made_sense_costs_no_other_object_the_file() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    // Of a file that an earlier daemon wrote nobody can say whether it was still the last good state.
    list(&mut files.book(Kind::EgressPolicy), &[policy("a", selects("a"))]);
    let mut book = files.book(Kind::EgressPolicy);
    let wrong = |priority: &str| policy("a", json!({"podSelector": 7, "priority": priority}));
    list(&mut book, &[wrong("one\ntwo"), policy("b", selects("b"))]);
    assert_eq!(item(&files, "a"), item_of(&wrong("one\ntwo")));
    assert_eq!(item(&files, "b"), item_of(&policy("b", selects("b"))));
    // What can be read of it is what it says now.
    apply(&mut book, &wrong("two"));
    assert_eq!(item(&files, "a"), item_of(&wrong("two")));
    list(&mut book, &[wrong("three")]);
    assert_eq!(item(&files, "a"), item_of(&wrong("three")));
    apply(&mut book, &policy("a", selects("a")));
    apply(&mut book, &wrong("four"));
    list(&mut book, &[wrong("five")]);
    assert_eq!(item(&files, "a"), item_of(&policy("a", selects("a"))));
    book.deleted(&(Some("shop".into()), "a".into()));
    assert!(recalled(&files, Kind::EgressPolicy).unwrap().is_empty());
    // One without a name is nobody's.
    let path = fixture.path(Kind::EgressPolicy);
    fs::write(&path, fs::read_to_string(&path).unwrap() + "shop/x\t{}\n").unwrap();
    assert!(recalled(&files, Kind::EgressPolicy).is_none());
}

#[test]
fn a_file_does_not_grow_with_the_number_of_changes() {
    let fixture = Fixture::new();
    let files = fixture.files("n1");
    let mut book = files.book(Kind::EgressPolicy);
    list(&mut book, &[policy("a", selects("a")), policy("b", selects("b"))]);
    let long: Vec<String> = (0..20).map(|n| format!("{n:x>50}")).collect();
    for n in 0..3000 {
        let expression = json!({"key": "long", "operator": "In", "values": long});
        let selector = json!({"matchLabels": {"n": n.to_string()}, "matchExpressions": [expression]});
        apply(&mut book, &policy("c", json!({ "podSelector": selector })));
    }
    assert!(fs::metadata(fixture.path(Kind::EgressPolicy)).unwrap().len() < 2 * CHANGES);
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["a", "b", "c"]);
    book.deleted(&(Some("shop".into()), "a".into()));
    assert_eq!(recalled(&files, Kind::EgressPolicy).unwrap(), ["b", "c"]);
}

#[test]
fn everything_that_a_node_reads_of_an_object_is_kept() {
    let metadata = json!({"name": "a", "namespace": "shop", "uid": "7", "generation": 3,
        "creationTimestamp": "2026-01-31T12:00:00Z", "labels": {"app": "a"}, "annotations": {"x": "y"},
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
    ];
    for (kind, spec, status) in objects {
        let whole = json!({"metadata": metadata, "spec": spec, "status": status});
        let mut kept = Vec::new();
        prune(kind, whole.to_string().as_bytes(), &mut kept).unwrap();
        let (whole, kept) = (read(kind, &whole), read(kind, &serde_json::from_slice(&kept).unwrap()));
        assert!(matches!(whole.item, Ok(Some(_))), "{kind}: {:?}", whole.item);
        assert_eq!(format!("{:?}", kept.item), format!("{:?}", whole.item), "{kind}");
        assert_eq!((kept.key, kept.generation), (whole.key, whole.generation), "{kind}");
    }
}

#[test]
fn the_nodes_own_word_and_the_services_networks_are_known_again() {
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
        matches!(own.item, Ok(Some(Item::EgressNode(name, status))) if &*name == "n1" && status.of_allocations().held == [3])
    );
}
