//! Which source a packet may have: the policies as a person reads them, without any of Egret's code.

use super::step::{Cover, Families, GATEWAYS, PolicySpec};
use lab::topology::{EXT4, EXT6};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The second server's address; the first one is the lab's.
pub const SECOND4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 101);
/// See [`SECOND4`].
pub const SECOND6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x101);
/// Where pods send: the two servers, by both families.
pub const SERVERS: [IpAddr; 4] = [IpAddr::V4(EXT4), IpAddr::V6(EXT6), IpAddr::V4(SECOND4), IpAddr::V6(SECOND6)];

/// The namespace of a pod.
pub fn namespace(pod: usize) -> &'static str {
    ["shop", "office"][pod % 2]
}

/// Whose a policy is: its namespace, or `None` for a ClusterEgressPolicy; whether it is of the tier Admin; its
/// priority. No two of a tier have the same priority: which one is older is nothing that the model knows.
pub fn scope(policy: usize) -> (Option<&'static str>, bool, i32) {
    [
        (Some("shop"), false, 5),
        (Some("shop"), false, 3),
        (Some("shop"), false, 9),
        (Some("office"), false, 6),
        (Some("office"), false, 2),
        (None, true, 1),
        (None, false, 4),
    ][policy]
}

/// The last part of the address that a policy names, in hexadecimal as in decimal. Addresses are shared within a
/// namespace only, and as they are: who names one family names another address than who names both.
fn named(policy: usize, spec: &PolicySpec) -> Option<u8> {
    let namespace = match scope(policy).0 {
        Some("shop") => 0,
        Some(_) => 2,
        None => 4,
    };
    let families = match spec.families {
        Families::Both => 50,
        Families::V4 => 60,
        Families::V6 => 70,
    };
    spec.address.map(|address| families + namespace + address)
}

fn v6(last: u8) -> Ipv6Addr {
    format!("2001:db8::{last}").parse().expect("an IPv6 address")
}

/// The sources that a packet may have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// The pod's node's own.
    pub node: bool,
    /// Addresses that policies name.
    pub named: BTreeSet<IpAddr>,
    /// Any of the second gateway's pool.
    pub pool: bool,
}

impl Allowed {
    /// Takes in another one.
    pub fn join(&mut self, other: &Allowed) {
        self.node |= other.node;
        self.pool |= other.pool;
        self.named.extend(&other.named);
    }

    /// Whether `source` is one of them, where the node's own addresses are `node`.
    pub fn has(&self, source: IpAddr, node: [IpAddr; 2]) -> bool {
        (self.node && node.contains(&source)) || (self.pool && in_pool(source)) || self.named.contains(&source)
    }
}

fn in_pool(source: IpAddr) -> bool {
    match source {
        IpAddr::V4(a) => a.octets()[..3] == [192, 0, 2] && (110..190).contains(&a.octets()[3]),
        IpAddr::V6(a) => {
            a.segments()[..7] == [0x2001, 0xdb8, 0, 0, 0, 0, 0] && (0x110..=0x189).contains(&a.segments()[7])
        }
    }
}

/// The policies at a time.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    /// Those that there are.
    pub all: BTreeMap<usize, PolicySpec>,
    /// Those whose manifest is damaged. A daemon that starts meanwhile knows of such a one only its address and its
    /// namespace, and may take all that could be its pods for its pods.
    pub damaged: BTreeSet<usize>,
}

impl Policies {
    /// What a pod of the namespace with this `app` may be seen as at a server.
    pub fn allow(&self, namespace: &str, app: &str, server: usize) -> Allowed {
        let mut allowed = Allowed::default();
        let mut decided = false;
        for (policy, spec) in self.in_order(namespace) {
            let matches = spec.selects(app, server);
            if self.damaged.contains(&policy) || (matches && !decided) {
                allowed.join(&addresses(policy, spec, server));
            }
            // Nobody can say from outside whether a policy with a fallback has an allocation. Without one the next
            // policy decides; with one whose owner is away the pod leaves from the node's address.
            allowed.node |= matches && !decided && spec.fallback;
            decided |= matches && !spec.fallback;
        }
        allowed.node |= !decided;
        allowed
    }

