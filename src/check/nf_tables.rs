//! Trials of the parts of nf_tables that Egret's tables use. Each part is tried alone, so that the missing one can be
//! named.

use super::{Need, NeedState};
use crate::datapath::port_log;
use egret_nft::Family;
use egret_nft::Nftables;
use egret_nft::netlink::Error;
use egret_nft::rule::Rule;
use egret_nft::table::{Chain, DataType, Hook, Limit, Policy, Set, SetKind, Table, TableName, hook};
use egret_nft::uapi::*;
use nix::libc::{EAFNOSUPPORT, EINVAL, ENOENT, EOPNOTSUPP};
use std::net::Ipv4Addr;
use std::sync::Arc;

/// A part of nf_tables, and a table that needs it.
struct Trial {
    name: &'static str,
    /// Description if it works.
    there: &'static str,
    /// What to do if it does not.
    remedy: &'static str,
    family: u8,
    table: fn() -> Table,
}

/// Egret needs one of these two.
const HOOK: &str = "netdev egress chain";
const VETHS: &str = "forwarding of packets";
// Egret works without these.
const COPIES: &str = "copies of packets";
const LOG: &str = "log of packets";
const HASH: &str = "hashes";
const LIMITS: &str = "limits";
const BRIDGE: &str = "family bridge";
/// The parts that Egret works without.
const OPTIONAL: [&str; 5] = [COPIES, LOG, HASH, LIMITS, BRIDGE];
/// The set's name in the trials that have one.
const SET: &str = "set";

