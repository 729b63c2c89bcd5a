//! The rules for EgressGateways.

use super::{Addition, address_pair, selector, with_rules};
use crate::api::{MAX_CAPACITIES, MAX_INTERFACES, MAX_PROBES, MAX_VLAN, MAX_WEIGHT, PROBE_INTERVAL, PROBE_MISSES};
use serde_json::{Value, json};

/// An IPv4 entry of the pool: an address, a network or a range.
const POOL_IPV4: &str =
    "^ *[0-9]{1,3}([.][0-9]{1,3}){3} *(/([0-9]|[12][0-9]|3[0-2])|- *[0-9]{1,3}([.][0-9]{1,3}){3})? *$";
/// An IPv6 entry of the pool.
const POOL_IPV6: &str =
    "^ *[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]* *(/([0-9]|[1-9][0-9]|1[01][0-9]|12[0-8])|- *[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)? *$";

/// The additions to the schema of an EgressGateway.
pub(super) fn gateway() -> Vec<Addition> {
    let reservation = "/properties/reservations/items";
    let capacity = "/properties/capacity/items";
    let external =
        "!(has(self.announce) && self.announce == 'Route' && has(self.placement) && self.placement == 'External')";
    let external_message = "announce: Route needs placement: Managed: what places the addresses announces them";
    let ping = "!(has(self.announce) && self.announce == 'Route' && has(self.answerPing) && self.answerPing)";
    let ping_message = "answerPing needs announce: ARP; leave one of them out";
    let asked = "!has(self.optIn) || !self.optIn || has(self.namespaceSelector)";
    let asked_message = "optIn needs namespaceSelector, which says who may ask; give it, {} for all namespaces";
    let interface = "!(has(self.interface) && has(self.interfaces))";
    let interface_message = "interfaces excludes interface; write all names into interfaces";
    let router = "!has(self.vlan) || has(self.nextHop)";
    let router_message = "vlan needs nextHop, the router in the VLAN; give it";
    let placed = "!(has(self.vlan) && has(self.placement) && self.placement == 'External')";
    let placed_message =
        "vlan needs placement: Managed; name the interface that has the addresses in interface, without vlan";
    let whole = [
        (asked, asked_message),
        (external, external_message),
        (ping, ping_message),
        (interface, interface_message),
        (router, router_message),
        (placed, placed_message),
    ];
    let no_name = ("!self.matches('[/:\\\\s]')", "no interface has such a name");
    let mut all = vec![
        (String::new(), with_rules(json!({}), &whole)),
        ("/properties/addresses".to_owned(), json!({"maxItems": 1000})),
        ("/properties/addresses/items".to_owned(), {
            let mut entry = pool_entry();
            let message = "loopback, link-local, multicast, 0.0.0.0/8 and 240.0.0.0/4 cannot be egress IPs";
            let rule = json!({"rule": format!("!self.matches('{NO_EGRESS_ADDRESS}')"), "message": message});
            if let Some(rules) = entry["x-kubernetes-validations"].as_array_mut() {
                rules.push(rule);
            }
            entry
        }),
        ("/properties/capacity".to_owned(), json!({"maxItems": MAX_CAPACITIES})),
        (capacity.to_owned(), {
            let either = "has(self.weight) || has(self.maxEgressIPs)";
            with_rules(json!({}), &[(either, "give weight, maxEgressIPs or both")])
        }),
        (format!("{capacity}/properties/weight"), json!({"minimum": 1, "maximum": MAX_WEIGHT})),
        ("/properties/reservations".to_owned(), json!({"maxItems": 20})),
        (format!("{reservation}/properties/addresses"), json!({"maxItems": 50, "minItems": 1})),
        (format!("{reservation}/properties/addresses/items"), pool_entry()),
        // IFNAMSIZ is 16 including the terminating zero, include/uapi/linux/if.h.
        ("/properties/interface".to_owned(), with_rules(json!({"maxLength": 15, "minLength": 1}), &[no_name])),
        ("/properties/vlan".to_owned(), json!({"minimum": 1, "maximum": MAX_VLAN})),
        ("/properties/interfaces".to_owned(), json!({"maxItems": MAX_INTERFACES})),
        ("/properties/interfaces/items".to_owned(), with_rules(json!({"maxLength": 15, "minLength": 1}), &[no_name])),
        ("/properties/defaultAddress".to_owned(), {
            address_pair("give ipv4, ipv6 or both, or leave defaultAddress out")
        }),
        ("/properties/nextHop".to_owned(), address_pair("give ipv4, ipv6 or both, or leave nextHop out")),
    ];
    all.extend(probes());
    all.extend(selector("/properties/nodeSelector"));
    all.extend(selector(&format!("{capacity}/properties/nodeSelector")));
    all.extend(selector("/properties/namespaceSelector"));
    all.extend(selector(&format!("{reservation}/properties/namespaceSelector")));
    all
}

