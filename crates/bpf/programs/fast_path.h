/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* What the programs of the fast path and the crate that loads them share. Keep it equal to ../src/layout.rs, which encodes
 * and decodes it by hand. All fields are in the byte order of the host but for addresses and ports. */
#ifndef EGRET_FAST_PATH_H
#define EGRET_FAST_PATH_H

struct address {
	__u32 word[4]; /* IPv4: in the first one */
};

/* The settings, which do not change while the programs are loaded. */
struct settings {
	__u64 lease;     /* how long a lease lasts, nanoseconds */
	__u32 base;      /* the upper half of Egret's connection marks, shifted */
	__u32 kind_mask; /* of packet marks */
	__u32 after;     /* packets of one direction before it may get a lease */
	__u32 unused;
};

/* What the daemon changes while they run. */
struct state {
	__u32 generation;     /* 0: closed, no packet goes the fast way */
	__u32 tunnel;         /* the tunnel device's index */
	struct address local; /* this node's end of the tunnel */
	__be32 vni;           /* as in VXLAN's header, shifted */
	__be16 port;          /* of the tunnel, UDP */
	__u8 mac[6];          /* the tunnel device's */
	__u8 is_v6;           /* whether the tunnel is over IPv6 */
	__u8 unused[3];
};

/* A connection for which connection tracking is to be liberal, as its first packet was. */
struct lease_request {
	struct address source, destination;
	__u16 ports[2];
	__u8 is_v6;
	__u8 unused[3];
};

struct mac {
	__u8 byte[6];
	__u8 unused[2];
};

struct count {
	__u64 packets, bytes;
};

#define GATEWAY 0x10000 /* in a key of `counts`, besides the egress ID: a packet from the tunnel, of another node's pod */

#endif
