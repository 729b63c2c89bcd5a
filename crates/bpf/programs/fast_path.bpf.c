// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* The fast path: established connections past nf_tables.
 *
 * Nothing here decides. The programs `enter…` stand where packets come in: on selected pods' veths, on the tunnel device, on a
 * gateway's uplinks, on the interfaces to other nodes. The programs `leave…` stand where the kernel's own way ends. A packet
 * that comes there was let through by every hook of the host, Egret's and everybody else's. It gives its connection a lease:
 * for one second, packets of this direction are treated as this one was. `enter…` sends what has a valid lease straight on.
 * Everything else takes the kernel's own way.
 *
 * A lease is void as soon as the generation changes, which the daemon raises when anybody changes a rule or a route. A packet of
 * a connection that lasts carries the generation in which it came in (`tc_index`), so one that old rules let through gives no
 * lease of the new generation. All other packets, and those that went the fast way, carry 0, and give none. */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "fast_path.h"
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define PEER 0x8000           /* in a connection mark: a peer index follows, not an egress ID */
#define HANDED 0x4000         /* in a connection mark: handed over to another node */
#define ID_MASK 0x3fff        /* the egress ID in marks */
#define HALF (1U << 30)       /* a quarter of the numbers of TCP: what tracking has seen last is that near */

#include "packet.h"
#include "lease.h"
#include "rewrite.h"
#include "tunnel.h"

/* ---- the fast way ---- */

/* Whether the lease is for this packet. All that the kernel's own way looks at must be as it was. `in` is the interface by
 * which the frame comes in, `id` the egress ID that it bears. */
static __always_inline bool holds(struct __sk_buff *skb, const struct packet *p, const struct lease *lease, __u64 now, __u32 in, __u32 id,
				  const __u32 off)
{
	if (lease->in != in || (__s64)(lease->until - now) < 0)
		return false;
	if (p->hops != (__u8)(lease->hops + 1) || p->hops <= 1 || p->tos != lease->tos || p->size > lease->size)
		return false;
	/* What tracking has seen of TCP's numbers stays near enough to judge a reset (`nf_conntrack_tcp_packet`). */
	if (p->protocol == IPPROTO_TCP && (p->seq - lease->seq + HALF > 2 * HALF || p->ack - lease->ack + HALF > 2 * HALF))
		return false;
	if (lease->is_request) {
		void *data = (void *)(long)skb->data + off, *end = (void *)(long)skb->data_end;
		if (data + ETH_HLEN > end || id != lease->id)
			return false;
		const __u16 *sender = data + 6, *known = (const __u16 *)lease->sender;
		if (sender[0] != known[0] || sender[1] != known[1] || sender[2] != known[2])
			return false;
	}
	/* The sum over a whole IPv6 packet would not be right any more; of IPv4 it is, as its header has a checksum. */
	return !p->is_v6 || bpf_csum_update(skb, 0) < 0;
}

/* Whether the packet differs from those of a lease in the bits for congestion (ECN, RFC 3168) alone, as data, acknowledgements and
 * marked packets of one direction do. It takes the kernel's own way, and leaves the lease to the others. */
static __always_inline bool differs_in_ecn(const struct packet *p, const struct lease *lease, __u64 now)
{
	return p->tos != lease->tos && !((p->tos ^ lease->tos) & ~3) && (__s64)(lease->until - now) >= 0;
}

