//! What Egret holds in a node's kernel, as `nft` and `ip` tell it.

use super::topology::Node;
use serde_json::Value;
use std::fs;
use std::thread;
use std::time::Duration;

/// The tables that are Egret's, as `nft` names them.
pub const TABLES: [&str; 2] = ["inet egret", "netdev egret"];

/// One rule, by the words that delete it.
#[derive(Clone, Debug)]
pub struct RuleAt {
    /// `inet egret prerouting handle 12`.
    pub place: String,
    /// The rule itself, to name it in a failure.
    pub text: String,
}

/// `IFA_F_TENTATIVE`, include/uapi/linux/if_addr.h.
const TENTATIVE: u32 = 0x40;

impl Node {
    /// Waits until the kernel uses the IPv6 addresses that a CNI plugin has just put on the node. It takes an address
    /// into use in a worker, also without duplicate address detection (`addrconf_dad_start`, net/ipv6/addrconf.c), and
    /// answers no neighbour solicitation before (`ndisc_recv_ns`). `ptp` does not wait for its host veth's address: on a
    /// busy machine a pod's first IPv6 packet then takes a second, with Egret or without.
    pub fn wait_for_ipv6_addresses(&self) {
        let tentative = || {
            // The network of this thread, and not of the process: address, index, prefix, scope, flags, name.
            let text = fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap_or_default();
            text.lines().any(|line| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                let number = |i: usize| fields.get(i).and_then(|f| u32::from_str_radix(f, 16).ok()).unwrap_or_default();
                number(3) == 0 && number(4) & TENTATIVE != 0
            })
        };
        self.within(|| {
            for _ in 0..200 {
                if !tentative() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
        });
    }

    /// All that Egret holds in the kernel, a line each, sorted, without counters: equal before and after what should
    /// change nothing.
    pub fn egret_state(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for table in TABLES {
            let name: Vec<&str> = table.split(' ').collect();
            let out = self.try_run(["nft", "-s", "-n", "list", "table", name[0], name[1]]);
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            lines.extend(nft_lines(table, &text));
        }
        for family in ["-4", "-6"] {
            for table in [7871, 7872, 7873] {
                // A table that never had a route is an error to `ip -6`.
                let out = self.try_run(["ip", family, "route", "show", "table", &table.to_string()]);
                let text = String::from_utf8_lossy(&out.stdout).into_owned();
                lines.extend(text.lines().map(|l| format!("{family} table {table}: {}", l.trim())));
            }
            // Not there before the device.
            let out = self.try_run(["ip", family, "neighbour", "show", "dev", "egret", "nud", "permanent"]);
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            lines.extend(text.lines().map(|l| format!("neighbour {}", l.trim())));
            let rules = self.ip(&format!("{family} rule"));
            lines.extend(rules.lines().map(|l| format!("{family} rule: {l}")));
        }
        for device in ["egret", "eth0"] {
            let out = self.try_run(["ip", "-o", "addr", "show", "dev", device]);
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            // Without its index: a device that was removed comes back with another.
            lines.extend(text.lines().filter_map(|l| l.split_once(": ")).map(|(_, rest)| rest.to_owned()));
        }
        let link = self.try_run(["ip", "-o", "link", "show", "dev", "egret"]);
        let group = String::from_utf8_lossy(&link.stdout).split_once(" group ").map(|(_, rest)| rest.to_owned());
        lines.extend(group.iter().filter_map(|g| g.split_whitespace().next()).map(|g| format!("egret: group {g}")));
        let peers = self.try_run(["bridge", "fdb", "show", "dev", "egret"]);
        lines.extend(String::from_utf8_lossy(&peers.stdout).lines().map(|l| format!("fdb {l}")));
        lines.sort();
        lines
    }

    /// The MAC address of the node's tunnel device.
    pub fn tunnel_mac(&self) -> Vec<u8> {
        let mac = self.mac("egret");
        mac.split(':').map(|b| u8::from_str_radix(b, 16).expect("hexadecimal")).collect()
    }

    /// Egret's tables as text that `nft -f` reads. What nft lists of them is not: where a rule does not match the link's
    /// type first, it shows offsets; of two masked ports that are looked up together it cannot read what it shows, for
    /// which there are a few rules less; and for a table's owner it shows a flag without a name.
    pub fn egret_tables(&self) -> String {
        let list = |family: &str| self.run(["nft", "list", "table", family, "egret"]);
        let text = list("inet") + &list("netdev");
        let text = text.replace("@ll,48,48", "ether saddr").replace("@ll,0,48 set", "ether daddr set");
        let is_read = |line: &&str| !line.contains("!= @same_port") && !line.starts_with("\tflags");
        text.lines().filter(is_read).flat_map(|line| [line, "\n"]).collect()
    }

