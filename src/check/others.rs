//! Checks whether other programs' nf_tables rules disturb the packets that this node forwards. Only reads.

use super::Need;
use crate::datapath::foreign_programs;
use crate::datapath::names::{DEVICE, TABLE};
use egret_nft::netlink::{Attributes, Error, NETLINK_NETFILTER, Socket, attributes, string};
use egret_nft::uapi::*;

/// `NF_INET_FORWARD`, include/uapi/linux/netfilter.h.
const FORWARD: u32 = 2;
/// Stands for all families.
const NFPROTO_UNSPEC: u8 = 0;
/// Expressions that match nothing: a rule of these alone applies to every packet.
const UNCONDITIONAL: [&str; 4] = ["counter", "log", "immediate", "reject"];

/// A chain of another program's table.
struct Chain {
    family: u8,
    table: String,
    name: String,
    drops: bool,
}

/// Checks the firewalls at the hook `forward`, and the flow tables.
pub fn read() -> Vec<Need> {
    let mut all = Vec::new();
    let mut read = || {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        all.push(firewalls(&mut socket)?);
        all.push(flow_tables(&mut socket)?);
        all.extend(legacy_firewall());
        all.push(programs());
        Ok::<(), Error>(())
    };
    if let Err(e) = read() {
        all.push(Need::warn("other rules", format!("cannot be read: {e}"), "run as root"));
    }
    all
}

fn firewalls(socket: &mut Socket) -> Result<Need, Error> {
    let mut closed = Vec::new();
    for chain in forward_chains(socket)? {
        let rules = Rules::of(socket, &chain)?;
        if (chain.drops || rules.end_closed) && !rules.know_device {
            let family = match chain.family {
                NFPROTO_IPV4 => "ip",
                NFPROTO_IPV6 => "ip6",
                _ => "inet",
            };
            closed.push(format!("{family} {} {}", chain.table, chain.name));
        }
    }
    if closed.is_empty() {
        return Ok(Need::ok(
            "firewall, forwarding",
            "no chain drops forwarded packets by default (legacy iptables cannot be read)",
        ));
    }
    Ok(Need::warn(
        "firewall, forwarding",
        format!("packets are dropped unless a rule accepts them, by {}", closed.join(", ")),
        format!(
            "on a gateway, accept what is forwarded from and to {DEVICE}, for both families: iptables -I FORWARD \
             -i {DEVICE} -j ACCEPT, iptables -I FORWARD -o {DEVICE}+ -j ACCEPT"
        ),
    ))
}

/// Tables of iptables-legacy are not part of nf_tables, and only its own programs can read their rules.
fn legacy_firewall() -> Option<Need> {
    let in_use = |(file, program)| {
        let names = std::fs::read_to_string(format!("/proc/net/{file}")).unwrap_or_default();
        names.lines().any(|name| name == "filter").then_some(program)
    };
    let files = [("ip_tables_names", "iptables-legacy"), ("ip6_tables_names", "ip6tables-legacy")];
    let programs: Vec<&str> = files.into_iter().filter_map(in_use).collect();
    let first = programs.first()?;
    Some(Need::warn(
        "firewall, legacy",
        format!("the table filter of {} is in use, and its rules cannot be read", programs.join(" and ")),
        format!(
            "if `{first} -S FORWARD` drops packets by default, accept on a gateway what is forwarded from and to \
             {DEVICE}: {first} -I FORWARD -i {DEVICE} -j ACCEPT, {first} -I FORWARD -o {DEVICE}+ -j ACCEPT"
        ),
    ))
}

/// CNIs whose eBPF may take pods' packets past nf_tables. The daemon finds out whether it does, with selected pods.
fn programs() -> Need {
    let Some(device) = foreign_programs::device() else { return Need::ok("eBPF of CNIs", "none") };
    let (cni, remedy) = foreign_programs::remedy();
    Need::warn(
        "eBPF of CNIs",
        format!(
            "{cni}'s ({device}): where it takes a selected pod's packets past nf_tables, all that leaves the cluster is \
                 blocked for the pod, and the EgressNode's condition PodsArrive is False"
        ),
        format!("then {remedy}"),
    )
}

fn be32(value: &[u8]) -> u32 {
    value.try_into().map_or(0, u32::from_be_bytes)
}

fn kind(message: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | message
}

/// Reads the chains that filter IP packets at the hook `forward`, without Egret's own.
fn forward_chains(socket: &mut Socket) -> Result<Vec<Chain>, Error> {
    socket.dump(kind(NFT_MSG_GETCHAIN), &[NFPROTO_UNSPEC, 0, 0, 0], Vec::new, |all, message| {
        let family = message.first().copied().unwrap_or_default();
        let mut chain = Chain { family, table: String::new(), name: String::new(), drops: false };
        let (mut number, mut filter) = (None, false);
        for (attribute, value) in attributes(message.get(4..).unwrap_or_default()) {
            match attribute {
                NFTA_CHAIN_TABLE => chain.table = string(value),
                NFTA_CHAIN_NAME => chain.name = string(value),
                NFTA_CHAIN_POLICY => chain.drops = be32(value) as i32 == NF_DROP,
                NFTA_CHAIN_TYPE => filter = string(value) == "filter",
                NFTA_CHAIN_HOOK => {
                    number = attributes(value).find(|(a, _)| *a == NFTA_HOOK_HOOKNUM).map(|(_, value)| be32(value));
                }
                _ => {}
            }
        }
        let of_ip = matches!(family, NFPROTO_INET | NFPROTO_IPV4 | NFPROTO_IPV6);
        if of_ip && filter && number == Some(FORWARD) && chain.table != TABLE {
            all.push(chain);
        }
    })
}

