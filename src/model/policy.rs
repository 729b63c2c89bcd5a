//! EgressPolicies and ClusterEgressPolicies, validated.

use super::ObjectKey;
use super::bandwidth::Bandwidth;
use super::covers::Covers;
use super::destination::{Destination, DestinationError};
use super::metadata::{Invalid, Metadata};
use super::selector::{Name, Selector};
use crate::api::{
    self, Action, AddressPair, Allocate, ClusterEgressPolicySpec, EgressPolicySpec, EgressRule, ExistingConnections,
    Fallback, MAX_DSCP, MAX_POLICY_ADDRESSES, PolicyAddress, Preference, ServiceReference, Spread,
};
use crate::model::addresses_of;
use std::collections::BTreeSet;
use std::sync::Arc;

/// How many combinations of a network and a range of ports a policy may list. Each one is an entry of a kernel set.
const MAX_ENTRIES: usize = 100_000;

/// An EgressPolicy or a ClusterEgressPolicy, validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// The namespaces that it applies to; for an EgressPolicy its own.
    pub namespaces: Namespaces,
    /// The pods in them.
    pub pods: PodMatch,
    /// The gateway; `None`: the default one.
    pub gateway: Option<Name>,
    /// The destinations; `None`: everything outside the cluster. Policies with equal lists share one.
    pub egress: Option<Arc<Covers>>,
    /// The egress IPs that it asks for.
    pub address: AddressRequest,
    /// How its traffic is divided among several egress IPs.
    pub spread: Spread,
    /// Which of several egress IPs are preferred.
    pub preference: Box<[Preference]>,
    /// The DSCP of packets that leave from the egress IP, 0 to 63.
    pub dscp: Option<u8>,
    /// How much its pods may send and receive.
    pub bandwidth: Option<Bandwidth>,
    /// What happens to traffic while the egress IP is not ready.
    pub fallback: Fallback,
    /// What happens to connections that began before the policy.
    pub existing_connections: ExistingConnections,
    /// A policy of an upper tier decides first.
    pub tier: Tier,
    /// Within a tier, the higher priority decides first.
    pub priority: i32,
    /// `metadata.creationTimestamp`, seconds since the Unix epoch. [`i64::MAX`] where the source gives none: the policy
    /// counts as the youngest.
    pub created: i64,
    /// Which parts are guesses, if this is the fallback policy of one that cannot be read.
    pub guessed: Guessed,
    /// What only a controller uses. It is boxed because there may be ten thousand policies.
    pub for_controller: Option<Box<ForController>>,
}

/// Which parts of a policy that cannot be read are unknown. If another policy selects the same pod, and the unknown
/// part decides between the two, the pod is isolated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guessed {
    /// Tier or priority.
    pub rank: bool,
    /// The destinations.
    pub egress: bool,
}

/// The parts of a policy that only a controller uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForController {
    /// `metadata.generation`.
    pub generation: Option<i64>,
    /// The node that the egress IP is to be moved to ([`MOVE_TO`](super::MOVE_TO)).
    pub move_to: Option<Name>,
    /// Whether the controller has made it of a Service's annotations ([`MADE_FROM`](super::MADE_FROM)).
    pub made: bool,
}

/// Policies of an upper tier decide before those of a lower one, whatever the priorities. The first variant is the
/// upper one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// ClusterEgressPolicies that decide before every EgressPolicy.
    Admin,
    /// EgressPolicies, and ClusterEgressPolicies without a tier.
    #[default]
    ByPriority,
    /// ClusterEgressPolicies that decide after every EgressPolicy.
    Baseline,
}

impl From<Option<api::Tier>> for Tier {
    fn from(tier: Option<api::Tier>) -> Self {
        match tier {
            Some(api::Tier::Admin) => Tier::Admin,
            None => Tier::ByPriority,
            Some(api::Tier::Baseline) => Tier::Baseline,
        }
    }
}

/// The namespaces that a policy applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// An EgressPolicy's own.
    One(Name),
    /// A ClusterEgressPolicy's, by label.
    Selected(Box<Selector>),
}

/// The pods that a policy selects within a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodMatch {
    /// By their labels.
    Labels(Selector),
    /// The pods that Services of these names select.
    Services(Box<[Name]>),
}

