//! The golden files: `EGRET_WRITE_SNAPSHOTS=1 cargo test --lib ruleset` writes them anew.

use super::*;
use crate::cluster::{self, Scope, SourceName};
use crate::node_plan::TunnelWay;
use std::path::{Path, PathBuf};

/// Name of the file, directory of the cluster, and node.
const RULESETS: &[(&str, &str, &str)] = include!("../../../../tests/rulesets/list.rs");

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rulesets")
}

/// What a node of the cluster in this directory loads, for the file `name`.
async fn ruleset(name: &str, of: &str, node: &str) -> String {
    let source = SourceName::Dir(directory().join(of));
    let source = cluster::open(&source, Scope::Node(node.to_owned())).await.unwrap();
    assert_eq!(**source.problems.borrow(), [""; 0], "{of}");
    let cluster = source.snapshots.borrow().clone();
    let of_node = include!("../../../../tests/rulesets/node.rs");
    let tell = |plan: &mut NodePlan| of_node(name, plan);
    ExpectedRuleset::with(&cluster, node, &[], Marks::default(), tell).unwrap().to_string()
}

#[tokio::test]
async fn each_ruleset_is_as_in_its_file() {
    for (name, of, node) in RULESETS {
        let text = ruleset(name, of, node).await;
        let file = directory().join(format!("{name}.nft"));
        if std::env::var_os("EGRET_WRITE_SNAPSHOTS").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        let golden = std::fs::read_to_string(&file).unwrap_or_default();
        let differs = text.lines().zip(golden.lines()).find(|(now, before)| now != before);
        assert!(
            text == golden,
            "{name}.nft is not what is loaded now; run `make snapshots` and read the difference.\nfirst line, now and in the file: {differs:#?}"
        );
    }
}

/// The kernel refuses a rule whose counter its table does not have.
#[tokio::test]
async fn every_counter_that_a_rule_names_is_in_its_table() {
    for (name, of, node) in RULESETS {
        let text = ruleset(name, of, node).await;
        for table in text.split("\ntable ") {
            for name in table.split("counter name \"").skip(1).filter_map(|rest| rest.split('"').next()) {
                let is_there = table.contains(&format!("\tcounter {name} {{"));
                assert!(
                    is_there,
                    "a rule names the counter {name}, which its table does not have; add it in `inet()` or `netdev()`"
                );
            }
        }
    }
}

/// A drop that nothing counts is one that nobody can explain.
#[tokio::test]
async fn every_rule_that_drops_has_a_counter() {
    for (name, of, node) in RULESETS {
        let text = ruleset(name, of, node).await;
        for rule in text.lines().filter(|line| line.trim_end().ends_with(" drop") && !line.contains("policy drop")) {
            assert!(rule.contains("counter name "), "{name}: {rule}");
        }
    }
}

/// What a node loads whose kernel refuses limits.
#[tokio::test]
async fn without_limits_the_other_rules_are_the_same() {
    let source = SourceName::Dir(directory().join("dual-stack"));
    let source = cluster::open(&source, Scope::Node("everything".to_owned())).await.unwrap();
    let cluster = source.snapshots.borrow().clone();
    let Expected { view, plan, .. } = Expected::new(&cluster, "everything", &[]).unwrap();
    let with = shared_sets(&view, &PeerIndexes::new(), Marks::default(), &SharedSets::default());
    let without = with.without_limits();
    assert!(with.has_limits() && !without.has_limits());
    let chains = |shared: &SharedSets| {
        let ruleset = Ruleset::new(plan.clone(), shared, Marks::default(), None);
        let (_, table) = &ruleset.tables()[0];
        assert!(shared.has_limits() || table.limits.is_empty());
        table.chains.keys().map(ToString::to_string).collect::<std::collections::BTreeSet<_>>()
    };
    let gone: Vec<String> = chains(&with).difference(&chains(&without)).cloned().collect();
    assert_eq!(gone, ["beyond-egress", "beyond-ingress", "limit-egress", "limit-ingress"]);
    assert!(chains(&without).is_subset(&chains(&with)));
    assert_eq!(without.beyond_bandwidth().count(), 0);
}

#[test]
fn a_node_that_the_cluster_lacks_is_named() {
    let error = ExpectedRuleset::expected(&Cluster::default(), "n9", &[], Marks::default()).err().unwrap();
    assert!(error.to_string().contains("no Node \"n9\""), "{error}");
}
