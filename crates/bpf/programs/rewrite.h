/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* A packet's headers, written anew. */
#ifndef EGRET_REWRITE_H
#define EGRET_REWRITE_H

/* One's complement, RFC 1624. */
static __always_inline __u32 replaced(__u32 sum, __u32 old, __u32 new)
{
	sum += (~old & 0xffff) + (~old >> 16);
	return sum + (new & 0xffff) + (new >> 16);
}

static __always_inline __u16 folded(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

/* What lies on the stack after the Ethernet header's 14 bytes is aligned to two bytes. */
static __always_inline void put(void *to, __u32 value)
{
	*(__u16 *)to = value;
	*(__u16 *)(to + 2) = value >> 16;
}

/* The transport checksum, which needs nothing but what changes. */
static __always_inline bool fix_checksum(struct __sk_buff *skb, const struct packet *p, const struct lease *lease)
{
	__u32 at = p->l4 + (p->protocol == IPPROTO_TCP ? 16 : 6);
	__u64 udp = p->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	struct address old = lease->translation == 1 ? p->source : p->destination, new = lease->address;
	__u16 port = lease->translation == 1 ? p->ports[0] : p->ports[1];
	if (p->is_v6) {
		__s64 difference = bpf_csum_diff((void *)&old, sizeof(old), (void *)&new, sizeof(new), 0);
		if (bpf_l4_csum_replace(skb, at, 0, difference, BPF_F_PSEUDO_HDR | udp))
			return false;
	} else if (bpf_l4_csum_replace(skb, at, old.word[0], new.word[0], BPF_F_PSEUDO_HDR | udp | 4)) {
		return false;
	}
	return port == lease->port || !bpf_l4_csum_replace(skb, at, port, lease->port, udp | 2);
}

/* Writes what changes: MAC addresses, TTL, address and port. */
static __always_inline bool rewrite4(struct __sk_buff *skb, const struct packet *p, const struct lease *lease)
{
	__u8 h[38] __attribute__((aligned(8)));
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + sizeof(h) > end)
		return false;
	__builtin_memcpy(h, lease->macs, 12);
	__builtin_memcpy(h + 12, data + 12, 26);
	*(__u16 *)(h + 12) = bpf_htons(ETH_P_IP);
	__u32 sum = (__u16)~*(__u16 *)(h + 24);
	__u16 old = *(__u16 *)(h + 22);
	h[22]--;
	sum = replaced(sum, 0xffff0000 | old, *(__u16 *)(h + 22));
	if (lease->translation == 1) {
		sum = replaced(sum, p->source.word[0], lease->address.word[0]);
		put(h + 26, lease->address.word[0]);
		*(__u16 *)(h + 34) = lease->port;
	} else if (lease->translation == 2) {
		sum = replaced(sum, p->destination.word[0], lease->address.word[0]);
		put(h + 30, lease->address.word[0]);
		*(__u16 *)(h + 36) = lease->port;
	}
	*(__u16 *)(h + 24) = ~folded(sum);
	return !bpf_skb_store_bytes(skb, 0, h, sizeof(h), 0);
}

static __always_inline bool rewrite6(struct __sk_buff *skb, const struct lease *lease)
{
	__u8 h[58] __attribute__((aligned(8)));
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + sizeof(h) > end)
		return false;
	__builtin_memcpy(h, lease->macs, 12);
	__builtin_memcpy(h + 12, data + 12, 46);
	*(__u16 *)(h + 12) = bpf_htons(ETH_P_IPV6);
	h[21]--;
	if (lease->translation == 1) {
		__builtin_memcpy(h + 22, &lease->address, 16);
		*(__u16 *)(h + 54) = lease->port;
	} else if (lease->translation == 2) {
		__builtin_memcpy(h + 38, &lease->address, 16);
		*(__u16 *)(h + 56) = lease->port;
	}
	return !bpf_skb_store_bytes(skb, 0, h, sizeof(h), 0);
}

#endif
