use super::*;
use crate::api::{Action, ClusterEgressPolicySpec, EgressPolicySpec, Tier};
use crate::model::selector::Selector;
use crate::model::{Metadata, ObjectKey};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use proptest::prelude::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().copied().collect()
}

fn selector(pairs: &[(&str, &str)]) -> LabelSelector {
    let match_labels = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    LabelSelector { match_labels: Some(match_labels), match_expressions: None }
}

#[derive(Default)]
struct Builder(Cluster);

impl Builder {
    fn namespace(mut self, name: &str, pairs: &[(&str, &str)]) -> Self {
        self.0.namespaces.insert(name.into(), labels(pairs));
        self
    }

    fn service(mut self, namespace: &str, name: &str, pairs: &[(&str, &str)]) -> Self {
        let selector = Some(Selector::equals(pairs.iter().copied()));
        let service = Service { selector, ..Service::default() };
        self.0.services.insert(ObjectKey::new(namespace, name), Arc::new(service));
        self
    }

    fn policy(mut self, key: &str, spec: EgressPolicySpec, created: Option<i64>) -> Self {
        let key = PolicyKey::from(key);
        let meta = Metadata { created, ..Metadata::default() };
        let policy = Policy::namespaced(key.namespace.as_deref().unwrap(), &spec, meta).unwrap();
        self.0.policies.insert(key, Arc::new(policy));
        self
    }

    fn cluster_policy(mut self, key: &str, spec: ClusterEgressPolicySpec) -> Self {
        let policy = Policy::cluster(&spec, Metadata::default()).unwrap();
        self.0.policies.insert(key.into(), Arc::new(policy));
        self
    }

    fn index(&self) -> PolicyIndex {
        PolicyIndex::new(&self.0)
    }
}

fn by_labels(pairs: &[(&str, &str)], priority: i32) -> EgressPolicySpec {
    EgressPolicySpec { pod_selector: Some(selector(pairs)), priority, ..Default::default() }
}

fn keys(index: &PolicyIndex, namespace: &str, pairs: &[(&str, &str)]) -> Vec<String> {
    index.policies_for(namespace, &labels(pairs)).iter().map(|r| r.key.to_string()).collect()
}

#[test]
fn priority_then_namespaced_then_age_then_name() {
    let everyone = |priority| by_labels(&[], priority);
    let index = Builder::default()
        .cluster_policy(
            "first",
            ClusterEgressPolicySpec { pod_selector: Some(selector(&[])), priority: 1, ..Default::default() },
        )
        .cluster_policy("last", ClusterEgressPolicySpec { pod_selector: Some(selector(&[])), ..Default::default() })
        .policy("a/unknown-age-b", everyone(0), None)
        .policy("a/unknown-age-a", everyone(0), None)
        .policy("a/young", everyone(0), Some(20))
        .policy("a/old", everyone(0), Some(10))
        .policy("a/below", everyone(-1), Some(1))
        .policy("b/elsewhere", everyone(9), Some(1))
        .index();
    let expected = ["first", "a/old", "a/young", "a/unknown-age-a", "a/unknown-age-b", "last", "a/below"];
    assert_eq!(keys(&index, "a", &[]), expected);
}

#[test]
fn a_tier_goes_before_every_priority() {
    let of_tier = |tier, priority| ClusterEgressPolicySpec {
        tier,
        pod_selector: Some(selector(&[])),
        priority,
        ..Default::default()
    };
    let index = Builder::default()
        .cluster_policy("admin", of_tier(Some(Tier::Admin), i32::MIN))
        .cluster_policy("admin-first", of_tier(Some(Tier::Admin), 0))
        .cluster_policy("between", of_tier(None, 5))
        .cluster_policy("baseline", of_tier(Some(Tier::Baseline), i32::MAX))
        .policy("a/high", by_labels(&[], i32::MAX), Some(1))
        .policy("a/low", by_labels(&[], i32::MIN), Some(1))
        .index();
    assert_eq!(keys(&index, "a", &[]), ["admin-first", "admin", "a/high", "between", "a/low", "baseline"]);
}

