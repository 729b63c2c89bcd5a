//! Where a test runs: the gateway, the nodes of each kind, the image.

use super::objects::PREFIX;
use super::server::Server;
use crate::api::AddressPair;
use crate::ctl::check::Check;
use crate::ctl::output::{count, few};
use crate::ctl::problem::Problem;
use crate::ctl::state::ClusterState;
use crate::ctl::status::{NodeState, Status};
use crate::model::{Cluster, addresses_of};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// The most nodes that pods are started on.
const MOST_NODES: usize = 50;

/// What a node is to the test's egress IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It holds the egress IP.
    Owner,
    /// It could.
    Gateway,
    /// It could not.
    Plain,
}

impl Kind {
    /// In words.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Owner => "the gateway node that holds the egress IP",
            Kind::Gateway => "another gateway node",
            Kind::Plain => "a node that is no gateway node",
        }
    }
}

/// The gateway and the nodes.
#[derive(Clone, Debug, Default)]
pub struct Participants {
    /// The gateway.
    pub gateway: String,
    /// Its nodes that are ready, sorted.
    pub gateway_nodes: Vec<String>,
    /// Other nodes with a daemon, sorted.
    pub plain_nodes: Vec<String>,
}

impl Participants {
    /// One node of each kind that there is, when the owner is known.
    pub fn kinds(&self, owner: &str) -> Vec<(Kind, String)> {
        let other = self.gateway_nodes.iter().find(|node| *node != owner);
        let of = |kind, node: Option<&String>| node.map(|node| (kind, node.clone()));
        let owner = Some((Kind::Owner, owner.to_owned()));
        [owner, of(Kind::Gateway, other), of(Kind::Plain, self.plain_nodes.first())].into_iter().flatten().collect()
    }

    /// The nodes for many pods at once: every one, up to some.
    pub fn all_nodes(&self) -> Vec<&str> {
        let all = self.gateway_nodes.iter().chain(&self.plain_nodes).map(String::as_str);
        all.take(MOST_NODES).collect()
    }
}

/// The gateway that is to be used, or a check that says why there is none.
///
/// # Errors
/// There is none.
pub fn gateway(cluster: &Cluster, named: Option<&str>) -> Result<String, Check> {
    let names: Vec<String> =
        cluster.gateways.keys().map(ToString::to_string).filter(|n| !n.starts_with(PREFIX)).collect();
    let fail = |found: String, remedy: &str| Err(Check::failed(super::CLUSTER, "a gateway", found, remedy));
    if let Some(name) = named {
        return match names.iter().any(|n| n == name) {
            true => Ok(name.to_owned()),
            false if names.is_empty() => fail(format!("there is no EgressGateway {name}"), NO_GATEWAY),
            false => fail(
                format!("there is no EgressGateway {name}, but {}", few(&names, 5)),
                "name one of these with --gateway",
            ),
        };
    }
    let default = names.iter().find(|name| cluster.gateways.get(name.as_str()).is_some_and(|gateway| gateway.default));
    match (default, names.as_slice()) {
        (Some(name), _) => Ok(name.clone()),
        (None, [only]) => Ok(only.clone()),
        (None, []) => fail("there is no EgressGateway".to_owned(), NO_GATEWAY),
        (None, _) => fail(
            format!("there are {}, and none is the default", few(&names, 5)),
            "name one with --gateway, or set spec.default of one",
        ),
    }
}

const NO_GATEWAY: &str = "make one: docs/install.md, The first gateway";

/// The gateway's nodes and the others, or a check that says why the gateway cannot be tested.
///
/// # Errors
/// It has no node that is ready.
pub fn of_gateway(state: &ClusterState, status: &Status, gateway: String) -> Result<Participants, Check> {
    let is_of_gateway = |node: &&crate::ctl::status::NodeStatus| node.gateways.contains(&gateway);
    let members: Vec<_> = status.nodes.iter().filter(is_of_gateway).collect();
    let is_linux = |name: &str| {
        let node = state.cluster.nodes.get(name);
        node.is_some_and(|node| node.labels.get("kubernetes.io/os").is_none_or(|os| &**os == "linux"))
    };
    let ready = |node: &crate::ctl::status::NodeStatus| node.state == NodeState::Ready;
    let gateway_nodes: Vec<String> = members.iter().filter(|n| ready(n)).map(|n| n.name.clone()).collect();
    if gateway_nodes.is_empty() {
        if members.is_empty() {
            let found = format!("EgressGateway {gateway}: no node matches its selector");
            return Err(Check::failed(super::CLUSTER, "a gateway", found, "label a node, or correct the selector"));
        }
        let is_of_member = |p: &&Problem| members.iter().any(|node| p.object == format!("gateway node {}", node.name));
        let problem = status.problems.iter().find(is_of_member);
        let why = problem.map(|p| format!("; {}: {}: {}", p.object, p.reason, p.message)).unwrap_or_default();
        let found =
            format!("EgressGateway {gateway}: none of its {} is ready{why}", count(members.len(), "node", "nodes"));
        let remedy = problem.map(|p| p.remedy.clone()).filter(|remedy| !remedy.is_empty());
        let remedy = remedy.unwrap_or_else(|| "see `kubectl egret status`".to_owned());
        return Err(Check::failed(super::CLUSTER, "a gateway", found, remedy));
    }
    let is_plain =
        |node: &&crate::ctl::status::NodeStatus| node.gateways.is_empty() && ready(node) && is_linux(&node.name);
    let plain_nodes = status.nodes.iter().filter(is_plain).map(|node| node.name.clone()).collect();
    Ok(Participants { gateway, gateway_nodes, plain_nodes })
}

