//! Tables that one socket owns, in a real kernel of Linux 6.9 or newer: flushes by others skip them. Needs root.
//!
//! Each test runs alone. A program that another test starts has all sockets of this process open for a moment, and a
//! table has an owner as long as the owner's socket is open.

use crate::namespace::{in_namespace, run};
use egret_nft::Nftables;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, Hook, Lifetime, Policy, Table, TableName, hook};
use egret_nft::uapi::NFPROTO_INET;
use std::process::Command;
use std::sync::Arc;

const NAME: TableName = TableName { family: NFPROTO_INET, name: "egret" };

/// A chain of `rules` rules at a hook, and a counter.
fn tables(rules: usize) -> [(TableName, Table); 1] {
    let hook =
        Hook { kind: "filter".into(), number: hook::POSTROUTING, priority: 300, policy: Policy::Accept, device: None };
    let rules = (0..rules).map(|n| Rule::new().mark(u32::MAX, n as u32).counter("seen").drop()).collect();
    let chains = [("egress-guard".into(), Arc::new(Chain::new(Some(hook), rules)))].into();
    [(NAME, Table { chains, counters: ["seen"].into(), ..Table::default() })]
}

fn owning() -> Nftables {
    let mut nft = Nftables::open().unwrap();
    assert!(nft.own_tables().unwrap(), "tables with an owner that outlive its socket need Linux 6.9");
    nft
}

/// Applies the tables, and closes the socket. A program that another test starts may have the socket open until it
/// runs.
fn apply_and_end(tables: &[(TableName, Table)]) {
    owning().apply(tables).unwrap();
    while run("nft", "list table inet egret").contains("owner") {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// The text of `nft` when the kernel rejects its change.
fn refusal(arguments: &str) -> String {
    let out = Command::new("nft").args(arguments.split(' ')).output().unwrap();
    assert!(!out.status.success(), "{arguments} is not refused");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// The chain with its handles, which differ if the table was recreated.
fn listed() -> String {
    run("nft", "-a list chain inet egret egress-guard").lines().filter(|l| l.contains("handle")).collect()
}

#[test]
fn an_owned_table_can_be_read_by_all_and_changed_by_its_owner_only() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let mut nft = owning();
        assert_eq!(run("nft", "list ruleset"), "", "the trial leaves a table");
        nft.apply(&tables(2)).unwrap();
        let before = listed();
        run("nft", "add table inet somebody");
        run("nft", "flush ruleset");
        assert_eq!(run("nft", "list tables").trim(), "table inet egret");
        for command in [
            "delete table inet egret",
            "flush table inet egret",
            "flush chain inet egret egress-guard",
            "insert rule inet egret egress-guard accept",
            "add table inet egret { flags dormant; }",
        ] {
            let refusal = refusal(command);
            assert!(refusal.contains("not permitted"), "{command}: {refusal}");
        }
        assert_eq!(listed(), before);
        assert!(run("nft", "list ruleset").contains("chain egress-guard"));
        nft.invalidate();
        assert_eq!(nft.apply(&tables(2)).unwrap(), 0, "there is nothing to mend");
        assert!(nft.apply(&tables(3)).unwrap() > 0);
    });
}

#[test]
fn a_table_outlives_its_owner_and_the_next_one_adopts_it_as_it_is() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        apply_and_end(&tables(2));
        let before = listed();
        // It has no owner now.
        run("nft", "insert rule inet egret egress-guard accept");
        apply_and_end(&tables(2));
        assert!(!listed().contains("accept"));
        let mended = listed();
        assert_ne!(mended, before);
        let mut third = owning();
        assert_eq!(third.apply(&tables(2)).unwrap(), 1, "it is adopted, and nothing else is to be done");
        assert_eq!(listed(), mended, "it was made anew");
        run("nft", "flush ruleset");
        assert_eq!(listed(), mended);
    });
}

/// As after pods have started while no daemon ran: the kernel accepts no new chain at a hook together with new flags.
#[test]
fn a_table_is_adopted_that_lacks_a_chain_at_a_hook() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let more = || {
            let [(name, mut table)] = tables(2);
            let hook = Hook {
                kind: "filter".into(),
                number: hook::PREROUTING,
                priority: 0,
                policy: Policy::Accept,
                device: None,
            };
            table.chains.insert("more".into(), Arc::new(Chain::new(Some(hook), vec![Rule::new().accept()])));
            [(name, table)]
        };
        apply_and_end(&tables(2));
        apply_and_end(&more());
        assert!(run("nft", "list table inet egret").contains("chain more"));
        owning().apply(&tables(2)).unwrap();
        assert!(!run("nft", "list table inet egret").contains("chain more"));
    });
}

#[test]
fn an_earlier_table_is_recreated_with_an_owner_in_one_transaction() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        Nftables::open().unwrap().apply(&tables(2)).unwrap();
        let mut nft = owning();
        nft.apply(&tables(2)).unwrap();
        run("nft", "flush ruleset");
        assert!(listed().contains("drop"));
        nft.invalidate();
        assert_eq!(nft.apply(&tables(2)).unwrap(), 0);
    });
}

/// Chains of a dormant table see no packet.
#[test]
fn a_dormant_table_is_activated() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let mut nft = Nftables::open().unwrap();
        nft.apply(&tables(1)).unwrap();
        run("nft", "add table inet egret { flags dormant; }");
        assert!(run("nft", "list table inet egret").contains("dormant"));
        nft.invalidate();
        nft.apply(&tables(1)).unwrap();
        assert!(!run("nft", "list table inet egret").contains("dormant"));
    });
}

#[test]
fn the_error_about_another_sockets_table_names_the_owner() {
    let _machine = lab::turn::alone();
    in_namespace(|| async {
        let mut owner = owning();
        owner.apply(&tables(1)).unwrap();
        let mut other = owning();
        let port = format!("port {}", owner.port());
        for refused in [other.apply(&tables(2)).map(drop), other.remove(&[NAME]).map(drop)] {
            let text = refused.unwrap_err().to_string();
            assert!(text.contains(&port) && text.contains("egret"), "{text}");
        }
        drop(owner);
        assert_eq!(other.remove(&[NAME]).unwrap(), 1);
        assert_eq!(run("nft", "list ruleset"), "");
    });
}

/// As on kernels before Linux 6.9, where no owned table outlives its owner's socket.
#[test]
fn a_table_that_ends_with_its_socket_is_owned_beside_one_without_an_owner() {
    let _machine = lab::turn::alone();
    const FLUSH_GUARD: TableName = TableName { family: NFPROTO_INET, name: "egret-flush-guard" };
    in_namespace(|| async {
        let both = || {
            let [(name, table)] = tables(2);
            [(name, table.clone()), (FLUSH_GUARD, Table { lifetime: Lifetime::OfSocket, ..table })]
        };
        // Another program has created a table of that name.
        run("nft", "add table inet egret-flush-guard");
        let mut nft = Nftables::open().unwrap();
        nft.apply(&both()).unwrap();
        run("nft", "flush ruleset");
        assert_eq!(run("nft", "list tables").trim(), "table inet egret-flush-guard");
        assert!(refusal("flush table inet egret-flush-guard").contains("not permitted"));
        nft.invalidate();
        nft.apply(&both()).unwrap();
        nft.invalidate();
        assert_eq!(nft.apply(&both()).unwrap(), 0, "there is nothing to mend");
        drop(nft);
        while run("nft", "list tables").contains("egret-flush-guard") {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(run("nft", "list tables").trim(), "table inet egret");
    });
}