    /// Whether such a pod must be answered when all is well. A family that a policy's address does not have is blocked,
    /// with a fallback too.
    pub fn answers(&self, namespace: &str, app: &str, server: usize) -> bool {
        let first = self.in_order(namespace).find(|(_, spec)| spec.selects(app, server));
        first.is_none_or(|(policy, spec)| addresses(policy, spec, server) != Allowed::default())
    }

    /// Those that can select pods of the namespace, the one first that decides first.
    fn in_order(&self, namespace: &str) -> impl Iterator<Item = (usize, &PolicySpec)> {
        let mut all: Vec<usize> = self.all.keys().copied().collect();
        all.retain(|policy| scope(*policy).0.is_none_or(|own| own == namespace));
        all.sort_by_key(|policy| (!scope(*policy).1, -scope(*policy).2));
        all.into_iter().filter_map(|policy| Some((policy, self.all.get(&policy)?)))
    }
}

impl PolicySpec {
    fn selects(&self, app: &str, server: usize) -> bool {
        self.app.is_none_or(|selected| selected == app) && covers(self.cover, server)
    }
}

fn covers(cover: Cover, server: usize) -> bool {
    match cover {
        Cover::All => true,
        Cover::First => server < 2,
        Cover::Second => server >= 2,
    }
}

fn addresses(policy: usize, spec: &PolicySpec, server: usize) -> Allowed {
    let Some(last) = named(policy, spec) else { return Allowed { pool: true, ..Allowed::default() } };
    let (v4, address) = match SERVERS[server] {
        IpAddr::V4(_) => (true, IpAddr::V4(Ipv4Addr::new(192, 0, 2, last))),
        IpAddr::V6(_) => (false, IpAddr::V6(v6(last))),
    };
    let has = match spec.families {
        Families::Both => true,
        Families::V4 => v4,
        Families::V6 => !v4,
    };
    Allowed { named: has.then_some(address).into_iter().collect(), ..Allowed::default() }
}

/// The policy's manifest.
pub fn manifest(policy: usize, spec: &PolicySpec) -> Value {
    let (namespace, admin, priority) = scope(policy);
    let mut object = json!({
        "apiVersion": "egret.dev/v1alpha1",
        "kind": if namespace.is_some() { "EgressPolicy" } else { "ClusterEgressPolicy" },
        "metadata": {"name": format!("q{policy}")},
        "spec": {
            "gateway": GATEWAYS[usize::from(spec.address.is_none())],
            "podSelector": spec.app.map_or(json!({}), |app| json!({"matchLabels": {"app": app}})),
            "fallback": if spec.fallback { "NodeAddress" } else { "Block" },
            "priority": priority,
        }
    });
    match namespace {
        Some(namespace) => object["metadata"]["namespace"] = namespace.into(),
        None => object["spec"]["namespaceSelector"] = json!({}),
    }
    if admin {
        object["spec"]["tier"] = "Admin".into();
    }
    if let Some(last) = named(policy, spec) {
        let (v4, v6) = (json!(Ipv4Addr::new(192, 0, 2, last)), json!(v6(last)));
        object["spec"]["address"] = match spec.families {
            Families::Both => json!({"ipv4": v4, "ipv6": v6}),
            Families::V4 => json!({"ipv4": v4}),
            Families::V6 => json!({"ipv6": v6}),
        };
    }
    let servers = match spec.cover {
        Cover::All => return object,
        Cover::First => &SERVERS[..2],
        Cover::Second => &SERVERS[2..],
    };
    let blocks =
        servers.iter().map(|s| json!({"ipBlock": {"cidr": format!("{s}/{}", if s.is_ipv4() { 32 } else { 128 })}}));
    object["spec"]["egress"] = json!([{"to": blocks.collect::<Vec<_>>()}]);
    object
}

/// A gateway's manifest: of all gateway nodes.
pub fn gateway(name: &str) -> Value {
    let addresses = if name == GATEWAYS[0] {
        ["192.0.2.50-192.0.2.79", "2001:db8::50-2001:db8::79"]
    } else {
        ["192.0.2.110-192.0.2.189", "2001:db8::110-2001:db8::189"]
    };
    json!({
        "apiVersion": "egret.dev/v1alpha1", "kind": "EgressGateway", "metadata": {"name": name},
        "spec": {"nodeSelector": {"matchLabels": {"egret.dev/gateway": "true"}}, "addresses": addresses}
    })
}
