//! What the converters of the single systems make: gateways and policies in Egret's fields, and notes.

use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{
    AddressPair, Allocate, ClusterEgressPolicySpec, EgressGatewaySpec, EgressRule, MAX_POLICY_ADDRESSES, PolicyAddress,
    Spread,
};
use crate::model::addresses_of;
use crate::model::blocks::Covered;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement};
use std::fmt;
use std::net::IpAddr;

/// What a note is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NoteKind {
    /// An object that was not converted although it is another egress system's.
    NotConverted,
    /// A field that Egret's objects cannot say.
    Lost,
    /// What Egret does in another way.
    Differs,
    /// An object that no converter knows.
    PassedOver,
}

impl fmt::Display for NoteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NoteKind::NotConverted => "not converted",
            NoteKind::Lost => "lost",
            NoteKind::Differs => "differs",
            NoteKind::PassedOver => "passed over",
        })
    }
}

/// A remark for the user, about one object of the input.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Note {
    /// What it is about.
    pub kind: NoteKind,
    /// The object of the input, or the name of its system.
    pub object: String,
    /// A sentence.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.kind, self.object, self.text)
    }
}

/// The notes of one object of the output.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes(pub(super) Vec<(NoteKind, String)>);

impl Notes {
    pub(super) fn lost(&mut self, text: impl Into<String>) {
        self.add(NoteKind::Lost, text.into());
    }

    pub(super) fn differs(&mut self, text: impl Into<String>) {
        self.add(NoteKind::Differs, text.into());
    }

    fn add(&mut self, kind: NoteKind, text: String) {
        if !self.0.contains(&(kind, text.clone())) {
            self.0.push((kind, text));
        }
    }

    /// Notes each field of `field` that the converter does not know.
    pub(super) fn unknown(&mut self, field: &Field<'_>, known: &[&str]) -> Result<(), Invalid> {
        for name in field.unknown(known)? {
            let lost = field.at(&name);
            self.lost(format!("{}: {} has no counterpart", lost.path(), lost.shown()));
        }
        Ok(())
    }
}

/// An EgressGateway to be.
#[derive(Clone, Debug)]
pub(super) struct GatewayDraft {
    pub(super) name: String,
    pub(super) spec: EgressGatewaySpec,
    /// The objects of the input that it comes from.
    pub(super) from: Vec<String>,
    pub(super) notes: Notes,
}

impl GatewayDraft {
    pub(super) fn new(name: &str, node_selector: LabelSelector) -> Self {
        let spec = EgressGatewaySpec { node_selector, ..EgressGatewaySpec::default() };
        GatewayDraft { name: name.to_owned(), spec, from: Vec::new(), notes: Notes::default() }
    }

    /// Adds an address, a range or a network to the pool, once.
    pub(super) fn add_addresses(&mut self, text: &str) {
        if !self.spec.addresses.iter().any(|known| known == text) {
            self.spec.addresses.push(text.to_owned());
        }
    }

    pub(super) fn add_from(&mut self, object: &Object) {
        if !self.from.iter().any(|known| known == object.label()) {
            self.from.push(object.label().to_owned());
        }
    }
}

/// An EgressPolicy or a ClusterEgressPolicy to be.
#[derive(Clone, Debug)]
pub(super) struct PolicyDraft {
    /// An EgressPolicy's scope, or a ClusterEgressPolicy's.
    pub(super) scope: Scope,
    pub(super) name: String,
    /// An EgressPolicy has the same fields, but no tier and no namespace selector.
    pub(super) spec: ClusterEgressPolicySpec,
    /// The object of the input that it comes from.
    pub(super) from: String,
    pub(super) notes: Notes,
}

/// Where a policy is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    /// An EgressPolicy of this namespace; `None`: the namespace in which it will be created.
    Namespace(Option<String>),
    /// A ClusterEgressPolicy.
    Cluster,
}

impl PolicyDraft {
    /// An EgressPolicy in the object's namespace.
    pub(super) fn namespaced(from: &Object, name: &str) -> Self {
        PolicyDraft::new(from, name, Scope::Namespace(from.namespace().map(str::to_owned)))
    }

    /// A ClusterEgressPolicy.
    pub(super) fn cluster(from: &Object, name: &str) -> Self {
        PolicyDraft::new(from, name, Scope::Cluster)
    }

    fn new(from: &Object, name: &str, scope: Scope) -> Self {
        let (spec, notes) = (ClusterEgressPolicySpec::default(), Notes::default());
        PolicyDraft { scope, name: name.to_owned(), spec, from: from.label().to_owned(), notes }
    }

    /// Names the egress IP.
    pub(super) fn set_address(&mut self, pair: AddressPair) {
        (self.spec.address, self.spec.allocate) = (Some(pair.into()), None);
    }

