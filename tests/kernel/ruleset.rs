//! The golden rulesets in a real kernel: `nft` lists them as their files have them, and the crate `nftables` reads
//! each object as expected. Needs root.

use crate::namespace::{in_namespace, ip, run};
use egret::cluster::{self, Scope, SourceName};
use egret::datapath::ruleset::ExpectedRuleset;
use egret::model::marks::Marks;
use egret::node_plan::{NodePlan, TunnelWay};
use egret_nft::Nftables;
use nftables::schema::{Chain, NfListObject};
use nftables::stmt::Statement;
use nftables::types::{NfChainPolicy, NfChainType, NfHook};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// File, cluster and node.
const RULESETS: &[(&str, &str, &str)] = include!("../rulesets/list.rs");

/// Texts that nft 1.0.6 lists differently: in the file, and in the listing. It assumes that there is no Ethernet
/// header unless a rule has compared the type of the link (`meta iiftype`), and prints a mark that is looked up as a
/// constant in network byte order.
const LISTED_OTHERWISE: [(&str, &str); 4] = [
    ("ether saddr map", "@ll,48,48 map"),
    ("ether daddr set", "@ll,0,48 set"),
    ("ether daddr != 02:65:67:ff:ff:ff", "@ll,0,48 != 0x26567ffffff"),
    ("meta mark set 0x45470003 map", "meta mark set 0x3004745 [invalid type] map"),
];

/// Texts that nft 1.0.6 lists and cannot read again: masks of ports in a concatenation, a constant that is looked up
/// in a map, a hash of a connection's ports.
const NOT_READ_AGAIN: [&str; 3] = [" proto-src & ", " meta mark set 0x45470003 map @", " jhash ct original "];

/// The base chains of all nodes: family, name, hook, type, priority, policy. Each pod has one more, at the hook
/// `ingress`.
const BASE_CHAINS: [(&str, &str, NfHook, NfChainType, i32, NfChainPolicy); 7] = [
    ("inet", "raw", NfHook::Prerouting, NfChainType::Filter, -300, NfChainPolicy::Accept),
    ("inet", "prerouting", NfHook::Prerouting, NfChainType::Filter, -90, NfChainPolicy::Accept),
    ("inet", "output", NfHook::Output, NfChainType::Filter, -310, NfChainPolicy::Accept),
    ("inet", "errors", NfHook::Output, NfChainType::Route, -299, NfChainPolicy::Accept),
    ("inet", "srcnat", NfHook::Postrouting, NfChainType::NAT, -190, NfChainPolicy::Accept),
    ("inet", "egress-guard", NfHook::Postrouting, NfChainType::Filter, 300, NfChainPolicy::Accept),
    ("netdev", "to-tunnel", NfHook::Egress, NfChainType::Filter, 0, NfChainPolicy::Accept),
];

/// The base chains of nodes on which an egress IP has a DSCP, a bandwidth, an uplink in a VRF.
const TREATMENT_CHAINS: [(&str, NfHook, i32); 4] = [
    ("write-dscp", NfHook::Postrouting, 301),
    ("limit-egress", NfHook::Postrouting, 302),
    ("limit-ingress", NfHook::Prerouting, -150),
    ("from-vrf", NfHook::Prerouting, -88),
];

/// The base chains of nodes with pods whose packets come by an ifb device.
const LIMITED_CHAINS: [(&str, &str, NfHook, i32, NfChainPolicy); 2] = [
    ("bridge", "prerouting", NfHook::Prerouting, -300, NfChainPolicy::Accept),
    ("netdev", "into-tunnel", NfHook::Ingress, 0, NfChainPolicy::Drop),
];

/// The base chains of nodes during a planned move.
const HANDOVER_CHAINS: [(&str, &str, NfHook, i32); 5] = [
    ("ip", "handover", NfHook::Prerouting, -91),
    ("ip6", "handover", NfHook::Prerouting, -91),
    ("ip", "handover-mark", NfHook::Postrouting, 301),
    ("ip6", "handover-mark", NfHook::Postrouting, 301),
    ("inet", "old-ways", NfHook::Prerouting, -89),
];

