// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* The fast path: established connections past nf_tables.
 *
 * Nothing here decides. `enter` stands where packets come in: on selected pods' veths, on the tunnel device, on a gateway's
 * uplinks. `leave_tunnel`, `leave_uplink` and `leave_pod` stand where the kernel's own way ends. A packet that comes there
 * was let through by every hook of the host, Egret's and everybody else's. It gives its connection a lease: for one second,
 * packets of this direction are treated as this one was. `enter` sends what has a valid lease straight on. Everything else
 * takes the kernel's own way.
 *
 * A lease is void as soon as the generation changes, which the daemon raises when anybody changes a rule or a route. Each
 * packet carries the generation in which it came in (`tc_index`), so one that old rules let through gives no lease of the
 * new generation. A packet that went the fast way carries 0, and gives none. */
#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "fast_path.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define NEXT (-1)             /* TCX_NEXT: on to the next program, and into the stack */
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_HLEN 14
#define PACKET_HOST 0
#define TCP_FIN_SYN_RST 0x07
#define PEER 0x8000           /* in a connection mark: a peer index follows, not an egress ID */
#define HANDED 0x4000         /* in a connection mark: handed over to another node */
#define ID_MASK 0x3fff        /* the egress ID in marks */
#define HALF (1U << 30)       /* a quarter of the numbers of TCP: what tracking has seen last is that near */
#define SLOTS (1 << 14)

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

/* The parts of the kernel's types that are read. Their offsets come from the running kernel's BTF. */
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

struct bpf_ct_opts {
	__s32 netns_id, error;
	__u8 l4proto, dir, reserved[2];
};
extern struct nf_conn *bpf_skb_ct_lookup(struct __sk_buff *, struct bpf_sock_tuple *, __u32, struct bpf_ct_opts *, __u32) __ksym;
extern void bpf_ct_release(struct nf_conn *) __ksym;

/* One direction of a connection, by the tuple with which its packets come in, and how the last packet was treated that
 * took the kernel's own way. */
struct lease {
	__u64 seal;          /* over all that follows and the key, see `seal_of` */
	__u64 until;         /* nanoseconds of the coarse monotonic clock */
	__u32 generation;
	__u32 in, out;       /* interfaces */
	__u32 mark;          /* with which packets leave */
	__u32 priority;      /* as above */
	__u32 count;         /* the key of `counts`, 0: not counted */
	__u32 seq, ack;      /* TCP's numbers of the packet that gave the lease */
	__u16 size;          /* of the largest packet, or segment, that the kernel's own way has let through, bytes from the IP header on */
	__u16 port;          /* translation: the new port */
	__u8 translation;    /* 0: none, 1: of the source, 2: of the destination */
	__u8 hops, tos;      /* TTL and type of service with which packets leave */
	__u8 is_request;     /* it comes out of the tunnel, and must bear this egress ID and the MAC address of this node: */
	__u16 id;
	__u8 sender[6];
	__u8 macs[12];       /* of the frame that leaves */
	struct address address; /* translation: the new address */
	__u32 unused;
};
_Static_assert(sizeof(struct lease) == 96, "no padding, which would not be sealed");

struct key4 {
	__u32 source, destination;
	__u16 ports[2];
	__u8 protocol, unused[3];
};
struct key6 {
	struct address source, destination;
	__u16 ports[2];
	__u8 protocol, unused[3];
};

/* How many packets in a row a direction had among those whose hash leads here. A wrong one costs time and nothing else. */
struct slot {
	__u32 hash, packets;
};

volatile const struct settings settings SEC(".rodata") = {};
volatile struct state state SEC(".bss") = {};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct key4);
	__type(value, struct lease);
} leases4 SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 32768);
	__type(key, struct key6);
	__type(value, struct lease);
} leases6 SEC(".maps");
/* A peer's connection mark to its MAC address on the tunnel. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, struct mac);
} peers SEC(".maps");
/* Packets that went the fast way, by egress ID and role, as the counters of `egress_id_out` and `rx` count the others. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, __u32);
	__type(value, struct count);
} counts SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SLOTS);
	__type(key, __u32);
	__type(value, struct slot);
} slots SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_QUEUE);
	__uint(max_entries, 4096);
	__type(value, struct wish);
} wishes SEC(".maps");

/* ---- what a packet is ---- */

