// What Cilium's host routing does to a pod's packets: its program at the pod's veth sends them straight to an interface,
// past the host's stack (`fib_redirect`, bpf/lib/fib.h). Tests put one of these at a pod's veth. build.sh compiles them.
//
// Packets to pods of the same node, and what is no IP packet to elsewhere, go to the stack.
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// The index of the node's uplink, which the test replaces in the compiled program.
#define UPLINK 0x0e677e57
#define AF_INET 2
#define AF_INET6 10

static __always_inline int for_stack(struct __sk_buff *skb, struct bpf_fib_lookup *to) {
  if (skb->protocol == bpf_htons(ETH_P_IP)) {
    struct iphdr ip;
    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip)) return 1;
    to->family = AF_INET;
    to->ipv4_src = ip.saddr;
    to->ipv4_dst = ip.daddr;
    return (ip.saddr ^ ip.daddr) & bpf_htonl(0xffffff00) ? 0 : 1;
  }
  if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
    struct ipv6hdr ip;
    if (bpf_skb_load_bytes(skb, ETH_HLEN, &ip, sizeof ip)) return 1;
    to->family = AF_INET6;
    __builtin_memcpy(to->ipv6_src, &ip.saddr, 16);
    __builtin_memcpy(to->ipv6_dst, &ip.daddr, 16);
    if ((to->ipv6_dst[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000)) return 1;
    if ((to->ipv6_dst[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000)) return 1;
    return to->ipv6_src[0] == to->ipv6_dst[0] && to->ipv6_src[1] == to->ipv6_dst[1];
  }
  return 1;
}

// With one interface: no look-up of the program's own (ENABLE_SKIP_FIB).
SEC("neigh") int redirect_neigh(struct __sk_buff *skb) {
  struct bpf_fib_lookup to = {};
  if (for_stack(skb, &to)) return TC_ACT_OK;
  return bpf_redirect_neigh(UPLINK, 0, 0, 0);
}

// With several: the program looks the route up.
SEC("fib") int redirect_fib(struct __sk_buff *skb) {
  struct bpf_fib_lookup to = {};
  if (for_stack(skb, &to)) return TC_ACT_OK;
  to.ifindex = skb->ifindex;
  long found = bpf_fib_lookup(skb, &to, sizeof to, 0);
  if (found == BPF_FIB_LKUP_RET_NO_NEIGH) {
    struct bpf_redir_neigh hop = {.nh_family = to.family};
    __builtin_memcpy(hop.ipv6_nh, to.ipv6_dst, 16);
    return bpf_redirect_neigh(to.ifindex, &hop, sizeof hop, 0);
  }
  if (found != BPF_FIB_LKUP_RET_SUCCESS) return TC_ACT_SHOT;
  bpf_skb_store_bytes(skb, 0, to.dmac, ETH_ALEN, 0);
  bpf_skb_store_bytes(skb, ETH_ALEN, to.smac, ETH_ALEN, 0);
  return bpf_redirect(to.ifindex, 0);
}

// Cilium without host routing: the packet goes to the stack with the pod's identity as its mark.
SEC("stack") int to_stack(struct __sk_buff *skb) {
  skb->mark = 0x12340f00;
  return TC_ACT_OK;
}

char words[] SEC("license") = "Dual BSD/GPL";
