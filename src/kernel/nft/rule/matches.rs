//! What a packet must be like.

use super::*;

impl Rule {
    /// `iifname NAME`
    pub fn iif(self, name: &str) -> Self {
        self.load_meta(NFT_META_IIFNAME, R1).equals(&interface_name(name))
    }

    /// `iifgroup GROUP`
    pub fn iif_group(self, group: u32) -> Self {
        self.load_meta(NFT_META_IIFGROUP, R1).equals(&group.to_ne_bytes())
    }

    /// `iifgroup != GROUP`
    pub fn iif_group_not(self, group: u32) -> Self {
        self.load_meta(NFT_META_IIFGROUP, R1).differs(&group.to_ne_bytes())
    }

    /// `oifgroup GROUP`
    pub fn oif_group(self, group: u32) -> Self {
        self.load_meta(NFT_META_OIFGROUP, R1).equals(&group.to_ne_bytes())
    }

    /// `oifgroup != GROUP`
    pub fn oif_group_not(self, group: u32) -> Self {
        self.load_meta(NFT_META_OIFGROUP, R1).differs(&group.to_ne_bytes())
    }

    /// `iif != 0`, at postrouting: another than this node has sent it (Linux 5.7, `ip_output`).
    pub fn forwarded(self) -> Self {
        self.load_meta(NFT_META_IIF, R1).differs(&[0; 4])
    }

    /// `meta skuid >= 0`, at output: a process's socket has sent it, not the kernel itself.
    pub fn by_process(self) -> Self {
        self.load_meta(NFT_META_SKUID, R1).compare(5, &[0; 4])
    }

    /// `meta nfproto ipv4` or `ipv6`
    pub fn ip(self, ip: Ip) -> Self {
        self.load_meta(NFT_META_NFPROTO, R1).equals(&[ip.nfproto()])
    }

    /// `meta protocol != { ip, ip6 }`
    pub fn not_ip(self) -> Self {
        self.load_meta(NFT_META_PROTOCOL, R1)
            .differs(&0x0800u16.to_be_bytes())
            .load_meta(NFT_META_PROTOCOL, R1)
            .differs(&0x86ddu16.to_be_bytes())
    }

    /// `ct direction original`
    pub fn ct_original(self) -> Self {
        self.load_ct(NFT_CT_DIRECTION).equals(&[0])
    }

    /// `ct direction reply`
    pub fn ct_reply(self) -> Self {
        self.load_ct(NFT_CT_DIRECTION).equals(&[1])
    }

    /// `ct state { … }`, any of the bits.
    pub fn ct_state(self, bits: u32) -> Self {
        self.load_ct(NFT_CT_STATE).and(&bits.to_ne_bytes()).differs(&[0; 4])
    }

    /// `ct status snat`: the connection bears another source address than its first packet came with.
    pub fn ct_snat(self) -> Self {
        self.load_ct(NFT_CT_STATUS).and(&IPS_SRC_NAT.to_ne_bytes()).differs(&[0; 4])
    }

    /// `ct status & (snat | 0x80) == 0x80`: the connection's source address is settled, and is the one that its first
    /// packet came with.
    pub fn ct_not_snat(self) -> Self {
        let both = (IPS_SRC_NAT | IPS_SRC_NAT_DONE).to_ne_bytes();
        self.load_ct(NFT_CT_STATUS).and(&both).equals(&IPS_SRC_NAT_DONE.to_ne_bytes())
    }

    /// `ct status expected`: a helper has foreseen the connection.
    pub fn ct_expected(self) -> Self {
        self.load_ct(NFT_CT_STATUS).and(&IPS_EXPECTED.to_ne_bytes()).differs(&[0; 4])
    }

    /// `ct status & (expected | dnat) == expected | dnat`: it was foreseen from outside to an address that is translated.
    pub fn ct_expected_and_dnat(self) -> Self {
        let both = (IPS_EXPECTED | IPS_DST_NAT).to_ne_bytes();
        self.load_ct(NFT_CT_STATUS).and(&both).equals(&both)
    }

