use super::*;

fn state() -> NodeState {
    let address = AddressPair { ipv4: Some([192, 0, 2, 50].into()), ipv6: None };
    NodeState {
        node: "g1".into(),
        not_ready: None,
        passes: 12,
        pending: BTreeMap::new(),
        desired: Desired {
            egress_ips: [(
                1,
                DesiredEgressIp {
                    gateway: "main".into(),
                    address,
                    traffic: "local".into(),
                    owner: None,
                    sent_packets: Some(7),
                    here: true,
                },
            )]
            .into(),
            health_address: true,
            uplinks: vec!["IPv4".into()],
            direct: vec!["10.0.0.0/8".into()],
        },
        observed: Observed {
            tunnel_address: Some([10, 0, 0, 1].into()),
            addresses: vec![[10, 0, 0, 1].into()],
            egress_ips: [(1, ObservedEgressIp { state: "Conflict".into(), here: false, refused: Some("why".into()) })]
                .into(),
            dead_nodes: vec!["g2".into()],
            lost_uplinks: BTreeMap::new(),
            pods: Pods { selected: 1, isolated: 0, free: 3, unmanaged: 0 },
            selected: vec![SelectedPod {
                addresses: vec![[10, 244, 1, 2].into()],
                policy_chain: "policy-1".into(),
                egress_ids: vec![1],
                isolated: false,
            }],
            faults: [("node n2".into(), "its end of the tunnel is no host's address".into())].into(),
            dropped_packets: BTreeMap::default(),
        },
    }
}

#[test]
fn the_text_says_what_is_desired_and_what_is_observed() {
    assert_eq!(
        state().to_string(),
        "node g1: in sync after 12 passes\n\
         pods: 1 selected, 0 isolated, 3 free, 0 unmanaged\n\
         tunnel: 10.0.0.1\n\
         health: this node answers probes; uplinks: IPv4\n\
         unreachable: g2\n\
         fault of node n2: its end of the tunnel is no host's address\n\
         egress IP 1 (192.0.2.50, gateway main): desired here, traffic local; observed elsewhere, Conflict\n  \
         refused: why\n\
         pod 10.244.1.2: policy-1, egress IDs 1\n"
    );
}

#[test]
fn a_written_state_is_parsed_back() {
    let response = StateResponse { version: PROTOCOL, state: Some(state()) };
    let read: StateResponse = serde_json::from_slice(&serde_json::to_vec(&response).unwrap()).unwrap();
    assert_eq!(read.state, Some(state()));
}
