//! The golden files: `EGRET_WRITE_SNAPSHOTS=1 cargo test --lib ruleset` writes them anew.

use super::*;
use crate::cluster::{self, Scope, SourceName};
use std::path::Path;

/// Name of the file, directory of the cluster, and node.
const RULESETS: &[(&str, &str, &str)] = include!("../../../../tests/rulesets/list.rs");

#[tokio::test]
async fn each_ruleset_is_as_in_its_file() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rulesets");
    for (name, of, node) in RULESETS {
        let source = SourceName::Dir(directory.join(of));
        let source = cluster::open(&source, Scope::Node((*node).to_owned())).await.unwrap();
        assert_eq!(**source.problems.borrow(), [""; 0], "{of}");
        let cluster = source.snapshots.borrow().clone();
        let text = ExpectedRuleset::expected(&cluster, node, &[], Marks::default()).unwrap().to_string();
        let file = directory.join(format!("{name}.nft"));
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

#[test]
fn a_node_that_the_cluster_lacks_is_named() {
    let error = ExpectedRuleset::expected(&Cluster::default(), "n9", &[], Marks::default()).err().unwrap();
    assert!(error.to_string().contains("no Node \"n9\""), "{error}");
}