/// Nodes on which no daemon has reported. Pods there leave past Egret, so the test starts none there.
pub fn nodes_without_daemon(status: &Status) -> Option<Check> {
    let without: Vec<&str> =
        status.nodes.iter().filter(|node| node.state == NodeState::NoDaemon).map(|node| node.name.as_str()).collect();
    (!without.is_empty()).then(|| {
        let found = format!(
            "none has reported on {}; the test leaves them out, policies have no effect there",
            few(&without, 5)
        );
        Check::warning(
            super::CLUSTER,
            "a daemon on every node",
            found,
            "see whether the DaemonSet egret-node has pods there",
        )
    })
}

/// Why the server is inside the cluster, where no policy covers it.
pub fn why_inside(cluster: &Cluster, server: &Server) -> Option<String> {
    server.addresses.iter().find_map(|at| {
        let ip = at.ip();
        let node = cluster.nodes.iter().find(|(_, node)| node.addresses.contains(&ip));
        let network = || {
            let inside = cluster.inside.pods.keys().chain(cluster.inside.services.keys());
            inside.copied().find(|network| network.contains(ip))
        };
        let pods = || {
            cluster.nodes.iter().find_map(|(name, node)| {
                node.pod_cidrs.iter().find(|network| network.contains(ip)).map(|network| (name, *network))
            })
        };
        match (node, network(), pods()) {
            (Some((name, _)), _, _) => Some(format!("{ip} is the address of node {name}")),
            (_, Some(network), _) => Some(format!("{ip} is in {network}, a network of pods or Services")),
            (_, _, Some((name, network))) => Some(format!("{ip} is in {network}, the pods of node {name}")),
            _ => None,
        }
    })
}

/// Addresses of the gateway's pool that earlier tests have given back. To name one again takes no other address into
/// cooldown.
pub fn used_before(cluster: &Cluster, gateway: &str) -> Vec<AddressPair> {
    let Some(gateway) = cluster.gateways.get(gateway) else { return Vec::new() };
    let in_use: Vec<IpAddr> = cluster.allocations().flat_map(|a| addresses_of(&a.address)).collect();
    let is_tests = |key: &crate::model::PolicyKey| key.namespace.as_deref().is_some_and(|n| n.starts_with(PREFIX));
    let mut found: Vec<AddressPair> = Vec::new();
    for released in &gateway.status.released {
        let mut addresses = addresses_of(&released.address);
        // What was named anew leaves its old id alone in cooldown, without an address.
        if released.policies.iter().all(is_tests)
            && !released.policies.is_empty()
            && !released.address.is_empty()
            && !addresses.any(|ip| in_use.contains(&ip) || found.iter().any(|pair| addresses_of(pair).any(|a| a == ip)))
        {
            found.push(released.address.clone());
        }
    }
    found
}

/// Whose each address is: nodes' and egress IPs.
pub fn names(cluster: &Cluster) -> BTreeMap<IpAddr, String> {
    let mut names = BTreeMap::new();
    for (name, node) in cluster.nodes.iter() {
        names.extend(node.addresses.iter().map(|ip| (*ip, format!("the address of node {name}"))));
    }
    for allocation in cluster.allocations() {
        let policies: Vec<String> = allocation.policies.iter().map(ToString::to_string).collect();
        names.extend(
            addresses_of(&allocation.address).map(|ip| (ip, format!("the egress IP of {}", few(&policies, 2)))),
        );
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::status::status;
    use crate::fixture::{World, naming};
    use std::sync::Arc;

    fn state(world: &World) -> ClusterState {
        ClusterState { cluster: Arc::new(world.cluster.clone()), now: world.now, ..ClusterState::default() }
    }

    #[test]
    fn the_gateway_is_the_named_the_default_or_the_only_one() {
        let world = World::new(&["192.0.2.50-192.0.2.59"]);
        assert_eq!(gateway(&world.cluster, None).unwrap(), "g");
        assert_eq!(gateway(&world.cluster, Some("g")).unwrap(), "g");
        let check = gateway(&world.cluster, Some("h")).unwrap_err();
        assert!(check.found.contains("no EgressGateway h, but g"), "{check:?}");
        let check = gateway(&Cluster::default(), None).unwrap_err();
        assert!(check.remedy.contains("The first gateway"), "{check:?}");
    }

    #[test]
    fn there_is_a_node_of_each_kind_and_none_that_is_not_ready() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        world.policy("shop/visitors", naming(&["192.0.2.50"]));
        world.node("s1", "none", &["10.0.0.9"]);
        let of = |world: &World| {
            let state = state(world);
            of_gateway(&state, &status(&state, None), "g".to_owned())
        };
        let check = of(&world).unwrap_err();
        assert!(check.found.contains("nodes is ready") || check.found.contains("node is ready"), "{check:?}");
        world.report();
        world.settle();
        let participants = of(&world).unwrap();
        let kinds = participants.kinds("n1");
        assert_eq!(kinds[..2], [(Kind::Owner, "n1".to_owned()), (Kind::Gateway, "n2".to_owned())]);
    }

    #[test]
    fn a_server_inside_the_cluster_is_refused() {
        let mut world = World::new(&["192.0.2.50-192.0.2.59"]);
        world.node("s1", "none", &["10.0.0.9"]);
        let server = |address: &str| Server {
            addresses: vec![address.parse().unwrap()],
            host: String::new(),
            path: String::new(),
            tls: false,
            is_reflector: false,
        };
        assert_eq!(why_inside(&world.cluster, &server("10.0.0.9:8080")).unwrap(), "10.0.0.9 is the address of node s1");
        assert_eq!(why_inside(&world.cluster, &server("198.51.100.1:8080")), None);
    }
}
