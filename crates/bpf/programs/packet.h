/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What a packet is. */
#ifndef EGRET_PACKET_H
#define EGRET_PACKET_H

struct packet {
	struct address source, destination;
	__u32 seq, ack;
	__u32 top;  /* the first four bytes of an IPv6 header */
	__u16 ports[2];
	__u16 l4;   /* offset of the transport header from this frame's Ethernet header */
	__u16 size; /* of the packet, or of its largest segment, from the IP header on */
	__u8 is_v6, protocol, flags, hops, tos;
	__u8 is_exact; /* the frame ends where its IP packet does: no padding follows */
};

/* Whether the fast way is for such packets: TCP and UDP without options of IP, not in fragments. `off` is the place of the
 * frame's Ethernet header: 0, or behind the tunnel's headers. */
static __always_inline bool parse(struct __sk_buff *skb, struct packet *p, const __u32 off)
{
	void *data = (void *)(long)skb->data + off, *end = (void *)(long)skb->data_end;
	__u32 header, length, rest = skb->len - ETH_HLEN - off;
	if (skb->vlan_present || data + ETH_HLEN + sizeof(struct iphdr) + 8 > end)
		return false;
	__u16 protocol = off ? *(__u16 *)(data + 12) : skb->protocol;
	if (protocol == bpf_htons(ETH_P_IP)) {
		struct iphdr *ip = data + ETH_HLEN;
		if (*(__u8 *)ip != 0x45 || (ip->frag_off & bpf_htons(0x3fff)))
			return false;
		p->is_v6 = 0;
		p->protocol = ip->protocol;
		p->hops = ip->ttl;
		p->tos = ip->tos;
		p->source = (struct address){ { ip->saddr } };
		p->destination = (struct address){ { ip->daddr } };
		p->l4 = ETH_HLEN + sizeof(struct iphdr);
		p->top = 0;
		length = bpf_ntohs(ip->tot_len);
	} else if (protocol == bpf_htons(ETH_P_IPV6)) {
		struct ipv6hdr *ip = data + ETH_HLEN;
		if ((void *)(ip + 1) + 8 > end)
			return false;
		p->is_v6 = 1;
		p->protocol = ip->nexthdr;
		p->hops = ip->hop_limit;
		p->tos = bpf_ntohs(*(__be16 *)ip) >> 4;
		__builtin_memcpy(&p->source, &ip->saddr, 16);
		__builtin_memcpy(&p->destination, &ip->daddr, 16);
		p->l4 = ETH_HLEN + sizeof(struct ipv6hdr);
		p->top = *(__u32 *)ip;
		length = bpf_ntohs(ip->payload_len) + sizeof(struct ipv6hdr);
	} else {
		return false;
	}
	void *l4 = data + (p->is_v6 ? ETH_HLEN + sizeof(struct ipv6hdr) : ETH_HLEN + sizeof(struct iphdr));
	if (l4 + 8 > end)
		return false;
	p->ports[0] = *(__u16 *)l4;
	p->ports[1] = *(__u16 *)(l4 + 2);
	p->flags = 0;
	p->seq = p->ack = 0;
	if (p->protocol == IPPROTO_TCP) {
		if (l4 + 20 > end)
			return false;
		p->seq = bpf_ntohl(*(__be32 *)(l4 + 4));
		p->ack = bpf_ntohl(*(__be32 *)(l4 + 8));
		header = (*(__u8 *)(l4 + 12) >> 4) * 4;
		p->flags = *(__u8 *)(l4 + 13);
	} else if (p->protocol == IPPROTO_UDP) {
		header = 8;
		/* Translation must not touch a checksum that is not there. Data behind the datagram (RFC 9868) is not in the checksum,
		 * from which that of a tunnel packet is computed. */
		if (*(__u16 *)(l4 + 6) == 0 || bpf_ntohs(*(__be16 *)(l4 + 4)) + p->l4 - ETH_HLEN != length)
			return false;
	} else {
		return false;
	}
	__u32 size = skb->gso_size ? skb->gso_size + p->l4 - ETH_HLEN + header : rest;
	p->is_exact = length == rest;
	p->size = size;
	return size <= 0xffff;
}

#endif
