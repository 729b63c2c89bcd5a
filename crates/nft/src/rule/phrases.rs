//! The phrases that rules are made of: conditions first, then statements.

use super::Field::*;
use super::*;

impl Rule {
    fn compare(self, left: impl Into<Operand>, operator: Operator, right: Constant) -> Self {
        self.with(Expression::Compare { left: left.into(), operator, right })
    }

    fn equals(self, left: impl Into<Operand>, number: u32) -> Self {
        self.compare(left, Operator::Equal, Constant::Number(number))
    }

    fn differs(self, left: impl Into<Operand>, number: u32) -> Self {
        self.compare(left, Operator::Unequal, Constant::Number(number))
    }

    fn in_set<const N: usize>(self, key: [Operand; N], set: impl Into<SetName>, not: bool) -> Self {
        let mut key = key.into_iter();
        let key = [key.next(), key.next(), key.next()];
        self.with(Expression::InSet { key, set: set.into(), not })
    }

    /// `iifname "NAME"`
    pub fn iif(self, name: &'static str) -> Self {
        self.compare(IifName, Operator::Equal, Constant::Name(name))
    }

    /// `iifgroup GROUP`
    pub fn iif_group(self, group: u32) -> Self {
        self.equals(IifGroup, group)
    }

    /// `iifgroup != GROUP`
    pub fn iif_group_not(self, group: u32) -> Self {
        self.differs(IifGroup, group)
    }

    /// `meta iifkind "vrf"`: the packet came in by an interface in a VRF, and passes the hook for the second time, as one
    /// of the VRF's own device (`vrf_ip_rcv`, drivers/net/vrf.c). The kind can be read since Linux 5.0.
    pub fn from_vrf(self) -> Self {
        self.compare(IifKind, Operator::Equal, Constant::Name("vrf"))
    }

    /// `oifgroup GROUP`
    pub fn oif_group(self, group: u32) -> Self {
        self.equals(OifGroup, group)
    }

    /// `oifgroup != GROUP`
    pub fn oif_group_not(self, group: u32) -> Self {
        self.differs(OifGroup, group)
    }

    /// `iif != 0`, at postrouting: the packet was forwarded, not sent by this node (Linux 5.7, `ip_output`).
    pub fn forwarded(self) -> Self {
        self.differs(Iif, 0)
    }

    /// `meta skuid >= 0`, at output: a process's socket sent the packet, not the kernel itself.
    pub fn by_process(self) -> Self {
        self.compare(SkUid, Operator::AtLeast, Constant::Number(0))
    }

    /// `meta nfproto ipv4` or `ipv6`
    pub fn ip(self, ip: Family) -> Self {
        self.equals(NfProto, nfproto(ip).into())
    }

    /// `meta protocol != ip meta protocol != ip6`
    pub fn not_ip(self) -> Self {
        self.differs(Protocol, ETH_P_IP).differs(Protocol, ETH_P_IPV6)
    }

    /// `ct direction original`
    pub fn ct_original(self) -> Self {
        self.equals(CtDirection, Direction::Original as u32)
    }

    /// `ct direction reply`
    pub fn ct_reply(self) -> Self {
        self.equals(CtDirection, Direction::Reply as u32)
    }

    /// `ct original ip saddr ADDRESS`: the address that began the connection (Linux 4.17).
    pub fn ct_original_saddr(self, address: IpAddr) -> Self {
        let field = CtSaddr(Family::of(&address), Direction::Original);
        self.compare(field, Operator::Equal, Constant::Network(address.into()))
    }

    /// `ct original ip daddr ADDRESS`: the destination that the connection began with (Linux 4.17).
    pub fn ct_original_daddr(self, address: IpAddr) -> Self {
        let field = CtDaddr(Family::of(&address), Direction::Original);
        self.compare(field, Operator::Equal, Constant::Network(address.into()))
    }

    /// `ct original protocol PROTOCOL`: the connection's, also of an ICMP error about it.
    pub fn ct_original_protocol(self, protocol: u8) -> Self {
        self.equals(CtProtocol, protocol.into())
    }

    /// `ct original proto-src PORT`: of ICMP, the identifier.
    pub fn ct_original_sport(self, port: u16) -> Self {
        self.equals(CtSport, port.into())
    }

