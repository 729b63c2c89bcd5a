//! The rules that Calico's agent Felix writes on a node, as its own code wrote them: `rules/felix.*`. They know two
//! workloads, the interfaces [`CALICO`], and a NetworkPolicy that allows both to send to the cluster and to the
//! server outside.

use super::topology::Node;

/// The interfaces of the workloads.
pub const CALICO: [&str; 2] = ["calia", "calib"];
/// What the NetworkPolicy allows outside of the cluster.
const OUTSIDE: [&str; 2] = ["192.0.2.0/24", "2001:db8::/64"];
const IPTABLES: [&str; 2] = [include_str!("../rules/felix.iptables4"), include_str!("../rules/felix.iptables6")];
const IPSET: &str = include_str!("../rules/felix.ipset");
const NFTABLES: &str = include_str!("../rules/felix.nft");
/// A rule of others that Felix comes before with `chainInsertMode: Insert`, and after with `Append`.
const OTHERS: &str = "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n";
/// A host endpoint on `eth0` without a policy that allows anything, shortened: only what comes in.
const HOST_ENDPOINT: &str = "*filter\n:cali-fh-eth0 - [0:0]\n\
    -A cali-fh-eth0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
    -A cali-fh-eth0 -m conntrack --ctstate INVALID -j DROP\n\
    -A cali-fh-eth0 -p tcp -m multiport --dports 22 -j ACCEPT\n\
    -A cali-fh-eth0 -j MARK --set-xmark 0x0/0x30000\n\
    -A cali-fh-eth0 -m mark --mark 0x10000/0x10000 -j RETURN\n\
    -A cali-fh-eth0 -m mark --mark 0x0/0x20000 -j DROP\n\
    -A cali-from-host-endpoint -i eth0 -g cali-fh-eth0\nCOMMIT\n";

/// How Felix is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Felix {
    /// `chainInsertMode: Insert`, the default.
    Insert,
    /// `chainInsertMode: Append`.
    Append,
    /// `iptablesBackend: Legacy`.
    Legacy,
    /// `nftablesMode: Enabled`.
    Nftables,
}

impl Felix {
    fn programs(self) -> [&'static str; 2] {
        match self {
            Felix::Legacy => ["iptables-legacy-restore", "ip6tables-legacy-restore"],
            _ => ["iptables-restore", "ip6tables-restore"],
        }
    }

    /// Writes all of its rules, in the place of what was in iptables' tables, or in its own of nf_tables.
    /// `allow` says whether the NetworkPolicy allows the server outside.
    pub fn write(self, node: &Node, allow: bool) {
        let rules = |text: &str| -> String {
            let denied = |line: &&str| !allow && OUTSIDE.iter().any(|network| line.contains(network));
            text.lines().filter(|line| !denied(line)).flat_map(|line| [line, "\n"]).collect()
        };
        if self == Felix::Nftables {
            // Its masquerade is the only one.
            self.programs().iter().for_each(|program| drop(node.feed([program], "*nat\nCOMMIT\n")));
            let own = "add table ip calico\ndelete table ip calico\nadd table ip6 calico\ndelete table ip6 calico\n";
            node.nft(&format!("{own}{}", rules(NFTABLES)));
            return;
        }
        node.feed(["ipset", "restore", "-exist"], IPSET);
        for (program, text) in self.programs().into_iter().zip(IPTABLES) {
            let hook = "-A FORWARD -j cali-FORWARD\n";
            let order = if self == Felix::Append { format!("{OTHERS}{hook}") } else { format!("{hook}{OTHERS}") };
            node.feed([program], &rules(text).replace(hook, &order));
        }
    }

    /// Removes all of its rules.
    pub fn remove(self, node: &Node) {
        if self == Felix::Nftables {
            node.nft("delete table ip calico\ndelete table ip6 calico\n");
            return;
        }
        let tables = ["raw", "mangle", "nat", "filter"].map(|table| format!("*{table}\nCOMMIT\n")).concat();
        self.programs().iter().for_each(|program| drop(node.feed([program], &tables)));
        node.run(["ipset", "destroy"]);
    }
}

/// Makes `eth0` a host endpoint that no policy opens, under the rules of [`Felix::Insert`].
pub fn add_host_endpoint(node: &Node) {
    for program in Felix::Insert.programs() {
        node.feed([program, "--noflush"], HOST_ENDPOINT);
    }
}

/// Lets tunnel packets through the host endpoint, as a GlobalNetworkPolicy with the port does.
pub fn allow_tunnel(node: &Node) {
    for program in ["iptables", "ip6tables"] {
        let rule = "-I cali-fh-eth0 5 -p udp -m multiport --dports 7871 -j MARK --set-xmark 0x10000/0x10000";
        node.run(std::iter::once(program).chain(rule.split(' ')));
    }
}
