//! nf_tables and connection tracking over netlink: synchronous, without libnftnl and without calling `nft`.
//!
//! A [`Table`](table::Table) is a value. [`Nftables::apply`] compares it with what the kernel holds and sends the
//! difference as one transaction, so that a second call changes nothing.
//!
//! ```
//! use egret_nft::Nftables;
//! use egret_nft::rule::Rule;
//! use egret_nft::table::{Chain, Hook, Policy, Table, TableName, hook};
//! use egret_nft::text::Listing;
//! use egret_nft::uapi::NFPROTO_INET;
//!
//! let name = TableName { family: NFPROTO_INET, name: "example" };
//! let (kind, number) = ("filter".to_owned(), hook::PREROUTING);
//! let hook = Hook { kind, number, priority: 0, policy: Policy::Accept, device: None };
//! let mut table = Table::default();
//! table.chains.insert("in".into(), Chain::new(Some(hook), vec![Rule::new().iif("eth0").drop()]).into());
//!
//! // What `nft list table inet example` would print:
//! let text = Listing { name, table: &table, interfaces: &Default::default() }.to_string();
//! assert!(text.contains("type filter hook prerouting priority filter; policy accept;"));
//! assert!(text.contains("iifname \"eth0\" drop"));
//!
//! // In the calling thread's network namespace, with CAP_NET_ADMIN:
//! # fn load(name: TableName, table: Table) -> Result<(), egret_nft::netlink::Error> {
//! let mut nftables = Nftables::open()?;
//! let tables = [(name, table)];
//! nftables.apply(&tables)?;
//! assert_eq!(nftables.apply(&tables)?, 0);
//! # Ok(())
//! # }
//! ```
//!
//! | module | content |
//! |---|---|
//! | [`table`] | tables, chains, sets and elements as values |
//! | [`rule`] | rules of typed expressions, encoded for the kernel and printed as nft does |
//! | [`text`] | whole tables in nft's syntax |
//! | [`trace`] | the kernel's messages about the way of single packets |
//! | [`uapi`] | the kernel's constants, by their names in its headers |
//! | [`conntrack`] | entries of connection tracking |
//! | [`netlink`] | the socket below, and an encoder and parser of attributes |
//! | [`mac`] | MAC addresses |

pub mod conntrack;
mod elements;
mod everyones;
mod family;
mod hash;
mod limit;
pub mod mac;
pub mod netlink;
mod nftables;
mod read;
pub mod rule;
pub mod table;
pub mod text;
pub mod trace;
mod transaction;
pub mod uapi;

pub use everyones::{ANY_OBJECT, Expression, fold_expressions};
pub use family::Family;
pub use nftables::Nftables;
pub use read::Count;