/// The maps to which these chains lead, with their chains.
const TREATMENT_MAPS: [(&str, (&str, &str, &str)); 4] = [
    ("write-dscp", ("dscp_values", "mark", "verdict")),
    ("limit-egress", ("limit_egress", "mark", "limit")),
    ("limit-ingress", ("limit_ingress4", "ipv4_addr", "limit")),
    ("limit-ingress", ("limit_ingress6", "ipv6_addr", "limit")),
];

/// Every map with the types of its keys and values, on all nodes, but those of policies with several egress IPs.
const MAPS: [(&str, &str, &str); 13] = [
    ("back", "mark", "ether_addr"),
    ("came", "mark", "mark"),
    ("egress_id_out", "mark", "mark"),
    ("handed", "ipv4_addr", "mark"),
    ("handed", "ipv6_addr", "mark"),
    ("hop", "mark", "ether_addr"),
    ("left", "mark", "mark"),
    ("peer", "ether_addr", "mark"),
    ("pods", "mark", "verdict"),
    ("rx", "mark", "mark"),
    ("snat4", "mark", "ipv4_addr"),
    ("snat6", "mark", "ipv6_addr"),
    ("veths", "iface_index", "mark"),
];

fn rulesets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rulesets")
}

/// Loads a golden file's ruleset into the namespace.
async fn load(name: &str, of: &str, node: &str) {
    let source = SourceName::Dir(rulesets().join(of));
    let source = cluster::open(&source, Scope::Node(node.to_owned())).await.expect("the cluster");
    let cluster = source.snapshots.borrow().clone();
    let of_node = include!("../rulesets/node.rs");
    let tell = |plan: &mut NodePlan| of_node(name, plan);
    let ruleset = ExpectedRuleset::with(&cluster, node, &[], Marks::default(), tell).expect("the node");
    ip("link add egret index 1000 type vxlan id 7871 dstport 7871 local 127.0.0.1 nolearning gbp");
    ip("link add egret-out type veth peer name egret-hop");
    for (index, name) in ruleset.ruleset().interfaces() {
        ip(&format!("link add {name} index {index} type veth peer name p{index}"));
    }
    let mut nft = Nftables::open().expect("nf_tables");
    nft.apply(ruleset.ruleset().tables()).unwrap_or_else(|e| panic!("{node}: {e}"));
}

/// Each object's lines, by table and header. The order of objects has no meaning. Elements are sorted.
fn objects(text: &str) -> BTreeMap<(String, String), Vec<String>> {
    let mut all: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    let (mut table, mut object, mut elements) = (String::new(), String::new(), None::<String>);
    for line in text.lines() {
        let line = line.split(" comment \"egret ").next().unwrap_or_default().trim();
        if let Some(list) = &mut elements {
            *list += &format!(" {line}");
        } else if line.is_empty() || line.starts_with('#') || line == "}" || line.starts_with("packets ") {
            continue;
        } else if let Some(name) = line.strip_prefix("table ") {
            table = name.to_owned();
        } else if line.ends_with('{') {
            object = line.to_owned();
            all.entry((table.clone(), object.clone())).or_default();
        } else if let Some(list) = line.strip_prefix("elements = {") {
            elements = Some(list.to_owned());
        } else {
            all.entry((table.clone(), object.clone())).or_default().push(line.to_owned());
        }
        if let Some(list) = elements.take_if(|list| list.ends_with('}')) {
            let mut list: Vec<String> = list.trim_end_matches('}').split(',').map(|e| e.trim().to_owned()).collect();
            list.sort();
            all.entry((table.clone(), object.clone())).or_default().extend(list);
        }
    }
    all
}

