/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Leases, the maps, and connection tracking. */
#ifndef EGRET_LEASE_H
#define EGRET_LEASE_H

#define SLOTS (1 << 15)
#define NOTED 16 /* so many times 2^30 nanoseconds after it was noted, a connection is forgotten */

/* The tunnel's headers: Ethernet, IP, UDP, VXLAN, and the Ethernet header of the frame in it. */
#define OUTER4 64
#define OUTER6 84
/* What of it lies around a frame, from its first byte to the Ethernet header of the frame in it. */
#define AROUND4 (OUTER4 - ETH_HLEN)
#define AROUND6 (OUTER6 - ETH_HLEN)

/* What the tunnel has to do with a direction of a connection. */
enum way { PLAIN, INTO_TUNNEL, OUT_OF_TUNNEL };

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
	/* The tunnel's packets, as the last one was: INTO_TUNNEL, as it left; OUT_OF_TUNNEL, as it came. */
	__u32 device;        /* the interface to or from the other node, 0: not known */
	__u32 outer_mark, outer_priority; /* INTO_TUNNEL: with which it left */
	__u16 outer_size;    /* INTO_TUNNEL: as `size`, of packets in whole tunnel packets */
	__u16 ip_sum, udp_sum; /* INTO_TUNNEL: sums over what does not change, for the checksums */
	__u8 way;
	__u8 unused;
	__u8 outer[88];      /* its headers; OUT_OF_TUNNEL: from the IP header to VXLAN's egress ID */
};
#define WORDS (sizeof(struct lease) / 8)
#define PLAIN_WORDS 14       /* without the tunnel's headers */
_Static_assert(sizeof(struct lease) == 200 && offsetof(struct lease, outer) == 8 * PLAIN_WORDS, "no padding, which would not be sealed");

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

/* How many packets in a row a direction had among those whose hash leads here, and when one of them was given a lease, or
 * the other direction was. A wrong slot costs time and nothing else. */
struct slot {
	__u32 hash;
	__u16 packets;
	__u16 noted; /* in 2^30 nanoseconds, 0: never */
};