    /// `ct original proto-dst PORT`
    pub fn ct_original_dport(self, port: u16) -> Self {
        self.equals(CtDport, port.into())
    }

    /// `ct state BIT,BIT`, any of the bits.
    pub fn ct_state(self, bits: u32) -> Self {
        self.differs(CtState.and(bits), 0)
    }

    /// `ct status snat`: the connection has another source address than its first packet had.
    pub fn ct_snat(self) -> Self {
        self.differs(CtStatus.and(IPS_SRC_NAT), 0)
    }

    /// `ct status & (snat | 0x80) == 0x80`: the connection's source NAT is settled and changed nothing.
    pub fn ct_not_snat(self) -> Self {
        self.equals(CtStatus.and(IPS_SRC_NAT | IPS_SRC_NAT_DONE), IPS_SRC_NAT_DONE)
    }

    /// `ct status expected`: a helper expected the connection.
    pub fn ct_expected(self) -> Self {
        self.differs(CtStatus.and(IPS_EXPECTED), 0)
    }

    /// `ct status expected,dnat / expected,dnat`: a helper expected the connection, from outside to an address that
    /// is translated.
    pub fn ct_expected_and_dnat(self) -> Self {
        self.equals(CtStatus.and(IPS_EXPECTED | IPS_DST_NAT), IPS_EXPECTED | IPS_DST_NAT)
    }

    /// `ct status assured`: both sides have sent packets, and a TCP connection is established.
    pub fn ct_assured(self) -> Self {
        self.differs(CtStatus.and(IPS_ASSURED), 0)
    }

    /// `ct status assured / assured,snat`
    pub fn ct_assured_and_not_snat(self) -> Self {
        self.equals(CtStatus.and(IPS_SRC_NAT | IPS_ASSURED), IPS_ASSURED)
    }

    /// `ct status ! confirmed`: this is the connection's first packet.
    pub fn ct_unconfirmed(self) -> Self {
        self.equals(CtStatus.and(IPS_CONFIRMED), 0)
    }

    /// `ct status confirmed`: this is not the connection's first packet.
    pub fn ct_confirmed(self) -> Self {
        self.differs(CtStatus.and(IPS_CONFIRMED), 0)
    }

    /// `ct mark & MASK == VALUE`
    pub fn ct_mark(self, mask: u32, value: u32) -> Self {
        self.equals(CtMark.and(mask), value)
    }

    /// `ct mark & MASK != VALUE`
    pub fn ct_mark_not(self, mask: u32, value: u32) -> Self {
        self.differs(CtMark.and(mask), value)
    }

    /// `meta mark & MASK == VALUE`
    pub fn mark(self, mask: u32, value: u32) -> Self {
        self.equals(Mark.and(mask), value)
    }

    /// `meta mark & MASK != VALUE`
    pub fn mark_not(self, mask: u32, value: u32) -> Self {
        self.differs(Mark.and(mask), value)
    }

    /// `ip saddr NETWORK`
    pub fn saddr_in(self, network: IpNetwork) -> Self {
        let ip = Family::of(&network.ip());
        self.ip(ip).compare(Saddr(ip), Operator::Equal, Constant::Network(network))
    }

    /// `ip saddr NETWORK` in a chain of the family bridge, which sees frames of all protocols.
    pub fn frame_saddr_in(self, network: IpNetwork) -> Self {
        let ip = Family::of(&network.ip());
        let protocol = match ip {
            Family::V4 => ETH_P_IP,
            Family::V6 => ETH_P_IPV6,
        };
        self.equals(Protocol, protocol).compare(Saddr(ip), Operator::Equal, Constant::Network(network))
    }

    /// `ip daddr NETWORK`
    pub fn daddr_in(self, network: IpNetwork) -> Self {
        let ip = Family::of(&network.ip());
        self.ip(ip).compare(Daddr(ip), Operator::Equal, Constant::Network(network))
    }