#[test]
fn nft_lists_the_loaded_files_unchanged() {
    for (name, of, node) in RULESETS {
        in_namespace(move || async move {
            load(name, of, node).await;
            let mut golden = std::fs::read_to_string(rulesets().join(format!("{name}.nft"))).expect("a golden file");
            for (written, listed) in LISTED_OTHERWISE {
                golden = golden.replace(written, listed);
            }
            let (written, listed) = (objects(&golden), objects(&run("nft", "-s list ruleset")));
            let names = |all: &BTreeMap<_, _>| all.keys().cloned().collect::<BTreeSet<_>>();
            assert_eq!(names(&written), names(&listed), "{name}: objects");
            let differing = written.iter().filter(|(head, lines)| listed[*head] != **lines);
            let differing: Vec<_> = differing.map(|(head, lines)| (head, lines, &listed[head])).collect();
            assert!(differing.is_empty(), "{name}: in the file and in the kernel: {differing:#?}");
        });
    }
}

#[test]
fn nft_itself_loads_the_files() {
    for (name, of, node) in RULESETS {
        in_namespace(move || async move {
            load(name, of, node).await;
            run("nft", "flush ruleset");
            let text = std::fs::read_to_string(rulesets().join(format!("{name}.nft"))).expect("a golden file");
            let readable = |line: &&str| !NOT_READ_AGAIN.iter().any(|part| line.contains(part));
            let file = tempfile::NamedTempFile::new().expect("a file");
            let text: Vec<&str> = text.lines().filter(readable).collect();
            std::fs::write(file.path(), text.join("\n") + "\n").expect("write");
            run("nft", &format!("-f {}", file.path().display()));
        });
    }
}

#[test]
fn an_independent_reader_finds_each_object() {
    for (name, of, node) in RULESETS {
        in_namespace(move || async move {
            load(name, of, node).await;
            let listed: Value = serde_json::from_str(&run("nft", "-j list ruleset")).expect("JSON");
            let objects = listed["nftables"].as_array().expect("objects");
            base_chains_are_where_they_should_be(name, objects);
            nothing_leads_nowhere(name, objects);
            maps_have_their_types(name, objects);
        });
    }
}

fn base_chains_are_where_they_should_be(name: &str, objects: &[Value]) {
    let chains = objects.iter().filter(|o| o.get("chain").is_some()).map(|o| match serde_json::from_value(o.clone()) {
        Ok(NfListObject::Chain(chain)) => chain,
        other => panic!("{name}: {o}: {other:?}"),
    });
    let (bases, others): (Vec<Chain>, Vec<Chain>) = chains.partition(|chain| chain.hook.is_some());
    assert!(others.iter().all(|chain| chain.prio.is_none() && chain.policy.is_none()), "{name}");
    let family =
        |chain: &Chain| serde_json::to_value(chain.family).expect("a family").as_str().unwrap_or_default().to_owned();
    let mut fixed = 0;
    for chain in &bases {
        let found = (chain.hook, chain._type, chain.prio, chain.policy);
        let (of, chain_name) = (family(chain), &*chain.name);
        if chain_name.starts_with("pod-") {
            let ingress = (Some(NfHook::Ingress), Some(NfChainType::Filter), Some(0), Some(NfChainPolicy::Drop));
            assert_eq!(found, ingress, "{name}: {chain_name}");
        } else if let Some((.., hook, priority)) = HANDOVER_CHAINS.iter().find(|c| (c.0, c.1) == (&*of, chain_name)) {
            let handover = (Some(*hook), Some(NfChainType::Filter), Some(*priority), Some(NfChainPolicy::Accept));
            assert_eq!(found, handover, "{name}: {of} {chain_name}");
        } else if let Some(limited) = LIMITED_CHAINS.iter().find(|c| (c.0, c.1) == (&*of, chain_name)) {
            let (_, _, hook, priority, policy) = *limited;
            let limited = (Some(hook), Some(NfChainType::Filter), Some(priority), Some(policy));
            assert_eq!(found, limited, "{name}: {of} {chain_name}");
        } else if let Some((_, hook, priority)) = TREATMENT_CHAINS.iter().find(|c| c.0 == chain_name) {
            let treatment = (Some(*hook), Some(NfChainType::Filter), Some(*priority), Some(NfChainPolicy::Accept));
            assert_eq!((&*of, found), ("inet", treatment), "{name}: {chain_name}");
        } else {
            let expected = BASE_CHAINS.iter().find(|c| (c.0, c.1) == (&*of, chain_name));
            let (_, _, hook, kind, priority, policy) =
                expected.unwrap_or_else(|| panic!("{name}: {of} {chain_name} is no base chain of Egret's"));
            assert_eq!(found, (Some(*hook), Some(*kind), Some(*priority), Some(*policy)), "{name}: {chain_name}");
            fixed += 1;
        }
    }
    assert_eq!(fixed, BASE_CHAINS.len(), "{name}");
}

