/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* The tunnel's own headers: learned from the packets of the tunnel device, written, and taken off. */
#ifndef EGRET_TUNNEL_H
#define EGRET_TUNNEL_H

/* Places in the tunnel's headers. */
#define UDP4 (ETH_HLEN + sizeof(struct iphdr))
#define UDP6 (ETH_HLEN + sizeof(struct ipv6hdr))
#define VXLAN_FLAGS 0x88 /* there are a network identifier and an egress ID (draft-smith-vxlan-group-policy) */

/* In `tc_index`, besides the generation: it came by `enter_uplink` or `enter_underlay` as a tunnel packet, in this
 * generation. */
#define BY_TUNNEL 0x8000
/* In `tc_index`, for `enter` at the tunnel device: the packet in it is counted, no lease is for it, and it gets none. */
#define SHORT 0x4000

/* The low bits of a generation, never 0. */
static __always_inline __u16 stamp(__u32 generation)
{
	return generation % 0x3fff + 1;
}

static __always_inline bool is_local(const __u32 *address, const bool is_v6)
{
	if (address[0] != state.local.word[0])
		return false;
	return !is_v6 || (address[1] == state.local.word[1] && address[2] == state.local.word[2] && address[3] == state.local.word[3]);
}

/* Whether the packet is one of the tunnel's, whole and without IP options, from or to this node's end. Its headers, OUTER4
 * or OUTER6 bytes, are within the packet then. */
static __always_inline bool is_tunnel_packet(struct __sk_buff *skb, const bool is_v6, const bool leaves)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + (is_v6 ? OUTER6 : OUTER4) > end || skb->vlan_present)
		return false;
	__u8 *ip = data + ETH_HLEN, *udp = data + (is_v6 ? UDP6 : UDP4);
	if (*(__be16 *)(udp + 2) != state.port || udp[8] != VXLAN_FLAGS)
		return false;
	if (is_v6)
		return skb->protocol == bpf_htons(ETH_P_IPV6) && ip[6] == IPPROTO_UDP && is_local((__u32 *)(ip + (leaves ? 8 : 24)), true);
	return skb->protocol == bpf_htons(ETH_P_IP) && ip[0] == 0x45 && ip[9] == IPPROTO_UDP && !(*(__be16 *)(ip + 6) & bpf_htons(0x3fff)) &&
	       is_local((__u32 *)(ip + (leaves ? 12 : 16)), false);
}

/* Whether its UDP destination port, or what is there, is the tunnel's. The packet stays as it is: most packets of an uplink are no
 * tunnel packets. */
static __always_inline bool may_be_tunnel_packet(struct __sk_buff *skb, const bool is_v6)
{
	const __u32 at = (is_v6 ? UDP6 : UDP4) + 2;
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__be16 port = 0;
	if (data + at + sizeof(port) <= end)
		return *(__be16 *)(data + at) == state.port;
	return !bpf_skb_load_bytes(skb, at, &port, sizeof(port)) && port == state.port;
}

static __always_inline __u32 sum_of(const __u8 *bytes, const int from, const int to)
{
	__u32 sum = 0;
	for (int i = from; i < to; i += 2)
		sum += *(const __u16 *)(bytes + i);
	return sum;
}

static __always_inline __u32 sum_of_word(__u32 word)
{
	return (word & 0xffff) + (word >> 16);
}

/* What of the checksums does not change from packet to packet. The sum over the transport header and the data of the frame in the
 * tunnel is the complement of the sum over its addresses, its protocol and its length: so the checksum of the tunnel packet needs
 * no byte of data (Documentation/networking/checksum-offloads.rst, local checksum offload). */
static __always_inline void sum_up(struct lease *lease, const struct packet *inner, const bool is_v6)
{
	const __u8 *h = lease->outer;
	const int udp = is_v6 ? UDP6 : UDP4;
	__u32 sum = sum_of(h, is_v6 ? 22 : 26, udp) + bpf_htons(IPPROTO_UDP) + sum_of(h, udp, udp + 4) +
		    sum_of(h, udp + 8, is_v6 ? OUTER6 : OUTER4);
	if (inner->is_v6) {
		/* Its header has no checksum. The addresses and the length are summed twice, once as complement. */
		sum += bpf_htons((__u16)inner->protocol << 8 | inner->hops) + (__u16)~bpf_htons(inner->protocol);
	} else {
		sum += (__u16)~folded(sum_of_word(inner->source.word[0]) + sum_of_word(inner->destination.word[0]) + bpf_htons(inner->protocol));
	}
	lease->udp_sum = folded(sum);
	/* Without length, identification and checksum. */
	lease->ip_sum = is_v6 ? 0 : folded(sum_of(h, 14, 16) + sum_of(h, 20, 24) + sum_of(h, 26, 34));
}