/* Treats the packet as its lease says. `off` is what lies around it and is taken off, nothing or the tunnel's headers. */
static __always_inline int treat(struct __sk_buff *skb, const struct packet *p, struct lease *lease, const __u32 off)
{
	__u32 key = lease->count, bytes = skb->len - ETH_HLEN - off;
	bool own = !off && lease->way == INTO_TUNNEL && lease->device && p->is_exact && p->size <= lease->outer_size && !is_encapsulated(skb) &&
		   (!skb->gso_size || may_segment(p, bytes));
	struct count *count = NULL;
	if (key && !(count = bpf_map_lookup_elem(&counts, &key)))
		return NEXT;
	if (off && bpf_skb_adjust_room(skb, -(__s32)off, BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_FIXED_GSO | (p->is_v6 ? ROOM_DECAP_IPV6 : ROOM_DECAP_IPV4)))
		return NEXT;
	/* A packet that is changed in part is not for anybody. */
	if (lease->translation && !fix_checksum(skb, p, lease))
		return TC_ACT_SHOT;
	if (!(p->is_v6 ? rewrite6(skb, lease) : rewrite4(skb, p, lease)))
		return TC_ACT_SHOT;
	if (own && !(state.is_v6 ? encapsulate(skb, p, lease, bytes, true) : encapsulate(skb, p, lease, bytes, false)))
		return TC_ACT_SHOT;
	if (count) {
		count->packets++;
		count->bytes += bytes;
	}
	skb->mark = own ? lease->outer_mark : lease->mark;
	skb->priority = own ? lease->outer_priority : lease->priority;
	skb->tc_index = 0;
	return bpf_redirect(own ? lease->device : lease->out, 0);
}

/* A packet that is not the tunnel's. `proven` is BY_TUNNEL if it came out of a tunnel packet of this generation. */
static __always_inline int enter_plain(struct __sk_buff *skb, __u32 generation, __u16 proven)
{
	struct packet p;
	__u32 hash;
	if (!parse(skb, &p, 0) || is_decrypted(skb))
		return NEXT;
	struct slot *slot = slot_of(&p, &hash);
	if (!slot)
		return NEXT;
	if (p.flags & TCP_FIN_SYN_RST) {
		if (is_noted(slot))
			end_both(skb, &p);
		return NEXT;
	}
	struct lease *found = is_noted(slot) ? find(&p) : NULL;
	if (found && found->generation == generation) {
		__u64 now = bpf_ktime_get_coarse_ns();
		struct lease *lease = copied(found, &p);
		if (lease && lease->generation == generation) {
			if (differs_in_ecn(&p, lease, now))
				return NEXT;
			if (holds(skb, &p, lease, now, skb->ifindex, skb->mark & 0xffff, 0)) {
				int verdict = treat(skb, &p, lease, 0);
				if (verdict != NEXT)
					return verdict;
			}
		}
	}
	if (found || lasts(skb, slot, hash))
		skb->tc_index = stamp(generation) | proven;
	return NEXT;
}

/* A packet of the tunnel, at the interface to another node. */
static __always_inline int enter_tunnel_packet(struct __sk_buff *skb, __u32 generation, const bool is_v6)
{
	const __u32 off = is_v6 ? AROUND6 : AROUND4, gbp = (is_v6 ? UDP6 : UDP4) + 10;
	struct packet p;
	__u32 hash;
	if (is_decrypted(skb))
		return NEXT;
	skb->tc_index = stamp(generation) | BY_TUNNEL;
	/* What was merged, or never segmented, would stay marked as a tunnel's (`SKB_GSO_UDP_TUNNEL`), which no helper changes. */
	if (skb->gso_size || !parse(skb, &p, off) || !p.is_exact)
		return NEXT;
	struct slot *slot = slot_of(&p, &hash);
	if (!slot)
		return NEXT;
	bool is_end = p.flags & TCP_FIN_SYN_RST;
	if (!is_noted(slot)) {
		if (is_end || is_short(skb, slot, hash))
			skb->tc_index |= SHORT;
		return NEXT;
	}
	if (is_end)
		return NEXT;
	struct lease *found = find(&p);
	if (!found || found->generation != generation)
		return NEXT;
	struct lease *lease = copied(found, &p);
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (!lease || lease->generation != generation || data + gbp + 2 > end)
		return NEXT;
	if (lease->way != OUT_OF_TUNNEL || lease->device != skb->ifindex || !is_as_known(skb, lease, is_v6))
		return NEXT;
	if (!holds(skb, &p, lease, bpf_ktime_get_coarse_ns(), state.tunnel, bpf_ntohs(*(__be16 *)(data + gbp)), off))
		return NEXT;
	return treat(skb, &p, lease, off);
}