    /// What Egret's counters say has been dropped, those that are not zero.
    pub fn egret_drops(&self) -> String {
        let out = self.try_run(["nft", "-j", "list", "counters"]);
        let all: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        let counters = all["nftables"].as_array().into_iter().flatten().map(|o| &o["counter"]);
        let dropped = counters.filter(|c| c["table"] == "egret" && c["packets"] != 0);
        dropped.map(|c| format!("{} {} ", c["name"].as_str().unwrap_or_default(), c["packets"])).collect()
    }

    /// Every rule in Egret's tables.
    pub fn egret_rules(&self) -> Vec<RuleAt> {
        let mut rules = Vec::new();
        for table in TABLES {
            let name: Vec<&str> = table.split(' ').collect();
            let text = self.run(["nft", "-a", "list", "table", name[0], name[1]]);
            let mut chain = "";
            for line in text.lines().map(str::trim) {
                if let Some(rest) = line.strip_prefix("chain ") {
                    chain = rest.split(' ').next().unwrap_or_default();
                } else if let Some((rule, handle)) = line.rsplit_once(" # handle ")
                    && !line.ends_with('{')
                    && !rule.contains('{')
                {
                    let place = format!("{table} {chain} handle {handle}");
                    rules.push(RuleAt { place, text: rule.to_owned() });
                }
            }
        }
        rules
    }

    /// Names of the maps and sets in Egret's tables that hold something: `inet egret egress_id_out`, with `map` or `set`.
    pub fn egret_sets(&self) -> Vec<(String, String)> {
        let text = self.run(["nft", "-j", "list", "ruleset"]);
        let all: Value = serde_json::from_str(&text).expect("nft's JSON");
        let mut sets = Vec::new();
        for object in all["nftables"].as_array().into_iter().flatten() {
            for kind in ["map", "set"] {
                let set = &object[kind];
                if set["table"] == "egret" && set["elem"].as_array().is_some_and(|e| !e.is_empty()) {
                    let word = |key: &str| set[key].as_str().unwrap_or_default().to_owned();
                    sets.push((kind.to_owned(), format!("{} egret {}", word("family"), word("name"))));
                }
            }
        }
        sets
    }
}

/// One line for each rule and each element: their order in a set is the kernel's own.
fn nft_lines(table: &str, text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut block = String::new();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && *l != "}") {
        if line.ends_with('{') && !line.starts_with("elements") {
            block = line.trim_end_matches(" {").to_owned();
        }
        let line = line.trim_start_matches("elements = {").trim_end_matches('}');
        for part in line.split(", ").map(|p| p.trim().trim_end_matches(',')).filter(|p| !p.is_empty()) {
            // Which index a peer has is the node's own affair; it changes when the kernel has forgotten the old one.
            let part = match (block.as_str(), part.split_once(" : ")) {
                ("map peer", Some((mac, _))) | ("map back", Some((_, mac))) => mac,
                _ => part,
            };
            // The rule's hash is also of the index of the device, which is another one if the device was made anew.
            let part = match part.split_once(" comment ") {
                Some((rule, _)) if rule.contains(" fwd to ") => rule,
                _ => part,
            };
            lines.push(format!("{table} {block}: {part}"));
        }
    }
    lines
}

/// Lines that are gone and lines that are new, to be read; empty if there are none. A line that stands there twice is
/// not the same as one that stands there once.
pub fn difference(before: &[String], after: &[String]) -> String {
    let count = |lines: &[String], line: &String| lines.iter().filter(|l| *l == line).count();
    let gone = before.iter().filter(|l| count(after, l) < count(before, l)).map(|l| format!("- {l}\n"));
    let new = after.iter().filter(|l| count(before, l) < count(after, l)).map(|l| format!("+ {l}\n"));
    gone.chain(new).collect()
}

/// What Egret holds for pods of the node: its kernel state less what was there before them, and its records.
fn pods_traces(node: &Node, before: &[String]) -> Vec<String> {
    let mut traces: Vec<String> = node.egret_state().into_iter().filter(|l| !before.contains(l)).collect();
    for directory in ["attachments", "adopted"] {
        let records = fs::read_dir(node.run_dir().join(directory)).into_iter().flatten().flatten();
        traces.extend(records.map(|r| r.path().display().to_string()));
    }
    traces
}

/// Panics unless within 5 s nothing is left on the node of pods that came after `before` ([`Node::egret_state`]).
#[track_caller]
pub fn assert_no_traces(node: &Node, before: &[String]) {
    let mut found = Vec::new();
    for _ in 0..100 {
        found = pods_traces(node, before);
        if found.is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    panic!("left on {}: {found:#?}", node.name);
}