/* A tunnel packet leaves which the tunnel device has made of the packet that was given the pending lease: by its headers, later
 * ones may pass the device by. All hooks of the host on its way have let it through. */
static __always_inline void learn(struct __sk_buff *skb, struct pending *pending, __u32 generation, const bool is_v6)
{
	struct packet inner;
	struct address to = {};
	if (!is_tunnel_packet(skb, is_v6, true) || !parse(skb, &inner, is_v6 ? AROUND6 : AROUND4) || is_of_ipsec(skb))
		return;
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + (is_v6 ? OUTER6 : OUTER4) > end)
		return;
	const struct packet *leaves = &pending->leaves;
	if (inner.is_v6 != leaves->is_v6 || inner.protocol != leaves->protocol || inner.seq != leaves->seq || inner.ack != leaves->ack ||
	    inner.ports[0] != leaves->ports[0] || inner.ports[1] != leaves->ports[1] || inner.size != leaves->size)
		return;
	for (int i = 0; i < 4; i++) {
		if (i && !inner.is_v6)
			break;
		if (inner.source.word[i] != leaves->source.word[i] || inner.destination.word[i] != leaves->destination.word[i])
			return;
	}
	/* Without a checksum, the tunnel packet is not as the device makes them. */
	if (!*(__u16 *)(data + (is_v6 ? UDP6 : UDP4) + 6))
		return;
	if (is_v6)
		__builtin_memcpy(&to, data + 38, 16);
	else
		to.word[0] = *(__u32 *)(data + 30);
	__u32 *interface = bpf_map_lookup_elem(&nodes, &to);
	if (!interface || *interface != skb->ifindex)
		return;
	const struct packet in = pending->in;
	struct lease *lease, *found = find(&in);
	if (!found || !(lease = copied(found, &in)) || lease->generation != generation || lease->way != INTO_TUNNEL)
		return;
	__builtin_memset(lease->outer, 0, sizeof(lease->outer));
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	if (data + (is_v6 ? OUTER6 : OUTER4) > end)
		return;
	for (int i = 0; i < (is_v6 ? OUTER6 : OUTER4); i += 2)
		*(__u16 *)(lease->outer + i) = *(__u16 *)(data + i);
	sum_up(lease, &inner, is_v6);
	lease->device = skb->ifindex;
	lease->outer_mark = skb->mark;
	lease->outer_priority = skb->priority;
	if (lease->outer_size < inner.size)
		lease->outer_size = inner.size;
	lease->seal = seal_of(lease, &in);
	store(&in, lease);
}

/* Whether the tunnel's headers may be written around a packet that is still to be segmented. The kernel repeats them for each
 * segment, but computes no checksum over it (`SKB_GSO_UDP_TUNNEL`; no helper asks for `SKB_GSO_UDP_TUNNEL_CSUM`). Over IPv4 a
 * tunnel packet needs none (RFC 7348, section 5); the packet in it has its own. */
static __always_inline bool may_segment(const struct packet *p, __u32 bytes)
{
	return !state.is_v6 && p->protocol == IPPROTO_TCP && bytes + AROUND4 <= 0xffff;
}

/* Writes the tunnel's headers around the frame, whose packet has so many bytes from its IP header on. */
static __always_inline bool encapsulate(struct __sk_buff *skb, const struct packet *p, struct lease *lease, __u32 bytes, const bool is_v6)
{
	const int udp = is_v6 ? UDP6 : UDP4, around = is_v6 ? AROUND6 : AROUND4;
	__u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP | BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
	__u8 *h = lease->outer;
	flags |= is_v6 ? BPF_F_ADJ_ROOM_ENCAP_L3_IPV6 : BPF_F_ADJ_ROOM_ENCAP_L3_IPV4;
	if (bpf_skb_adjust_room(skb, around, BPF_ADJ_ROOM_MAC, flags))
		return false;
	__be16 length = bpf_htons(bytes + around - (udp - ETH_HLEN));
	if (is_v6) {
		*(__be16 *)(h + 18) = length;
	} else {
		/* The kernel numbers packets at random, too, where they may be fragmented (`__ip_select_ident`). */
		__be16 all = bpf_htons(bytes + around), id = bpf_get_prandom_u32();
		*(__be16 *)(h + 16) = all;
		*(__be16 *)(h + 18) = id;
		*(__u16 *)(h + 24) = ~folded(lease->ip_sum + all + id);
	}
	*(__be16 *)(h + udp + 4) = length;
	__u16 check = 0;
	if (is_v6 || !skb->gso_size) {
		/* The length is summed up twice: as a field, and beside the addresses. */
		__u32 sum = lease->udp_sum + 2 * (__u32)length;
		sum += p->is_v6 ? sum_of_word(p->top) : (__u16)~bpf_htons(bytes - (p->l4 - ETH_HLEN));
		check = (__u16)~folded(sum) ?: 0xffff;
	}
	*(__u16 *)(h + udp + 6) = check;
	if (bpf_csum_update(skb, 0) >= 0) {
		/* The device that received it has summed up all from the IP header on: what lies around it now is added. */
		__s64 more = bpf_csum_diff(NULL, 0, (void *)(h + 12), around + 2, (__u16)~*(__u16 *)(h + 12));
		bpf_csum_update(skb, more);
	}
	return !bpf_skb_store_bytes(skb, 0, h, is_v6 ? OUTER6 : OUTER4, 0);
}

