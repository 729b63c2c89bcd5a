//! Whether this host can have the fast path, which only `egretd node --fast-path-lease` needs.

use super::{Need, NeedState};
use crate::datapath::obstacles;
use egret_bpf::{Programs, Settings};
use egret_nft::netlink::{NETLINK_NETFILTER, Socket};
use std::time::Duration;

const NAME: &str = "fast path";

/// Loads the programs, attaches them nowhere, and looks for what must see every packet.
pub fn read() -> Need {
    let settings = Settings { lease: Duration::from_secs(1), connection_base: 1, kind_mask: 0, after: 1 };
    if let Err(e) = Programs::load(&settings) {
        let found = format!("not here: {:#}", anyhow::Error::from(e));
        let remedy = "all packets take the kernel's own way, and only --fast-path-lease would need more".to_owned();
        return Need { name: NAME, state: NeedState::Ok, found, remedy };
    }
    let obstacle = Socket::open(NETLINK_NETFILTER)
        .map_err(anyhow::Error::from)
        .and_then(|mut socket| obstacles::rule(&mut socket));
    match obstacle.map(|rule| obstacles::setting().or(rule)) {
        Ok(None) => Need::ok(NAME, "the kernel takes its programs"),
        Ok(Some(why)) => {
            Need::ok(NAME, format!("the kernel takes its programs, and no packet would use them here: {why}"))
        }
        Err(e) => Need::warn(NAME, format!("other programs' rules cannot be read: {e:#}"), "run as root"),
    }
}
