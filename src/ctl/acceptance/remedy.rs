//! What to do about a broken promise, from what the cluster says of the nodes that it concerns.

use super::judge::Fault;
use crate::ctl::problem::Problem;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What an egress IP of the test is called.
pub const OF_THE_TEST: &str = "an egress IP of this test";

/// What is known of the cluster when a promise was broken.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// What `kubectl egret status` finds, the worst first, the CNI included.
    pub problems: Vec<Problem>,
    /// For each of the test's nodes: whether its daemon is ready.
    pub daemons: BTreeMap<String, bool>,
    /// Whose an address is, in words.
    pub names: BTreeMap<IpAddr, String>,
    /// The test's policy, `namespace/name`.
    pub policy: String,
    /// The gateway.
    pub gateway: String,
    /// The node that holds the egress IP.
    pub owner: String,
    /// The egress IP.
    pub egress: String,
    /// The server.
    pub server: String,
    /// The nodes whose pods have had right answers.
    pub answered: Vec<String>,
}

impl Findings {
    /// What an address is.
    pub fn name(&self, address: IpAddr) -> String {
        match self.names.get(&address) {
            Some(name) => format!("{address}, {name}"),
            None => format!("{address}, which is no egress IP and no node's address"),
        }
    }

    /// The problem of an object that may be the cause, as a remedy.
    fn of(&self, is_cause: impl Fn(&Problem) -> bool) -> Option<String> {
        let problem = self.problems.iter().find(|problem| is_cause(problem))?;
        let remedy = if problem.remedy.is_empty() { "see `kubectl egret status`" } else { &problem.remedy };
        Some(format!("{}: {}: {}; {remedy}", problem.object, problem.reason, problem.message))
    }

    fn daemon(&self, node: &str) -> Option<String> {
        (self.daemons.get(node) == Some(&false)).then(|| {
            format!(
                "no daemon of Egret's is ready on {node}; see `kubectl get pods -A -o wide -l app.kubernetes.io/name=egret` \
                 and its pod's log there"
            )
        })
    }

    /// What to do.
    pub fn remedy(&self, fault: &Fault) -> String {
        match fault {
            Fault::Elsewhere { node, saw, right_later, .. } => self.of_elsewhere(node, *saw, *right_later),
            Fault::NoAnswer { node, right_later: false, .. } => self.of_no_answer(node),
            Fault::NoAnswer { node, .. } | Fault::Slow { node, .. } => self.daemon(node).unwrap_or_else(|| {
                format!(
                    "run the test again when {node} is idle; if it stays, packets get lost on the way to {}",
                    self.server
                )
            }),
            Fault::Ended { node, .. } => format!(
                "see docs/failover.md, Ports, for connections that may end; else what passes between {node} and {} ends \
                 connections that are quiet or change their path",
                self.server
            ),
        }
    }

    fn of_elsewhere(&self, node: &str, saw: IpAddr, right_later: bool) -> String {
        if let Some(why) = self.daemon(node) {
            return why;
        }
        if let Some(why) = self.of(|problem| problem.object.starts_with("CNI ")) {
            return why;
        }
        if self.names.get(&saw).is_some_and(|name| name == OF_THE_TEST) {
            return format!(
                "the change has not reached {node}: see `kubectl egret status`, and the daemon's log there"
            );
        }
        if self.names.get(&saw).is_some_and(|name| name.starts_with("the egress IP")) {
            return format!("another policy decides for the test's pods; `kubectl egret ip {saw}` names it");
        }
        if right_later {
            return format!(
                "the container runtime on {node} has not called egret-cni: its entry is not in the network configuration \
                 that the runtime uses. See that EGRET_CNI_CONF_DIR of the DaemonSet egret-node is the runtime's \
                 directory, and the daemon's log on {node}"
            );
        }
        format!(
            "the pod's packets on {node} go past Egret: see docs/limits.md for CNIs that bypass netfilter, and whether \
             Egret's entry is in the network configuration of {node}"
        )
    }