/* False: it is no tunnel packet to this node. */
static __always_inline bool enter_by(struct __sk_buff *skb, __u32 generation, int *verdict, const bool is_v6)
{
	const __u32 headers = OUTER6 + sizeof(struct ipv6hdr) + 20;
	if (!may_be_tunnel_packet(skb, is_v6))
		return false;
	/* Some drivers leave all behind the first UDP header outside of the linear part. */
	if (skb->data_end - skb->data < headers && skb->data_end - skb->data < skb->len)
		bpf_skb_pull_data(skb, skb->len < headers ? skb->len : headers);
	if (!is_tunnel_packet(skb, is_v6, false))
		return false;
	*verdict = enter_tunnel_packet(skb, generation, is_v6);
	return true;
}

static __always_inline bool enter_by_tunnel(struct __sk_buff *skb, __u32 generation, int *verdict)
{
	return state.is_v6 ? enter_by(skb, generation, verdict, true) : enter_by(skb, generation, verdict, false);
}

/* On selected pods' veths, and on the tunnel device. */
SEC("tc")
int enter(struct __sk_buff *skb)
{
	__u32 generation = state.generation;
	__u16 came_by = skb->tc_index;
	bool proven = skb->ifindex == state.tunnel && (came_by & ~SHORT) == (stamp(generation) | BY_TUNNEL);
	skb->tc_index = 0;
	/* What was merged since, was counted in parts. */
	if (!generation || skb->pkt_type != PACKET_HOST || (proven && (came_by & SHORT) && !skb->gso_size))
		return NEXT;
	return enter_plain(skb, generation, proven ? BY_TUNNEL : 0);
}

/* On a gateway's uplinks, which can be interfaces to other nodes. */
SEC("tc")
int enter_uplink(struct __sk_buff *skb)
{
	__u32 generation = state.generation;
	int verdict = NEXT;
	skb->tc_index = 0;
	if (!generation || skb->pkt_type != PACKET_HOST)
		return NEXT;
	if (enter_by_tunnel(skb, generation, &verdict))
		return verdict;
	return enter_plain(skb, generation, 0);
}

/* On interfaces to other nodes that are no uplinks. */
SEC("tc")
int enter_underlay(struct __sk_buff *skb)
{
	__u32 generation = state.generation;
	int verdict = NEXT;
	skb->tc_index = 0;
	if (generation && skb->pkt_type == PACKET_HOST)
		enter_by_tunnel(skb, generation, &verdict);
	return verdict;
}

/* ---- where the kernel's own way ends ---- */

/* Whether one of the programs `enter…` has stamped the packet, or the one that the tunnel device has put it into, in this
 * generation. */
static __always_inline bool is_current(struct __sk_buff *skb, __u32 *generation)
{
	*generation = state.generation;
	return *generation && (skb->tc_index & ~BY_TUNNEL) == stamp(*generation);
}

/* Whether the packet came in by one of the programs `enter…`, in this generation, is of a connection that lasts, and took the
 * kernel's own way. */
static __always_inline bool came(struct __sk_buff *skb, __u32 *generation)
{
	return is_current(skb, generation) && skb->ingress_ifindex;
}

/* Connection tracking sees one packet a second of those with a lease. Its check of TCP's windows must not mind, which the
 * daemon arranges for the connections in `requests`. */
static __always_inline bool grantable(struct nf_conn *ct, const struct packet *p, int direction)
{
	unsigned long status = ct->status;
	if (!(status & IPS_CONFIRMED) || (status & (IPS_EXPECTED | IPS_DST_NAT | IPS_SEQ_ADJUST | IPS_DYING | IPS_HELPER)))
		return false;
	if (p->protocol != IPPROTO_TCP)
		return true;
	if (!(status & IPS_ASSURED) || ct->proto.tcp.state != ESTABLISHED)
		return false;
	__u8 flags = direction ? ct->proto.tcp.seen[1].flags : ct->proto.tcp.seen[0].flags;
	__u8 others = direction ? ct->proto.tcp.seen[0].flags : ct->proto.tcp.seen[1].flags;
	__u32 seen = direction ? ct->proto.tcp.seen[1].td_maxack : ct->proto.tcp.seen[0].td_maxack;
	if ((flags & others & BE_LIBERAL) && (!(flags & MAXACK_SET) || p->ack - seen + HALF <= 2 * HALF))
		return true;
	struct lease_request request = { .is_v6 = p->is_v6 };
	struct packet first = {};
	incoming(ct, 0, &first);
	request.source = first.source;
	request.destination = first.destination;
	request.ports[0] = first.ports[0];
	request.ports[1] = first.ports[1];
	bpf_map_push_elem(&requests, &request, 0);
	return false;
}

