//! What Egret writes into the kernel and reads from it, with `nft`, `ip` and `conntrack` as witnesses.

mod addresses;
mod announce;
mod conntrack;
mod links;
mod namespace;
mod nftables;
mod ownership;
mod routes;
mod ruleset;
mod tunnel;
mod watch;
