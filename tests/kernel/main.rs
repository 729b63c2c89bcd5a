//! Egret's objects in the kernel, checked with `nft`, `ip` and `conntrack`. Needs root.

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