/* The lease that was given last on this processor to packets that go into the tunnel, for the packet that is on its way. */
struct pending {
	struct packet leaves, in;
	__u32 generation; /* 0: none */
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
/* The other nodes' ends of the tunnel: the interface to each, where tunnel packets may pass the tunnel device by. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct address);
	__type(value, __u32);
} nodes SEC(".maps");
/* Egress IDs, and egress IPs (of replies, which bear no ID), whose packets take the kernel's own way. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u32);
} slow_ids SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct address);
	__type(value, __u32);
} slow_ips SEC(".maps");
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
	__type(value, struct lease_request);
} requests SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lease);
} copies SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct pending);
} pendings SEC(".maps");

static __always_inline struct key4 key4_of(const struct packet *p)
{
	return (struct key4){ .source = p->source.word[0], .destination = p->destination.word[0], .ports = { p->ports[0], p->ports[1] }, .protocol = p->protocol };
}

static __always_inline struct key6 key6_of(const struct packet *p)
{
	return (struct key6){ .source = p->source, .destination = p->destination, .ports = { p->ports[0], p->ports[1] }, .protocol = p->protocol };
}

static __always_inline struct lease *find(const struct packet *p)
{
	if (p->is_v6) {
		struct key6 key = key6_of(p);
		return bpf_map_lookup_elem(&leases6, &key);
	}
	struct key4 key = key4_of(p);
	return bpf_map_lookup_elem(&leases4, &key);
}

static __always_inline void store(const struct packet *p, const struct lease *lease)
{
	if (p->is_v6) {
		struct key6 key = key6_of(p);
		bpf_map_update_elem(&leases6, &key, lease, 0);
	} else {
		struct key4 key = key4_of(p);
		bpf_map_update_elem(&leases4, &key, lease, 0);
	}
}

/* The kernel gives the place of an element that was replaced or evicted to another one at once (kernel/bpf/hashtab.c), also
 * while a program on another processor reads it. What is read is whole and belongs to this tuple if the seal is right. */
static __always_inline __u64 seal_of(const struct lease *lease, const struct packet *p)
{
	const __u64 prime = 0x100000001b3; /* FNV-1a, by words, in two sums at once: each step is a bijection */
	const __u64 *word = (const __u64 *)lease;
	__u64 one = 0xcbf29ce484222325 ^ p->ports[0] ^ ((__u64)p->ports[1] << 16) ^ ((__u64)p->protocol << 32);
	__u64 other = 0x9e3779b97f4a7c15;
	if (p->is_v6) {
		for (int i = 0; i < 4; i++)
			one = (one ^ p->source.word[i] ^ ((__u64)p->destination.word[i] << 32)) * prime;
	} else {
		one = (one ^ p->source.word[0] ^ ((__u64)p->destination.word[0] << 32)) * prime;
	}
	for (int i = 1; i < PLAIN_WORDS; i += 2) {
		one = (one ^ word[i]) * prime;
		if (i + 1 < PLAIN_WORDS)
			other = (other ^ word[i + 1]) * prime;
	}
	if (lease->device) {
		for (int i = PLAIN_WORDS; i < WORDS; i += 2) {
			other = (other ^ word[i]) * prime;
			if (i + 1 < WORDS)
				one = (one ^ word[i + 1]) * prime;
		}
	}
	return (one ^ (other << 32 | other >> 32)) * prime;
}

/* A copy, as what is found can change at any time. NULL if it is not whole. */
static __always_inline struct lease *copied(const struct lease *found, const struct packet *p)
{
	__u32 zero = 0;
	struct lease *copy = bpf_map_lookup_elem(&copies, &zero);
	if (!copy)
		return NULL;
	const __u64 *from = (const __u64 *)found;
	__u64 *to = (__u64 *)copy;
	for (int i = 0; i < PLAIN_WORDS; i++)
		to[i] = from[i];
	if (copy->device) {
		for (int i = PLAIN_WORDS; i < WORDS; i++)
			to[i] = from[i];
	}
	return copy->seal == seal_of(copy, p) ? copy : NULL;
}

/* ---- which connections last ---- */

static __always_inline struct slot *slot_of(const struct packet *p, __u32 *hash)
{
	/* The kernel's own hash of a packet that came out of a tunnel would have to be computed, which takes longer. */
	__u64 mixed = ((__u64)p->source.word[0] << 32 | p->destination.word[0]) ^ ((__u64)p->ports[0] << 16 | p->ports[1]);
	if (p->is_v6)
		mixed ^= (__u64)p->source.word[3] << 32 ^ p->destination.word[3];
	*hash = (mixed * 0x9e3779b97f4a7c15) >> 32;
	__u32 at = *hash / (0x100000000 / SLOTS);
	return bpf_map_lookup_elem(&slots, &at);
}

/* Whether the tuple may have a lease, or its answers may: others need not be looked up. */
static __always_inline bool is_noted(const struct slot *slot)
{
	__u16 noted = slot->noted;
	return noted && (__u16)((bpf_ktime_get_coarse_ns() >> 30) - noted) < NOTED;
}

static __always_inline void note(const struct packet *p, __u64 now)
{
	__u32 hash;
	struct slot *slot = slot_of(p, &hash);
	if (slot)
		slot->noted = (__u16)(now >> 30) ?: 1;
}

/* Most connections are short, and must not cost more for a lease that they hardly use. Counts the packet, unless it is the one
 * with which there are as many as are needed for a lease: false. */
static __always_inline bool is_short(struct __sk_buff *skb, struct slot *slot, __u32 hash)
{
	__u32 packets = (slot->hash == hash ? slot->packets : 0) + (skb->gso_segs ?: 1);
	if (packets >= settings.after)
		return false;
	slot->hash = hash;
	slot->packets = packets;
	return true;
}

/* Counts the packet. After as many packets as are needed for a lease it is tried, and tried again after as many. */
static __always_inline bool lasts(struct __sk_buff *skb, struct slot *slot, __u32 hash)
{
	if (is_short(skb, slot, hash))
		return false;
	slot->hash = hash;
	slot->packets = 0;
	return true;
}

/* ---- connection tracking ---- */

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

static __always_inline void end_lease(const struct packet *p)
{
	struct lease *lease = find(p);
	if (lease)
		lease->generation = 0;
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

#endif