    /// `ip saddr @SET`
    pub fn saddr_in_set(self, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Saddr(ip).into()], set, false)
    }

    /// `ip daddr @SET`
    pub fn daddr_in_set(self, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Daddr(ip).into()], set, false)
    }

    /// `meta mark & MASK == @SET`
    pub fn mark_in_set(self, mask: u32, set: impl Into<SetName>) -> Self {
        self.in_set([Mark.and(mask)], set, false)
    }

    /// `ip daddr . meta l4proto @SET`
    pub fn daddr_and_protocol_in_set(self, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Daddr(ip).into(), L4Proto.into()], set, false)
    }

    /// `ip daddr . meta l4proto . th dport @SET`
    pub fn daddr_and_port_in_set(self, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Daddr(ip).into(), L4Proto.into(), Dport.into()], set, false)
    }

    /// `meta mark & MASK . ip saddr @SET`
    pub fn mark_and_saddr_in_set(self, mask: u32, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Mark.and(mask), Saddr(ip).into()], set, false)
    }

    /// `meta mark & MASK . ip saddr != @SET`
    pub fn mark_and_saddr_not_in_set(self, mask: u32, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Mark.and(mask), Saddr(ip).into()], set, true)
    }

    /// `meta mark & MASK . ct original ip saddr @SET`: the address that began the connection (Linux 4.17).
    pub fn mark_and_original_saddr_in_set(self, mask: u32, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Mark.and(mask), CtSaddr(ip, Direction::Original).into()], set, false)
    }

    /// `meta mark & MASK . ct reply ip saddr @SET`: the address that replies, a Service's backend for instance.
    pub fn mark_and_reply_saddr_in_set(self, mask: u32, ip: Family, set: impl Into<SetName>) -> Self {
        self.ip(ip).in_set([Mark.and(mask), CtSaddr(ip, Direction::Reply).into()], set, false)
    }

    /// `ct original proto-src & MASK . th sport & MASK != @SET`, for a rule that has matched the protocol.
    pub fn ports_not_in_set(self, mask: u16, set: impl Into<SetName>) -> Self {
        self.in_set([CtSport.and(mask.into()), Sport.and(mask.into())], set, true)
    }

    /// `fib daddr type TYPE`
    pub fn daddr_type(self, kind: u32) -> Self {
        self.equals(DaddrType, kind)
    }

    /// `fib daddr . iif type TYPE`: as the interface sees it that the packet came in by.
    pub fn daddr_type_at_iif(self, kind: u32) -> Self {
        self.equals(DaddrTypeAtIif, kind)
    }

    /// `fib saddr . iif oif != 0`: packets to where it came from would leave by the interface that it came in by.
    pub fn back_by_iif(self) -> Self {
        self.differs(SaddrOifAtIif, 0)
    }

    /// `fib saddr . iif oif 0`: packets to the source would not leave by the interface that this packet came in by,
    /// or the source is an address of this host or of nobody (`nft_fib4_eval`, `nft_fib6_eval`).
    pub fn not_back_by_iif(self) -> Self {
        self.equals(SaddrOifAtIif, 0)
    }

    /// `meta l4proto PROTOCOL`
    pub fn l4(self, protocol: u8) -> Self {
        self.equals(L4Proto, protocol.into())
    }

    /// `th sport PORT`, for a rule that has matched the protocol.
    pub fn sport(self, port: u16) -> Self {
        self.equals(Sport, port.into())
    }

    /// `th dport PORT`, for a rule that has matched the protocol.
    pub fn dport(self, port: u16) -> Self {
        self.equals(Dport, port.into())
    }

    /// `th dport != PORT`. For protocols without ports, the kernel compares the bytes at the place of the port.
    pub fn dport_not(self, port: u16) -> Self {
        self.differs(Dport, port.into())
    }

    /// `icmp type TYPE` or `icmpv6 type TYPE`, for a rule that has matched the protocol.
    pub fn icmp_type(self, kind: u8) -> Self {
        self.equals(IcmpType, kind.into())
    }

    /// `ip6 hoplimit LIMIT`, for a rule that has matched the IP version.
    pub fn hop_limit(self, limit: u8) -> Self {
        self.equals(HopLimit, limit.into())
    }

    /// `tcp flags syn`
    pub fn tcp_syn(self) -> Self {
        self.l4(protocol::TCP).differs(TcpFlags.and(TCP_FLAG_SYN), 0)
    }

    /// `tcp flags ! syn`
    pub fn tcp_not_syn(self) -> Self {
        self.l4(protocol::TCP).compare(TcpFlags.and(TCP_FLAG_SYN), Operator::Equal, Constant::Number(0))
    }

    /// `ether daddr != MAC`
    pub fn ether_daddr_not(self, mac: [u8; 6]) -> Self {
        self.compare(EtherDaddr, Operator::Unequal, Constant::Mac(mac))
    }
}