/// The relevant facts about a chain's rules.
#[derive(Default)]
struct Rules {
    /// The last rule drops or rejects every packet.
    end_closed: bool,
    /// A rule names the tunnel device.
    know_device: bool,
}

impl Rules {
    fn of(socket: &mut Socket, chain: &Chain) -> Result<Rules, Error> {
        let mut request = vec![chain.family, 0, 0, 0];
        request.text(NFTA_RULE_TABLE, &chain.table);
        request.text(NFTA_RULE_CHAIN, &chain.name);
        socket.dump(kind(NFT_MSG_GETRULE), &request, Rules::default, |rules, message| {
            let of = |wanted| move |(attribute, _): &(u16, &[u8])| *attribute == wanted;
            let attributes = || attributes(message.get(4..).unwrap_or_default());
            let chain_of = attributes().find(of(NFTA_RULE_CHAIN)).map(|(_, value)| string(value));
            if chain_of.as_ref() != Some(&chain.name) {
                return;
            }
            let expressions = attributes().find(of(NFTA_RULE_EXPRESSIONS)).map_or(&[][..], |(_, value)| value);
            rules.end_closed = closes(expressions);
            rules.know_device |= expressions.windows(DEVICE.len()).any(|bytes| bytes == DEVICE.as_bytes());
        })
    }
}

/// Whether a rule drops or rejects every packet.
fn closes(expressions: &[u8]) -> bool {
    let (mut unconditional, mut closes) = (true, false);
    for (_, expression) in attributes(expressions) {
        let of = |wanted| attributes(expression).find(move |(attribute, _)| *attribute == wanted).map(|(_, v)| v);
        let name = of(NFTA_EXPR_NAME).map(string).unwrap_or_default();
        unconditional &= UNCONDITIONAL.contains(&&*name);
        closes |= name == "reject" || (name == "immediate" && of(NFTA_EXPR_DATA).is_some_and(drops));
    }
    unconditional && closes
}

/// Whether an `immediate` expression is the verdict `drop`.
fn drops(immediate: &[u8]) -> bool {
    let inside = |bytes, wanted| attributes(bytes).find(|(attribute, _)| *attribute == wanted).map(|(_, value)| value);
    let verdict = inside(immediate, NFTA_IMMEDIATE_DATA).and_then(|data| inside(data, NFTA_DATA_VERDICT));
    let code = verdict.and_then(|verdict| inside(verdict, NFTA_VERDICT_CODE));
    code.is_some_and(|code| be32(code) as i32 == NF_DROP)
}

/// The flow table's full name: its table's and its own.
fn flow_table(message: &[u8]) -> String {
    let of = |wanted| attributes(message.get(4..).unwrap_or_default()).find(|(attribute, _)| *attribute == wanted);
    let [table, name] = [NFTA_FLOWTABLE_TABLE, NFTA_FLOWTABLE_NAME].map(|wanted| of(wanted).map(|(_, v)| string(v)));
    format!("{} {}", table.unwrap_or_default(), name.unwrap_or_default())
}

fn flow_tables(socket: &mut Socket) -> Result<Need, Error> {
    let found = socket.dump(kind(NFT_MSG_GETFLOWTABLE), &[NFPROTO_UNSPEC, 0, 0, 0], Vec::new, |all, message| {
        all.push(flow_table(message));
    })?;
    if found.is_empty() {
        return Ok(Need::ok("flow tables", "none"));
    }
    Ok(Need::warn(
        "flow tables",
        found.join(", "),
        "a flow that is added there bypasses Egret's rules, and selected pods' connections stall: exclude connections \
         with Egret's marks from it, that is, add only those with ct mark and 0xffff0000 != 0x45470000",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use egret_nft::rule::{Rule, protocol};

    #[test]
    fn a_flow_table_is_named() {
        let mut message = vec![NFPROTO_INET, 0, 0, 0];
        message.text(NFTA_FLOWTABLE_TABLE, "fw");
        message.text(NFTA_FLOWTABLE_NAME, "fast");
        assert_eq!(flow_table(&message), "fw fast");
    }

    #[test]
    fn a_rule_that_drops_every_packet_closes_its_chain() {
        let closes = |rule: Rule| {
            let mut expressions = Vec::new();
            rule.encode(&mut expressions);
            closes(&expressions)
        };
        assert!(closes(Rule::new().drop()));
        assert!(!closes(Rule::new().l4(protocol::TCP).drop()));
        assert!(!closes(Rule::new().accept()));
        assert!(!closes(Rule::new().goto("elsewhere")));
    }
}
