//! What becomes of a packet.

use super::*;

impl Rule {
    /// `counter name NAME`
    pub fn counter(self, name: &str) -> Self {
        self.expression("objref", |d| {
            d.be32(NFTA_OBJREF_IMM_TYPE, NFT_OBJECT_COUNTER);
            d.text(NFTA_OBJREF_IMM_NAME, name);
        })
    }

    /// `log group GROUP`
    pub fn log(self, group: u16) -> Self {
        self.expression("log", |d| d.attribute(NFTA_LOG_GROUP, &group.to_be_bytes()))
    }

    /// `notrack`
    pub fn notrack(self) -> Self {
        self.expression("notrack", |_| {})
    }

    /// `meta mark set VALUE`
    pub fn set_mark(self, value: u32) -> Self {
        self.immediate(R1, &value.to_ne_bytes()).store_mark(R1)
    }

    /// `meta mark set meta mark and MASK`
    pub fn clear_mark(self, keep: u32) -> Self {
        self.load_meta(NFT_META_MARK, R1).and(&keep.to_ne_bytes()).store_mark(R1)
    }

    /// `meta mark set meta mark and not MASK or VALUE`
    pub fn set_mark_in(self, mask: u32, value: u32) -> Self {
        let keep = (!mask).to_ne_bytes();
        self.load_meta(NFT_META_MARK, R1).bitwise(R1, &keep, &value.to_ne_bytes()).store_mark(R1)
    }

    /// `meta mark set meta mark xor VALUE`
    pub fn flip_mark(self, value: u32) -> Self {
        self.load_meta(NFT_META_MARK, R1).bitwise(R1, &[0xff; 4], &value.to_ne_bytes()).store_mark(R1)
    }

    /// `ct mark set VALUE`
    pub fn set_ct_mark(self, value: u32) -> Self {
        self.immediate(R1, &value.to_ne_bytes()).store_ct_mark(R1)
    }

    /// `meta mark set ct mark`
    pub fn set_mark_from_ct(self) -> Self {
        self.load_ct(NFT_CT_MARK).store_mark(R1)
    }

    /// `meta mark set ct mark map @MAP`
    pub fn set_mark_by_ct_mark(self, map: &str) -> Self {
        self.load_ct(NFT_CT_MARK).lookup(map, R1, Some(R1), false).store_mark(R1)
    }

    /// `meta mark set iif map @MAP`
    pub fn set_mark_by_iif(self, map: &str) -> Self {
        self.load_meta(NFT_META_IIF, R1).lookup(map, R1, Some(R1), false).store_mark(R1)
    }

    /// `ct mark set VALUE meta mark set VALUE map @MAP`, both only if the map has the value.
    pub fn set_ct_mark_and_mark_by(self, value: u32, map: &str) -> Self {
        self.immediate(R1, &value.to_ne_bytes())
            .lookup(map, R1, Some(R2), false)
            .store_mark(R2)
            .immediate(R1, &value.to_ne_bytes())
            .store_ct_mark(R1)
    }

    /// `ct mark set ether saddr map @PEERS meta mark set meta mark and MASK map @PATHS`, only if both maps know it.
    pub fn admit(self, peers: &str, mask: u32, paths: &str) -> Self {
        self.load_meta(NFT_META_MARK, R1)
            .and(&mask.to_ne_bytes())
            .lookup(paths, R1, Some(R2), false)
            .load_payload(NFT_PAYLOAD_LL_HEADER, 6, 6, R1)
            .lookup(peers, R1, Some(R1), false)
            .store_ct_mark(R1)
            .store_mark(R2)
    }

    fn store_mark(self, register: u32) -> Self {
        self.expression("meta", |d| {
            d.be32(NFTA_META_KEY, NFT_META_MARK);
            d.be32(NFTA_META_SREG, register);
        })
    }

    fn store_ct_mark(self, register: u32) -> Self {
        self.expression("ct", |d| {
            d.be32(NFTA_CT_KEY, NFT_CT_MARK);
            d.be32(NFTA_CT_SREG, register);
        })
    }