static __always_inline bool is_counted(__u32 key)
{
	struct count zero = {};
	return bpf_map_lookup_elem(&counts, &key) || !bpf_map_update_elem(&counts, &key, &zero, BPF_NOEXIST);
}

/* Gives a lease: `p` is the packet that leaves, `in` the tuple with which packets of its direction come in. */
static __always_inline bool give(struct __sk_buff *skb, const struct packet *p, const struct packet *in, struct lease *lease, __u64 now)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + ETH_HLEN > end || (lease->count && !is_counted(lease->count)))
		return false;
	__builtin_memcpy(lease->macs, data, 12);
	lease->in = skb->ingress_ifindex;
	lease->out = skb->ifindex;
	lease->mark = skb->mark;
	lease->priority = skb->priority;
	lease->seq = p->seq;
	lease->ack = p->ack;
	lease->hops = p->hops;
	lease->tos = p->tos;
	lease->size = p->size;
	lease->until = now + settings.lease;
	struct lease *old = find(in);
	if (old && old->generation == lease->generation && (__s64)(old->until - now) >= 0) {
		if (old->size > p->size)
			lease->size = old->size;
		if (lease->way == INTO_TUNNEL && old->device)
			lease->outer_size = old->outer_size;
	}
	lease->seal = seal_of(lease, in);
	store(in, lease);
	return true;
}

/* What a packet leaves for. */
enum kind { TUNNEL_REQUEST, TUNNEL_REPLY, UPLINK, POD };

static __always_inline bool is_slow(__u32 id)
{
	return bpf_map_lookup_elem(&slow_ids, &id);
}

/* Fills in what depends on the connection. False: no lease for such packets. */
static __always_inline bool fill(struct __sk_buff *skb, struct nf_conn *ct, __u8 direction, const enum kind kind, const struct packet *p,
				 const struct packet *in, struct lease *lease)
{
	__u32 mark = skb->mark, of = ct->mark, id = of & ID_MASK;
	bool own = (of & 0xffff0000) == settings.base && !(of & (PEER | HANDED)) && id;
	unsigned long status = ct->status;
	switch (kind) {
	case TUNNEL_REQUEST:
		/* The owner is another node, which translates. */
		lease->count = id;
		lease->way = INTO_TUNNEL;
		return direction == 0 && of == mark && own && !(status & IPS_SRC_NAT) && !is_slow(id);
	case TUNNEL_REPLY:
		lease->translation = 2;
		lease->address = p->destination;
		lease->port = p->ports[1];
		lease->way = INTO_TUNNEL;
		return direction == 0 && of == mark && (status & IPS_SRC_NAT) && !bpf_map_lookup_elem(&slow_ips, &in->destination);
	case UPLINK:
		id = mark & ID_MASK;
		lease->translation = 1;
		lease->address = p->source;
		lease->port = p->ports[0];
		lease->count = id;
		if (direction != 1 || !(status & IPS_SRC_NAT) || is_slow(id))
			return false;
		if ((of & 0xffff8000) == (settings.base | PEER)) {
			struct mac *sender = bpf_map_lookup_elem(&peers, &of);
			if (!sender || skb->ingress_ifindex != state.tunnel)
				return false;
			lease->count = id | GATEWAY;
			lease->is_request = 1;
			lease->id = id;
			__builtin_memcpy(lease->sender, sender->byte, 6);
			return true;
		}
		return own && (of & ID_MASK) == id && skb->ingress_ifindex != state.tunnel;
	case POD:
		if (direction != 0 || !own || is_slow(id))
			return false;
		if (status & IPS_SRC_NAT) {
			lease->translation = 2;
			lease->address = p->destination;
			lease->port = p->ports[1];
		}
		return true;
	}
	return false;
}

