use super::*;
use crate::api::{AllocationsWriter, FamilyUsage, PoolUsage};
use proptest::option::of;
use proptest::prelude::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?"
}

fn address() -> impl Strategy<Value = AddressPair> {
    let v4 = any::<u32>().prop_map(Into::into);
    let v6 = any::<u128>().prop_map(Into::into);
    (of(v4), of(v6)).prop_map(|(ipv4, ipv6)| AddressPair { ipv4, ipv6 })
}

fn policies() -> impl Strategy<Value = Users> {
    let key = (of(name()), name())
        .prop_map(|(namespace, name)| PolicyKey { namespace: namespace.map(Name::from), name: name.into() });
    prop::collection::vec(key, 0..4).prop_map(Users::from)
}

fn allocation() -> impl Strategy<Value = Allocation> {
    let kind = prop::sample::select(KINDS.map(|(kind, _)| kind).to_vec());
    (any::<u16>(), (kind, any::<u16>()), address(), of(name()), any::<i64>(), of(name()), policies()).prop_map(
        |(id, (kind, ordinal), address, node, since, leaving, policies)| Allocation {
            id,
            kind,
            ordinal,
            address,
            node: node.map(Name::from),
            since,
            leaving: leaving.map(Name::from),
            service: (kind == AllocationKind::Service).then(|| "shop/frontend".into()),
            policies,
        },
    )
}

fn released() -> impl Strategy<Value = ReleasedAllocation> {
    let all = (any::<u16>(), address(), policies(), any::<i64>(), any::<bool>());
    all.prop_map(|(id, address, policies, at, of_service)| ReleasedAllocation {
        id,
        address,
        policies,
        at,
        service: of_service.then(|| "shop/frontend".into()),
    })
}

proptest! {
    #[test]
    fn allocations_stay_the_same(
        allocations in prop::collection::vec(allocation(), 0..20),
        released in prop::collection::vec(released(), 0..10),
    ) {
        let writer = Some(AllocationsWriter { name: "one".into(), term: 3, writes: 7 });
        let status = EgressGatewayStatus {
            nodes: vec!["g1".into()], node_count: 1, not_ready_nodes: vec!["g1".into()], ready_nodes: 7,
            usage: PoolUsage { ipv4: Some(FamilyUsage { total: 9, used: 2, cooling_down: 1 }), ipv6: None },
            conditions: vec![], text: None, allocations, released, writer, reports_requested_at: Some(5), opt_in: Some(Box::default()),
        };
        let written = write(&status);
        prop_assert!(written.allocations.is_empty() && written.released.is_empty());
        prop_assert_eq!(read(written), Ok(status));
    }
}

#[test]
fn an_invalid_line_is_named() {
    let lines =
        ["7", "X D - - 0 - -", "7 Q - - 0 -", "7 D 192.0.2 - 0 - -", "7 D - 1 0 - -", "7 L - - 0 - -", "-7 - x -"];
    for wrong in lines {
        let text = format!("node g1\n7 D - 0 0 - -\n{wrong}\n");
        let error = read(EgressGatewayStatus { text: Some(text), ..Default::default() }).unwrap_err();
        assert!(error.contains(&format!("{wrong:?}")), "{error}");
    }
}

#[test]
fn what_a_later_version_writes_is_no_error() {
    let text = "node g1\nzone g1 a\n7 D 192.0.2.50 0 0 - shop/a later=1\n8 Q2 192.0.2.51 0 0 - shop/b,shop/c x y\n\
                -9 192.0.2.52 1 shop/d shop/web later\n";
    let status = read(EgressGatewayStatus { text: Some(text.into()), ..Default::default() }).unwrap();
    let kinds: Vec<_> = status.allocations.iter().map(|allocation| (allocation.id, allocation.kind)).collect();
    assert_eq!(kinds, [(7, AllocationKind::Dedicated), (8, AllocationKind::Unknown)]);
    let unknown = &status.allocations[1];
    assert_eq!(unknown.address.ipv4, Some([192, 0, 2, 51].into()));
    assert_eq!(unknown.policies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["shop/b", "shop/c"]);
    assert_eq!(status.released[0].service.as_deref(), Some("shop/web"));
}

/// With names of the usual lengths, all the ids that there are fit into one object.
#[test]
fn all_allocation_ids_fit_into_one_object() {
    let allocation = |n: u16| Allocation {
        id: n,
        kind: AllocationKind::Dedicated,
        ordinal: 0,
        address: AddressPair {
            ipv4: Some((0xc612_6400 + u32::from(n)).into()),
            ipv6: Some(((0x2001_0db8_0123_4567 << 64) + u128::from(n) + 0xff_0000).into()),
        },
        node: Some(format!("ip-10-64-0-{}.eu-central-1.compute.internal", n % 3).into()),
        since: 1_763_718_000,
        leaving: None,
        service: None,
        policies: [PolicyKey::from(&*format!("team-{:03}/app-{n:05}", n / 100))].into(),
    };
    let status = EgressGatewayStatus { allocations: (1..=16_383).map(allocation).collect(), ..Default::default() };
    let objects = serde_json::to_string(&status).unwrap().len();
    let text = serde_json::to_string(&write(&status)).unwrap().len();
    assert!(text < 1_400_000 && objects > 2_400_000, "{text} and {objects} bytes");
}
