//! A daemon that starts and finds fewer policies than were in force.

use super::*;
use crate::api::{Allocation, AllocationKind, EgressGatewayStatus};
use crate::model::PolicyKey;

/// A gateway, its policies `x/p` of priority 7 and `x/q`, and a gateway's allocations with both.
async fn in_force(fixture: &Fixture) {
    fixture.put("gateway.yaml", &gateway("g", "192.0.2.1"));
    fixture.put("p.yaml", &policy("x", "p", 7));
    fixture.put("q/q.yaml", &policy("x", "q", 3));
    let path = |id, policy: &str| Allocation {
        id,
        kind: AllocationKind::Dedicated,
        ordinal: 0,
        address: crate::fixture::pair(&["192.0.2.1"]),
        node: None,
        since: 0,
        leaving: None,
        service: None,
        policies: [PolicyKey::from(policy)].into_iter().collect(),
    };
    let status = EgressGatewayStatus { allocations: vec![path(1, "x/p"), path(2, "x/q")], ..Default::default() };
    let source = fixture.open().await;
    source.0.statuses.gateway("g", &status, None, Vec::new()).await.unwrap();
}

#[tokio::test]
async fn an_empty_file_does_not_remove_its_policies() {
    let fixture = Fixture::new();
    in_force(&fixture).await;
    fixture.put("p.yaml", "");
    let mut source = fixture.open().await;
    let policies = source.now().policies.clone();
    let stands = &policies[&PolicyKey::from("x/p")];
    assert!(stands.guessed.rank && stands.guessed.egress && stands.gateway.as_deref() == Some("g"));
    assert!(!policies[&PolicyKey::from("x/q")].guessed.rank);
    let problems = source.problems();
    assert!(problems.len() == 1 && problems[0].starts_with("p.yaml: is empty"), "{problems:?}");
    // Statuses of objects that may exist are not removed either.
    source.0.statuses.forget(&source.now()).await.unwrap();
    assert!(fixture.path("status/egressgateways/g.yaml").exists());
    // The user did delete the policies.
    fixture.put("p.yaml", "# nothing\n");
    source.until("the policy go", |c| !c.policies.contains_key(&"x/p".into())).await;
    source.until_well().await;
}

#[tokio::test]
async fn an_empty_directory_does_not_remove_its_policies() {
    let fixture = Fixture::new();
    in_force(&fixture).await;
    fs::remove_file(fixture.path("q/q.yaml")).unwrap();
    let mut source = fixture.open().await;
    assert!(source.now().policies[&PolicyKey::from("x/q")].guessed.rank);
    assert!(source.problems()[0].starts_with("q: is empty"), "{:?}", source.problems());
    fixture.put("q/q.yaml", &policy("x", "q", 3));
    source.until("the policy", |c| priority(c, "x/q") == Some(3)).await;
    source.until_well().await;
    // Without the gateway's file the allocations still exist, and nothing of them is unreadable.
    for file in ["gateway.yaml", "p.yaml", "q/q.yaml"] {
        fs::remove_file(fixture.path(file)).unwrap();
    }
    fs::remove_dir(fixture.path("q")).unwrap();
    let source = fixture.open().await;
    assert_eq!(source.now().policies.len(), 2);
    source.0.statuses.forget(&source.now()).await.unwrap();
    assert!(fixture.path("status/egressgateways/g.yaml").exists());
}

#[tokio::test]
async fn readable_parts_of_a_broken_file_are_used() {
    let fixture = Fixture::new();
    in_force(&fixture).await;
    // A valid policy in an invalid file, one with an invalid part, and one of which nothing can be read.
    fixture.put("q/q.yaml", &[policy("x", "q", 3), "x: [\n".to_owned()].join("---\n"));
    fixture.put("p.yaml", &policy("x", "p", 7).replace("spec:", "spec:\n  gateway: [g]"));
    let source = fixture.open().await;
    let policies = source.now().policies.clone();
    let [p, q] = ["x/p", "x/q"].map(|key| policies[&PolicyKey::from(key)].clone());
    assert_eq!((q.priority, q.guessed), (3, Default::default()));
    assert_eq!((p.priority, p.guessed), (7, Default::default()));
    assert!(p.gateway.as_deref() == Some("g") && p.egress.is_none());
    fixture.put("p.yaml", "x: [\n");
    let source = fixture.open().await;
    assert!(source.now().policies[&PolicyKey::from("x/p")].guessed.rank);
}

/// The file that had the policy is valid without it, and the file that has it now is invalid.
#[tokio::test]
async fn a_policy_that_moves_into_a_broken_file_stays_in_force() {
    let fixture = Fixture::new();
    in_force(&fixture).await;
    let mut source = fixture.open().await;
    fixture.put("z.yaml", &[policy("x", "p", 8), policy("x", "new", 1), "x: [\n".to_owned()].join("---\n"));
    source.until_problem("z.yaml").await;
    fixture.put("p.yaml", "# moved\n");
    let reports = |c: &Cluster| c.unreadable.get(&"x/p".into()).is_some_and(|u| u.message.contains("z.yaml:"));
    let cluster = source.until("the report", reports).await;
    assert_eq!((priority(&cluster, "x/p"), priority(&cluster, "x/new")), (Some(7), None));
    // Its status stays as long.
    source.0.statuses.policy(&"x/p".into(), &Default::default(), Vec::new()).await.unwrap();
    source.0.statuses.forget(&source.now()).await.unwrap();
    assert!(fixture.path("status/egresspolicies/x/p.yaml").exists());
    fixture.put("z.yaml", &policy("x", "p", 8));
    source.until("the policy", |c| priority(c, "x/p") == Some(8) && c.unreadable.is_empty()).await;
    fs::remove_file(fixture.path("z.yaml")).unwrap();
    source.until("its end", |c| !c.policies.contains_key(&"x/p".into())).await;
}
