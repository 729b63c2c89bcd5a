use super::*;
use std::io::Write;
use std::os::unix::fs::symlink;
use tokio::time::sleep;

/// Long enough for a change to be seen, if it has an effect.
const A_WHILE: Duration = Duration::from_millis(300);

#[tokio::test]
async fn changes_are_seen() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &(policy("x", "p", 1) + "---\n" + &policy("x", "same", 1)));
    let mut source = fixture.open().await;
    let before = source.now();

    fixture.put("a.yaml", &(policy("x", "p", 2) + "---\n" + &policy("x", "same", 1)));
    let after = source.until("the change", |c| priority(c, "x/p") == Some(2)).await;
    let same = |c: &Cluster| c.policies[&"x/same".into()].clone();
    assert!(Arc::ptr_eq(&same(&before), &same(&after)), "what did not change is shared");

    fixture.put_by_renaming("a.yaml", &policy("x", "p", 3));
    source.until("the rename", |c| priority(c, "x/p") == Some(3) && c.policies.len() == 1).await;

    fixture.put("new/deeper/b.yaml", &policy("x", "q", 4));
    source.until("the subdirectory", |c| priority(c, "x/q") == Some(4)).await;
    fixture.put("new/deeper/b.yaml", &policy("x", "q", 5));
    source.until("a change in it", |c| priority(c, "x/q") == Some(5)).await;
    fs::rename(fixture.path("new"), fixture.path("old")).unwrap();
    fixture.put("old/deeper/c.yaml", &policy("x", "r", 6));
    source.until("a change after its renaming", |c| priority(c, "x/r") == Some(6) && c.policies.len() == 3).await;
    fs::remove_dir_all(fixture.path("old")).unwrap();
    source.until("its end", |c| c.policies.len() == 1).await;

    fs::remove_file(fixture.path("a.yaml")).unwrap();
    source.until("the file's end", |c| c.policies.is_empty()).await;
    assert_eq!(source.problems(), [""; 0]);
}

#[tokio::test]
async fn unaffected_parts_of_a_snapshot_are_shared() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &policy("x", "p", 1));
    fixture.put("b.yaml", &gateway("g", "192.0.2.50"));
    let mut source = fixture.open().await;
    let before = source.now();
    fixture.put("a.yaml", &policy("x", "p", 2));
    let after = source.until("the change", |c| priority(c, "x/p") == Some(2)).await;
    // All fields, so that a new part of the cluster's state cannot be forgotten here.
    let Cluster {
        nodes,
        namespaces,
        pods,
        services,
        announcements,
        endpoints,
        gateways,
        policies,
        egress_nodes,
        policy_statuses,
        unreadable,
        inside,
    } = &*before;
    assert!(!policies.is(&after.policies));
    let same = [
        nodes.is(&after.nodes),
        namespaces.is(&after.namespaces),
        pods.is(&after.pods),
        services.is(&after.services),
        announcements.is(&after.announcements),
        endpoints.is(&after.endpoints),
        gateways.is(&after.gateways),
        egress_nodes.is(&after.egress_nodes),
        policy_statuses.is(&after.policy_statuses),
        unreadable.is(&after.unreadable),
        inside.is(&after.inside),
    ];
    assert_eq!(same, [true; 11]);
}

#[tokio::test]
async fn a_change_without_an_effect_makes_no_snapshot() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &policy("x", "p", 1));
    let mut source = fixture.open().await;
    source.0.snapshots.mark_unchanged();
    fixture.put("a.yaml", &format!("# the same\n{}", policy("x", "p", 1)));
    fixture.put("b.yaml", "# nothing\n");
    sleep(A_WHILE).await;
    assert!(!source.0.snapshots.has_changed().unwrap());
}

#[tokio::test]
async fn an_invalid_file_keeps_its_last_good_state_until_it_is_corrected() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &(policy("x", "p", 1) + "---\n" + &policy("x", "q", 1)));
    fixture.put("b.yaml", &policy("y", "r", 1));
    let mut source = fixture.open().await;

    // The file is truncated in the middle of the second document, and the first document is another one.
    let new = policy("x", "p", 2) + "---\n" + &policy("x", "q", 2);
    fixture.put("a.yaml", &new[..new.len() - 40]);
    let told = source.until_problem("a.yaml").await;
    assert!(
        told.starts_with("a.yaml:10: ")
            && told.ends_with("(Egret uses the file's last good state until that is corrected)"),
        "{told}"
    );
    fixture.put("b.yaml", &policy("y", "r", 2));
    let c = source.until("the other file's change", |c| priority(c, "y/r") == Some(2)).await;
    assert_eq!((priority(&c, "x/p"), priority(&c, "x/q")), (Some(1), Some(1)));

    fixture.put("a.yaml", &new);
    source.until("the file whole", |c| priority(c, "x/p") == Some(2) && priority(c, "x/q") == Some(2)).await;
    source.until_well().await;
}