struct packet {
	struct address source, destination;
	__u32 seq, ack;
	__u16 ports[2];
	__u16 l4;   /* offset of the transport header */
	__u16 size; /* of the packet, or of its largest segment, from the IP header on */
	__u8 is_v6, protocol, flags, hops, tos;
};

/* Whether the fast way is for such packets: TCP and UDP without options of IP, not in fragments. */
static __always_inline bool parse(struct __sk_buff *skb, struct packet *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 header;
	if (skb->vlan_present || data + ETH_HLEN + sizeof(struct iphdr) + 8 > end)
		return false;
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
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
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
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
		/* Translation must not touch a checksum that is not there. */
		if (*(__u16 *)(l4 + 6) == 0)
			return false;
	} else {
		return false;
	}
	__u32 size = skb->gso_size ? skb->gso_size + p->l4 - ETH_HLEN + header : skb->len - ETH_HLEN;
	p->size = size;
	return size <= 0xffff;
}

static __always_inline struct lease *find(const struct packet *p)
{
	if (p->is_v6) {
		struct key6 key = { .source = p->source, .destination = p->destination, .ports = { p->ports[0], p->ports[1] }, .protocol = p->protocol };
		return bpf_map_lookup_elem(&leases6, &key);
	}
	struct key4 key = { .source = p->source.word[0], .destination = p->destination.word[0], .ports = { p->ports[0], p->ports[1] }, .protocol = p->protocol };
	return bpf_map_lookup_elem(&leases4, &key);
}

/* The kernel gives the place of an element that was replaced or evicted to another one at once (kernel/bpf/hashtab.c), also
 * while a program on another processor reads it. What is read is whole and belongs to this tuple if the seal is right. */
static __always_inline __u64 seal_of(const struct lease *lease, const struct packet *p)
{
	const __u64 prime = 0x100000001b3; /* FNV-1a, by words: each step is a bijection */
	const __u64 *word = (const __u64 *)lease;
	__u64 seal = 0xcbf29ce484222325 ^ p->ports[0] ^ ((__u64)p->ports[1] << 16) ^ ((__u64)p->protocol << 32);
	if (p->is_v6) {
		for (int i = 0; i < 4; i++)
			seal = (seal ^ p->source.word[i] ^ ((__u64)p->destination.word[i] << 32)) * prime;
	} else {
		seal = (seal ^ p->source.word[0] ^ ((__u64)p->destination.word[0] << 32)) * prime;
	}
	for (int i = 1; i < sizeof(*lease) / 8; i++)
		seal = (seal ^ word[i]) * prime;
	return seal;
}

static __always_inline void end_lease(const struct packet *p)
{
	struct lease *lease = find(p);
	if (lease)
		lease->generation = 0;
}

/* The entry that connection tracking has of the packet, or of its answer, and the direction of what was looked up. */
static __always_inline struct nf_conn *tracked(struct __sk_buff *skb, const struct packet *p, bool answer, __u8 *direction)
{
	struct bpf_ct_opts options = { .netns_id = -1, .l4proto = p->protocol };
	struct bpf_sock_tuple tuple = {};
	const struct address *source = answer ? &p->destination : &p->source, *destination = answer ? &p->source : &p->destination;
	__u16 sport = answer ? p->ports[1] : p->ports[0], dport = answer ? p->ports[0] : p->ports[1];
	struct nf_conn *ct;
	if (p->is_v6) {
		__builtin_memcpy(tuple.ipv6.saddr, source, 16);
		__builtin_memcpy(tuple.ipv6.daddr, destination, 16);
		tuple.ipv6.sport = sport;
		tuple.ipv6.dport = dport;
		ct = bpf_skb_ct_lookup(skb, &tuple, sizeof(tuple.ipv6), &options, sizeof(options));
	} else {
		tuple.ipv4.saddr = source->word[0];
		tuple.ipv4.daddr = destination->word[0];
		tuple.ipv4.sport = sport;
		tuple.ipv4.dport = dport;
		ct = bpf_skb_ct_lookup(skb, &tuple, sizeof(tuple.ipv4), &options, sizeof(options));
	}
	*direction = options.dir;
	return ct;
}

