//! The parts of nf_tables that Egret's tables are made of, each tried on its own, so that it can be said which one
//! is missing.

use super::Need;
use crate::kernel::netlink::{
    Attributes, Error, NETLINK_NETFILTER, NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, Socket, append_message,
};

// include/uapi/linux/netfilter/nfnetlink.h, include/uapi/linux/netfilter.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_NETDEV: u8 = 5;
const NF_INET_PRE_ROUTING: u32 = 0;
const NF_INET_POST_ROUTING: u32 = 4;
const NF_INET_INGRESS: u32 = 5;
const NF_NETDEV_EGRESS: u32 = 1;
// include/uapi/linux/netfilter/nf_tables.h
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_NEWSET: u16 = 9;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_HOOK_DEV: u16 = 3;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_EXPR: u16 = 17;
const NFT_SET_INTERVAL: u32 = 0x4;
const NFT_SET_MAP: u32 = 0x8;
const NFT_SET_EXPR: u32 = 0x100;
const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
const NFT_REG_1: u32 = 1;
const NFT_META_MARK: u32 = 3;
const NFT_CT_MARK: u32 = 3;
const NFT_RT_TCPMSS: u32 = 3;
const NFT_EXTHDR_OP_TCPOPT: u32 = 1;
const NFT_FIB_RESULT_ADDRTYPE: u32 = 3;
const NFTA_FIB_F_DADDR: u32 = 2;
const NFT_NAT_SNAT: u32 = 0;
/// `TCPOPT_MSS`, include/net/tcp.h.
const TCPOPT_MSS: u8 = 2;

/// nft's numbers for the types of keys and values; the kernel only keeps them.
const TYPE_IPV4: u32 = 7;
const TYPE_ETHER: u32 = 9;
const TYPE_MARK: u32 = 19;

/// The chain of each trial, and what the names of its sets start with.
const CHAIN: &str = "chain";
const SET: &str = "set";