fn probes() -> Vec<Addition> {
    let probe = "/properties/probes/items";
    let number =
        |at: &str, (least, _, most): (u32, u32, u32)| (at.to_owned(), json!({"minimum": least, "maximum": most}));
    let unusable = format!("!self.matches('{NO_EGRESS_ADDRESS}')");
    let unusable = (&*unusable, "no host outside has a loopback, link-local, multicast or reserved address");
    let address =
        "self.matches('^[0-9]{1,3}([.][0-9]{1,3}){3}$') || self.matches('^[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*$')";
    let with_port =
        "self.matches('^([0-9]{1,3}([.][0-9]{1,3}){3}|\\\\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*\\\\]):[1-9][0-9]{0,4}$')";
    vec![
        ("/properties/probes".to_owned(), json!({"maxItems": MAX_PROBES})),
        (probe.to_owned(), with_rules(json!({}), &[("has(self.icmp) != has(self.tcp)", "give either icmp or tcp")])),
        (
            format!("{probe}/properties/icmp"),
            with_rules(
                json!({"maxLength": 45, "minLength": 1}),
                &[(address, "not an IP address; write 192.0.2.1 or 2001:db8::1"), unusable],
            ),
        ),
        (
            format!("{probe}/properties/tcp"),
            with_rules(
                json!({"maxLength": 53, "minLength": 1}),
                &[(with_port, "not an IP address with a port; write 203.0.113.1:443 or [2001:db8::1]:443")],
            ),
        ),
        number("/properties/probeIntervalMilliseconds", PROBE_INTERVAL),
        number("/properties/probeMisses", PROBE_MISSES),
    ]
}

/// Entries that begin with an address that cannot be an egress IP: 0/8, loopback, link-local, multicast, 240/4. The
/// condition `Accepted` reports such addresses further inside of an entry.
const NO_EGRESS_ADDRESS: &str = "^ *((0|127|169[.]254|22[4-9]|2[34][0-9]|25[0-5])[.]|::1?( |/|-|$)|[Ff][Ee][89ABab][0-9A-Fa-f]:|[Ff][Ff][0-9A-Fa-f][0-9A-Fa-f]:)";

