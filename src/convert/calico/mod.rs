//! Calico's egress gateways: annotations of namespaces and pods, `EgressGatewayPolicy`, and the gateways themselves.

mod clients;
mod gateways;
mod selector;

use self::clients::{Client, PREFIX, clients};
use self::gateways::{CalicoGateway, GROUPS, OPERATOR, gateways};
use self::selector::Selector;
use super::draft::{Draft, PolicyDraft, Scope};
use super::field::{Field, Invalid};
use super::input::Object;
use crate::api::{Action, Allocate, EgressPeer, EgressRule};
use crate::model::blocks::{Covered, contains, covered, everything_of};
use ipnetwork::IpNetwork;

/// Whether the object is of Calico's egress gateways.
pub(super) fn is_ours(object: &Object) -> bool {
    let kind = object.kind();
    object.is(OPERATOR, "EgressGateway")
        || GROUPS.contains(&object.group()) && matches!(kind, "EgressGatewayPolicy" | "IPPool")
}

/// The destinations of a client that go through one gateway.
struct Route<'k> {
    gateway: &'k CalicoGateway,
    covered: Covered,
}

pub(super) fn convert(objects: &[&Object]) -> Result<Draft, Invalid> {
    let mut draft = Draft::default();
    let known = gateways(objects, &mut draft)?;
    let clients = clients(objects)?;
    for client in &clients {
        let Some(pods) = client.pods.clone() else {
            draft.not_converted(client.object, "its pods have no labels by which a policy could select them; add one");
            continue;
        };
        let mut template = PolicyDraft::namespaced(client.object, "");
        template.scope = Scope::Namespace(client.namespace.map(str::to_owned));
        template.spec.pod_selector = Some(pods);
        if !client.is_namespace {
            // A pod's annotations replace its namespace's, so its policy decides first.
            template.spec.priority = 1;
        }
        let routes = routes(client, objects, &known, &mut template, &mut draft)?;
        let base = base_name(client, &routes)?;
        // A pod's annotations replace its namespace's, so what they do not cover leaves directly.
        let replaces_namespace = clients.iter().any(|other| is_namespace_of(other, client));
        if replaces_namespace && routes.iter().all(|route| route.covered != Covered::Everything) && !routes.is_empty() {
            let mut policy = PolicyDraft { name: format!("{base}-direct"), ..template.clone() };
            policy.spec.action = Action::Direct;
            template.spec.priority = 2;
            draft.policies.push(policy);
        }
        for route in &routes {
            let name = match (routes.len(), &base) {
                (1, base) => base.clone(),
                (_, base) => format!("{base}-{}", route.gateway.name),
            };
            let mut policy = PolicyDraft { name, ..template.clone() };
            policy.spec.gateway = Some(route.gateway.name.clone());
            policy.set_allocate(if route.gateway.by_node_address { Allocate::Node } else { Allocate::Shared });
            policy.set_covered(route.covered.clone())?;
            draft.policies.push(policy);
        }
    }
    note_unused(objects, &clients, &mut draft)?;
    Ok(draft)
}

fn is_namespace_of(namespace: &Client<'_>, client: &Client<'_>) -> bool {
    namespace.is_namespace && !client.is_namespace && namespace.namespace == Some(client.object.namespace_or_default())
}

/// The name of a client's policy: the workload's, or for a namespace that of what its annotation names.
fn base_name(client: &Client<'_>, routes: &[Route<'_>]) -> Result<String, Invalid> {
    if !client.is_namespace {
        return Ok(client.object.name().to_owned());
    }
    let of_policy = client.annotation("egressGatewayPolicy").text()?;
    let of_gateway = routes.first().map(|route| route.gateway.name.as_str());
    Ok(of_policy.or(of_gateway).unwrap_or("egress").to_owned())
}

fn routes<'k>(
    client: &Client<'_>,
    objects: &[&Object],
    known: &'k [CalicoGateway],
    policy: &mut PolicyDraft,
    draft: &mut Draft,
) -> Result<Vec<Route<'k>>, Invalid> {
    if let Some(hops) = client.annotation("maxNextHops").text()? {
        policy.notes.lost(format!("{PREFIX}maxNextHops: {hops}. A policy of Egret has one egress IP on one node"));
    }
    let named = client.annotation("egressGatewayPolicy");
    if let Some(name) = named.text()? {
        let is_it = |o: &&&Object| GROUPS.contains(&o.group()) && o.kind() == "EgressGatewayPolicy" && o.name() == name;
        return match objects.iter().find(is_it) {
            Some(object) => routes_of_policy(client, object, objects, known, policy, draft),
            None => {
                let text = format!("the EgressGatewayPolicy {name:?} that it names is not in the input; give it too");
                draft.not_converted(client.object, text);
                Ok(Vec::new())
            }
        };
    }
    let (selector, namespaces) = (client.annotation("selector"), client.annotation("namespaceSelector"));
    let gateway = find(client, &selector, &namespaces, objects, known, policy)?;
    if gateway.is_none() {
        draft.not_converted(client.object, no_gateway(&selector)?);
    }
    Ok(gateway.map(|gateway| Route { gateway, covered: Covered::Everything }).into_iter().collect())
}

