//! The selected pods whose packets come by ifb devices.

use crate::datapath::ifb;
use crate::node_plan::PodPlan;
use anyhow::{Context, Result};
use egret_nft::netlink::Socket;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

/// What is known of ifb devices.
pub(super) struct Ifbs {
    socket: Socket,
    /// Whether packets come by an ifb device, by the indexes of selected pods' interfaces.
    known: BTreeMap<u32, bool>,
}

impl Ifbs {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Ifbs { socket: ifb::open()?, known: BTreeMap::new() })
    }

    /// Makes the next call look at all interfaces.
    pub(super) fn invalidate(&mut self) {
        self.known.clear();
    }

    /// Makes the next call look at this interface.
    pub(super) fn invalidate_one(&mut self, index: u32) {
        self.known.remove(&index);
    }

    /// The interfaces of these pods whose packets come by ifb devices. A pod's start costs one look at its own interface.
    ///
    /// # Errors
    /// Filters cannot be read.
    pub(super) fn of<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<PodPlan>>) -> Result<BTreeSet<u32>> {
        let pods: BTreeSet<u32> = pods.map(|pod| pod.interface_index).collect();
        self.known.retain(|index, _| pods.contains(index));
        for index in pods {
            if !self.known.contains_key(&index) {
                let is_limited = ifb::is_redirected(&mut self.socket, index).context("filters at a pod's veth")?;
                self.known.insert(index, is_limited);
            }
        }
        Ok(self.known.iter().filter(|(_, is_limited)| **is_limited).map(|(index, _)| *index).collect())
    }
}