const TRIALS: [Trial; 14] = [
    Trial {
        name: "nf_tables",
        there: "family inet",
        remedy: "needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET (module nf_tables)",
        family: NFPROTO_INET,
        table: Table::default,
    },
    Trial {
        name: "inet ingress chain",
        there: "on a device",
        remedy: "needs CONFIG_NETFILTER_INGRESS, Linux 5.10",
        family: NFPROTO_INET,
        table: || table(on_device("filter", hook::INGRESS), Rule::new().drop()),
    },
    Trial {
        name: HOOK,
        there: "on a device",
        remedy: "needs CONFIG_NETFILTER_EGRESS and CONFIG_NF_TABLES_NETDEV, Linux 5.16: without it, packets enter the tunnel \
                 by a pair of veths, which costs more",
        family: NFPROTO_NETDEV,
        table: || to_tunnel(hook::NETDEV_EGRESS, Rule::accept),
    },
    Trial {
        name: VETHS,
        there: "to another device, in place of the egress hook",
        remedy: "needs CONFIG_NF_TABLES_NETDEV and CONFIG_NFT_FWD_NETDEV (module nft_fwd_netdev), or an egress hook",
        family: NFPROTO_NETDEV,
        table: || to_tunnel(hook::NETDEV_INGRESS, |rule| rule.forward(LOOPBACK, "lo")),
    },
    Trial {
        name: "maps",
        there: "marks, verdicts, intervals, ranges of ports, counters",
        remedy: "needs nf_tables' sets of Linux 5.13 or newer",
        family: NFPROTO_INET,
        table: || {
            let interval = SetKind::plain(DataType::Ipv4, None).of_ranges();
            let counter = map(DataType::Mark, DataType::Mark).counted();
            let verdicts = with(Table::default(), "verdicts", map(DataType::Mark, DataType::Verdict));
            let ports = SetKind::plain(DataType::Ipv4ProtocolPort, None).of_ranges();
            with(with(with(verdicts, "intervals", interval), "ports", ports), "counters", counter)
        },
    },
    Trial {
        name: "connection tracking",
        there: "with marks",
        remedy: "needs CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_MARK (module nf_conntrack)",
        family: NFPROTO_INET,
        table: || table(at("filter", hook::PREROUTING, -90), Rule::new().ct_mark(1, 0).set_ct_mark(1).notrack()),
    },
    Trial {
        name: "source NAT",
        there: "by a map",
        remedy: "needs CONFIG_NFT_NAT and CONFIG_NF_NAT (modules nft_nat and nft_chain_nat)",
        family: NFPROTO_INET,
        table: || {
            let rule = Rule::new().snat_by_mark(Family::V4, 1, SET);
            with(table(at("nat", hook::POSTROUTING, -190), rule), SET, map(DataType::Mark, DataType::Ipv4))
        },
    },
    Trial {
        name: "MSS clamping",
        there: "to the route's MTU",
        remedy: "needs nf_tables' expressions rt and exthdr, Linux 4.14",
        family: NFPROTO_INET,
        table: || table(at("filter", hook::POSTROUTING, 300), Rule::new().clamp_mss()),
    },
    Trial {
        name: "fib",
        there: "address types",
        remedy: "needs CONFIG_NFT_FIB_INET (module nft_fib_inet)",
        family: NFPROTO_INET,
        table: || table(at("filter", hook::PREROUTING, -90), Rule::new().daddr_type(RTN_LOCAL).accept()),
    },
    Trial {
        name: COPIES,
        there: "by nft's dup",
        remedy: "needs CONFIG_NFT_DUP_IPV4 (module nft_dup_ipv4): without it a planned move may lose packets",
        family: NFPROTO_IPV4,
        table: || {
            table(at("filter", hook::PREROUTING, -91), Rule::new().dup(Ipv4Addr::LOCALHOST.into(), LOOPBACK, "lo"))
        },
    },
    Trial {
        name: LOG,
        there: "to a group",
        remedy: "needs CONFIG_NFT_LOG and CONFIG_NETFILTER_NETLINK_LOG (modules nft_log and nfnetlink_log): without \
                 it, connections whose source port was changed end when their egress IP moves",
        family: NFPROTO_INET,
        table: || table(at("filter", hook::POSTROUTING, 300), Rule::new().log(port_log::GROUP)),
    },
    Trial {
        name: HASH,
        there: "of connections",
        remedy: "needs CONFIG_NFT_HASH (module nft_hash): without it, policies with spread: Connection use one of their \
                 egress IPs",
        family: NFPROTO_INET,
        table: || {
            let rule = Rule::new().set_ct_mark_by_hash(Family::V4, 2, SET);
            with(table(at("filter", hook::PREROUTING, -90), rule), SET, map(DataType::Mark, DataType::Mark))
        },
    },
    Trial {
        name: LIMITS,
        there: "by name, in a map",
        remedy: "needs CONFIG_NFT_LIMIT (module nft_limit, and nft_objref where that is a module): without it, the \
                 bandwidth of policies is not limited",
        family: NFPROTO_INET,
        table: || {
            let rule = Rule::new().beyond_limit_of_mark(u32::MAX, SET).drop();
            let limits = [("limit".into(), Limit { rate: 1_000_000, burst: 0 })].into();
            let table = Table { limits, ..table(at("filter", hook::POSTROUTING, 300), rule) };
            with(table, SET, map(DataType::Mark, DataType::Limit))
        },
    },
    Trial {
        name: BRIDGE,
        there: "with chains by ports",
        remedy: "needs CONFIG_NF_TABLES_BRIDGE: without it, bridged pods that the CNI plugin bandwidth limits \
                 (kubernetes.io/egress-bandwidth) are blocked",
        family: NFPROTO_BRIDGE,
        table: || {
            let rule = Rule::new().vmap_by_iif(SET);
            with(table(at("filter", hook::PREROUTING, -300), rule), SET, map(DataType::Interface, DataType::Verdict))
        },
    },
];

/// The index of a namespace's loopback device, `LOOPBACK_IFINDEX`, include/net/flow.h.
const LOOPBACK: u32 = 1;

/// Tries all parts. If nf_tables itself is missing, the others are not tried.
pub fn run() -> Vec<Need> {
    let mut all = Vec::new();
    let ownership = || Nftables::open()?.own_tables();
    for trial in TRIALS {
        let mut need = Need::tried(trial.name, attempt(trial.family, &(trial.table)()), trial.there, trial.remedy);
        if OPTIONAL.contains(&trial.name) && need.state == NeedState::Missing {
            need.state = NeedState::Warn;
        }
        let stop = all.is_empty() && need.state == NeedState::Missing;
        all.push(need);
        if stop {
            return all;
        }
    }
    one_is_enough(&mut all);
    all.push(owned(ownership()));
    all
}

/// If one way into the tunnel works, the lack of the other one is no failure. If the egress hook works, the pair of
/// veths is not shown.
fn one_is_enough(all: &mut Vec<Need>) {
    let state = |all: &[Need], name| all.iter().find(|need| need.name == name).map(|need| need.state);
    if state(all, HOOK) == Some(NeedState::Ok) {
        all.retain(|need| need.name != VETHS);
    } else if state(all, VETHS) == Some(NeedState::Ok) {
        all.iter_mut().filter(|need| need.name == HOOK).for_each(|need| need.state = NeedState::Warn);
    }
}

