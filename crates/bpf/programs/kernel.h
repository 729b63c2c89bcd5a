/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Constants of the kernel, and the parts of its types that are read. Their offsets come from the running kernel's BTF. */
#ifndef EGRET_KERNEL_H
#define EGRET_KERNEL_H

#define NEXT (-1)             /* TCX_NEXT: on to the next program, and into the stack */
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_HLEN 14
#define PACKET_HOST 0
#define TCP_FIN_SYN_RST 0x07

/* Flags of bpf_skb_adjust_room that came after Linux 6.1, include/uapi/linux/bpf.h. */
#define ROOM_DECAP_IPV4 (1ULL << 7)
#define ROOM_DECAP_IPV6 (1ULL << 8)

/* Bits of `nf_conn::status`, include/uapi/linux/netfilter/nf_conntrack_common.h. */
#define IPS_EXPECTED (1 << 0)
#define IPS_ASSURED (1 << 2)
#define IPS_CONFIRMED (1 << 3)
#define IPS_SRC_NAT (1 << 4)
#define IPS_DST_NAT (1 << 5)
#define IPS_SEQ_ADJUST (1 << 6)
#define IPS_DYING (1 << 9)
#define IPS_HELPER (1 << 13)
/* Flags of a direction and the state of a connection, include/uapi/linux/netfilter/nf_conntrack_tcp.h. */
#define BE_LIBERAL 0x08
#define MAXACK_SET 0x20
#define ESTABLISHED 3

#define KERNEL __attribute__((preserve_access_index))
union nf_inet_addr {
	__u32 all[4];
} KERNEL;
union nf_conntrack_man_proto {
	__be16 all;
} KERNEL;
struct nf_conntrack_man {
	union nf_inet_addr u3;
	union nf_conntrack_man_proto u;
} KERNEL;
struct nf_conntrack_tuple {
	struct nf_conntrack_man src;
	struct {
		union nf_inet_addr u3;
		union {
			__be16 all;
		} u;
	} dst;
} KERNEL;
struct nf_conntrack_tuple_hash {
	struct nf_conntrack_tuple tuple;
} KERNEL;
struct ip_ct_tcp_state {
	__u32 td_maxack;
	__u8 flags;
} KERNEL;
struct ip_ct_tcp {
	struct ip_ct_tcp_state seen[2];
	__u8 state;
} KERNEL;
union nf_conntrack_proto {
	struct ip_ct_tcp tcp;
} KERNEL;
struct nf_conn {
	struct nf_conntrack_tuple_hash tuplehash[2];
	unsigned long status;
	__u32 mark;
	union nf_conntrack_proto proto;
} KERNEL;
struct xfrm_state;
struct dst_entry {
	struct xfrm_state *xfrm;
} KERNEL;
struct sk_buff {
	unsigned char *head;
	unsigned long _skb_refdst;
	__u16 mac_header;
	__u8 active_extensions;
	__u8 encapsulation : 1;
} KERNEL;
enum skb_ext_id {
	SKB_EXT_SEC_PATH = 1,
};

struct bpf_ct_opts {
	__s32 netns_id, error;
	__u8 l4proto, dir, reserved[2];
};
extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *, struct bpf_sock_tuple *, __u32, struct bpf_ct_opts *, __u32) __ksym;
extern void bpf_ct_release(struct nf_conn *) __ksym;
extern void *bpf_cast_to_kern_ctx(void *) __ksym;

/* Whether IPsec has decrypted the packet (`skb_sec_path`). One in clear with the same addresses is another packet. */
static __always_inline bool is_decrypted(struct __sk_buff *skb)
{
	struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	if (!bpf_core_field_exists(kernel->active_extensions) || !bpf_core_enum_value_exists(enum skb_ext_id, SKB_EXT_SEC_PATH))
		return false;
	return kernel->active_extensions & (1 << bpf_core_enum_value(enum skb_ext_id, SKB_EXT_SEC_PATH));
}

/* Whether the packet that leaves has to do with IPsec: it was decrypted, or the device is to encrypt it (packet offload), which it
 * knows by the packet's route (`skb_dst`; the lowest bit is SKB_DST_NOREF). */
static __always_inline bool is_of_ipsec(struct __sk_buff *skb)
{
	struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	struct dst_entry *route = (void *)(kernel->_skb_refdst & ~1UL);
	if (route && bpf_core_field_exists(route->xfrm) && BPF_CORE_READ(route, xfrm))
		return true;
	return is_decrypted(skb);
}

/* Whether the kernel takes the packet for one that has a tunnel's headers already, and refuses it further ones. A packet that a
 * program has taken out of a tunnel stays so. */
static __always_inline bool is_encapsulated(struct __sk_buff *skb)
{
	struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	return BPF_CORE_READ_BITFIELD(kernel, encapsulation);
}

#endif