/* The tuple with which packets of a direction come in. */
static __always_inline void incoming(struct nf_conn *ct, int direction, struct packet *p)
{
	struct nf_conntrack_tuple *tuple = direction ? &ct->tuplehash[1].tuple : &ct->tuplehash[0].tuple;
	for (int i = 0; i < 4; i++) {
		p->source.word[i] = tuple->src.u3.all[i];
		p->destination.word[i] = tuple->dst.u3.all[i];
	}
	p->ports[0] = tuple->src.u.all;
	p->ports[1] = tuple->dst.u.all;
}

/* ---- the fast way ---- */

/* The low bits of a generation, never 0. */
static __always_inline __u16 stamp(__u32 generation)
{
	return generation % 0xffff + 1;
}

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

/* Connection tracking sees how a connection ends: no direction of it has a lease any more. */
static __always_inline void end_both(struct __sk_buff *skb, const struct packet *p)
{
	struct packet other = *p;
	__u8 direction;
	end_lease(p);
	struct nf_conn *ct = tracked(skb, p, false, &direction);
	if (!ct)
		return;
	incoming(ct, !direction, &other);
	bpf_ct_release(ct);
	end_lease(&other);
}

/* Whether the lease is for this packet. All that the kernel's own way looks at must be as it was. */
static __always_inline bool holds(struct __sk_buff *skb, const struct packet *p, const struct lease *lease)
{
	if (lease->in != skb->ifindex || (__s64)(lease->until - bpf_ktime_get_coarse_ns()) < 0)
		return false;
	if (p->hops != (__u8)(lease->hops + 1) || p->hops <= 1 || p->tos != lease->tos || p->size > lease->size)
		return false;
	/* What tracking has seen of TCP's numbers stays near enough to judge a reset (`nf_conntrack_tcp_packet`). */
	if (p->protocol == IPPROTO_TCP && (p->seq - lease->seq + HALF > 2 * HALF || p->ack - lease->ack + HALF > 2 * HALF))
		return false;
	if (lease->is_request) {
		void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
		if (data + ETH_HLEN > end || (skb->mark & 0xffff) != lease->id)
			return false;
		const __u16 *sender = data + 6, *known = (const __u16 *)lease->sender;
		if (sender[0] != known[0] || sender[1] != known[1] || sender[2] != known[2])
			return false;
	}
	/* The sum over a whole IPv6 packet would not be right any more; of IPv4 it is, as its header has a checksum. */
	return !p->is_v6 || bpf_csum_update(skb, 0) < 0;
}

