use super::*;
use crate::api::Allocate;
use crate::fixture::{World, asking};
use crate::node_plan::allocations::Facts;

const POD: &[(&str, &str)] = &[("app", "x")];

/// A pod of a node that is none of the gateway's, since long.
struct Scene {
    world: World,
    beginning: Beginning,
    now: Instant,
}

impl Scene {
    fn new(policies: &[&str]) -> Self {
        let mut world = World::new(&["192.0.2.0/24"]);
        world.node("plain", "none", &["10.0.0.9"]);
        policies.iter().for_each(|policy| world.policy(policy, asking(Allocate::Dedicated)));
        let mut scene = Scene { world, beginning: Beginning::default(), now: Instant::now() };
        scene.placed();
        scene.policies();
        scene.now += Duration::from_secs(60);
        scene
    }

    /// Every policy gets its address, and nodes have them.
    fn placed(&mut self) {
        self.world.settle();
        self.world.allocate();
        self.world.settle();
        for said in self.world.cluster.egress_nodes.values_mut() {
            Arc::make_mut(said).tunnel_address = Some([10, 0, 0, 1].into());
        }
    }

    /// The policies that hold the pod now.
    fn policies(&mut self) -> Vec<String> {
        let view = View::new(&self.world.cluster, "plain", &Facts::default(), &[], []);
        let labels: Labels = POD.iter().copied().collect();
        match self.beginning.policy_chain(&view, "a", Some(&labels), self.now) {
            Some(PolicyChain::Steps(steps)) => steps.iter().map(|step| step.policy.to_string()).collect(),
            Some(PolicyChain::Isolated) => vec!["held".into()],
            None => vec![],
        }
    }
}

fn begins(scene: &mut Scene, policy: &str) {
    scene.world.policy(policy, asking(Allocate::Dedicated));
}

#[test]
fn a_policy_that_begins_waits_for_its_address_and_no_longer_than_a_second() {
    let mut scene = Scene::new(&[]);
    begins(&mut scene, "a/p");
    assert!(scene.policies().is_empty());
    assert_eq!(scene.beginning.next(), Some(scene.now + GRACE));
    scene.now += Duration::from_millis(300);
    scene.world.allocate();
    assert!(scene.policies().is_empty(), "no node has it");
    scene.placed();
    assert_eq!(scene.policies(), ["a/p"]);
    assert_eq!(scene.beginning.next(), None);

    let mut scene = Scene::new(&[]);
    begins(&mut scene, "a/p");
    assert!(scene.policies().is_empty());
    scene.now += GRACE;
    assert_eq!(scene.policies(), ["a/p"]);
    scene.now += GRACE;
    assert_eq!(scene.policies(), ["a/p"]);
}

#[test]
fn a_pod_goes_on_by_the_policy_that_it_had() {
    let mut scene = Scene::new(&["a/q"]);
    assert_eq!(scene.policies(), ["a/q"]);
    // It is the senior one by its name, and covers all that the other covers.
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/q"]);
    scene.placed();
    assert_eq!(scene.policies(), ["a/p"]);
}

#[test]
fn what_takes_another_policys_place_holds_at_once() {
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
fn new_pods_and_pods_of_a_daemon_that_has_just_started_are_held_at_once() {
    let mut scene = Scene::new(&[]);
    scene.beginning = Beginning::default();
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/p"]);

    let mut scene = Scene::new(&[]);
    scene.beginning = Beginning::default();
    assert!(scene.policies().is_empty());
    scene.now += Duration::from_secs(2);
    begins(&mut scene, "a/p");
    assert_eq!(scene.policies(), ["a/p"]);
}