/// The egress IPs that a policy asks for. Most policies ask for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressRequest {
    /// These, at least one.
    Explicit(Box<[AddressPair]>),
    /// The addresses of this Service.
    Service(ObjectKey),
    /// So many that the controller chooses, at least one.
    Allocate(Allocate, u16),
    /// One, of which the policy says nothing: the gateway's default address, or one that the controller chooses for this
    /// policy alone.
    Unspecified,
    /// None: what the policy covers leaves as if Egret were not there (`action: Direct`).
    Direct,
}

impl AddressRequest {
    /// How many egress IPs it asks for.
    pub fn count(&self) -> usize {
        match self {
            AddressRequest::Explicit(pairs) => pairs.len(),
            AddressRequest::Allocate(_, count) => (*count).into(),
            AddressRequest::Service(_) | AddressRequest::Unspecified => 1,
            AddressRequest::Direct => 0,
        }
    }
}

impl ForController {
    /// `None` if there is nothing.
    fn new(meta: Metadata) -> Option<Self> {
        let all = ForController { generation: meta.generation, move_to: meta.move_to, made: meta.made };
        (all != ForController::default()).then_some(all)
    }
}

impl Policy {
    /// Validates an EgressPolicy's spec.
    ///
    /// # Errors
    /// Both or neither of `podSelector` and `services`, several of `address`, `addresses` and `allocate`, networks or
    /// ports that cannot be parsed or are too many, an invalid selector.
    pub fn namespaced(namespace: &str, spec: &EgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        Policy::new(Namespaces::One(namespace.into()), spec, meta)
    }

    /// Validates a ClusterEgressPolicy's spec.
    ///
    /// # Errors
    /// As [`Policy::namespaced`].
    pub fn cluster(spec: &ClusterEgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        let namespaces = match &spec.namespace_selector {
            Some(s) => Selector::checked(s).map_err(|e| Invalid::new("spec.namespaceSelector", e))?,
            None => Selector::default(),
        };
        let policy = Policy::new(Namespaces::Selected(Box::new(namespaces)), &spec.clone().into(), meta)?;
        Ok(Policy { tier: spec.tier.into(), ..policy })
    }

    fn new(namespaces: Namespaces, spec: &EgressPolicySpec, meta: Metadata) -> Result<Self, Invalid> {
        Ok(Policy {
            pods: pods(spec)?,
            address: address(&namespaces, spec)?,
            spread: spec.spread.unwrap_or_default(),
            preference: preference(spec)?,
            namespaces,
            gateway: spec.gateway.as_deref().map(Into::into),
            egress: spec.egress.as_deref().map(destinations).transpose()?,
            dscp: dscp(spec)?,
            bandwidth: spec.bandwidth.as_ref().map(Bandwidth::new).transpose()?,
            fallback: spec.fallback,
            existing_connections: spec.existing_connections,
            tier: Tier::default(),
            priority: spec.priority,
            created: meta.created.unwrap_or(i64::MAX),
            guessed: Guessed::default(),
            for_controller: ForController::new(meta).map(Box::new),
        })
    }

    /// `metadata.generation`, where the reader is a controller.
    pub fn generation(&self) -> Option<i64> {
        self.for_controller.as_ref()?.generation
    }

    /// Whether the controller has made it of a Service's annotations, where the reader is a controller.
    pub fn is_made(&self) -> bool {
        self.for_controller.as_ref().is_some_and(|more| more.made)
    }

    /// Whether both policies say the same, whatever their metadata.
    pub fn says_the_same(&self, other: &Policy) -> bool {
        let for_controller = self.for_controller.clone();
        *self == Policy { created: self.created, for_controller, ..other.clone() }
    }

    /// The node that the policy's egress IP is to be moved to, where the reader is a controller.
    pub fn move_to(&self) -> Option<&Name> {
        self.for_controller.as_ref()?.move_to.as_ref()
    }

    /// Whether what it covers leaves as if Egret were not there.
    pub fn is_direct(&self) -> bool {
        self.address == AddressRequest::Direct
    }

    /// How many networks, exceptions and ports its `egress` lists.
    pub fn listed_destinations(&self) -> usize {
        let networks = |d: &Destination| d.networks.iter().map(|network| 1 + network.except.len()).sum::<usize>();
        self.egress.iter().flat_map(|all| all.iter()).map(|d| networks(d) + d.ports.len()).sum()
    }

    /// Whether the policy covers every destination outside the cluster.
    pub fn covers_everything(&self) -> bool {
        match &self.egress {
            None => true,
            Some(rules) => rules.iter().any(|d| d.networks.is_empty() && d.ports.is_empty()),
        }
    }
}