/// A trial: what it is called, what is said if it works and if it does not, and the messages.
type Trial = (&'static str, &'static str, &'static str, fn(&mut Batch));

const TRIALS: &[Trial] = &[
    ("nf_tables", "family inet", "needs CONFIG_NF_TABLES and CONFIG_NF_TABLES_INET, the module nf_tables", |b| {
        b.table(NFPROTO_INET);
    }),
    ("inet ingress chain", "on a device", "needs CONFIG_NETFILTER_INGRESS, Linux 5.10", |b| {
        b.chain(NFPROTO_INET, "filter", NF_INET_INGRESS, 0, Some("lo"));
    }),
    (
        "netdev egress chain",
        "on a device",
        "needs CONFIG_NETFILTER_EGRESS and CONFIG_NF_TABLES_NETDEV, Linux 5.16",
        |b| {
            b.set(NFPROTO_NETDEV, TYPE_MARK, 4, Some((TYPE_ETHER, 6)), 0);
            b.chain(NFPROTO_NETDEV, "filter", NF_NETDEV_EGRESS, 0, Some("lo"));
            b.rule(NFPROTO_NETDEV, |r| {
                expression(r, "meta", &[(META_KEY, NFT_META_MARK), (META_DREG, NFT_REG_1)]);
                lookup(r);
                // payload: from register 1, link layer header, offset 0, six bytes, no checksum.
                expression(r, "payload", &[(5, NFT_REG_1), (2, 0), (3, 0), (4, 6), (6, 0)]);
            });
        },
    ),
    ("maps", "marks, verdicts, intervals, counters", "needs nf_tables' sets of Linux 5.13 or newer", |b| {
        b.set(NFPROTO_INET, TYPE_MARK, 4, Some((NFT_DATA_VERDICT, 0)), 0);
        b.set(NFPROTO_INET, TYPE_IPV4, 4, None, NFT_SET_INTERVAL);
        b.set(NFPROTO_INET, TYPE_MARK, 4, Some((TYPE_MARK, 4)), NFT_SET_EXPR);
    }),
    (
        "connection tracking",
        "with marks",
        "needs CONFIG_NFT_CT and CONFIG_NF_CONNTRACK_MARK, the module nf_conntrack",
        |b| {
            b.chain(NFPROTO_INET, "filter", NF_INET_PRE_ROUTING, -90, None);
            b.rule(NFPROTO_INET, |r| {
                expression(r, "ct", &[(CT_KEY, NFT_CT_MARK), (CT_DREG, NFT_REG_1)]);
                expression(r, "ct", &[(CT_KEY, NFT_CT_MARK), (CT_SREG, NFT_REG_1)]);
                expression(r, "notrack", &[]);
            });
        },
    ),
    ("source NAT", "by a map", "needs CONFIG_NFT_NAT and CONFIG_NF_NAT, the modules nft_nat and nft_chain_nat", |b| {
        b.set(NFPROTO_INET, TYPE_MARK, 4, Some((TYPE_IPV4, 4)), 0);
        b.chain(NFPROTO_INET, "nat", NF_INET_POST_ROUTING, -190, None);
        b.rule(NFPROTO_INET, |r| {
            expression(r, "meta", &[(META_KEY, NFT_META_MARK), (META_DREG, NFT_REG_1)]);
            lookup(r);
            expression(r, "nat", &[(1, NFT_NAT_SNAT), (2, NFPROTO_IPV4.into()), (3, NFT_REG_1)]);
        });
    }),
    ("MSS clamping", "to the route's MTU", "needs nf_tables' expressions rt and exthdr, Linux 4.14", |b| {
        b.chain(NFPROTO_INET, "filter", NF_INET_POST_ROUTING, 300, None);
        b.rule(NFPROTO_INET, |r| {
            // rt: TCP MSS into register 1.
            expression(r, "rt", &[(1, NFT_REG_1), (2, NFT_RT_TCPMSS)]);
            r.nested(NFTA_LIST_ELEM, |e| {
                e.text(NFTA_EXPR_NAME, "exthdr");
                e.nested(NFTA_EXPR_DATA, |d| {
                    // type, offset, length, operation, source register
                    d.attribute(2, &[TCPOPT_MSS]);
                    d.be32(3, 2);
                    d.be32(4, 2);
                    d.be32(6, NFT_EXTHDR_OP_TCPOPT);
                    d.be32(7, NFT_REG_1);
                });
            });
        });
    }),
    ("fib", "types of addresses", "needs CONFIG_NFT_FIB_INET, the module nft_fib_inet", |b| {
        b.chain(NFPROTO_INET, "filter", NF_INET_PRE_ROUTING, -90, None);
        b.rule(NFPROTO_INET, |r| {
            // fib: the destination's type into register 1.
            expression(r, "fib", &[(1, NFT_REG_1), (2, NFT_FIB_RESULT_ADDRTYPE), (3, NFTA_FIB_F_DADDR)]);
        });
    }),
    (
        COPIES,
        "by nft's dup",
        "needs CONFIG_NFT_DUP_IPV4, the module nft_dup_ipv4: without it a path that is moved on purpose may lose packets",
        |b| {
            b.chain(NFPROTO_IPV4, "filter", NF_INET_PRE_ROUTING, -91, None);
            // dup: to the address in register 1.
            b.rule(NFPROTO_IPV4, |r| {
                expression(r, "meta", &[(META_KEY, NFT_META_MARK), (META_DREG, NFT_REG_1)]);
                expression(r, "dup", &[(1, NFT_REG_1)]);
            });
        },
    ),
];

/// Egret works without it.
const COPIES: &str = "copies of packets";

// Attributes of the expressions meta, ct and lookup.
const META_DREG: u16 = 1;
const META_KEY: u16 = 2;
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_SREG: u16 = 4;
const LOOKUP_SET: u16 = 1;
const LOOKUP_SREG: u16 = 2;
const LOOKUP_DREG: u16 = 3;

/// Tries all parts. Without the first there is no use in trying the others.
pub fn run() -> Vec<Need> {
    let mut all = Vec::new();
    for (i, (name, there, remedy, fill)) in TRIALS.iter().enumerate() {
        // Each has a table of its own, so that none stumbles over another's.
        let mut need = Need::tried(name, attempt(format!("trial{i}"), *fill), there, remedy);
        if *name == COPIES && need.state == super::State::Missing {
            need.state = super::State::Warn;
        }
        let stop = all.is_empty() && need.state == super::State::Missing;
        all.push(need);
        if stop {
            break;
        }
    }
    all
}

/// Commits one transaction. Nothing need be removed: the namespace goes, and its tables with it.
fn attempt(table: String, fill: fn(&mut Batch)) -> Result<(), Error> {
    let mut batch = Batch { table, bytes: Vec::new(), messages: 0, sets: 0 };
    batch.edge(NFNL_MSG_BATCH_BEGIN);
    fill(&mut batch);
    batch.edge(NFNL_MSG_BATCH_END);
    // A socket of its own: what the kernel still has to say of a refused transaction goes with it.
    let mut socket = Socket::open(NETLINK_NETFILTER)?;
    socket.send(&batch.bytes)?;
    let mut left = batch.messages;
    while left > 0 {
        let mut refusal = None;
        socket.receive(|m| match m.acknowledgement() {
            Ok(()) => left = left.saturating_sub(1),
            Err(e) => refusal = Some(e),
        })?;
        if let Some(e) = refusal {
            return Err(e);
        }
    }
    Ok(())
}

/// A transaction, being put together.
struct Batch {
    table: String,
    bytes: Vec<u8>,
    /// How many messages there are to be acknowledged.
    messages: u32,
    /// How many sets there are; the first is the one that [`lookup`] means.
    sets: u32,
}

impl Batch {
    fn edge(&mut self, kind: u16) {
        append_message(&mut self.bytes, kind, NLM_F_REQUEST, 0, |m| {
            // nfgenmsg: any family, version 0, whose transaction it is.
            m.extend_from_slice(&[0, 0]);
            m.extend_from_slice(&NFNL_SUBSYS_NFTABLES.to_be_bytes());
        });
    }

    fn push(&mut self, kind: u16, family: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        self.messages += 1;
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE;
        append_message(&mut self.bytes, NFNL_SUBSYS_NFTABLES << 8 | kind, flags, self.messages, |m| {
            m.extend_from_slice(&[family, 0, 0, 0]);
            fill(m);
        });
    }

    fn table(&mut self, family: u8) {
        let name = self.table.clone();
        self.push(NFT_MSG_NEWTABLE, family, |m| m.text(NFTA_TABLE_NAME, &name));
    }

    fn chain(&mut self, family: u8, kind: &str, hook: u32, priority: i32, device: Option<&str>) {
        self.table(family);
        let name = self.table.clone();
        self.push(NFT_MSG_NEWCHAIN, family, |m| {
            m.text(NFTA_CHAIN_TABLE, &name);
            m.text(NFTA_CHAIN_NAME, CHAIN);
            m.nested(NFTA_CHAIN_HOOK, |h| {
                h.be32(NFTA_HOOK_HOOKNUM, hook);
                h.attribute(NFTA_HOOK_PRIORITY, &priority.to_be_bytes());
                if let Some(device) = device {
                    h.text(NFTA_HOOK_DEV, device);
                }
            });
            m.text(NFTA_CHAIN_TYPE, kind);
        });
    }

    /// A set, or with the type and the length of values a map.
    fn set(&mut self, family: u8, key: u32, key_length: u32, value: Option<(u32, u32)>, flags: u32) {
        self.table(family);
        let (table, id) = (self.table.clone(), self.sets);
        self.sets += 1;
        self.push(NFT_MSG_NEWSET, family, |m| {
            m.text(NFTA_SET_TABLE, &table);
            m.text(NFTA_SET_NAME, &format!("{SET}{id}"));
            m.be32(NFTA_SET_FLAGS, if value.is_some() { flags | NFT_SET_MAP } else { flags });
            m.be32(NFTA_SET_KEY_TYPE, key);
            m.be32(NFTA_SET_KEY_LEN, key_length);
            m.be32(NFTA_SET_ID, id);
            if let Some((kind, length)) = value {
                m.be32(NFTA_SET_DATA_TYPE, kind);
                m.be32(NFTA_SET_DATA_LEN, length);
            }
            if flags & NFT_SET_EXPR != 0 {
                m.nested(NFTA_SET_EXPR, |e| {
                    e.text(NFTA_EXPR_NAME, "counter");
                    e.nested(NFTA_EXPR_DATA, |_| {});
                });
            }
        });
    }

    fn rule(&mut self, family: u8, expressions: impl FnOnce(&mut Vec<u8>)) {
        let table = self.table.clone();
        self.push(NFT_MSG_NEWRULE, family, |m| {
            m.text(NFTA_RULE_TABLE, &table);
            m.text(NFTA_RULE_CHAIN, CHAIN);
            m.nested(NFTA_RULE_EXPRESSIONS, expressions);
        });
    }
}

/// Appends an expression whose attributes are all 32 bits wide.
fn expression(rule: &mut Vec<u8>, name: &str, attributes: &[(u16, u32)]) {
    rule.nested(NFTA_LIST_ELEM, |e| {
        e.text(NFTA_EXPR_NAME, name);
        e.nested(NFTA_EXPR_DATA, |d| attributes.iter().for_each(|(kind, value)| d.be32(*kind, *value)));
    });
}

/// Register 1, looked up in the first map, becomes what it leads to.
fn lookup(rule: &mut Vec<u8>) {
    rule.nested(NFTA_LIST_ELEM, |e| {
        e.text(NFTA_EXPR_NAME, "lookup");
        e.nested(NFTA_EXPR_DATA, |d| {
            d.text(LOOKUP_SET, &format!("{SET}0"));
            d.be32(LOOKUP_SREG, NFT_REG_1);
            d.be32(LOOKUP_DREG, NFT_REG_1);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;
    use nix::sched::{CloneFlags, unshare};

    /// A trial that always succeeds would tell nothing.
    #[test]
    fn what_the_kernel_lacks_is_refused() {
        let refusals = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let expression_unknown: fn(&mut Batch) = |b| {
                b.chain(NFPROTO_INET, "filter", NF_INET_PRE_ROUTING, 0, None);
                b.rule(NFPROTO_INET, |r| expression(r, "egret-knows-none-such", &[]));
            };
            let hook_unknown: fn(&mut Batch) = |b| b.chain(NFPROTO_INET, "nat", NF_INET_INGRESS, 0, Some("lo"));
            let all = [expression_unknown, hook_unknown];
            all.map(|fill| attempt("refused".into(), fill).unwrap_err().errno().unwrap())
        });
        assert_eq!(refusals.join().unwrap(), [libc::ENOENT, libc::EOPNOTSUPP]);
    }
}