/* Notes for the tunnel packet that is now made of this one whose lease it can complete. */
static __always_inline void expect(struct pending *pending, const struct packet *p, const struct packet *in, __u32 generation)
{
	pending->leaves = *p;
	pending->in = *in;
	pending->generation = generation;
}

/* Gives the packet's connection a lease, if it may have one. */
static __always_inline int leave(struct __sk_buff *skb, const enum kind kind, __u32 generation, struct pending *pending)
{
	struct packet p, in, other;
	__u32 zero = 0;
	__u8 found;
	struct lease *lease = bpf_map_lookup_elem(&copies, &zero);
	if (!lease || !parse(skb, &p, 0) || (p.flags & TCP_FIN_SYN_RST) || is_of_ipsec(skb))
		return NEXT;
	struct nf_conn *ct = tracked(skb, &p, kind != TUNNEL_REQUEST, &found);
	if (!ct)
		return NEXT;
	/* Of the packet itself: requests are of the original direction, what goes back to pods is of the other. */
	const int direction = kind == TUNNEL_REPLY || kind == POD;
	in = other = p;
	incoming(ct, direction, &in);
	incoming(ct, !direction, &other);
	__builtin_memset(lease, 0, sizeof(*lease));
	lease->generation = generation;
	bool is_given = fill(skb, ct, found, kind, &p, &in, lease) && grantable(ct, &p, direction);
	bpf_ct_release(ct);
	if (!is_given)
		return NEXT;
	if (skb->ingress_ifindex == state.tunnel && (skb->tc_index & BY_TUNNEL)) {
		if (state.is_v6)
			remember(skb, lease, true);
		else
			remember(skb, lease, false);
	}
	__u64 now = bpf_ktime_get_coarse_ns();
	if (!give(skb, &p, &in, lease, now))
		return NEXT;
	note(&in, now);
	note(&other, now);
	if (pending)
		expect(pending, &p, &in, generation);
	return NEXT;
}

/* On the tunnel device: a request of a pod of this node, or a gateway's reply to another node's pod. */
SEC("tc")
int leave_tunnel(struct __sk_buff *skb)
{
	__u32 generation, zero = 0, mark = skb->mark;
	if (!came(skb, &generation) || (mark & 0xffff0000) != settings.base)
		return NEXT;
	struct pending *pending = bpf_map_lookup_elem(&pendings, &zero);
	if (!pending)
		return NEXT;
	pending->generation = 0;
	if (mark & PEER)
		return leave(skb, TUNNEL_REPLY, generation, pending);
	if ((mark & HANDED) || !(mark & ID_MASK))
		return NEXT;
	return leave(skb, TUNNEL_REQUEST, generation, pending);
}

/* On a gateway's uplinks, where a request leaves, translated, and on the interfaces to other nodes, where the tunnel device's
 * packets leave. */
SEC("tc")
int leave_uplink(struct __sk_buff *skb)
{
	__u32 zero = 0, mark = skb->mark, generation;
	if (!is_current(skb, &generation))
		return NEXT;
	struct pending *pending = bpf_map_lookup_elem(&pendings, &zero);
	if (pending && pending->generation == generation) {
		pending->generation = 0;
		if (state.is_v6)
			learn(skb, pending, generation, true);
		else
			learn(skb, pending, generation, false);
		return NEXT;
	}
	if ((mark & settings.kind_mask) || !(mark & ID_MASK) || !skb->ingress_ifindex)
		return NEXT;
	return leave(skb, UPLINK, generation, NULL);
}

/* On a pod's veth: a reply has come. */
SEC("tc")
int leave_pod(struct __sk_buff *skb)
{
	__u32 generation;
	if (!came(skb, &generation))
		return NEXT;
	return leave(skb, POD, generation, NULL);
}
