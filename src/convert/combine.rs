//! Puts the drafts of all systems together: unique names, who shares an address, and what Egret would refuse.

use super::draft::Note;
use super::draft::{Draft, GatewayDraft, NoteKind, Notes, PolicyDraft, Scope};
use super::field::Invalid;
use super::output::{self, Conversion};
use crate::api::{Action, AddressPair, Allocate, EgressRule, Placement, PolicyAddress, Sharing};
use crate::model::{AddressRange, Gateway, Metadata, Policy};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

/// # Errors
/// All objects that Egret would refuse.
pub(super) fn combine(drafts: Vec<(&'static str, Draft)>) -> Result<Conversion, Vec<Invalid>> {
    let mut systems = Vec::new();
    let mut all = Draft::default();
    for (system, mut draft) in drafts {
        if !draft.gateways.is_empty() || !draft.policies.is_empty() {
            systems.push(system);
        }
        rename_gateways(system, &mut draft, &all);
        all.gateways.append(&mut draft.gateways);
        all.policies.append(&mut draft.policies);
        all.notes.append(&mut draft.notes);
    }
    rename_policies(&mut all.policies);
    note_defaults(&mut all.gateways);
    share(&mut all);
    let pools = pools(&all.gateways)?;
    note_overlaps(&mut all.gateways, &pools);
    for policy in &mut all.policies {
        note_policy(policy, &all.gateways, &pools);
    }
    let faults: Vec<Invalid> = all.policies.iter().filter_map(|policy| refusal(policy).err()).collect();
    if !faults.is_empty() {
        return Err(faults);
    }
    Ok(Conversion { objects: output::objects(&all), notes: notes(&all), systems })
}

/// A gateway's name that an earlier system has becomes `SYSTEM-NAME`, and its policies follow.
fn rename_gateways(system: &str, draft: &mut Draft, earlier: &Draft) {
    let prefix = system.to_ascii_lowercase().replace([' ', '.'], "-");
    for gateway in &mut draft.gateways {
        if earlier.gateways.iter().any(|other| other.name == gateway.name) {
            let new = format!("{prefix}-{}", gateway.name);
            for policy in &mut draft.policies {
                if policy.spec.gateway.as_ref() == Some(&gateway.name) {
                    policy.spec.gateway = Some(new.clone());
                }
            }
            gateway.name = new;
        }
    }
}

/// Of several policies with one name in one place, all but the first get a number.
fn rename_policies(policies: &mut [PolicyDraft]) {
    let mut taken: BTreeSet<(Scope, String)> = BTreeSet::new();
    for policy in policies {
        let before = policy.name.clone();
        for number in 2.. {
            if taken.insert((policy.scope.clone(), policy.name.clone())) {
                break;
            }
            policy.name = format!("{before}-{number}");
        }
        if policy.name != before {
            policy.notes.differs(format!("the name is another one, because another object became {before:?}"));
        }
    }
}

fn note_defaults(gateways: &mut [GatewayDraft]) {
    let defaults: Vec<String> = gateways.iter().filter(|g| g.spec.default).map(|g| g.name.clone()).collect();
    if let [_, _, ..] = defaults.as_slice() {
        for gateway in gateways.iter_mut().filter(|g| g.spec.default) {
            let text = format!("{} are all default gateways; keep default: true on one", defaults.join(", "));
            gateway.notes.differs(text);
        }
    }
}

/// Policies of several namespaces that name one address need `sharing: Cluster`.
fn share(draft: &mut Draft) {
    let default = draft.gateways.iter().find(|gateway| gateway.spec.default).map(|gateway| gateway.name.clone());
    let mut users: BTreeMap<(Option<&String>, IpAddr), BTreeSet<&Scope>> = BTreeMap::new();
    for policy in &draft.policies {
        let gateway = policy.spec.gateway.as_ref().or(default.as_ref());
        for address in policy.named() {
            users.entry((gateway, address)).or_default().insert(&policy.scope);
        }
    }
    let shared = users.into_iter().filter(|(_, scopes)| scopes.len() > 1);
    let shared: BTreeMap<Option<&String>, IpAddr> = shared.map(|((name, address), _)| (name, address)).collect();
    for gateway in &mut draft.gateways {
        if let Some(address) = shared.get(&Some(&gateway.name)) {
            gateway.spec.sharing = Sharing::Cluster;
            gateway.notes.differs(format!(
                "policies of several namespaces share {address}, so sharing is Cluster: every namespace that may use the \
                 gateway may name its addresses. namespaceSelector and reservations restrict it"
            ));
        }
    }
}

/// The pool of each gateway, by its name.
type Pools = BTreeMap<String, Box<[AddressRange]>>;

/// # Errors
/// The gateways that Egret would refuse.
fn pools(gateways: &[GatewayDraft]) -> Result<Pools, Vec<Invalid>> {
    let (mut pools, mut faults) = (Pools::new(), Vec::new());
    for draft in gateways {
        match Gateway::new(&draft.spec, Metadata::default()) {
            Ok(gateway) => drop(pools.insert(draft.name.clone(), gateway.pool)),
            Err(fault) => faults.push(Invalid {
                object: draft.from.join(", "),
                message: format!("as an EgressGateway of Egret it is invalid: {fault}"),
            }),
        }
    }
    if faults.is_empty() { Ok(pools) } else { Err(faults) }
}

fn note_overlaps(gateways: &mut [GatewayDraft], pools: &Pools) {
    for index in 1..gateways.len() {
        let (earlier, rest) = gateways.split_at_mut(index);
        let Some(gateway) = rest.first_mut() else { continue };
        let own = pools.get(&gateway.name).map(Box::as_ref).unwrap_or_default();
        for other in earlier {
            let others = pools.get(&other.name).map(Box::as_ref).unwrap_or_default();
            if let Some(range) = own.iter().find(|range| others.iter().any(|other| other.overlaps(range))) {
                gateway.notes.differs(format!(
                    "{} to {} is in the pool of EgressGateway {} as well: an address belongs to one gateway, the older one \
                     has it",
                    range.first, range.last, other.name
                ));
            }
        }
    }
}

/// Notes what the controller would say of the policy.
fn note_policy(policy: &mut PolicyDraft, gateways: &[GatewayDraft], pools: &Pools) {
    if policy.spec.action == Action::Direct {
        return;
    }
    let gateway = match &policy.spec.gateway {
        Some(name) => gateways.iter().find(|gateway| &gateway.name == name),
        None => gateways.iter().find(|gateway| gateway.spec.default),
    };
    let Some(gateway) = gateway else {
        policy.notes.differs(match &policy.spec.gateway {
            Some(name) => format!("its gateway {name:?} is not in the input; give it too, or create an EgressGateway"),
            None => "it names no gateway, and no gateway in the input is the default one; name one, or create an \
                     EgressGateway with default: true"
                .to_owned(),
        });
        return;
    };
    let pool = pools.get(&gateway.name).map(Box::as_ref).unwrap_or_default();
    for address in policy.named().collect::<Vec<_>>() {
        if !pool.iter().any(|range| range.contains(address)) {
            let text = format!("{address} is not in the pool of EgressGateway {}; add it to addresses", gateway.name);
            policy.notes.differs(text);
        }
    }
    if let Some(text) = missing_family(policy, pool) {
        policy.notes.differs(text);
    }
    // A node's own address on a gateway whose addresses Egret does not place needs no pool.
    if gateway.spec.placement == Placement::Managed && pool.is_empty() && policy.spec.allocate != Some(Allocate::Node) {
        policy
            .notes
            .differs(format!("EgressGateway {} has no addresses; add the egress IPs to addresses", gateway.name));
    }
}

/// A policy that covers destinations of a family of which its egress IP has no address blocks them.
fn missing_family(policy: &PolicyDraft, pool: &[AddressRange]) -> Option<String> {
    let first = policy.spec.address.as_ref().map(PolicyAddress::pair).or(policy.spec.addresses.first().cloned());
    let is_service = policy.spec.address.as_ref().is_some_and(|address| address.service.is_some());
    let has = |ipv6: bool| match (&first, policy.spec.allocate) {
        (_, Some(Allocate::Node)) => true,
        // Which addresses a Service has is not known here.
        _ if is_service => true,
        (Some(AddressPair { ipv4, ipv6: v6 }), _) => {
            if ipv6 {
                v6.is_some()
            } else {
                ipv4.is_some()
            }
        }
        (None, _) => pool.is_empty() || pool.iter().any(|range| range.first.is_ipv6() == ipv6),
    };
    let covers = |ipv6: bool| {
        let in_rule = |rule: &EgressRule| {
            rule.to.is_empty() || rule.to.iter().any(|peer| peer.ip_block.cidr.contains(':') == ipv6)
        };
        policy.spec.egress.as_ref().is_none_or(|rules| rules.iter().any(in_rule))
    };
    let (family, other, all) = [(true, "IPv6", ("IPv4", "0.0.0.0/0")), (false, "IPv4", ("IPv6", "::/0"))]
        .into_iter()
        .find(|(ipv6, ..)| covers(*ipv6) && !has(*ipv6))
        .map(|(_, family, (other, all))| (family, other, all))?;
    Some(format!(
        "the egress IP has no {family} address, so {family} destinations outside the cluster are blocked. To leave {family} to \
         the node, write egress with {other} networks only: {all}"
    ))
}

fn refusal(draft: &PolicyDraft) -> Result<Policy, Invalid> {
    let policy = match &draft.scope {
        Scope::Cluster => Policy::cluster(&draft.spec, Metadata::default()),
        Scope::Namespace(namespace) => {
            let namespace = namespace.as_deref().unwrap_or("default");
            Policy::namespaced(namespace, &draft.spec.clone().into(), Metadata::default())
        }
    };
    policy.map_err(|fault| Invalid {
        object: draft.from.clone(),
        message: format!("as a policy of Egret it is invalid: {fault}"),
    })
}

/// All notes: of each object, then of those that became nothing.
fn notes(draft: &Draft) -> Vec<Note> {
    let of = |object: String, notes: &Notes| {
        let note =
            move |(kind, text): &(NoteKind, String)| Note { kind: *kind, object: object.clone(), text: text.clone() };
        notes.0.iter().map(note).collect::<Vec<_>>()
    };
    let gateways = draft.gateways.iter().flat_map(|gateway| of(gateway.from.join(", "), &gateway.notes));
    let policies = draft.policies.iter().flat_map(|policy| of(policy.from.clone(), &policy.notes));
    let mut all: Vec<Note> = gateways.chain(policies).chain(draft.notes.iter().cloned()).collect();
    // Several policies of one object have its notes each.
    let mut seen = HashSet::new();
    all.retain(|note| seen.insert(note.clone()));
    all
}
