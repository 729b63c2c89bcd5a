//! Which expressions the rules of all programs use, by name. Their contents are not read.

use super::read::{header, kind};
use super::uapi::*;
use crate::netlink::{Error, Socket, attributes};
use nix::libc::AF_UNSPEC;

/// The name of the extension in an expression `match` or `target` of iptables (`NFTA_MATCH_NAME`, `NFTA_TARGET_NAME`).
const NAME: u16 = 1;
/// The type of the object that an expression `objref` names.
const NFTA_OBJREF_IMM_TYPE: u16 = 1;
/// The expressions of the elements that an expression `dynset` adds: one, or a list (include/uapi/linux/netfilter/nf_tables.h).
const NFTA_DYNSET_EXPR: u16 = 7;
const NFTA_DYNSET_EXPRESSIONS: u16 = 10;

/// The type of an object that a map names, which may be any.
pub const ANY_OBJECT: u32 = u32::MAX;

/// An expression of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expression<'a> {
    /// The rule's table.
    pub table: &'a str,
    /// The rule's chain.
    pub chain: &'a str,
    /// The expression's name: `limit`, `match`.
    pub name: &'a str,
    /// The extension of iptables: `hashlimit`; empty for other expressions.
    pub extension: &'a str,
    /// The type of the object that it names (`NFT_OBJECT_QUOTA`), [`ANY_OBJECT`] if a map names it, 0 if it names none.
    pub object: u32,
}

/// Calls `each` with every expression of every rule of this network namespace, also those in the elements that rules add,
/// and with the state that `start` returned.
///
/// # Errors
/// The rules cannot be read.
pub fn fold_expressions<S>(
    socket: &mut Socket,
    start: impl FnMut() -> S,
    mut each: impl FnMut(&mut S, Expression<'_>),
) -> Result<S, Error> {
    socket.dump(kind(NFT_MSG_GETRULE), &header(AF_UNSPEC as u8), start, |state, message| {
        let (mut table, mut chain, mut expressions) = ("", "", None);
        for (kind, value) in attributes(message.get(4..).unwrap_or_default()) {
            match kind {
                NFTA_RULE_TABLE => table = text(value),
                NFTA_RULE_CHAIN => chain = text(value),
                NFTA_RULE_EXPRESSIONS => expressions = Some(value),
                _ => {}
            }
        }
        for (_, expression) in expressions.into_iter().flat_map(attributes) {
            visit(table, chain, expression, &mut |expression| each(state, expression));
        }
    })
}

fn visit<'a>(table: &'a str, chain: &'a str, expression: &'a [u8], each: &mut dyn FnMut(Expression<'a>)) {
    let (mut name, mut data) = ("", &[][..]);
    for (kind, value) in attributes(expression) {
        match kind {
            NFTA_EXPR_NAME => name = text(value),
            NFTA_EXPR_DATA => data = value,
            _ => {}
        }
    }
    let of = |wanted| attributes(data).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let extension = if matches!(name, "match" | "target") { of(NAME).map(text) } else { None };
    let number = |value: &[u8]| value.try_into().ok().map(u32::from_be_bytes);
    let object = match name {
        "objref" => of(NFTA_OBJREF_IMM_TYPE).map_or(Some(ANY_OBJECT), number),
        _ => None,
    };
    each(Expression {
        table,
        chain,
        name,
        extension: extension.unwrap_or_default(),
        object: object.unwrap_or_default(),
    });
    if name == "dynset" {
        let list = of(NFTA_DYNSET_EXPRESSIONS).into_iter().flat_map(attributes).map(|(_, nested)| nested);
        of(NFTA_DYNSET_EXPR).into_iter().chain(list).for_each(|nested| visit(table, chain, nested, each));
    }
}

/// The text up to the NUL; empty if it is none.
fn text(value: &[u8]) -> &str {
    value.split(|b| *b == 0).next().and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
}