#[tokio::test]
async fn a_fault_in_a_file_is_reported_by_the_object_that_has_it() {
    let fixture = Fixture::new();
    let invalid = |name: &str| policy("x", name, 2).replace("podSelector: {}", "podSelector: []");
    let list = |second: &str| {
        let indented = |text: &str| text.replace('\n', "\n  ");
        format!("kind: List\napiVersion: v1\nitems:\n- {}\n- {}\n", indented(&policy("x", "r", 1)), indented(second))
    };
    fixture.put("a.yaml", &(policy("x", "p", 1) + "---\n" + &policy("x", "q", 1)));
    fixture.put("b.yaml", &list(&policy("x", "s", 1)));
    let mut source = fixture.open().await;
    assert_eq!((source.now().policies.len(), source.problems()), (4, vec![]));
    fixture.put("a.yaml", &(policy("x", "p", 2) + "---\n" + &invalid("q")));
    fixture.put("b.yaml", &list(&invalid("s")));
    let c = source.until("both reports", |c| c.unreadable.len() == 2).await;
    assert_eq!(c.unreadable.keys().map(|key| &*key.name).collect::<Vec<_>>(), ["q", "s"]);
    assert_eq!(c.policies.values().map(|p| p.priority).collect::<Vec<_>>(), [1; 4]);
    assert!(c.unreadable.values().all(|u| u.message.contains("its last good state is used")), "{:?}", c.unreadable);
}

#[tokio::test]
async fn a_file_that_is_still_being_written_is_not_read() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &(policy("x", "p", 1) + "---\n" + &policy("x", "q", 1)));
    let mut source = fixture.open().await;
    let mut file = fs::File::create(fixture.path("a.yaml")).unwrap();
    file.write_all(policy("x", "p", 2).as_bytes()).unwrap();
    sleep(A_WHILE).await;
    assert_eq!((source.now().policies.len(), priority(&source.now(), "x/p")), (2, Some(1)));
    file.write_all(("---\n".to_owned() + &policy("x", "q", 2)).as_bytes()).unwrap();
    drop(file);
    let c = source.until("the file whole", |c| priority(c, "x/p") == Some(2)).await;
    assert_eq!(priority(&c, "x/q"), Some(2));
    assert_eq!(source.problems(), [""; 0]);
}

#[tokio::test]
async fn a_file_truncated_to_nothing_keeps_its_objects() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &policy("x", "p", 1));
    let mut source = fixture.open().await;
    fixture.put("a.yaml", "");
    assert!(source.until_problem("is empty").await.starts_with("a.yaml:1: "));
    assert_eq!(source.now().policies.len(), 1);
    fixture.put("a.yaml", "# nothing any more\n");
    source.until("the policy's end", |c| c.policies.is_empty()).await;
    source.until_well().await;
}

#[tokio::test]
async fn a_file_that_was_invalid_at_first_is_read_when_corrected() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", "x: [\n");
    let mut source = fixture.open().await;
    assert_eq!(source.problems().len(), 1);
    fixture.put("a.yaml", &policy("x", "p", 1));
    source.until("the policy", |c| c.policies.len() == 1).await;
    source.until_well().await;
}

#[tokio::test]
async fn the_second_definition_counts_when_the_first_is_removed() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &policy("x", "p", 1));
    fixture.put("b.yaml", &policy("x", "p", 2));
    let mut source = fixture.open().await;
    assert_eq!(priority(&source.now(), "x/p"), Some(1));
    fs::remove_file(fixture.path("a.yaml")).unwrap();
    source.until("the other", |c| priority(c, "x/p") == Some(2)).await;
    source.until_well().await;
}