/// Validates `spec.podSelector` and `spec.services`, of which there must be one.
fn pods(spec: &EgressPolicySpec) -> Result<PodMatch, Invalid> {
    match (&spec.pod_selector, spec.services.as_slice()) {
        (Some(s), []) => Ok(PodMatch::Labels(Selector::checked(s).map_err(|e| Invalid::new("spec.podSelector", e))?)),
        (None, services @ [_, ..]) => Ok(PodMatch::Services(services.iter().map(|s| s.as_str().into()).collect())),
        (Some(_), _) => Err(Invalid::new("spec", "has both podSelector and services; keep the one that is meant")),
        (None, []) => Err(Invalid::new(
            "spec",
            "selects no pods; add podSelector ({} for every pod of the namespace) or services",
        )),
    }
}

/// Validates `spec.address`, `spec.addresses` and `spec.allocate`, of which there can be one, and none with
/// `action: Direct`.
fn address(namespaces: &Namespaces, spec: &EgressPolicySpec) -> Result<AddressRequest, Invalid> {
    if spec.action == Action::Direct {
        let given = [
            ("gateway", spec.gateway.is_some()),
            ("address", spec.address.is_some()),
            ("addresses", !spec.addresses.is_empty()),
            ("allocate", spec.allocate.is_some()),
            ("addressCount", spec.address_count.is_some()),
            ("spread", spec.spread.is_some()),
            ("preference", !spec.preference.is_empty()),
            ("dscp", spec.dscp.is_some()),
            ("bandwidth", spec.bandwidth.is_some()),
            ("fallback", spec.fallback != Fallback::default()),
        ];
        return match given.iter().find(|(_, is_given)| *is_given) {
            Some((field, _)) => Err(Invalid::new(
                format!("spec.{field}"),
                "has no meaning with action: Direct; leave it out, or leave action out",
            )),
            None => Ok(AddressRequest::Direct),
        };
    }
    let both =
        |a: &str, b: &str| Err(Invalid::new("spec", format!("has both {a} and {b}; keep the one that is meant")));
    let count = spec.address_count;
    match (&spec.address, spec.addresses.as_slice(), spec.allocate) {
        (Some(_), _, Some(_)) => both("address", "allocate"),
        (Some(_), [_, ..], _) => both("address", "addresses"),
        (None, [_, ..], Some(_)) => both("addresses", "allocate"),
        (Some(_), ..) | (None, [_, ..], None) if count.is_some() => Err(Invalid::new(
            "spec.addressCount",
            "needs allocate: Dedicated; leave out the addresses, or addressCount",
        )),
        (Some(PolicyAddress { service: Some(service), ipv4: None, ipv6: None }), ..) => of_service(namespaces, service),
        (Some(a), ..) if a.service.is_some() => {
            Err(Invalid::new("spec.address", "has a service and addresses; keep what is meant"))
        }
        (Some(a), ..) if a.pair().is_empty() => {
            Err(Invalid::new("spec.address", "has neither ipv4 nor ipv6 nor service; give one, or leave address out"))
        }
        (Some(a), ..) => Ok(AddressRequest::Explicit([a.pair()].into())),
        (None, all @ [_, ..], None) => several(all),
        (None, [], None) if count.is_none() => Ok(AddressRequest::Unspecified),
        (None, [], allocate) => {
            let (allocate, count) = (allocate.unwrap_or_default(), count.unwrap_or(1));
            if !(1..=MAX_POLICY_ADDRESSES).contains(&count) {
                let message = format!("is {count}; give 1 to {MAX_POLICY_ADDRESSES}");
                return Err(Invalid::new("spec.addressCount", message));
            }
            if spec.address_count.is_some() && allocate != Allocate::Dedicated {
                let message = format!("needs allocate: Dedicated, not {allocate:?}");
                return Err(Invalid::new("spec.addressCount", message));
            }
            Ok(AddressRequest::Allocate(allocate, count))
        }
    }
}

/// Validates `spec.preference`.
fn preference(spec: &EgressPolicySpec) -> Result<Box<[Preference]>, Invalid> {
    match spec.preference.as_slice() {
        [_, ..] if spec.spread == Some(Spread::Ordinal) => {
            Err(Invalid::new("spec.preference", "has no meaning with spread: Ordinal; leave one of them out"))
        }
        [_] | [] | [Preference::SameNode, Preference::SameZone] | [Preference::SameZone, Preference::SameNode] => {
            Ok(spec.preference.as_slice().into())
        }
        _ => Err(Invalid::new("spec.preference", "has a value twice; name each once")),
    }
}