impl Rule {
    fn assign(self, target: Writable, value: Value) -> Self {
        self.with(Expression::Assign(target, value))
    }

    /// `counter name "NAME"`
    pub fn counter(self, name: &'static str) -> Self {
        self.with(Expression::Counter(name))
    }

    /// `log group GROUP`
    pub fn log(self, group: u16) -> Self {
        self.with(Expression::Log(group))
    }

    /// `limit rate 1/hour burst PACKETS packets`: so many packets, and one more every hour.
    pub fn limit_burst(self, packets: u32) -> Self {
        self.with(Expression::LimitBurst(packets))
    }

    /// `limit name meta mark & MASK map @MAP`: the rule continues for packets beyond the limit that the map has for the
    /// mark. It ends for packets within it, and for marks without a limit.
    pub fn beyond_limit_of_mark(self, mask: u32, map: impl Into<SetName>) -> Self {
        self.with(Expression::LimitMap(Mark.and(mask), map.into()))
    }

    /// `limit name ip daddr map @MAP`, by destination address.
    pub fn beyond_limit_of_daddr(self, ip: Family, map: impl Into<SetName>) -> Self {
        self.ip(ip).with(Expression::LimitMap(Daddr(ip).into(), map.into()))
    }

    /// `meta nftrace set 1`: the kernel tells of the packet's way from here on, see [`crate::trace`].
    pub fn trace(self) -> Self {
        self.with(Expression::Trace)
    }

    /// `notrack`
    pub fn notrack(self) -> Self {
        self.with(Expression::Notrack)
    }

    /// `meta mark set VALUE`
    pub fn set_mark(self, value: u32) -> Self {
        self.assign(Writable::Mark, Value::Number(value))
    }

    /// `meta mark set meta mark & MASK`
    pub fn clear_mark(self, keep: u32) -> Self {
        self.assign(Writable::Mark, Value::Of(Mark.and(keep)))
    }

    /// `meta mark set meta mark & KEEP | VALUE`: the bits of `mask` become `value`.
    pub fn set_mark_in(self, mask: u32, value: u32) -> Self {
        let bits = Bits::Put { mask, value };
        self.assign(Writable::Mark, Value::Of(Operand { field: Mark, bits }))
    }

    /// `meta mark set meta mark ^ VALUE`
    pub fn flip_mark(self, value: u32) -> Self {
        self.assign(Writable::Mark, Value::Of(Mark.xor(value)))
    }

    /// `ct mark set VALUE`
    pub fn set_ct_mark(self, value: u32) -> Self {
        self.assign(Writable::CtMark, Value::Number(value))
    }

    /// `ct mark set jhash … mod MODULUS seed SEED map @MAP`, of the addresses and ports of a connection whose first packet
    /// this is. The map has the keys 0 to MODULUS - 1. A packet of a connection without ports has those that connection
    /// tracking gives it; if it is not tracked, the rule does not match.
    pub fn set_ct_mark_by_hash(self, ip: Family, modulus: u32, map: impl Into<SetName>) -> Self {
        let fields = [
            CtSaddr(ip, Direction::Original).into(),
            CtSport.into(),
            CtSaddr(ip, Direction::Reply).into(),
            CtDport.into(),
        ];
        self.ip(ip).assign(Writable::CtMark, Value::MapOfHash(fields, modulus, map.into()))
    }

    /// `meta mark set ct mark`
    pub fn set_mark_from_ct(self) -> Self {
        self.assign(Writable::Mark, Value::Of(CtMark.into()))
    }

    /// `meta mark set ct mark map @MAP`
    pub fn set_mark_by_ct_mark(self, map: impl Into<SetName>) -> Self {
        self.assign(Writable::Mark, Value::Map(CtMark.into(), map.into()))
    }

    /// `meta mark set iif map @MAP`
    pub fn set_mark_by_iif(self, map: impl Into<SetName>) -> Self {
        self.assign(Writable::Mark, Value::Map(Iif.into(), map.into()))
    }