#[tokio::test]
async fn a_config_map_is_followed() {
    let fixture = Fixture::new();
    let version = |name: &str, n: i32| {
        fs::create_dir(fixture.path(name)).unwrap();
        fixture.put(&format!("{name}/a.yaml"), &policy("x", "p", n));
    };
    version("..1", 1);
    symlink("..1", fixture.path("..data")).unwrap();
    symlink("..data/a.yaml", fixture.path("a.yaml")).unwrap();
    let mut source = fixture.open().await;
    assert_eq!((source.now().policies.len(), priority(&source.now(), "x/p")), (1, Some(1)));
    version("..2", 2);
    symlink("..2", fixture.path("..data_tmp")).unwrap();
    fs::rename(fixture.path("..data_tmp"), fixture.path("..data")).unwrap();
    fs::remove_dir_all(fixture.path("..1")).unwrap();
    source.until("the swap", |c| priority(c, "x/p") == Some(2)).await;
    assert_eq!(source.problems(), [""; 0]);
}

#[tokio::test]
async fn links_are_followed_and_a_link_to_nothing_keeps_the_state() {
    let fixture = Fixture::new();
    let elsewhere = fixture.directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("b.yaml"), policy("x", "q", 1)).unwrap();
    fs::write(fixture.directory.path().join("c.yaml"), policy("x", "r", 1)).unwrap();
    let mut source = fixture.open().await;
    symlink(&elsewhere, fixture.path("sub")).unwrap();
    symlink(".", fixture.path("circle")).unwrap();
    symlink(fixture.directory.path().join("c.yaml"), fixture.path("c.yaml")).unwrap();
    source.until("the links", |c| priority(c, "x/q") == Some(1) && priority(c, "x/r") == Some(1)).await;
    fs::write(elsewhere.join("b.yaml"), policy("x", "q", 2)).unwrap();
    source.until("a change behind the link", |c| priority(c, "x/q") == Some(2)).await;
    fs::remove_file(fixture.directory.path().join("c.yaml")).unwrap();
    fs::remove_file(fixture.path("c.yaml")).unwrap();
    symlink("nowhere", fixture.path("c.yaml")).unwrap();
    sleep(A_WHILE).await;
}

#[tokio::test]
async fn a_removed_directory_keeps_its_state_until_it_is_back() {
    let fixture = Fixture::new();
    fixture.put("a.yaml", &policy("x", "p", 1));
    fixture.put("sub/b.yaml", &policy("x", "q", 1));
    let mut source = fixture.open().await;

    fs::remove_dir_all(fixture.path("")).unwrap();
    source.until_problem("until it is back").await;
    assert_eq!(source.now().policies.len(), 2);
    fs::create_dir(fixture.path("")).unwrap();
    source.until_problem("was replaced by a directory without any manifest").await;
    assert_eq!(source.now().policies.len(), 2);
    fixture.put("a.yaml", &policy("x", "p", 2));
    source.until("the new one", |c| priority(c, "x/p") == Some(2) && c.policies.len() == 1).await;
    source.until_well().await;
    fixture.put("a.yaml", &policy("x", "p", 3));
    source.until("a change in it", |c| priority(c, "x/p") == Some(3)).await;

    let next = fixture.directory.path().join("next");
    fs::create_dir(&next).unwrap();
    fs::write(next.join("a.yaml"), policy("x", "p", 4)).unwrap();
    fs::rename(fixture.path(""), fixture.directory.path().join("old")).unwrap();
    fs::rename(next, fixture.path("")).unwrap();
    source.until("its replacement", |c| priority(c, "x/p") == Some(4)).await;
    source.until_well().await;
}

#[tokio::test]
async fn a_storm_of_changes_ends_in_the_right_state() {
    let fixture = Fixture::new();
    let mut source = fixture.open().await;
    for round in 0..10 {
        for i in 0..100 {
            fixture.put(&format!("d{}/f{i}.yaml", i % 7), &policy("x", &format!("p{i}"), round));
        }
        if round % 4 == 0 {
            fs::remove_dir_all(fixture.path("d3")).unwrap();
        }
        sleep(Duration::from_millis(7)).await;
    }
    fs::remove_dir_all(fixture.path("d3")).unwrap();
    source
        .until("the last round", |c| {
            c.policies.len() == (0..100).filter(|i| i % 7 != 3).count() && c.policies.values().all(|p| p.priority == 9)
        })
        .await;
    assert_eq!(source.problems(), [""; 0]);
}

#[tokio::test]
async fn the_watch_ends_without_receivers() {
    let fixture = Fixture::new();
    let source = fixture.open().await;
    let before = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    drop(source);
    for _ in 0..100 {
        if tokio::runtime::Handle::current().metrics().num_alive_tasks() < before {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the task lives on");
}
