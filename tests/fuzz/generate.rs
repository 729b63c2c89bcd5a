//! A sequence from a seed.

use super::random::Random;
use super::step::{
    APPS, Cover, DAEMONS, Families, Flush, GATEWAYS, Harm, Junk, NODES, PODS, POLICIES, PolicySpec, Step,
};

/// How many steps a sequence has after its beginning.
const LENGTH: usize = 60;

/// So many milliseconds are long enough for all to have heard of everything.
const RESTS: u32 = 5500;

/// The sequence of a seed. It begins with pods and policies, so that there is something to break.
pub fn sequence(seed: u64) -> Vec<Step> {
    let mut random = Random::new(seed);
    let mut steps = Vec::new();
    // Where daemons own their tables, nobody can take anything out of them.
    if random.below(2) == 0 {
        steps.push(Step::Unowned);
    }
    for policy in 0..3 {
        steps.push(Step::Policy(random.below(POLICIES), spec(&mut random)));
        steps.push(add(&mut random, policy));
        steps.push(add(&mut random, policy + 3));
    }
    steps.push(Step::Wait(1000));
    // What was broken is mended most of the time, or soon nothing would be left to break.
    let mut broken: Vec<Step> = Vec::new();
    while steps.len() < LENGTH {
        steps.push(pause(&mut random));
        if !broken.is_empty() && random.below(3) == 0 {
            steps.push(broken.remove(random.below(broken.len())));
            continue;
        }
        let step = step(&mut random);
        if let Step::Kill(daemon) = step
            && random.below(2) == 0
        {
            steps.extend(pods_without_daemon(&mut random, daemon));
        } else {
            steps.push(step);
        }
        broken.extend(mended_by(step));
    }
    steps
}

/// All have heard of everything, then a daemon is killed, and a pod is made where it ran.
fn pods_without_daemon(random: &mut Random, daemon: &'static str) -> [Step; 5] {
    let node = NODES.into_iter().find(|node| *node == daemon).unwrap_or(random.one(&NODES));
    let pod = random.below(PODS);
    let rest = Step::Wait(RESTS);
    [Step::Delete(pod), rest, Step::Kill(daemon), Step::Add(pod, node, random.one(&APPS)), Step::Wait(700)]
}

fn mended_by(step: Step) -> Option<Step> {
    Some(match step {
        Step::Kill(daemon) | Step::Hang(daemon) => Step::Start(daemon),
        Step::Unplug(node) => Step::Plug(node),
        Step::Leave(node) => Step::Join(node),
        Step::Ungateway(gateway) => Step::Gateway(gateway),
        Step::Damage(..) | Step::DamagePod(..) => Step::Repair,
        _ => return None,
    })
}

/// Mostly short: races are between steps. Now and then long enough for all to have heard of everything.
fn pause(random: &mut Random) -> Step {
    Step::Wait(match random.below(20) {
        0 => RESTS,
        1..5 => 1000,
        5..12 => 200,
        _ => 5 + u32::try_from(random.below(60)).expect("less than 60"),
    })
}

fn add(random: &mut Random, pod: usize) -> Step {
    Step::Add(pod, random.one(&NODES), random.one(&APPS))
}

fn spec(random: &mut Random) -> PolicySpec {
    PolicySpec {
        app: if random.below(4) == 0 { None } else { Some(random.one(&APPS)) },
        cover: random.one(&[Cover::All, Cover::All, Cover::First, Cover::Second]),
        address: if random.below(3) == 0 { None } else { Some(u8::try_from(random.below(2)).expect("0 or 1")) },
        families: random.one(&[Families::Both, Families::Both, Families::Both, Families::V4, Families::V6]),
        fallback: random.below(8) == 0,
    }
}

fn step(random: &mut Random) -> Step {
    let (pod, policy, node) = (random.below(PODS), random.below(POLICIES), random.one(&NODES));
    let gateway_node = random.one(&NODES[2..]);
    match random.below(100) {
        0..16 => add(random, pod),
        16..26 => Step::Delete(pod),
        26..28 => Step::Forget(pod),
        28..36 => Step::Relabel(pod, random.one(&APPS)),
        36..44 => Step::Policy(policy, spec(random)),
        44..47 => Step::Unpolicy(policy),
        47..49 => Step::Ungateway(random.one(&GATEWAYS)),
        49..68 => Step::Kill(random.one(&DAEMONS)),
        68..70 => Step::Hang(random.one(&DAEMONS)),
        70..74 => Step::Unplug(random.one(&["g1", "g2", "g1", "g2", "n1"])),
        74..76 => Step::Leave(gateway_node),
        76..81 => Step::Damage(policy, random.one(Harm::ALL)),
        81..83 => Step::DamagePod(pod, random.one(Harm::ALL)),
        83..88 => Step::Junk(node, random.one(Junk::ALL)),
        88..94 => Step::Remove(node, random.below(1000)),
        94..96 => Step::Down(node),
        96..98 => Step::Flush(node, random.one(Flush::ALL)),
        _ => Step::Conntrack(node),
    }
}