/// Validates `spec.addresses`.
fn several(all: &[AddressPair]) -> Result<AddressRequest, Invalid> {
    if all.len() > usize::from(MAX_POLICY_ADDRESSES) {
        let message = format!("has {} egress IPs, and at most {MAX_POLICY_ADDRESSES} are possible", all.len());
        return Err(Invalid::new("spec.addresses", message));
    }
    let mut seen = BTreeSet::new();
    for (at, pair) in all.iter().enumerate() {
        let invalid = |message: String| Err(Invalid::new(format!("spec.addresses[{at}]"), message));
        if pair.is_empty() {
            return invalid("has neither ipv4 nor ipv6; give one".to_owned());
        }
        if (pair.ipv4.is_some(), pair.ipv6.is_some()) != (all[0].ipv4.is_some(), all[0].ipv6.is_some()) {
            return invalid("has not the families of the first; give ipv4, ipv6 or both in all of them".to_owned());
        }
        if let Some(twice) = addresses_of(pair).find(|address| !seen.insert(*address)) {
            return invalid(format!("{twice} stands there twice; name each once"));
        }
    }
    Ok(AddressRequest::Explicit(all.into()))
}

/// Validates `spec.address.service`. An EgressPolicy's Service is in the policy's namespace: who may write policies in
/// one namespace must not use addresses of another one.
fn of_service(namespaces: &Namespaces, service: &ServiceReference) -> Result<AddressRequest, Invalid> {
    let namespace = match (namespaces, &service.namespace) {
        (Namespaces::One(own), None) => own.clone(),
        (Namespaces::Selected(_), Some(namespace)) => namespace.as_str().into(),
        (Namespaces::One(_), Some(_)) => {
            let message = "an EgressPolicy uses a Service of its own namespace; leave out namespace";
            return Err(Invalid::new("spec.address.service.namespace", message));
        }
        (Namespaces::Selected(_), None) => {
            let message = "has no namespace; a ClusterEgressPolicy has none of its own, so give it";
            return Err(Invalid::new("spec.address.service", message));
        }
    };
    Ok(AddressRequest::Service(ObjectKey { namespace, name: service.name.as_str().into() }))
}

/// Validates `spec.dscp`.
fn dscp(spec: &EgressPolicySpec) -> Result<Option<u8>, Invalid> {
    match spec.dscp {
        Some(value) if value > MAX_DSCP => {
            Err(Invalid::new("spec.dscp", format!("{value} is no DSCP; write 0 to {MAX_DSCP}")))
        }
        other => Ok(other),
    }
}

