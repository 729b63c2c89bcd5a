//! The kernel's messages about the way of a packet that `meta nftrace set 1` has marked: each chain that it passes, each
//! rule that matches it, and the verdict (`nft_trace_notify`, net/netfilter/nf_tables_trace.c).
//!
//! The kernel makes them only while a socket is in the group, and looks at the packet's bit only while a rule of some
//! table sets it.

use crate::netlink::{Message, Socket, attributes, string};
use crate::uapi::*;
use std::fmt;
use std::io;

/// Length of `struct nfgenmsg`.
const NFGENMSG: usize = 4;

/// Makes a socket receive the messages of its network namespace.
///
/// # Errors
/// The kernel has no such group.
pub fn subscribe(socket: &mut Socket) -> io::Result<()> {
    socket.join(NFNLGRP_NFTRACE)
}

/// One step of a packet's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The kernel's number of the packet. It stays the same while the packet does not change its interface or its
    /// buffer (`nft_trace_init`).
    pub id: u32,
    /// The family of the table, `NFPROTO_*`.
    pub family: u8,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// What the step is.
    pub kind: Kind,
    /// The packet's mark after the step.
    pub mark: u32,
    /// The packet as it came into the chain: of the first step in each base chain.
    pub packet: Option<Packet>,
}

/// What a step is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A rule matched.
    Rule {
        /// The kernel's handle of the rule.
        handle: u64,
        /// What follows.
        verdict: Verdict,
    },
    /// A chain ended, and its caller goes on.
    Return,
    /// A base chain ended, and its policy decided.
    Policy(Verdict),
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves the base chain for the next one.
    Accept,
    /// It ends here.
    Drop,
    /// The next rule looks at it.
    Continue,
    /// The caller of the chain goes on.
    Return,
    /// Another chain looks at it, and then this one goes on.
    Jump(String),
    /// Another chain looks at it, and this one does not go on.
    Goto(String),
    /// Another one, by its number: queued to a program, or stolen.
    Other(i32),
}

/// A packet as a chain saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// The index of the interface that it came in by, if the hook knows it.
    pub iif: Option<u32>,
    /// The index of the interface that it leaves by, if the hook knows it.
    pub oif: Option<u32>,
    /// The beginning of the IP header.
    pub network: Vec<u8>,
    /// The beginning of the transport header.
    pub transport: Vec<u8>,
}

impl Verdict {
    /// Whether the packet ends here.
    pub fn is_drop(&self) -> bool {
        *self == Verdict::Drop
    }

    fn parse(nest: &[u8]) -> Self {
        let (mut code, mut chain) = (NF_DROP, String::new());
        for (kind, value) in attributes(nest) {
            match kind {
                NFTA_VERDICT_CODE => code = be32(value) as i32,
                NFTA_VERDICT_CHAIN => chain = string(value),
                _ => {}
            }
        }
        match code {
            NFT_JUMP => Verdict::Jump(chain),
            NFT_GOTO => Verdict::Goto(chain),
            other => Verdict::of(other),
        }
    }

    fn of(code: i32) -> Self {
        match code {
            NF_ACCEPT => Verdict::Accept,
            NF_DROP => Verdict::Drop,
            NFT_CONTINUE => Verdict::Continue,
            NFT_RETURN => Verdict::Return,
            other => Verdict::Other(other),
        }
    }
}

impl fmt::Display for Verdict {
    /// In nft's words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Continue => f.write_str("continue"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
            Verdict::Other(code) => write!(f, "verdict {code}"),
        }
    }
}