/// Whether devices have an egress hook. It leaves nothing in the kernel.
pub(super) fn has_egress_hook(nft: &mut Nftables) -> Result<bool, Error> {
    for trial in TRIALS.iter().filter(|trial| trial.name == HOOK) {
        match nft.try_out(trial.family, &(trial.table)()) {
            Ok(()) => {}
            // No such hook (`nft_chain_parse_netdev`), no such family, an attribute of a hook that is not known.
            Err(e) if matches!(e.errno(), Some(EOPNOTSUPP | EAFNOSUPPORT | ENOENT | EINVAL)) => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// The parts that this kernel lacks and Egret cannot work without. It leaves nothing in the kernel.
pub(super) fn lacking() -> Vec<Need> {
    let mut lacking = Vec::new();
    let Ok(mut nft) = Nftables::open() else { return lacking };
    for trial in TRIALS.iter().filter(|trial| !OPTIONAL.contains(&trial.name)) {
        if let Err(e) = nft.try_out(trial.family, &(trial.table)()) {
            lacking.push(Need::tried(trial.name, Err(e), trial.there, trial.remedy));
        }
    }
    let lacks = |name| lacking.iter().any(|need| need.name == name);
    if !(lacks(HOOK) && lacks(VETHS)) {
        lacking.retain(|need| need.name != HOOK && need.name != VETHS);
    }
    lacking
}

/// Whether tables can have an owner. Egret works without it.
fn owned(result: Result<bool, Error>) -> Need {
    let name = "tables with an owner";
    let remedy = "needs Linux 6.9: without it `nft flush ruleset`, and so a restart of nftables.service, interrupts \
                  selected pods for some milliseconds, and lets their traffic pass while egretd is away; remove that \
                  line from /etc/nftables.conf";
    match result {
        Ok(true) => Need::ok(name, "other programs cannot flush Egret's tables"),
        Ok(false) => Need::warn(name, "the kernel does not keep them when the owner ends", remedy),
        Err(e) => Need::warn(name, format!("error: {e}"), remedy),
    }
}

/// Makes a table and removes it.
fn attempt(family: u8, table: &Table) -> Result<(), Error> {
    let name = TableName { family, name: "trial" };
    let mut nft = Nftables::open()?;
    nft.apply(&[(name, table.clone())])?;
    nft.remove(&[name]).map(drop)
}

/// A table with one chain of one rule.
fn table(hook: Hook, rule: Rule) -> Table {
    let chain = Chain::new(Some(hook), vec![rule]);
    Table { chains: [("chain".into(), Arc::new(chain))].into(), ..Table::default() }
}

fn at(kind: &str, number: u32, priority: i32) -> Hook {
    Hook { kind: kind.into(), number, priority, policy: Policy::Accept, device: None }
}

/// As the chain that sets the next hop's MAC address.
fn to_tunnel(number: u32, end: fn(Rule) -> Rule) -> Table {
    let rule = end(Rule::new().set_ether_daddr_by_mark(SET));
    with(table(on_device("filter", number), rule), SET, map(DataType::Mark, DataType::Ether))
}

/// A hook on the loopback device.
fn on_device(kind: &str, number: u32) -> Hook {
    Hook { device: Some("lo".into()), ..at(kind, number, 0) }
}

fn with(mut table: Table, set: &'static str, kind: SetKind) -> Table {
    table.sets.insert(set.into(), Set { kind, elements: Arc::default() });
    table
}

fn map(key: DataType, data: DataType) -> SetKind {
    SetKind::plain(key, Some(data))
}

#[cfg(test)]
mod tests {
    mod needs_root {
        use super::super::*;
        use nix::libc;
        use nix::sched::{CloneFlags, unshare};

        /// A trial that always succeeds would prove nothing.
        #[test]
        fn trials_of_missing_features_fail() {
            let errors = std::thread::spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                let chain_unknown = table(at("filter", hook::PREROUTING, 0), Rule::new().jump("none-such"));
                let kind_unknown = table(on_device("nat", hook::INGRESS), Rule::new().drop());
                [chain_unknown, kind_unknown].map(|table| attempt(NFPROTO_INET, &table).unwrap_err().errno().unwrap())
            });
            assert_eq!(errors.join().unwrap(), [libc::ENOENT, libc::EOPNOTSUPP]);
        }
    }
}