fn no_gateway(selector: &Field<'_>) -> Result<String, Invalid> {
    let selector = selector.text()?.unwrap_or_default();
    Ok(format!("no egress gateway in the input matches {selector:?}; give the EgressGateway that does"))
}

/// The gateway that a client's selectors find. Without a selector of namespaces, it is in the client's own.
fn find<'k>(
    client: &Client<'_>,
    selector: &Field<'_>,
    namespaces: &Field<'_>,
    objects: &[&Object],
    known: &'k [CalicoGateway],
    policy: &mut PolicyDraft,
) -> Result<Option<&'k CalicoGateway>, Invalid> {
    let parse = |field: &Field<'_>| {
        let text = field.text()?;
        text.map(Selector::parse).transpose().map_err(|why| field.invalid(why))
    };
    let Some(pods) = parse(selector)? else { return Ok(None) };
    let namespaces = parse(namespaces)?;
    let mut found = Vec::new();
    for gateway in known.iter().filter(|gateway| gateway.matches(&pods)) {
        let in_namespace = match &namespaces {
            Some(selector) => gateway.namespace_matches(selector, objects)?,
            None => gateway.is_in(client.namespace.unwrap_or("default")),
        };
        if in_namespace {
            found.push(gateway);
        }
    }
    if let [_, others @ ..] = found.as_slice()
        && !others.is_empty()
    {
        let names = others.iter().map(|gateway| gateway.name.as_str()).collect::<Vec<_>>().join(", ");
        policy.notes.lost(format!("the selector matches {names} too; a policy of Egret has one gateway"));
    }
    Ok(found.first().copied())
}

/// The rules of an EgressGatewayPolicy. The longest prefix decides, so a rule does not cover what others within it do.
fn routes_of_policy<'k>(
    client: &Client<'_>,
    object: &Object,
    objects: &[&Object],
    known: &'k [CalicoGateway],
    policy: &mut PolicyDraft,
    draft: &mut Draft,
) -> Result<Vec<Route<'k>>, Invalid> {
    let rules = object.field("spec.rules").list()?;
    let mut networks: Vec<IpNetwork> = Vec::new();
    for rule in &rules {
        networks.push(rule.at("destination").at("cidr").network()?.unwrap_or_else(|| everything_of(false)));
    }
    let mut routes: Vec<Route<'k>> = Vec::new();
    for (rule, network) in rules.iter().zip(&networks) {
        policy.notes.unknown(rule, &["destination", "description", "gateway", "gatewayPreference"])?;
        let (gateway, preference) = (rule.at("gateway"), rule.at("gatewayPreference"));
        if let Some(hint) = preference.text()?.filter(|hint| *hint != "None") {
            policy.notes.lost(format!("{}: {hint}. All pods of a policy leave from one node", preference.path()));
        }
        if !gateway.is_present() {
            continue;
        }
        if let Some(hops) = Some(gateway.at("maxNextHops")).filter(Field::is_present) {
            policy.notes.lost(format!("{}: {}. An egress IP is on one node", hops.path(), hops.shown()));
        }
        let (selector, namespaces) = (gateway.at("selector"), gateway.at("namespaceSelector"));
        let Some(gateway) = find(client, &selector, &namespaces, objects, known, policy)? else {
            draft.not_converted(object, no_gateway(&selector)?);
            continue;
        };
        let within: Vec<IpNetwork> =
            networks.iter().copied().filter(|other| other != network && contains(network, other)).collect();
        add_route(&mut routes, Route { gateway, covered: covered(&[*network], &within, &[]) });
    }
    Ok(routes)
}

/// Destinations of one gateway are one policy.
fn add_route<'k>(routes: &mut Vec<Route<'k>>, new: Route<'k>) {
    let same = routes.iter_mut().find(|route| route.gateway.name == new.gateway.name);
    match (same, new) {
        (_, Route { covered: Covered::Nothing, .. }) => {}
        (Some(Route { covered: Covered::Rules(all), .. }), Route { covered: Covered::Rules(more), .. }) => {
            let peers =
                |rules: &[EgressRule]| rules.iter().flat_map(|rule| rule.to.clone()).collect::<Vec<EgressPeer>>();
            let to = [peers(all), peers(&more)].concat();
            *all = to.chunks(100).map(|part| EgressRule { to: part.to_vec(), ports: Vec::new() }).collect();
        }
        (_, new) => routes.push(new),
    }
}

/// Policies that no annotation of the input names.
fn note_unused(objects: &[&Object], clients: &[Client<'_>], draft: &mut Draft) -> Result<(), Invalid> {
    for object in objects.iter().filter(|o| GROUPS.contains(&o.group()) && o.kind() == "EgressGatewayPolicy") {
        let mut used = false;
        for client in clients {
            used |= client.annotation("egressGatewayPolicy").text()? == Some(object.name());
        }
        if !used {
            let text = format!(
                "no Namespace, Pod or workload in the input names it in {PREFIX}egressGatewayPolicy, so it has no pods; \
                 give those too"
            );
            draft.not_converted(object, text);
        }
    }
    Ok(())
}