/* The transport checksum, which needs nothing but what changes. */
static __always_inline bool fix_checksum(struct __sk_buff *skb, const struct packet *p, const struct lease *lease)
{
	__u32 at = p->l4 + (p->protocol == IPPROTO_TCP ? 16 : 6);
	__u64 udp = p->protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
	struct address old = lease->translation == 1 ? p->source : p->destination, new = lease->address;
	__u16 port = lease->translation == 1 ? p->ports[0] : p->ports[1];
	if (p->is_v6) {
		__s64 difference = bpf_csum_diff((void *)&old, 16, (void *)&new, 16, 0);
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

SEC("tc")
int enter(struct __sk_buff *skb)
{
	__u32 generation = state.generation;
	struct packet p;
	skb->tc_index = generation ? stamp(generation) : 0;
	if (!generation || skb->pkt_type != PACKET_HOST || !parse(skb, &p))
		return NEXT;
	struct lease *found = find(&p);
	if (!found || found->generation != generation)
		return NEXT;
	if (p.flags & TCP_FIN_SYN_RST) {
		end_both(skb, &p);
		return NEXT;
	}
	struct lease lease = *found;
	if (lease.seal != seal_of(&lease, &p) || lease.generation != generation || !holds(skb, &p, &lease))
		return NEXT;
	__u32 key = lease.count;
	if (key) {
		struct count *count = bpf_map_lookup_elem(&counts, &key);
		if (!count)
			return NEXT;
		count->packets++;
		count->bytes += skb->len - ETH_HLEN;
	}
	/* A packet that is changed in part is not for anybody. */
	if (lease.translation && !fix_checksum(skb, &p, &lease))
		return TC_ACT_SHOT;
	if (!(p.is_v6 ? rewrite6(skb, &lease) : rewrite4(skb, &p, &lease)))
		return TC_ACT_SHOT;
	skb->mark = lease.mark;
	skb->priority = lease.priority;
	skb->tc_index = 0;
	return bpf_redirect(lease.out, 0);
}

/* ---- where the kernel's own way ends ---- */

/* Whether the packet came in by `enter`, in this generation, and took the kernel's own way. */
static __always_inline bool came(struct __sk_buff *skb, __u32 *generation)
{
	*generation = state.generation;
	return *generation && skb->ingress_ifindex && skb->tc_index == stamp(*generation);
}

/* Counts the packet. Most connections are short, and must not cost more for a lease that they hardly use. */
static __always_inline struct slot *lasting(struct __sk_buff *skb, const struct packet *p)
{
	/* The kernel's own hash of a packet that came out of a tunnel would have to be computed, which takes longer. */
	__u64 mixed = ((__u64)p->source.word[0] << 32 | p->destination.word[0]) ^ ((__u64)p->ports[0] << 16 | p->ports[1]);
	if (p->is_v6)
		mixed ^= (__u64)p->source.word[3] << 32 ^ p->destination.word[3];
	__u32 hash = (mixed * 0x9e3779b97f4a7c15) >> 32, at = hash / (0x100000000 / SLOTS);
	struct slot *slot = bpf_map_lookup_elem(&slots, &at);
	if (!slot)
		return NULL;
	if (slot->hash != hash) {
		slot->hash = hash;
		slot->packets = 0;
	}
	if (slot->packets < settings.after)
		slot->packets += skb->gso_segs ?: 1;
	return slot->packets < settings.after ? NULL : slot;
}

/* Connection tracking sees one packet a second of those with a lease. Its check of TCP's windows must not mind, which the
 * daemon arranges for the connections in `wishes`. */
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
	struct wish wish = { .is_v6 = p->is_v6 };
	struct packet first = {};
	incoming(ct, 0, &first);
	wish.source = first.source;
	wish.destination = first.destination;
	wish.ports[0] = first.ports[0];
	wish.ports[1] = first.ports[1];
	bpf_map_push_elem(&wishes, &wish, 0);
	return false;
}

static __always_inline bool is_counted(__u32 key)
{
	struct count zero = {};
	return bpf_map_lookup_elem(&counts, &key) || !bpf_map_update_elem(&counts, &key, &zero, BPF_NOEXIST);
}

/* Gives a lease: `p` is the packet that leaves, `in` the tuple with which packets of its direction come in. */
static __always_inline void give(struct __sk_buff *skb, const struct packet *p, const struct packet *in, struct lease *lease)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	if (data + ETH_HLEN > end || (lease->count && !is_counted(lease->count)))
		return;
	__builtin_memcpy(lease->macs, data, 12);
	__u64 now = bpf_ktime_get_coarse_ns();
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
	if (old && old->generation == lease->generation && (__s64)(old->until - now) >= 0 && old->size > p->size)
		lease->size = old->size;
	lease->seal = seal_of(lease, in);
	if (p->is_v6) {
		struct key6 key = { .source = in->source, .destination = in->destination, .ports = { in->ports[0], in->ports[1] }, .protocol = in->protocol };
		bpf_map_update_elem(&leases6, &key, lease, 0);
	} else {
		struct key4 key = { .source = in->source.word[0], .destination = in->destination.word[0], .ports = { in->ports[0], in->ports[1] }, .protocol = in->protocol };
		bpf_map_update_elem(&leases4, &key, lease, 0);
	}
}

