use super::*;
use crate::api::Allocate;
use crate::fixture::{World, asking};
use crate::model::selector::Labels;
use crate::node_plan::allocations::Facts;

const POD: &[(&str, &str)] = &[("app", "x")];

/// A pod that has run for long, on a node outside of the gateway.
struct Scene {
    world: World,
    policy_delay: PolicyDelay,
    now: Instant,
}

impl Scene {
    fn new(policies: &[&str]) -> Self {
        let mut world = World::new(&["192.0.2.0/24"]);
        world.node("plain", "none", &["10.0.0.9"]);
        policies.iter().for_each(|policy| world.policy(policy, asking(Allocate::Dedicated)));
        let mut scene = Scene { world, policy_delay: PolicyDelay::default(), now: Instant::now() };
        scene.placed();
        scene.policies();
        scene.now += Duration::from_secs(60);
        scene
    }

    /// Every policy gets its egress IP, and nodes own them.
    fn placed(&mut self) {
        self.world.settle();
        self.world.allocate();
        self.world.settle();
        for said in self.world.cluster.egress_nodes.values_mut() {
            Arc::make_mut(said).tunnel_address = Some([10, 0, 0, 1].into());
        }
    }

    /// The policies in force for the pod now.
    fn policies(&mut self) -> Vec<String> {
        let view = View::new(&self.world.cluster, "plain", &Facts::default(), &[], []);
        let labels: Labels = POD.iter().copied().collect();
        let pod = Client { namespace: "a", name: "p", uid: "", labels: Some(&labels) };
        match self.policy_delay.policy_chain(&view, pod, self.now) {
            Some(PolicyChain::Steps(steps)) => steps.iter().map(|step| step.policy.to_string()).collect(),
            Some(PolicyChain::Isolated) => vec!["isolated".into()],
            None => vec![],
        }
    }
}

fn begins(scene: &mut Scene, policy: &str) {
    scene.world.policy(policy, asking(Allocate::Dedicated));
}

#[test]
fn a_new_policy_waits_for_its_egress_ip_at_most_a_second() {
    let mut scene = Scene::new(&[]);
    begins(&mut scene, "a/p");
    assert!(scene.policies().is_empty());
    assert_eq!(scene.policy_delay.next(), Some(scene.now + GRACE));
    scene.now += Duration::from_millis(300);
    scene.world.allocate();
    assert!(scene.policies().is_empty(), "no node has it");
    scene.placed();
    assert_eq!(scene.policies(), ["a/p"]);
    assert_eq!(scene.policy_delay.next(), None);

    let mut scene = Scene::new(&[]);
    begins(&mut scene, "a/p");
    assert!(scene.policies().is_empty());
    scene.now += GRACE;
    assert_eq!(scene.policies(), ["a/p"]);
    scene.now += GRACE;
    assert_eq!(scene.policies(), ["a/p"]);
}

#[test]
fn a_pod_keeps_its_policy_while_a_new_one_waits() {
    let mut scene = Scene::new(&["a/q"]);
    assert_eq!(scene.policies(), ["a/q"]);
    // The new policy precedes the other by its name, and covers the same destinations.
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/q"]);
    scene.placed();
    assert_eq!(scene.policies(), ["a/p"]);
}

#[test]
fn a_policy_that_replaces_another_is_in_force_at_once() {
    let mut scene = Scene::new(&["a/q"]);
    begins(&mut scene, "a/p");
    scene.world.without_policy("a/q");
    assert_eq!(scene.policies(), ["a/p"]);

    let mut scene = Scene::new(&["a/q"]);
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/q"]);
    scene.world.without_policy("a/q");
    assert_eq!(scene.policies(), ["a/p"], "it ends while the other one waits");

    let mut scene = Scene::new(&["a/q"]);
    begins(&mut scene, "a/p");
    let mut narrower = asking(Allocate::Dedicated);
    narrower.egress = Some(Vec::new());
    scene.world.policy("a/q", narrower);
    assert_eq!(scene.policies(), ["a/p"], "it covers less than it did");
}

#[test]
fn policies_of_new_pods_and_of_a_starting_daemon_are_in_force_at_once() {
    let mut scene = Scene::new(&[]);
    scene.policy_delay = PolicyDelay::default();
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/p"]);

    let mut scene = Scene::new(&[]);
    scene.policy_delay = PolicyDelay::default();
    assert!(scene.policies().is_empty());
    scene.now += Duration::from_secs(2);
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/p"]);
}