fn pool_entry() -> Value {
    let message = "not an address, a range or a network of one family; write 192.0.2.50, \
                   192.0.2.50-192.0.2.59 or 192.0.2.0/28";
    let ipv4 = format!("self.contains(':') || self.matches('{POOL_IPV4}')");
    let ipv6 = format!("!self.contains(':') || self.matches('{POOL_IPV6}')");
    // Two IPv6 addresses of 39 characters, and what is between them.
    with_rules(json!({"maxLength": 84, "minLength": 1}), &[(&ipv4, message), (&ipv6, message)])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_good, assert_refused};
    use super::*;

    #[test]
    fn a_pool_has_addresses_ranges_and_networks() {
        let pool = |entry: &str| json!({"nodeSelector": {}, "addresses": [entry]});
        for entry in [
            "192.0.2.50",
            "192.0.2.50-192.0.2.59",
            "192.0.2.50 - 192.0.2.59",
            "198.51.100.16/28",
            "223.255.255.0/24",
            "12.0.0.1",
            "2001:db8::50",
            "2001:db8::50-2001:db8::59",
            "2001:db8::/64",
            "64:ff9b::192.0.2.1/128",
        ] {
            assert_good("EgressGateway", &pool(entry));
        }
        for entry in
            ["192.0.2", "here", "192.0.2.50-2001:db8::1", "192.0.2.0/33", "2001:db8::/129", "192.0.2.1,192.0.2.2"]
        {
            assert_refused("EgressGateway", &pool(entry), "192.0.2.50-192.0.2.59");
        }
    }

    #[test]
    fn a_pool_has_no_address_that_no_host_can_have() {
        let pool = |entry: &str| json!({"nodeSelector": {}, "addresses": [entry]});
        for entry in [
            "0.0.0.0/0",
            "127.0.0.1",
            "169.254.1.0/24",
            "224.0.0.5",
            "239.1.1.1-239.1.1.9",
            "240.0.0.1",
            "255.255.255.255",
            "::/0",
            "::1",
            "fe80::1",
            "FF02::1-FF02::9",
        ] {
            assert_refused("EgressGateway", &pool(entry), "cannot be egress IPs");
        }
    }

    #[test]
    fn probes_have_addresses_and_one_protocol() {
        let probe = |probe: Value| json!({"nodeSelector": {}, "probes": [probe]});
        for address in ["192.0.2.1", "2001:db8::1"] {
            assert_good("EgressGateway", &probe(json!({"icmp": address})));
        }
        for address in ["203.0.113.1:443", "[2001:db8::1]:53"] {
            assert_good("EgressGateway", &probe(json!({"tcp": address})));
        }
        for address in ["example.com", "192.0.2.1:80", "192.0.2"] {
            assert_refused("EgressGateway", &probe(json!({"icmp": address})), "not an IP address");
        }
        for address in ["127.0.0.1", "fe80::1", "ff02::1"] {
            assert_refused("EgressGateway", &probe(json!({"icmp": address})), "link-local");
        }
        for address in ["203.0.113.1", "203.0.113.1:0", "2001:db8::1:443", "example.com:443"] {
            assert_refused("EgressGateway", &probe(json!({"tcp": address})), "with a port");
        }
        assert_refused("EgressGateway", &probe(json!({})), "either icmp or tcp");
        assert_refused("EgressGateway", &probe(json!({"icmp": "192.0.2.1", "tcp": "192.0.2.1:80"})), "either");
    }

    #[test]
    fn a_gateway_that_routers_announce_is_placed_by_egret_and_answers_no_ping() {
        let routed = |more: Value| {
            let mut spec = json!({"nodeSelector": {}, "announce": "Route"});
            spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            spec
        };
        assert_good(
            "EgressGateway",
            &routed(json!({"placement": "Managed", "interface": "eth1", "answerPing": false})),
        );
        assert_refused("EgressGateway", &routed(json!({"placement": "External"})), "needs placement: Managed");
        assert_refused("EgressGateway", &routed(json!({"answerPing": true})), "answerPing needs announce: ARP");
        let by_arp = json!({"nodeSelector": {}, "announce": "ARP", "placement": "External", "answerPing": true});
        assert_good("EgressGateway", &by_arp);
    }

    #[test]
    fn a_gateway_names_one_interface_or_several() {
        let named = |names: Value| json!({"nodeSelector": {}, "interfaces": names});
        assert_good("EgressGateway", &named(json!(["eth1", "ens192", "bond0.100"])));
        for name in ["eth1/ens192", "eth1:1", "eth 1"] {
            assert_refused("EgressGateway", &named(json!([name])), "no interface has such a name");
            let one = json!({"nodeSelector": {}, "interface": name});
            assert_refused("EgressGateway", &one, "no interface has such a name");
        }
        let both = json!({"nodeSelector": {}, "interface": "eth1", "interfaces": ["ens192"]});
        assert_refused("EgressGateway", &both, "interfaces excludes interface");
    }

    #[test]
    fn a_vlan_has_a_number_and_a_router_and_its_addresses_are_managed() {
        let with = |vlan: u32| json!({"nodeSelector": {}, "vlan": vlan, "nextHop": {"ipv4": "198.51.100.1"}});
        assert_good("EgressGateway", &with(1));
        assert_good("EgressGateway", &with(4094));
        assert_refused("EgressGateway", &json!({"nodeSelector": {}, "vlan": 100}), "vlan needs nextHop");
        let mut external = with(100);
        external["placement"] = json!("External");
        assert_refused("EgressGateway", &external, "vlan needs placement: Managed");
    }

    #[test]
    fn reservations_are_validated() {
        let reserved = |reservation: Value| json!({"nodeSelector": {}, "reservations": [reservation]});
        let selector = json!({"matchLabels": {"team": "sales"}});
        assert_good("EgressGateway", &reserved(json!({"addresses": ["192.0.2.50"], "namespaceSelector": selector})));
        assert_refused("EgressGateway", &reserved(json!({"addresses": ["x"], "namespaceSelector": {}})), "192.0.2.50");
        let broken = json!({"matchExpressions": [{"key": "a", "operator": "In"}]});
        let broken = reserved(json!({"addresses": ["192.0.2.50"], "namespaceSelector": broken}));
        assert_refused("EgressGateway", &broken, "need values");
    }

    #[test]
    fn who_may_ask_is_said() {
        assert_good("EgressGateway", &json!({"nodeSelector": {}, "optIn": false}));
        assert_good("EgressGateway", &json!({"nodeSelector": {}, "optIn": true, "namespaceSelector": {}}));
        assert_refused("EgressGateway", &json!({"nodeSelector": {}, "optIn": true}), "optIn needs namespaceSelector");
    }

    #[test]
    fn a_capacity_has_a_weight_or_a_maximum() {
        let of = |capacity: Value| json!({"nodeSelector": {}, "capacity": [capacity]});
        assert_good("EgressGateway", &of(json!({"nodeSelector": {}, "weight": 3})));
        assert_good("EgressGateway", &of(json!({"nodeSelector": {}, "maxEgressIPs": 0})));
        assert_refused("EgressGateway", &of(json!({"nodeSelector": {}})), "weight, maxEgressIPs or both");
    }
}