/* What a packet leaves for. */
enum kind { TUNNEL_REQUEST, TUNNEL_REPLY, UPLINK, POD };

/* Fills in what depends on the connection. False: no lease for such packets. */
static __always_inline bool fill(struct __sk_buff *skb, struct nf_conn *ct, __u8 direction, const enum kind kind, const struct packet *p,
				 struct lease *lease)
{
	__u32 mark = skb->mark, of = ct->mark, id = of & ID_MASK;
	bool own = (of & 0xffff0000) == settings.base && !(of & (PEER | HANDED)) && id;
	unsigned long status = ct->status;
	switch (kind) {
	case TUNNEL_REQUEST:
		/* The owner is another node, which translates. */
		lease->count = id;
		return direction == 0 && of == mark && own && !(status & IPS_SRC_NAT);
	case TUNNEL_REPLY:
		lease->translation = 2;
		lease->address = p->destination;
		lease->port = p->ports[1];
		return direction == 0 && of == mark && (status & IPS_SRC_NAT);
	case UPLINK:
		id = mark & ID_MASK;
		lease->translation = 1;
		lease->address = p->source;
		lease->port = p->ports[0];
		lease->count = id;
		if (direction != 1 || !(status & IPS_SRC_NAT))
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
		if (direction != 0 || !own)
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

/* Gives the packet's connection a lease, if it lasts and may have one. */
static __always_inline int leave(struct __sk_buff *skb, const enum kind kind, __u32 generation)
{
	struct lease lease = { .generation = generation };
	struct packet p, in;
	__u8 found;
	if (!parse(skb, &p) || (p.flags & TCP_FIN_SYN_RST))
		return NEXT;
	struct slot *slot = lasting(skb, &p);
	if (!slot)
		return NEXT;
	/* Until something better is known: tried again after as many packets. */
	slot->packets = 0;
	struct nf_conn *ct = tracked(skb, &p, kind != TUNNEL_REQUEST, &found);
	if (!ct)
		return NEXT;
	if (fill(skb, ct, found, kind, &p, &lease)) {
		/* Of the packet itself: requests are of the original direction, what goes back to pods is of the other. */
		int direction = kind == TUNNEL_REPLY || kind == POD;
		if (grantable(ct, &p, direction)) {
			in = p;
			incoming(ct, direction, &in);
			give(skb, &p, &in, &lease);
			slot->packets = settings.after;
		}
	}
	bpf_ct_release(ct);
	return NEXT;
}

/* On the tunnel device: a request of a pod of this node, or a gateway's reply to another node's pod. */
SEC("tc")
int leave_tunnel(struct __sk_buff *skb)
{
	__u32 generation, mark = skb->mark;
	if (!came(skb, &generation) || (mark & 0xffff0000) != settings.base)
		return NEXT;
	if (mark & PEER)
		return leave(skb, TUNNEL_REPLY, generation);
	if ((mark & HANDED) || !(mark & ID_MASK))
		return NEXT;
	return leave(skb, TUNNEL_REQUEST, generation);
}

/* On a gateway's uplink: a request leaves, translated. */
SEC("tc")
int leave_uplink(struct __sk_buff *skb)
{
	__u32 generation, mark = skb->mark;
	if ((mark & settings.kind_mask) || !(mark & ID_MASK) || !came(skb, &generation))
		return NEXT;
	return leave(skb, UPLINK, generation);
}

/* On a pod's veth: a reply has come. */
SEC("tc")
int leave_pod(struct __sk_buff *skb)
{
	__u32 generation;
	if (!came(skb, &generation))
		return NEXT;
	return leave(skb, POD, generation);
}