    fn of_no_answer(&self, node: &str) -> String {
        let concerns = |problem: &Problem| {
            let object = problem.object.as_str();
            problem.policies.contains(&self.policy)
                || [node, &self.owner]
                    .iter()
                    .any(|node| object == format!("node {node}") || object == format!("gateway node {node}"))
                || object == format!("EgressGateway {}", self.gateway)
        };
        if let Some(why) = self.daemon(node).or_else(|| self.daemon(&self.owner)).or_else(|| self.of(concerns)) {
            return why;
        }
        if node != self.owner && self.answered.contains(&self.owner) {
            return format!(
                "pods on {} have answers, so packets get lost between {node} and {}: UDP 7871 must pass between them both \
                 ways, and a firewall on {} must let packets from the device egret be forwarded",
                self.owner, self.owner, self.owner
            );
        }
        format!(
            "let {} reach {}: see that a firewall between them lets it pass, that the network of {} takes packets from it \
             (clouds must be told of further addresses), and that answers find the way back",
            self.egress, self.server, self.owner
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::judge::Series;
    use super::*;
    use crate::ctl::problem::Severity;
    use crate::probe::ProbeMethod;

    const TCP4: Series = Series { method: ProbeMethod::Tcp, ipv6: false };

    fn known() -> Findings {
        Findings {
            daemons: ["n1", "n2"].map(|node| (node.to_owned(), true)).into(),
            names: [("192.0.2.60".parse().unwrap(), "the egress IP of EgressPolicy shop/all".to_owned())].into(),
            policy: "egret-test-x/first".to_owned(),
            owner: "n2".to_owned(),
            egress: "192.0.2.50".to_owned(),
            server: "192.0.2.100:8080".to_owned(),
            ..Findings::default()
        }
    }

    fn elsewhere(saw: &str, right_later: bool) -> Fault {
        Fault::Elsewhere { node: "n1".to_owned(), series: TCP4, saw: saw.parse().unwrap(), right_later }
    }

    fn no_answer() -> Fault {
        Fault::NoAnswer { node: "n1".to_owned(), series: TCP4, error: "no answer".to_owned(), right_later: false }
    }

    #[test]
    fn the_remedy_for_a_wrong_address_follows_from_when_and_whose_it_is() {
        let mut known = known();
        assert!(known.remedy(&elsewhere("192.0.2.11", true)).contains("has not called egret-cni"));
        assert!(known.remedy(&elsewhere("192.0.2.11", false)).contains("bypass netfilter"));
        assert!(known.remedy(&elsewhere("192.0.2.60", false)).contains("kubectl egret ip 192.0.2.60"));
        known.names.insert("192.0.2.51".parse().unwrap(), OF_THE_TEST.to_owned());
        assert!(known.remedy(&elsewhere("192.0.2.51", false)).starts_with("the change has not reached n1"));
        let cni = Problem::new(Severity::Error, "CNI Cilium", "BypassesNetfilter", "it does; install it otherwise");
        known.problems.push(cni);
        assert!(known.remedy(&elsewhere("192.0.2.11", true)).ends_with("it does; install it otherwise"));
        known.daemons.insert("n1".to_owned(), false);
        assert!(known.remedy(&elsewhere("192.0.2.11", true)).starts_with("no daemon of Egret's is ready on n1"));
    }

    #[test]
    fn the_remedy_for_no_answer_is_what_the_nodes_report_else_where_packets_get_lost() {
        let mut known = known();
        assert!(known.remedy(&no_answer()).starts_with("let 192.0.2.50 reach 192.0.2.100:8080"));
        known.answered.push("n2".to_owned());
        assert!(known.remedy(&no_answer()).contains("between n1 and n2: UDP 7871 must pass"));
        let blocked = Problem::new(Severity::Error, "node n2", "Blocked", "a host firewall drops; let egress pass");
        known.problems.push(blocked);
        assert_eq!(known.remedy(&no_answer()), "node n2: Blocked: a host firewall drops; let egress pass");
        let other = Problem::new(Severity::Error, "node n7", "Blocked", "a host firewall drops; let egress pass");
        known.problems = vec![other];
        assert!(known.remedy(&no_answer()).contains("UDP 7871"));
    }
}