    /// `ether daddr set meta mark map @MAP`
    pub fn set_ether_daddr_by_mark(self, map: &str) -> Self {
        self.load_meta(NFT_META_MARK, R1).lookup(map, R1, Some(R1), false).expression("payload", |d| {
            d.be32(NFTA_PAYLOAD_SREG, R1);
            d.be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_LL_HEADER);
            d.be32(NFTA_PAYLOAD_OFFSET, 0);
            d.be32(NFTA_PAYLOAD_LEN, 6);
            d.be32(NFTA_PAYLOAD_CSUM_TYPE, 0);
        })
    }

    /// `meta mark set ip daddr map @MAP`
    pub fn set_mark_by_daddr(self, ip: Ip, map: &str) -> Self {
        self.load_daddr(ip).lookup(map, R1, Some(R1), false).store_mark(R1)
    }

    /// `dup to ADDRESS device INDEX`, in a table of the address's family: `nft_dup_ipv4.c` and `nft_dup_ipv6.c` know no
    /// `inet`. The copy is not tracked.
    pub fn dup(self, to: IpAddr, device: u32) -> Self {
        // An IPv6 address fills the four words of register 1.
        let device_register = if to.is_ipv4() { R1_SECOND_WORD } else { R2 };
        let loaded = match to {
            IpAddr::V4(a) => self.immediate(R1, &a.octets()),
            IpAddr::V6(a) => self.immediate(R1, &a.octets()),
        };
        loaded.immediate(device_register, &device.to_ne_bytes()).expression("dup", |d| {
            d.be32(NFTA_DUP_SREG_ADDR, R1);
            d.be32(NFTA_DUP_SREG_DEV, device_register);
        })
    }

    /// `snat ip to ip saddr`: settles the connection's source NAT without changing anything.
    pub fn snat_identity(self, ip: Ip) -> Self {
        self.ip(ip).load_saddr(ip, R1).snat(ip)
    }

    /// `snat ip to meta mark and MASK map @MAP`
    pub fn snat_by_mark(self, ip: Ip, mask: u32, map: &str) -> Self {
        self.ip(ip).load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes()).lookup(map, R1, Some(R1), false).snat(ip)
    }

    fn snat(self, ip: Ip) -> Self {
        self.expression("nat", |d| {
            d.be32(NFTA_NAT_TYPE, NFT_NAT_SNAT);
            d.be32(NFTA_NAT_FAMILY, u32::from(ip.nfproto()));
            d.be32(NFTA_NAT_REG_ADDR_MIN, R1);
        })
    }

    /// `tcp option maxseg size set rt mtu`. The kernel only ever lowers it (`nft_exthdr_tcp_set_eval`).
    pub fn clamp_mss(self) -> Self {
        self.expression("rt", |d| {
            d.be32(NFTA_RT_KEY, NFT_RT_TCPMSS);
            d.be32(NFTA_RT_DREG, R1);
        })
        .expression("byteorder", |d| {
            d.be32(NFTA_BYTEORDER_SREG, R1);
            d.be32(NFTA_BYTEORDER_DREG, R1);
            d.be32(NFTA_BYTEORDER_OP, NFT_BYTEORDER_HTON);
            d.be32(NFTA_BYTEORDER_LEN, 2);
            d.be32(NFTA_BYTEORDER_SIZE, 2);
        })
        .expression("exthdr", |d| {
            d.be32(NFTA_EXTHDR_SREG, R1);
            d.attribute(NFTA_EXTHDR_TYPE, &[TCP_OPTION_MAXSEG]);
            d.be32(NFTA_EXTHDR_OFFSET, 2);
            d.be32(NFTA_EXTHDR_LEN, 2);
            d.be32(NFTA_EXTHDR_OP, NFT_EXTHDR_OP_TCPOPT);
        })
    }

    // Verdicts.

    /// `accept`
    pub fn accept(self) -> Self {
        self.verdict(NF_ACCEPT, None)
    }

    /// `drop`
    pub fn drop(self) -> Self {
        self.verdict(NF_DROP, None)
    }

    /// `return`
    pub fn return_(self) -> Self {
        self.verdict(NFT_RETURN, None)
    }

    /// `jump CHAIN`
    pub fn jump(self, chain: &str) -> Self {
        self.verdict(NFT_JUMP, Some(chain))
    }

    /// `goto CHAIN`
    pub fn goto(self, chain: &str) -> Self {
        self.verdict(NFT_GOTO, Some(chain))
    }

    /// `meta mark and MASK vmap @MAP`
    pub fn vmap_by_mark(self, mask: u32, map: &str) -> Self {
        self.load_meta(NFT_META_MARK, R1).and(&mask.to_ne_bytes()).lookup(map, R1, Some(0), false)
    }
}