/// Validates `spec.egress`.
///
/// # Errors
/// Networks or ports that cannot be parsed or are too many.
pub fn destinations(rules: &[EgressRule]) -> Result<Arc<Covers>, Invalid> {
    let mut all = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let d =
            Destination::try_from(rule).map_err(|e: DestinationError| Invalid::new(format!("spec.egress[{i}]"), e))?;
        all.push(d);
    }
    let all = Covers::from(all);
    if all.entries_at_most() > MAX_ENTRIES && all.shape().entries > MAX_ENTRIES {
        return Err(Invalid::new(
            "spec.egress",
            format!(
                "makes {} combinations of a network and ports, and at most {MAX_ENTRIES} are allowed; use wider \
                 networks or ranges of ports",
                all.shape().entries
            ),
        ));
    }
    Ok(Arc::new(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_uses_a_service_of_its_own_namespace() {
        let spec = |namespace: Option<&str>| EgressPolicySpec {
            address: Some(PolicyAddress {
                service: Some(ServiceReference { name: "web".into(), namespace: namespace.map(str::to_owned) }),
                ..PolicyAddress::default()
            }),
            pod_selector: Some(Default::default()),
            ..EgressPolicySpec::default()
        };
        let service = |namespace| AddressRequest::Service(ObjectKey::new(namespace, "web"));
        let of_namespace = |spec: &EgressPolicySpec| Policy::namespaced("a", spec, Metadata::default());
        let of_cluster = |spec: EgressPolicySpec| Policy::cluster(&spec.into(), Metadata::default());
        assert_eq!(of_namespace(&spec(None)).unwrap().address, service("a"));
        assert_eq!(of_cluster(spec(Some("b"))).unwrap().address, service("b"));
        assert!(of_namespace(&spec(Some("a"))).is_err() && of_cluster(spec(None)).is_err());
        let mut both = spec(None);
        both.address.as_mut().unwrap().ipv4 = Some([192, 0, 2, 50].into());
        assert!(of_namespace(&both).unwrap_err().to_string().contains("keep what is meant"));
    }

    #[test]
    fn a_direct_policy_asks_for_no_egress_ip() {
        let direct = || EgressPolicySpec {
            action: Action::Direct,
            pod_selector: Some(Default::default()),
            ..EgressPolicySpec::default()
        };
        let policy = |spec: EgressPolicySpec| Policy::namespaced("a", &spec, Metadata::default());
        assert!(policy(direct()).unwrap().is_direct());
        let pair = AddressPair { ipv4: Some([192, 0, 2, 1].into()), ipv6: None };
        for (spec, field) in [
            (EgressPolicySpec { gateway: Some("g".into()), ..direct() }, "spec.gateway"),
            (EgressPolicySpec { address: Some(pair.into()), ..direct() }, "spec.address"),
            (EgressPolicySpec { allocate: Some(Allocate::Shared), ..direct() }, "spec.allocate"),
            (EgressPolicySpec { spread: Some(Spread::Pod), ..direct() }, "spec.spread"),
            (EgressPolicySpec { dscp: Some(46), ..direct() }, "spec.dscp"),
            (EgressPolicySpec { bandwidth: Some(Default::default()), ..direct() }, "spec.bandwidth"),
            (EgressPolicySpec { fallback: Fallback::NodeAddress, ..direct() }, "spec.fallback"),
        ] {
            let refusal = policy(spec).unwrap_err().to_string();
            assert!(refusal.contains(field) && refusal.contains("leave it out"), "{refusal}");
        }
    }

    #[test]
    fn several_egress_ips_are_distinct_and_of_the_same_families() {
        let pair = |last: u8, ipv6: bool| AddressPair {
            ipv4: Some([192, 0, 2, last].into()),
            ipv6: ipv6.then(|| [0x2001, 0xdb8, 0, 0, 0, 0, 0, last.into()].into()),
        };
        let spec = |addresses: Vec<AddressPair>| EgressPolicySpec {
            pod_selector: Some(Default::default()),
            addresses,
            ..EgressPolicySpec::default()
        };
        let policy = |spec: EgressPolicySpec| Policy::namespaced("a", &spec, Metadata::default());
        let refusal = |spec| policy(spec).unwrap_err().to_string();
        let two = vec![pair(1, true), pair(2, true)];
        assert_eq!(policy(spec(two.clone())).unwrap().address, AddressRequest::Explicit(two.clone().into()));
        assert!(refusal(spec(vec![pair(1, true), pair(2, false)])).contains("families"));
        assert!(refusal(spec(vec![pair(1, false), pair(1, false)])).contains("192.0.2.1 stands there twice"));
        assert!(refusal(spec((0..=MAX_POLICY_ADDRESSES as u8).map(|n| pair(n, false)).collect())).contains("at most"));
        let counted = |count, allocate| EgressPolicySpec { address_count: Some(count), allocate, ..spec(Vec::new()) };
        assert_eq!(policy(counted(4, None)).unwrap().address, AddressRequest::Allocate(Allocate::Dedicated, 4));
        assert!(refusal(counted(4, Some(Allocate::Shared))).contains("not Shared"));
        assert!(refusal(counted(0, None)).contains("give 1 to"));
        assert!(refusal(EgressPolicySpec { address_count: Some(2), ..spec(two.clone()) }).contains("addressCount"));
        assert!(
            refusal(EgressPolicySpec { allocate: Some(Allocate::Dedicated), ..spec(two.clone()) }).contains("both")
        );
        let near = |spread, preference: &[Preference]| EgressPolicySpec {
            spread: Some(spread),
            preference: preference.into(),
            ..spec(two.clone())
        };
        assert!(refusal(near(Spread::Ordinal, &[Preference::SameZone])).contains("no meaning"));
        assert!(refusal(near(Spread::Pod, &[Preference::SameZone; 2])).contains("twice"));
        assert!(policy(near(Spread::Pod, &[Preference::SameNode, Preference::SameZone])).is_ok());
    }
}