    /// Names the egress IPs, among which the traffic is divided if they are several.
    pub(super) fn set_addresses(&mut self, mut pairs: Vec<AddressPair>, spread: Spread) {
        match pairs.len() {
            1 => self.set_address(pairs.remove(0)),
            _ => {
                (self.spec.addresses, self.spec.spread) = (pairs, Some(spread).filter(|s| *s != Spread::default()));
                (self.spec.address, self.spec.allocate) = (None, None);
            }
        }
    }

    /// The addresses that it names.
    pub(super) fn named(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let one = self.spec.address.iter().map(PolicyAddress::pair);
        one.chain(self.spec.addresses.iter().cloned()).flat_map(|pair| addresses_of(&pair))
    }

    /// Has the egress IP chosen. `Dedicated` is the default, and not written.
    pub(super) fn set_allocate(&mut self, allocate: Allocate) {
        (self.spec.address, self.spec.allocate) = (None, Some(allocate).filter(|a| *a != Allocate::Dedicated));
    }

    /// Sets the destinations. `false`: there are none, so the policy has no meaning.
    pub(super) fn set_covered(&mut self, covered: Covered) -> Result<bool, Invalid> {
        let rules: Option<Vec<EgressRule>> = match covered {
            Covered::Everything => None,
            Covered::Rules(rules) => Some(rules),
            Covered::Nothing => return Ok(false),
            Covered::TooMany(count) => {
                let message = format!(
                    "its destinations make {count} networks, and a policy can list 10,000; use wider networks or fewer \
                     exceptions"
                );
                return Err(Invalid { object: self.from.clone(), message });
            }
        };
        self.spec.egress = rules;
        Ok(true)
    }
}

/// The objects that one system's objects become.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    pub(super) gateways: Vec<GatewayDraft>,
    pub(super) policies: Vec<PolicyDraft>,
    /// Notes that belong to no object of the output.
    pub(super) notes: Vec<Note>,
}

impl Draft {
    /// The gateway of this name, if it is there.
    pub(super) fn gateway(&mut self, name: &str) -> Option<&mut GatewayDraft> {
        self.gateways.iter_mut().find(|gateway| gateway.name == name)
    }

    /// Notes that an object was not converted, and the reason with the remedy.
    pub(super) fn not_converted(&mut self, object: &Object, text: impl Into<String>) {
        self.notes.push(Note { kind: NoteKind::NotConverted, object: object.label().to_owned(), text: text.into() });
    }
}

/// A pair of the first address of each family. Returns the others as well.
pub(super) fn pair_of(addresses: impl IntoIterator<Item = IpAddr>) -> (AddressPair, Vec<IpAddr>) {
    let (mut pair, mut others) = (AddressPair::default(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(a) if pair.ipv4.is_none() => pair.ipv4 = Some(a),
            IpAddr::V6(a) if pair.ipv6.is_none() => pair.ipv6 = Some(a),
            other if pair.ipv4.map(IpAddr::V4) == Some(other) || pair.ipv6.map(IpAddr::V6) == Some(other) => {}
            other => others.push(other),
        }
    }
    (pair, others)
}

/// Pairs of addresses, all with the same families. Returns the addresses that make none, or are too many.
pub(super) fn pairs_of(addresses: impl IntoIterator<Item = IpAddr>) -> (Vec<AddressPair>, Vec<IpAddr>) {
    let (mut rest, mut pairs) = (addresses.into_iter().collect::<Vec<_>>(), Vec::<AddressPair>::new());
    while !rest.is_empty() && pairs.len() < usize::from(MAX_POLICY_ADDRESSES) {
        let (pair, others) = pair_of(rest.iter().copied());
        let families = |pair: &AddressPair| (pair.ipv4.is_some(), pair.ipv6.is_some());
        if pairs.first().is_some_and(|first| families(first) != families(&pair)) {
            break;
        }
        pairs.push(pair);
        rest = others;
    }
    (pairs, rest)
}

/// A selector of these labels.
pub(super) fn labels<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> LabelSelector {
    let match_labels: std::collections::BTreeMap<String, String> =
        pairs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    LabelSelector { match_labels: Some(match_labels).filter(|all| !all.is_empty()), match_expressions: None }
}

/// A selector of what has a label, whatever its value.
pub(super) fn has_label(key: &str) -> LabelSelector {
    let requirement = LabelSelectorRequirement { key: key.to_owned(), operator: "Exists".to_owned(), values: None };
    LabelSelector { match_labels: None, match_expressions: Some(vec![requirement]) }
}

/// The label that Egret's documents use for gateway nodes.
pub(super) const GATEWAY_LABEL: &str = "egret.dev/gateway";
