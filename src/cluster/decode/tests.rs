use super::validate::NAMESPACE_NAME_LABEL;
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn read(kind: Kind, object: &Value, node: Option<&str>) -> Decoded {
    let reading = Reading { node: node.map(Name::from) };
    decode(kind, object.to_string().as_bytes(), &reading, &mut Names::default()).unwrap()
}

#[test]
fn an_invalid_object_is_refused_by_name() {
    let policy = json!({"metadata": {"namespace": "shop", "name": "p", "resourceVersion": "7"},
        "spec": {"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.1/24"}}]}]}});
    let decoded = read(Kind::EgressPolicy, &policy, None);
    assert_eq!((decoded.key.1.as_ref(), decoded.version.as_str()), ("p", "7"));
    let fault = decoded.object.unwrap_err().text;
    assert!(fault.contains("spec.egress[0]") && fault.contains("203.0.113.1/24"), "{fault}");
    for spec in [json!({"podSelector": {}, "gatway": "g"}), json!({"podSelector": 7}), Value::Null] {
        let policy = json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec});
        assert!(read(Kind::EgressPolicy, &policy, None).object.is_err());
    }
    assert!(decode(Kind::Pod, b"{}", &Reading { node: None }, &mut Names::default()).is_err());
}

#[test]
fn a_node_reads_its_own_pods_and_no_statuses_of_policies() {
    let pod = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": {"nodeName": "n1"}});
    assert!(matches!(read(Kind::Pod, &pod, Some("n1")).object, Ok(Some(Object::Pod(..)))));
    assert!(matches!(read(Kind::Pod, &pod, Some("n2")).object, Ok(None)));
    let policy = json!({"metadata": {"namespace": "a", "name": "p"}, "spec": {"podSelector": {}},
        "status": {"pods": 3}});
    for (node, has_status) in [(Some("n1"), false), (None, true)] {
        let decoded = read(Kind::EgressPolicy, &policy, node);
        assert!(matches!(decoded.object, Ok(Some(Object::Policy(..)))));
        assert_eq!(decoded.policy_status.is_some(), has_status);
    }
}

#[test]
fn a_namespace_has_its_name_as_label_in_kubernetes_1_20_too() {
    let namespace = json!({"metadata": {"name": "shop"}});
    let Ok(Some(Object::Namespace(_, labels))) = read(Kind::Namespace, &namespace, None).object else { panic!() };
    assert_eq!(labels.get(NAMESPACE_NAME_LABEL).map(|v| &**v), Some("shop"));
}

/// An object with something in most fields that are looked at, of any kind.
fn whole_object() -> Value {
    json!({
        "metadata": {"namespace": "a", "name": "b", "uid": "u", "resourceVersion": "7", "generation": 3,
            "labels": {"a": "b"}, "annotations": {"c": "d"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": "n1", "hostNetwork": false, "podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"],
            "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"a": "b"}, "cidr": "10.1.0.0/16",
            "cidrs": ["10.96.0.0/16"], "podSelector": {"matchLabels": {"a": "b"}}, "services": [], "priority": 5,
            "egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 80}]}],
            "nodeSelector": {}, "addresses": ["192.0.2.1"], "unschedulable": true},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}],
            "addresses": [{"type": "InternalIP", "address": "192.0.2.11"}], "allocations": [{"id": 1}], "nodes": ["n1"],
            "conditions": [{"type": "Ready", "status": "True"}], "pods": 3},
        "endpoints": [{"addresses": ["192.0.2.3"], "conditions": {"ready": true}}], "ports": [{"port": 80}],
        "addressType": "IPv4"
    })
}

/// The places of an object, each as a JSON pointer.
fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, v)| places(v, &format!("{at}/{key}"), found)),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), found)),
        _ => {}
    }
}

fn odd() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::sample::select(vec![
            Value::Null,
            json!({}),
            json!([]),
            json!([null]),
            json!(""),
            json!(-1),
            json!(1e300),
            json!(u64::MAX),
            json!(true),
            json!("::/0"),
            json!("0.0.0.0/33"),
            json!("999.1.1.1"),
            json!({"matchExpressions": [{"key": "a", "operator": "In"}]}),
        ]),
        ".{0,6}".prop_map(Value::from),
    ]
}

proptest! {
    /// An invalid object of a list costs no other object of the list: if it has a name, it is refused by name.
    #[test]
    fn any_object_is_valid_or_refused_by_name(
        changes in prop::collection::vec((any::<prop::sample::Index>(), odd()), 0..4), cut in any::<prop::sample::Index>(),
    ) {
        let mut object = whole_object();
        for (place, value) in changes {
            let mut all = Vec::new();
            places(&object, "", &mut all);
            if let Some(at) = object.pointer_mut(&all[place.index(all.len())]) {
                *at = value;
            }
        }
        let text = object.to_string();
        let reading = Reading { node: Some("n1".into()) };
        let mut names = Names::default();
        for kind in Kind::STORED {
            if let Ok(decoded) = decode(kind, text.as_bytes(), &reading, &mut names) {
                prop_assert_eq!(object.pointer("/metadata/name").and_then(Value::as_str), Some(&*decoded.key.1));
            }
            let part = &text.as_bytes()[..cut.index(text.len())];
            prop_assert!(decode(kind, part, &reading, &mut names).is_err(), "half an object is none");
        }
    }
}

#[test]
fn an_object_without_end_is_refused() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        let text = format!("{{\"metadata\": {{\"name\": \"b\"}}, \"spec\": {deep}}}");
        let read = decode(Kind::EgressPolicy, text.as_bytes(), &Reading { node: None }, &mut Names::default());
        assert!(read.is_err() || read.is_ok_and(|decoded| decoded.object.is_err()));
    }
}
