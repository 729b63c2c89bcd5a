//! kube-vip's annotations of a Service for egress, as a policy: the Service's pods leave from its address.

use super::blocks::{Covered, covered, everything_of};
use super::metadata::Invalid;
use crate::api::{EgressPolicySpec, EgressPort, ExistingConnections, PolicyAddress, Protocol, ServiceReference};
use ipnetwork::IpNetwork;
use std::collections::BTreeMap;

/// What the names of kube-vip's annotations begin with.
pub const PREFIX: &str = "kube-vip.io/";
/// The annotation that asks for egress from the Service's address: `"true"`.
pub const EGRESS: &str = "kube-vip.io/egress";
/// The annotation that asks for IPv6: `"true"`. By default it is IPv4.
const IPV6: &str = "kube-vip.io/egress-ipv6";
/// The destination ports: `udp:5060,tcp:5060`; a port alone is TCP's.
const PORTS: &str = "kube-vip.io/egress-destination-ports";
/// The destinations, and exceptions from them: networks, separated by commas.
const NETWORKS: [&str; 2] = ["kube-vip.io/egress-allowed-networks", "kube-vip.io/egress-denied-networks"];
/// The annotation that asks to end connections that began before.
const FLUSH: &str = "kube-vip.io/flush-conntrack";

/// The annotations that decide about the policy.
pub const ANNOTATIONS: [&str; 6] = [EGRESS, IPV6, PORTS, NETWORKS[0], NETWORKS[1], FLUSH];

/// Whether kube-vip gives the Service's pods its address.
pub fn has_egress(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(EGRESS).is_some_and(|value| value.trim().eq_ignore_ascii_case("true"))
}

/// Whether the egress is by IPv6.
pub fn is_ipv6(annotations: &BTreeMap<String, String>) -> bool {
    annotations.get(IPV6).is_some_and(|value| value.trim() == "true")
}

/// The policy that a Service's annotations ask for.
///
/// # Errors
/// A port or a network that cannot be read, or no destination at all.
pub fn policy(service: &str, annotations: &BTreeMap<String, String>) -> Result<EgressPolicySpec, Invalid> {
    let [mut allowed, denied] = NETWORKS.map(|key| networks(key, annotations));
    if let Ok(allowed) = &mut allowed
        && allowed.is_empty()
    {
        // kube-vip leaves the other family to the node.
        allowed.push(everything_of(is_ipv6(annotations)));
    }
    let egress = match covered(&allowed?, &denied?, &ports(annotations)?) {
        Covered::Everything => None,
        Covered::Rules(rules) => Some(rules),
        Covered::Nothing => return Err(invalid(NETWORKS[1], "contains all of egress-allowed-networks")),
        Covered::TooMany(count) => {
            let message = format!("makes {count} networks of egress-allowed-networks; list fewer or wider ones");
            return Err(invalid(NETWORKS[1], message));
        }
    };
    let named = ServiceReference { name: service.to_owned(), namespace: None };
    let flush = annotations.contains_key(FLUSH);
    Ok(EgressPolicySpec {
        services: vec![service.to_owned()],
        address: Some(PolicyAddress { service: Some(named), ..PolicyAddress::default() }),
        egress,
        existing_connections: if flush { ExistingConnections::End } else { ExistingConnections::Keep },
        ..EgressPolicySpec::default()
    })
}

fn invalid(key: &str, message: impl ToString) -> Invalid {
    Invalid::new(format!("metadata.annotations.{key}"), message)
}

fn parts<'a>(key: &str, annotations: &'a BTreeMap<String, String>) -> impl Iterator<Item = &'a str> {
    let text = annotations.get(key).map(String::as_str).unwrap_or_default();
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn networks(key: &str, annotations: &BTreeMap<String, String>) -> Result<Vec<IpNetwork>, Invalid> {
    let network = |text: &str| {
        let network: IpNetwork = text.parse().ok()?;
        IpNetwork::new(network.network(), network.prefix()).ok()
    };
    let wrong =
        |text: &str| invalid(key, format!("{text:?} is not a network; write one like 203.0.113.0/24 or 2001:db8::/32"));
    parts(key, annotations).map(|text| network(text).ok_or_else(|| wrong(text))).collect()
}

fn ports(annotations: &BTreeMap<String, String>) -> Result<Vec<EgressPort>, Invalid> {
    let port = |part: &str| {
        let (protocol, port) = part.split_once(':').unwrap_or(("tcp", part));
        let protocol = match protocol.trim().to_ascii_lowercase().as_str() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return None,
        };
        let port = port.trim().parse::<u16>().ok().filter(|port| *port > 0)?;
        Some(EgressPort { protocol, port: Some(port), end_port: None })
    };
    let wrong = |part: &str| invalid(PORTS, format!("{part:?} is not a port; write tcp:443 or udp:5060"));
    parts(PORTS, annotations).map(|part| port(part).ok_or_else(|| wrong(part))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Metadata, Policy};

    fn annotations(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| (format!("{PREFIX}{key}"), (*value).to_owned())).collect()
    }

    #[test]
    fn annotations_become_a_policy_that_egret_accepts() {
        let plain = policy("web", &annotations(&[("egress", "true")])).unwrap();
        let egress = serde_json::to_value(&plain).unwrap();
        assert_eq!(egress["egress"][0]["to"][0]["ipBlock"]["cidr"], "0.0.0.0/0");
        assert_eq!(egress["address"]["service"]["name"], "web");
        let all = annotations(&[
            ("egress-ipv6", "true"),
            ("egress-destination-ports", "udp:5060, 443"),
            ("egress-allowed-networks", "2001:db8::/32"),
            ("egress-denied-networks", "2001:db8:1::/48"),
            ("flush-conntrack", "true"),
        ]);
        let all = policy("web", &all).unwrap();
        let rule = &serde_json::to_value(&all).unwrap()["egress"][0];
        assert_eq!(rule["to"][0]["ipBlock"]["except"][0], "2001:db8:1::/48");
        assert_eq!(rule["ports"][1]["port"], 443);
        assert_eq!(all.existing_connections, ExistingConnections::End);
        for spec in [plain, all] {
            Policy::namespaced("shop", &spec, Metadata::default()).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (key, value, words) in [
            ("egress-destination-ports", "udp:many", "\"udp:many\" is not a port"),
            ("egress-allowed-networks", "here", "\"here\" is not a network"),
            ("egress-denied-networks", "0.0.0.0/0", "contains all"),
        ] {
            let refused = policy("web", &annotations(&[(key, value)])).unwrap_err().to_string();
            assert!(refused.contains(words) && refused.contains(key), "{refused}");
        }
        assert!(has_egress(&annotations(&[("egress", "True")])) && !has_egress(&annotations(&[("egress", "no")])));
    }
}