    /// `ct status assured`: both sides have spoken, and of TCP neither is making the connection any more.
    pub fn ct_assured(self) -> Self {
        self.load_ct(NFT_CT_STATUS).and(&IPS_ASSURED.to_ne_bytes()).differs(&[0; 4])
    }

    /// `ct status & (snat | assured) == assured`
    pub fn ct_assured_and_not_snat(self) -> Self {
        let both = (IPS_SRC_NAT | IPS_ASSURED).to_ne_bytes();
        self.load_ct(NFT_CT_STATUS).and(&both).equals(&IPS_ASSURED.to_ne_bytes())
    }

    /// `ct mark and MASK == VALUE`
    pub fn ct_mark(self, mask: u32, value: u32) -> Self {
        self.load_ct(NFT_CT_MARK).and(&mask.to_ne_bytes()).equals(&value.to_ne_bytes())
    }

    /// `ct mark and MASK != VALUE`
    pub fn ct_mark_not(self, mask: u32, value: u32) -> Self {
        self.load_ct(NFT_CT_MARK).and(&mask.to_ne_bytes()).differs(&value.to_ne_bytes())
    }

    /// `meta mark and MASK == VALUE`
    pub fn mark(self, mask: u32, value: u32) -> Self {
        self.load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes()).equals(&value.to_ne_bytes())
    }

    /// `meta mark and MASK != VALUE`
    pub fn mark_not(self, mask: u32, value: u32) -> Self {
        self.load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes()).differs(&value.to_ne_bytes())
    }

    /// `ip saddr ADDRESS`
    pub fn saddr(self, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(a) => self.ip(Ip::V4).load_saddr(Ip::V4, R1).equals(&a.octets()),
            IpAddr::V6(a) => self.ip(Ip::V6).load_saddr(Ip::V6, R1).equals(&a.octets()),
        }
    }

    /// `ip saddr NETWORK`
    pub fn saddr_in(self, network: IpNetwork) -> Self {
        let ip = if network.is_ipv4() { Ip::V4 } else { Ip::V6 };
        self.ip(ip).load_saddr(ip, R1).in_network(network, true)
    }

    /// `ip daddr NETWORK`
    pub fn daddr_in(self, network: IpNetwork) -> Self {
        let ip = if network.is_ipv4() { Ip::V4 } else { Ip::V6 };
        self.ip(ip).load_daddr(ip).in_network(network, true)
    }

    /// `ip daddr != NETWORK`, for a rule that has matched the IP version.
    pub fn daddr_not_in(self, network: IpNetwork) -> Self {
        let ip = if network.is_ipv4() { Ip::V4 } else { Ip::V6 };
        self.load_daddr(ip).in_network(network, false)
    }

    fn in_network(self, network: IpNetwork, inside: bool) -> Self {
        let (address, mask) = match (network.network(), network.mask()) {
            (IpAddr::V4(a), IpAddr::V4(m)) => (a.octets().to_vec(), m.octets().to_vec()),
            (IpAddr::V6(a), IpAddr::V6(m)) => (a.octets().to_vec(), m.octets().to_vec()),
            _ => unreachable!("a network's address and mask are of one family"),
        };
        let masked = self.and(&mask);
        if inside { masked.equals(&address) } else { masked.differs(&address) }
    }

    /// `ip saddr @SET`
    pub fn saddr_in_set(self, ip: Ip, set: &str) -> Self {
        self.ip(ip).load_saddr(ip, R1).lookup(set, R1, None, false)
    }

    /// `ip daddr @SET`
    pub fn daddr_in_set(self, ip: Ip, set: &str) -> Self {
        self.ip(ip).load_daddr(ip).lookup(set, R1, None, false)
    }

    /// `ip daddr . meta l4proto @SET`
    pub fn daddr_and_protocol_in_set(self, ip: Ip, set: &str) -> Self {
        self.load_daddr_and_protocol(ip).lookup(set, R1, None, false)
    }

    /// `ip daddr . meta l4proto . th dport @SET`
    pub fn daddr_and_port_in_set(self, ip: Ip, set: &str) -> Self {
        let port = R1_FIRST_WORD + ip.len() / 4 + 1;
        let loaded = self.load_daddr_and_protocol(ip);
        loaded.load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_DPORT, 2, port).lookup(set, R1, None, false)
    }

    fn load_daddr_and_protocol(self, ip: Ip) -> Self {
        self.ip(ip).load_daddr(ip).load_meta(NFT_META_L4PROTO, R1_FIRST_WORD + ip.len() / 4)
    }

    /// `meta mark and MASK . ip saddr @SET`
    pub fn mark_and_saddr_in_set(self, mask: u32, ip: Ip, set: &str) -> Self {
        self.load_mark_and_saddr(mask, ip).lookup(set, R1, None, false)
    }

    /// `meta mark and MASK . ct original ip saddr @SET`: the address that began the connection (Linux 4.17).
    pub fn mark_and_original_saddr_in_set(self, mask: u32, ip: Ip, set: &str) -> Self {
        self.mark_and_ct_saddr_in_set(mask, ip, IP_CT_DIR_ORIGINAL, set)
    }

    /// `meta mark and MASK . ct reply ip saddr @SET`: the address that answers, which is a Service's backend.
    pub fn mark_and_reply_saddr_in_set(self, mask: u32, ip: Ip, set: &str) -> Self {
        self.mark_and_ct_saddr_in_set(mask, ip, IP_CT_DIR_REPLY, set)
    }

    fn mark_and_ct_saddr_in_set(self, mask: u32, ip: Ip, direction: u8, set: &str) -> Self {
        let loaded = self.ip(ip).load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes());
        let loaded = loaded.expression("ct", |d| {
            d.be32(NFTA_CT_KEY, if ip == Ip::V4 { NFT_CT_SRC_IP } else { NFT_CT_SRC_IP6 });
            d.be32(NFTA_CT_DREG, R1_SECOND_WORD);
            d.attribute(NFTA_CT_DIRECTION, &[direction]);
        });
        loaded.lookup(set, R1, None, false)
    }

    /// `meta mark and MASK . ip saddr != @SET`
    pub fn mark_and_saddr_not_in_set(self, mask: u32, ip: Ip, set: &str) -> Self {
        self.load_mark_and_saddr(mask, ip).lookup(set, R1, None, true)
    }

    fn load_mark_and_saddr(self, mask: u32, ip: Ip) -> Self {
        let loaded = self.ip(ip).load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes());
        loaded.load_saddr(ip, R1_SECOND_WORD)
    }

    /// `fib daddr type TYPE`
    pub fn daddr_type(self, kind: u32) -> Self {
        self.fib(NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR).equals(&kind.to_ne_bytes())
    }

    /// `fib daddr . iif type TYPE`: as the interface sees it that the packet came in by.
    pub fn daddr_type_at_iif(self, kind: u32) -> Self {
        self.fib(NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR | NFTA_FIB_F_IIF).equals(&kind.to_ne_bytes())
    }

    /// `fib saddr . iif oif != 0`: packets to where it came from would leave by the interface that it came in by.
    pub fn back_by_iif(self) -> Self {
        self.fib(NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF).differs(&[0; 4])
    }

    /// `fib saddr . iif oif 0`: packets to where it came from would leave by another interface, or by none; the source is
    /// an address of this host's, or nobody's (`nft_fib4_eval`, `nft_fib6_eval`).
    pub fn not_back_by_iif(self) -> Self {
        self.fib(NFT_FIB_RESULT_OIF, NFTA_FIB_F_SADDR | NFTA_FIB_F_IIF).equals(&[0; 4])
    }

    fn fib(self, result: u32, flags: u32) -> Self {
        self.expression("fib", |d| {
            d.be32(NFTA_FIB_DREG, R1);
            d.be32(NFTA_FIB_RESULT, result);
            d.be32(NFTA_FIB_FLAGS, flags);
        })
    }

    /// `meta l4proto PROTOCOL`
    pub fn l4(self, protocol: u8) -> Self {
        self.load_meta(NFT_META_L4PROTO, R1).equals(&[protocol])
    }

    /// `th dport FIRST-LAST`, for a rule that has matched the protocol.
    pub fn dport(self, first: u16, last: u16) -> Self {
        let loaded = self.load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_DPORT, 2, R1);
        if first == last {
            return loaded.equals(&first.to_be_bytes());
        }
        loaded.compare(5, &first.to_be_bytes()).compare(3, &last.to_be_bytes())
    }

    /// `th dport != PORT`; of protocols without ports, whatever stands where others have it.
    pub fn dport_not(self, port: u16) -> Self {
        self.load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_DPORT, 2, R1).differs(&port.to_be_bytes())
    }

    /// `ct status ! confirmed`: it is the connection's first packet.
    pub fn ct_unconfirmed(self) -> Self {
        self.load_ct(NFT_CT_STATUS).and(&IPS_CONFIRMED.to_ne_bytes()).equals(&[0; 4])
    }

    /// `ct status confirmed`: it is not the connection's first packet.
    pub fn ct_confirmed(self) -> Self {
        self.load_ct(NFT_CT_STATUS).and(&IPS_CONFIRMED.to_ne_bytes()).differs(&[0; 4])
    }

    /// `ct original proto-src and MASK . th sport and MASK != @SET`, for a rule that has matched the protocol.
    pub fn ports_not_in_set(self, mask: u16, set: &str) -> Self {
        let mask = mask.to_be_bytes();
        self.expression("ct", |d| {
            d.be32(NFTA_CT_KEY, NFT_CT_PROTO_SRC);
            d.be32(NFTA_CT_DREG, R1);
            d.attribute(NFTA_CT_DIRECTION, &[IP_CT_DIR_ORIGINAL]);
        })
        .and(&mask)
        .load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_SPORT, 2, R1_SECOND_WORD)
        .bitwise(R1_SECOND_WORD, &mask, &[0; 2])
        .lookup(set, R1, None, true)
    }

    /// `icmp type TYPE` or `icmpv6 type TYPE`, for a rule that has matched the protocol.
    pub fn icmp_type(self, kind: u8) -> Self {
        self.load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_ICMP_TYPE, 1, R1).equals(&[kind])
    }

    /// `ip6 hoplimit LIMIT`, for a rule that has matched the IP version.
    pub fn hop_limit(self, limit: u8) -> Self {
        self.load_payload(NFT_PAYLOAD_NETWORK_HEADER, OFFSET_HOP_LIMIT, 1, R1).equals(&[limit])
    }

    /// `tcp flags syn`
    pub fn tcp_syn(self) -> Self {
        self.l4(protocol::TCP)
            .load_payload(NFT_PAYLOAD_TRANSPORT_HEADER, OFFSET_TCP_FLAGS, 1, R1)
            .and(&[TCP_FLAG_SYN])
            .differs(&[0])
    }

    /// `ether daddr != MAC`
    pub fn ether_daddr_not(self, mac: [u8; 6]) -> Self {
        self.load_payload(NFT_PAYLOAD_LL_HEADER, 0, 6, R1).differs(&mac)
    }
}

/// An interface's name as the kernel compares it: all of `IFNAMSIZ` bytes.
fn interface_name(name: &str) -> [u8; IFNAMSIZ] {
    let mut out = [0; IFNAMSIZ];
    for (to, from) in out.iter_mut().zip(name.bytes().take(IFNAMSIZ - 1)) {
        *to = from;
    }
    out
}