#[test]
fn services_resolve_in_the_pods_namespace() {
    let services = vec!["frontend".to_string(), "backend".to_string()];
    let index = Builder::default()
        .namespace("a", &[("team", "x")])
        .namespace("b", &[("team", "y")])
        .service("a", "frontend", &[("app", "front")])
        .service("a", "backend", &[("tier", "back")])
        .service("b", "frontend", &[("app", "other")])
        .policy("a/p", EgressPolicySpec { services: services.clone(), ..Default::default() }, None)
        .cluster_policy(
            "c",
            ClusterEgressPolicySpec {
                services,
                namespace_selector: Some(selector(&[("team", "y")])),
                ..Default::default()
            },
        )
        .index();
    assert_eq!(
        keys(&index, "a", &[("app", "front"), ("tier", "back")]),
        ["a/p"],
        "once, though two Services select it"
    );
    assert!(keys(&index, "a", &[("app", "other")]).is_empty());
    assert_eq!(keys(&index, "b", &[("app", "other")]), ["c"]);
    assert!(keys(&index, "b", &[("app", "front")]).is_empty());
}

#[test]
fn reach_distinguishes_known_from_unknown_namespaces() {
    let builder = Builder::default()
        .namespace("a", &[("kubernetes.io/metadata.name", "a")])
        .namespace("b", &[("kubernetes.io/metadata.name", "b")])
        .namespace("c", &[("kubernetes.io/metadata.name", "c")])
        .policy("a/p", by_labels(&[], 0), None)
        .policy("only-spoken-of/p", by_labels(&[], 0), None)
        .cluster_policy(
            "named",
            ClusterEgressPolicySpec {
                pod_selector: Some(selector(&[])),
                namespace_selector: Some(selector(&[("kubernetes.io/metadata.name", "b")])),
                ..Default::default()
            },
        );
    let reach = builder.index().reach();
    let policies = |names: &[&str]| names.iter().map(|name| PolicyKey::from(*name)).collect::<Vec<_>>();
    let selectable = [("a", ["a/p"]), ("b", ["named"]), ("only-spoken-of", ["only-spoken-of/p"])];
    assert_eq!(reach.selectable, selectable.map(|(ns, by)| (Name::from(ns), policies(&by))).into());
    assert_eq!(reach.in_unknown, [], "the only ClusterEgressPolicy names a known namespace");

    let builder = builder.cluster_policy(
        "by-label",
        ClusterEgressPolicySpec {
            pod_selector: Some(selector(&[])),
            namespace_selector: Some(selector(&[("egress", "yes")])),
            ..Default::default()
        },
    );
    let reach = builder.index().reach();
    assert_eq!((reach.in_unknown, reach.free), (policies(&["by-label"]), BTreeSet::from(["c".into()])));
}

#[test]
fn an_undeclared_namespace_has_its_name_as_label() {
    let index = Builder::default()
        .cluster_policy(
            "named",
            ClusterEgressPolicySpec {
                pod_selector: Some(selector(&[])),
                namespace_selector: Some(selector(&[("kubernetes.io/metadata.name", "x")])),
                ..Default::default()
            },
        )
        .index();
    assert_eq!(keys(&index, "x", &[]), ["named"]);
    assert!(keys(&index, "y", &[]).is_empty());
}

#[test]
fn a_label_of_pod_and_namespace_alike_gives_a_policy_once() {
    let mut builder = Builder::default().namespace("a", &[("app", "x0")]);
    for i in 0..20 {
        let app = format!("x{i}");
        builder = builder.cluster_policy(
            &app.clone(),
            ClusterEgressPolicySpec { pod_selector: Some(selector(&[("app", &app)])), ..Default::default() },
        );
    }
    assert_eq!(keys(&builder.index(), "a", &[("app", "x0")]), ["x0"]);
}

/// The expected result of [`PolicyIndex::policies_for`], found by exhaustive search.
fn by_exhaustion(cluster: &Cluster, namespace: &str, pod: &Labels) -> Vec<PolicyKey> {
    let mut found: Vec<Ranked> = Vec::new();
    for (key, policy) in &cluster.policies {
        let here = match &policy.namespaces {
            Namespaces::One(ns) => &**ns == namespace,
            Namespaces::Selected(s) => s.matches(&cluster.namespaces[namespace]),
        };
        let selected = match &policy.pods {
            PodMatch::Labels(s) => s.matches(pod),
            PodMatch::Services(names) => names.iter().any(|name| {
                let service = cluster.services.get(&ObjectKey::new(namespace, name));
                service.and_then(|s| s.selector.as_ref()).is_some_and(|s| s.matches(pod))
            }),
        };
        if here && selected {
            found.push(Ranked { key: key.clone(), policy: policy.clone(), over_quota: false });
        }
    }
    found.sort_by(|a, b| precedence(a).cmp(&precedence(b)));
    found.into_iter().map(|r| r.key).collect()
}