/// Parses a message. `None` if it is none about a packet's way.
pub fn parse(message: &Message) -> Option<Step> {
    if message.kind != NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_TRACE {
        return None;
    }
    let (family, body) = (*message.payload.first()?, message.payload.get(NFGENMSG..)?);
    let (mut kind, mut id, mut handle, mut mark, mut policy) = (0, None, None, 0, NF_ACCEPT);
    let (mut table, mut chain) = (String::new(), String::new());
    let (mut verdict, mut packet) = (Verdict::Continue, Packet::default());
    for (attribute, value) in attributes(body) {
        match attribute {
            NFTA_TRACE_TABLE => table = string(value),
            NFTA_TRACE_CHAIN => chain = string(value),
            NFTA_TRACE_RULE_HANDLE => handle = Some(u64::from_be_bytes(value.try_into().ok()?)),
            NFTA_TRACE_TYPE => kind = be32(value),
            NFTA_TRACE_VERDICT => verdict = Verdict::parse(value),
            NFTA_TRACE_ID => id = Some(be32(value)),
            NFTA_TRACE_NETWORK_HEADER => packet.network = value.to_vec(),
            NFTA_TRACE_TRANSPORT_HEADER => packet.transport = value.to_vec(),
            NFTA_TRACE_IIF => packet.iif = Some(be32(value)),
            NFTA_TRACE_OIF => packet.oif = Some(be32(value)),
            NFTA_TRACE_MARK => mark = be32(value),
            NFTA_TRACE_POLICY => policy = be32(value) as i32,
            _ => {}
        }
    }
    let kind = match (kind, handle) {
        (NFT_TRACETYPE_RULE | NFT_TRACETYPE_RETURN, Some(handle)) => Kind::Rule { handle, verdict },
        // At the end of a chain there is no rule, and newer kernels say `NFT_TRACETYPE_RULE` (`nft_trace_verdict`).
        (NFT_TRACETYPE_RULE | NFT_TRACETYPE_RETURN, None) => Kind::Return,
        (NFT_TRACETYPE_POLICY, _) => Kind::Policy(Verdict::of(policy)),
        _ => return None,
    };
    let packet = (!packet.network.is_empty()).then_some(packet);
    Some(Step { id: id?, family, table, chain, kind, mark, packet })
}

fn be32(value: &[u8]) -> u32 {
    value.try_into().map(u32::from_be_bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::Attributes;

    #[test]
    fn a_step_is_parsed_and_a_truncated_message_is_not_misread() {
        let mut payload = vec![NFPROTO_INET, 0, 0, 0];
        payload.be32(NFTA_TRACE_ID, 7);
        payload.be32(NFTA_TRACE_TYPE, NFT_TRACETYPE_RULE);
        payload.text(NFTA_TRACE_CHAIN, "prerouting");
        payload.text(NFTA_TRACE_TABLE, "egret");
        payload.attribute(NFTA_TRACE_RULE_HANDLE, &42u64.to_be_bytes());
        payload.nested(NFTA_TRACE_VERDICT, |v| {
            v.be32(NFTA_VERDICT_CODE, NFT_GOTO as u32);
            v.text(NFTA_VERDICT_CHAIN, "known");
        });
        payload.be32(NFTA_TRACE_IIF, 3);
        payload.attribute(NFTA_TRACE_NETWORK_HEADER, &[0x45; 20]);
        payload.be32(NFTA_TRACE_MARK, 0x4000_0000);
        let message = |kind, payload| Message { kind, flags: 0, sequence: 0, port: 0, payload };
        let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_TRACE;
        let packet = Packet { iif: Some(3), oif: None, network: vec![0x45; 20], transport: Vec::new() };
        let step = Step {
            id: 7,
            family: NFPROTO_INET,
            table: "egret".into(),
            chain: "prerouting".into(),
            kind: Kind::Rule { handle: 42, verdict: Verdict::Goto("known".into()) },
            mark: 0x4000_0000,
            packet: Some(packet),
        };
        assert_eq!(parse(&message(kind, &payload)), Some(step));
        assert_eq!(parse(&message(kind + 1, &payload)), None);
        let end = [&[NFPROTO_INET, 0, 0, 0][..], &[8, 0, 6, 0, 0, 0, 0, 7], &[8, 0, 4, 0, 0, 0, 0, 3]].concat();
        assert_eq!(parse(&message(kind, &end)).map(|step| step.kind), Some(Kind::Return));
        for length in 0..payload.len() {
            let found = parse(&message(kind, &payload[..length]));
            assert!(found.is_none_or(|found| found.id == 7), "{length} bytes");
        }
    }
}
