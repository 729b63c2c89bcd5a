//! The cooldown of ids and addresses that were given back.
//!
//! The id travels with each packet. A source node that has not seen the change yet still sends with the old id, so an
//! id is not given to another policy for a while, and the owner drops packets with an unknown id. For this reason an
//! address can be given at once to a policy that names it: it gets another id. Addresses for policies that name none
//! have a cooldown too, because servers may still associate them with the previous policy.

use super::address_pair::addresses;
use super::index::{GatewayIndex, PolicyIndex};
use crate::api::{AddressPair, EgressGatewayStatus, Name, PolicyKey, ReleasedAllocation, Users};
use crate::model::Gateway;
use jiff::Timestamp;
use std::collections::HashMap;
use std::net::IpAddr;

/// How long an id or an address that was given back is kept from other policies, seconds.
pub const COOLDOWN_SECONDS: i64 = 600;

/// The released entries of a gateway that are in cooldown at `now`, each with the start of its cooldown.
pub(super) fn in_cooldown(status: &EgressGatewayStatus, now: i64) -> impl Iterator<Item = (&ReleasedAllocation, i64)> {
    // A time in the future comes from another clock. The cooldown does not last longer for it.
    let since = move |released: &ReleasedAllocation| released.at.min(now);
    status.released.iter().map(move |r| (r, since(r))).filter(move |(_, at)| at.saturating_add(COOLDOWN_SECONDS) > now)
}

/// Until when the annotation of the gateway ends the cooldown of addresses, seconds since the Unix epoch.
///
/// # Errors
/// The text of the annotation is not a time; it is returned.
pub(super) fn cooldown_ended_until(gateway: &Gateway) -> Result<i64, &str> {
    match &gateway.end_cooldown {
        None => Ok(i64::MIN),
        Some(text) => text.parse::<Timestamp>().map(Timestamp::as_second).map_err(|_| text.as_str()),
    }
}

/// An id with addresses that were given back.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The index of the gateway.
    pub(super) gateway: GatewayIndex,
    pub(super) id: u16,
    pub(super) address: AddressPair,
    /// The policies that had it, including those that no longer exist.
    pub(super) policies: Users,
    /// When it was given back, seconds since the Unix epoch.
    pub(super) at: i64,
    /// Whether the annotation of the gateway has ended the cooldown of the addresses.
    pub(super) ended: bool,
    /// The Service whose address it was, `namespace/name`.
    pub(super) service: Option<Name>,
    /// The indices of the policies that had it and still exist, sorted.
    had_by: Vec<PolicyIndex>,
}

impl Entry {
    /// Whether one of these policies had it. Such a policy may have it again.
    fn was_of(&self, policies: &[PolicyIndex]) -> bool {
        policies.iter().any(|p| self.had_by.binary_search(p).is_ok())
    }
}

/// All entries in cooldown.
#[derive(Clone, Debug, Default)]
pub(super) struct Cooldowns {
    pub(super) entries: Vec<Entry>,
    by_address: HashMap<IpAddr, Vec<usize>>,
    by_policy: HashMap<(GatewayIndex, PolicyIndex), Vec<usize>>,
    by_id: HashMap<u16, Vec<usize>>,
}

impl Cooldowns {
    /// Adds an entry. `ended`: the annotation of the gateway has ended the cooldown of the addresses. `indices` has the
    /// policies that still exist.
    pub(super) fn add(
        &mut self,
        gateway: GatewayIndex,
        released: ReleasedAllocation,
        ended: bool,
        indices: &HashMap<&PolicyKey, PolicyIndex>,
    ) {
        let ReleasedAllocation { id, address, at, policies, service } = released;
        let entry = self.entries.len();
        let mut had_by: Vec<PolicyIndex> = policies.iter().filter_map(|name| indices.get(name).copied()).collect();
        had_by.sort_unstable();
        for policy in &had_by {
            self.by_policy.entry((gateway, *policy)).or_default().push(entry);
        }
        for address in addresses(&address) {
            self.by_address.entry(address).or_default().push(entry);
        }
        self.by_id.entry(id).or_default().push(entry);
        self.entries.push(Entry { gateway, id, address, policies, at, ended, service, had_by });
    }

    /// Until when an address is kept from these policies; `None` if it is not.
    pub(super) fn until(&self, address: IpAddr, policies: &[PolicyIndex]) -> Option<i64> {
        let entries = self.by_address.get(&address).into_iter().flatten().map(|e| &self.entries[*e]);
        entries.filter(|e| !e.ended && !e.was_of(policies)).map(|e| e.at + COOLDOWN_SECONDS).max()
    }

    /// The newest entry by which an address was a Service's, unless these policies had it.
    pub(super) fn of_service(&self, address: IpAddr, policies: &[PolicyIndex]) -> Option<&Entry> {
        let entries = self.by_address.get(&address).into_iter().flatten().map(|e| &self.entries[*e]);
        entries.filter(|e| e.service.is_some() && !e.ended && !e.was_of(policies)).max_by_key(|e| e.at)
    }

    /// Whether an id is kept from these policies. An allocation that loses its addresses one by one leaves several
    /// entries with its id, and not always of the same policies.
    pub(super) fn keeps_id(&self, id: u16, policies: &[PolicyIndex]) -> bool {
        self.by_id.get(&id).into_iter().flatten().any(|e| !self.entries[*e].was_of(policies))
    }

    /// The entries that these policies gave back to the gateway, the latest first.
    pub(super) fn of(&self, gateway: GatewayIndex, policies: &[PolicyIndex]) -> Vec<&Entry> {
        let indices = policies.iter().filter_map(|p| self.by_policy.get(&(gateway, *p))).flatten();
        let mut entries: Vec<&Entry> = indices.map(|e| &self.entries[*e]).collect();
        entries.sort_by_key(|e| (std::cmp::Reverse(e.at), e.id, e.address.ipv4, e.address.ipv6));
        entries
    }

    /// Whether the address is in cooldown.
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        self.by_address.get(&address).into_iter().flatten().any(|e| !self.entries[*e].ended)
    }
}