/* A packet that the tunnel device has taken out of a tunnel packet leaves: its tunnel headers are where they were, before the
 * frame (`__iptunnel_pull_header`, `pskb_expand_head`). They have passed all hooks of the host for tunnel packets. */
static __always_inline void remember(struct __sk_buff *skb, struct lease *lease, const bool is_v6)
{
	const int length = (is_v6 ? UDP6 : UDP4) + 16 - ETH_HLEN;
	struct sk_buff *kernel = bpf_cast_to_kern_ctx(skb);
	__u32 at = kernel->mac_header;
	struct address from = {};
	__u8 *ip = lease->outer + ETH_HLEN, *udp = lease->outer + (is_v6 ? UDP6 : UDP4);
	lease->way = OUT_OF_TUNNEL;
	if (at < length || bpf_probe_read_kernel(ip, length, kernel->head + at - length))
		return;
	if (*(__be16 *)(udp + 2) != state.port || udp[8] != VXLAN_FLAGS)
		return;
	if (!skb->gso_size && bpf_ntohs(*(__be16 *)(udp + 4)) != skb->len + 16)
		return;
	if (lease->is_request && *(__be16 *)(udp + 10) != bpf_htons(lease->id))
		return;
	if (is_v6) {
		if (ip[6] != IPPROTO_UDP || !is_local((__u32 *)(ip + 24), true))
			return;
		__builtin_memcpy(&from, ip + 8, 16);
	} else {
		if (ip[0] != 0x45 || ip[9] != IPPROTO_UDP || !is_local((__u32 *)(ip + 16), false))
			return;
		from.word[0] = *(__u32 *)(ip + 12);
	}
	__u32 *interface = bpf_map_lookup_elem(&nodes, &from);
	if (interface)
		lease->device = *interface;
}

/* Whether the tunnel's headers around a packet are those that the last one came with. */
static __always_inline bool is_as_known(struct __sk_buff *skb, const struct lease *lease, const bool is_v6)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + (is_v6 ? OUTER6 : OUTER4) > end)
		return false;
	const __u8 *h = data, *known = lease->outer;
	const int udp = is_v6 ? UDP6 : UDP4;
	__u32 length = skb->len - udp;
	/* Version, type of service, flow label; protocol, TTL; addresses, ports; egress ID. */
	__u32 differs = *(__u16 *)(h + 14) ^ *(__u16 *)(known + 14);
	if (is_v6) {
		differs |= *(__u16 *)(h + 16) ^ *(__u16 *)(known + 16);
		differs |= *(__u16 *)(h + 18) ^ bpf_htons(length);
		differs |= *(__u16 *)(h + 20) ^ *(__u16 *)(known + 20);
	} else {
		differs |= *(__u16 *)(h + 20) ^ *(__u16 *)(known + 20);
		differs |= *(__u16 *)(h + 22) ^ *(__u16 *)(known + 22);
		differs |= *(__u16 *)(h + 16) ^ bpf_htons(length + sizeof(struct iphdr));
	}
	for (int i = is_v6 ? 22 : 26; i < udp + 4; i += 4)
		differs |= (*(__u16 *)(h + i) ^ *(__u16 *)(known + i)) | (*(__u16 *)(h + i + 2) ^ *(__u16 *)(known + i + 2));
	differs |= *(__u16 *)(h + udp + 4) ^ bpf_htons(length);
	differs |= (*(__u16 *)(h + udp + 8) ^ *(__u16 *)(known + udp + 8)) | (*(__u16 *)(h + udp + 10) ^ *(__u16 *)(known + udp + 10));
	/* The network identifier, and the MAC address of this node. */
	if (differs || *(__u32 *)(h + udp + 12) != state.vni)
		return false;
	const __u16 *to = (const __u16 *)(h + udp + 16);
	return to[0] == *(volatile __u16 *)state.mac && to[1] == *(volatile __u16 *)(state.mac + 2) && to[2] == *(volatile __u16 *)(state.mac + 4);
}

#endif