fn some_labels() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    proptest::collection::vec((prop::sample::select(vec!["k", "l"]), prop::sample::select(vec!["1", "2", "3"])), 0..3)
        .prop_map(|mut all| {
            all.sort();
            all.dedup_by_key(|(k, _)| *k);
            all
        })
}

proptest! {
    #[test]
    fn the_index_finds_the_same_as_an_exhaustive_search(
        policies in proptest::collection::vec(
            (any::<bool>(), 0..2usize, some_labels(), some_labels(), any::<bool>(), -1..2i32), 0..40),
        services in proptest::collection::vec((0..2usize, 0..2usize, some_labels()), 0..4),
        namespaces in [some_labels(), some_labels()],
        pod in some_labels(),
    ) {
        let names = ["a", "b"];
        let mut builder = Builder::default().namespace("a", &namespaces[0]).namespace("b", &namespaces[1]);
        for (ns, name, selector) in &services {
            builder = builder.service(names[*ns], ["s", "t"][*name], selector);
        }
        for (i, (cluster_wide, ns, pods, in_namespaces, by_service, priority)) in policies.iter().enumerate() {
            let services = if *by_service { vec!["s".to_string()] } else { vec![] };
            let pod_selector = (!by_service).then(|| selector(pods));
            builder = if *cluster_wide {
                let namespace_selector = Some(selector(in_namespaces));
                builder.cluster_policy(&format!("p{i}"), ClusterEgressPolicySpec {
                    namespace_selector, pod_selector, services, priority: *priority, ..Default::default()
                })
            } else {
                builder.policy(&format!("{}/p{i}", names[*ns]), EgressPolicySpec {
                    pod_selector, services, priority: *priority, ..Default::default()
                }, None)
            };
        }
        let index = builder.index();
        for ns in names {
            let found: Vec<PolicyKey> =
                index.policies_for(ns, &labels(&pod)).iter().map(|r| r.key.clone()).collect();
            prop_assert_eq!(&found, &by_exhaustion(&builder.0, ns, &labels(&pod)));
            if !found.is_empty() {
                prop_assert!(index.can_select_in(ns));
                prop_assert!(index.reach().selectable.contains_key(ns));
            }
        }
    }
}

/// A direct policy of pods with these labels.
fn direct(priority: i32) -> EgressPolicySpec {
    EgressPolicySpec { action: Action::Direct, ..by_labels(&[], priority) }
}

#[test]
fn an_egress_policy_exempts_no_pod_from_a_cluster_policy() {
    let cluster_wide = |tier, action| ClusterEgressPolicySpec {
        tier,
        action,
        pod_selector: Some(selector(&[])),
        ..Default::default()
    };
    for (tier, action, expected) in [
        (None, Action::EgressIp, Some(PassedOver::ClusterPolicy)),
        (Some(Tier::Baseline), Action::EgressIp, Some(PassedOver::ClusterPolicy)),
        (Some(Tier::Admin), Action::EgressIp, None),
        (None, Action::Direct, None),
    ] {
        let index = Builder::default()
            .policy("a/direct", direct(9), Some(1))
            .cluster_policy("everywhere", cluster_wide(tier, action))
            .index();
        let policies = index.policies_for("a", &Labels::default());
        let of = |name: &str| *policies.iter().find(|ranked| ranked.key == PolicyKey::from(name)).unwrap();
        assert_eq!(passed_over(of("a/direct"), &policies, false), expected, "{tier:?} {action:?}");
        assert_eq!(passed_over(of("everywhere"), &policies, true), None, "{tier:?} {action:?}");
    }
}

#[test]
fn where_only_direct_policies_are_no_pod_needs_egret() {
    let cluster_wide = |labels: &[(&str, &str)]| ClusterEgressPolicySpec {
        action: Action::Direct,
        namespace_selector: Some(selector(labels)),
        pod_selector: Some(selector(&[])),
        ..Default::default()
    };
    let builder = Builder::default()
        .policy("a/direct", direct(0), Some(1))
        .cluster_policy("everywhere", cluster_wide(&[]))
        .cluster_policy("labelled", cluster_wide(&[("team", "x")]));
    let index = builder.index();
    assert!(!index.can_select_in("a") && !index.is_undecided_in("unknown"));
    let reach = index.reach();
    assert_eq!((reach.selectable, reach.in_unknown), Default::default());
    let index = builder.policy("b/p", by_labels(&[], 0), Some(1)).index();
    assert!(!index.can_select_in("a") && index.can_select_in("b"));
    // Whether a direct policy decides before another one depends on the namespace's labels.
    assert!(index.is_undecided_in("unknown"));
}