/// Whether the target of each rule and verdict exists.
fn nothing_leads_nowhere(name: &str, objects: &[Value]) {
    let place = |object: &Value, of: &str| format!("{} {of}", object["family"]);
    let chains: BTreeSet<String> = objects
        .iter()
        .filter_map(|o| o.get("chain"))
        .map(|chain| place(chain, chain["name"].as_str().unwrap_or_default()))
        .collect();
    let (mut read, mut led) = (0, 0);
    for object in objects {
        // The crate's types lack some expressions and verdict maps. For these, the JSON is searched.
        let mut targets = Vec::new();
        if let (Some(rule), Ok(NfListObject::Rule(typed))) =
            (object.get("rule"), serde_json::from_value(object.clone()))
        {
            read += 1;
            for statement in typed.expr.iter() {
                if let Statement::Jump(to) | Statement::Goto(to) = statement {
                    targets.push(place(rule, &to.target));
                }
            }
        } else if let Some(other) = ["rule", "map"].iter().find_map(|kind| object.get(*kind)) {
            jumps(other, &mut |to| targets.push(place(other, to)));
        }
        led += targets.len();
        for target in targets {
            assert!(chains.contains(&target), "{name}: {object} leads to {target}, which is not there");
        }
    }
    println!("{name}: {read} rules read by their types, {led} ways on");
    assert!(read > 50 && led > 15, "{name}: {read} rules, {led} ways on");
}

fn jumps(json: &Value, found: &mut dyn FnMut(&str)) {
    match json {
        Value::Array(all) => all.iter().for_each(|item| jumps(item, found)),
        Value::Object(all) => {
            for (key, value) in all {
                match value["target"].as_str().filter(|_| key == "jump" || key == "goto") {
                    Some(target) => found(target),
                    None => jumps(value, found),
                }
            }
        }
        _ => {}
    }
}

fn maps_have_their_types(name: &str, objects: &[Value]) {
    let mut found: Vec<(String, String, String)> = Vec::new();
    for object in objects.iter().filter(|o| o.get("map").is_some()) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let json = &object["map"];
        let mut types = (text(&json["name"]), text(&json["type"]), text(&json["map"]));
        // By the crate's types, which lack `verdict` and `iface_index`.
        if let Ok(NfListObject::Map(map)) = serde_json::from_value(object.clone()) {
            let type_ = |value| text(&serde_json::to_value(value).expect("a type"));
            types = (map.name.to_string(), type_(&map.set_type), type_(&map.map));
        }
        if types.0.starts_with("choices-") {
            assert_eq!((&*types.1, &*types.2), ("mark", "mark"), "{name}: {}", types.0);
        } else {
            found.push(types);
        }
    }
    found.sort();
    if name == "limited-pods" {
        let limited = ("limited".to_owned(), "iface_index".to_owned(), "verdict".to_owned());
        assert!(found.iter().position(|map| *map == limited).map(|at| found.remove(at)).is_some(), "{name}: {found:?}");
    }
    let in_use = |chain: &str| objects.iter().any(|object| object["chain"]["name"] == chain);
    let treatments = TREATMENT_MAPS.into_iter().filter(|(chain, _)| in_use(chain)).map(|(_, map)| map);
    let expected = MAPS.into_iter().chain(treatments);
    let mut expected: Vec<_> = expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned())).collect();
    expected.sort();
    assert_eq!(found, expected, "{name}");
}