    /// `meta mark set ip daddr map @MAP`
    pub fn set_mark_by_daddr(self, ip: Family, map: impl Into<SetName>) -> Self {
        self.assign(Writable::Mark, Value::Map(Daddr(ip).into(), map.into()))
    }

    /// `ether daddr set meta mark map @MAP`
    pub fn set_ether_daddr_by_mark(self, map: impl Into<SetName>) -> Self {
        self.assign(Writable::EtherDaddr, Value::Map(Mark.into(), map.into()))
    }

    /// `ct mark set VALUE meta mark set VALUE map @MAP`. Nothing is set if the map does not contain the value.
    pub fn set_ct_mark_and_mark_by(self, value: u32, map: impl Into<SetName>) -> Self {
        let looked_up = Value::MapOfNumber(value, map.into());
        self.with(Expression::AssignBoth([(Writable::CtMark, Value::Number(value)), (Writable::Mark, looked_up)]))
    }

    /// `ct mark set ether saddr map @PEERS meta mark set meta mark & MASK map @RX`. Nothing is set unless both maps
    /// contain their key.
    pub fn admit(self, peers: impl Into<SetName>, mask: u32, paths: impl Into<SetName>) -> Self {
        let peer = Value::Map(EtherSaddr.into(), peers.into());
        let path = Value::Map(Mark.and(mask), paths.into());
        self.with(Expression::AssignBoth([(Writable::CtMark, peer), (Writable::Mark, path)]))
    }

    /// `fwd to "NAME"`, in a chain of the family netdev at the hook ingress. `index` is the index of the device. The
    /// packet leaves the chain.
    pub fn forward(self, index: u32, device: &'static str) -> Self {
        self.with(Expression::Forward { index, device })
    }

    /// `dup to ADDRESS device "NAME"`, in a table of the address's family (`nft_dup_ipv4.c` and `nft_dup_ipv6.c` do
    /// not exist for `inet`). `index` is the index of the device. The copy is not tracked.
    pub fn dup(self, to: IpAddr, index: u32, device: &'static str) -> Self {
        self.with(Expression::Dup { to, index, device })
    }

    /// `snat ip to ip saddr`: settles the connection's source NAT without changing anything.
    pub fn snat_identity(self, ip: Family) -> Self {
        self.ip(ip).with(Expression::Snat(ip, Value::Of(Saddr(ip).into())))
    }

    /// `snat ip to meta mark & MASK map @MAP`
    pub fn snat_by_mark(self, ip: Family, mask: u32, map: impl Into<SetName>) -> Self {
        self.ip(ip).with(Expression::Snat(ip, Value::Map(Mark.and(mask), map.into())))
    }

    /// `tcp option maxseg size set rt mtu`. The kernel only lowers the value (`nft_exthdr_tcp_set_eval`).
    pub fn clamp_mss(self) -> Self {
        self.with(Expression::ClampMss)
    }

    /// `ip dscp set VALUE`, of six bits. The two bits of ECN stay.
    pub fn set_dscp(self, ip: Family, value: u8) -> Self {
        self.ip(ip).with(Expression::SetDscp(ip, value))
    }

    /// `accept`
    pub fn accept(self) -> Self {
        self.with(Expression::Verdict(Verdict::Accept))
    }

    /// `drop`
    pub fn drop(self) -> Self {
        self.with(Expression::Verdict(Verdict::Drop))
    }

    /// `return`
    pub fn return_(self) -> Self {
        self.with(Expression::Verdict(Verdict::Return))
    }

    /// `jump CHAIN`
    pub fn jump(self, chain: &'static str) -> Self {
        self.with(Expression::Verdict(Verdict::Jump(chain)))
    }

    /// `goto CHAIN`
    pub fn goto(self, chain: &'static str) -> Self {
        self.with(Expression::Verdict(Verdict::Goto(chain)))
    }

    /// `iif vmap @MAP`
    pub fn vmap_by_iif(self, map: impl Into<SetName>) -> Self {
        self.with(Expression::VerdictMap(Iif.into(), map.into()))
    }

    /// `meta mark & MASK vmap @MAP`
    pub fn vmap_by_mark(self, mask: u32, map: impl Into<SetName>) -> Self {
        self.with(Expression::VerdictMap(Mark.and(mask), map.into()))
    }
}
