//! What the fuzzer does to a cluster: steps, and how they are written in a sequence.

use std::fmt;
use std::str::FromStr;

/// The nodes of the fuzzer's lab.
pub const NODES: [&str; 4] = ["n1", "n2", "g1", "g2"];
/// What can be killed.
pub const DAEMONS: [&str; 5] = ["n1", "n2", "g1", "g2", "controller"];
/// How many pods there are at most. Those with an even number are in `shop`, the others in `office`.
pub const PODS: usize = 8;
/// How many policies there are at most, see [`super::model::scope`].
pub const POLICIES: usize = 7;
/// The gateways. Policies that name an address use the first, the others the second.
pub const GATEWAYS: [&str; 2] = ["first", "second"];
/// Values of pods' label `app`.
pub const APPS: [&str; 3] = ["a", "b", "c"];

/// A policy, besides what its number says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicySpec {
    /// The value of `app` that it selects; `None`: all pods.
    pub app: Option<&'static str>,
    /// What it covers.
    pub cover: Cover,
    /// The address that it names, by its number in the namespace; `None`: the gateway gives it one.
    pub address: Option<u8>,
    /// The families of a named address.
    pub families: Families,
    /// `fallback: NodeAddress`.
    pub fallback: bool,
}

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant),* }

        impl $name {
            /// All of them.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            fn word(self) -> &'static str {
                match self { $($name::$variant => $word),* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<$name, String> {
                $name::ALL.iter().copied().find(|v| v.word() == text).ok_or_else(|| {
                    format!("{text:?} is none of {:?}", $name::ALL.iter().map(|v| v.word()).collect::<Vec<_>>())
                })
            }
        }
    };
}

words!(
    /// Which of the two servers a policy covers.
    Cover {
        /// It has no `egress`.
        All = "all",
        /// The first server, by its addresses.
        First = "first",
        /// The second one.
        Second = "second",
    }
);

words!(
    /// The families of a named address.
    Families {
        /// A pair.
        Both = "both",
        /// IPv6 is blocked.
        V4 = "v4",
        /// IPv4 is blocked.
        V6 = "v6",
    }
);

words!(
    /// What becomes of a manifest.
    Harm {
        /// No bytes.
        Empty = "empty",
        /// The first half.
        Half = "half",
        /// Other bytes.
        Garbage = "garbage",
    }
);

words!(
    /// What somebody leaves or destroys in a node's directories.
    Junk {
        /// A directory where a record should be.
        Directory = "directory",
        /// A FIFO.
        Fifo = "fifo",
        /// A link to itself.
        Circle = "circle",
        /// A link to `/dev/zero`.
        Device = "device",
        /// A huge file.
        Huge = "huge",
        /// The records of pods are lost.
        Lost = "lost",
        /// The snapshot for the plugin is cut in half.
        Snapshot = "snapshot",
    }
);

words!(
    /// What somebody does to all of a node's rules at once.
    Flush {
        /// `nft flush ruleset`, and the CNI's own rules put back.
        Ruleset = "ruleset",
        /// `nft flush table inet egret`.
        Table = "table",
        /// `nft delete table inet egret`.
        Delete = "delete",
    }
);

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// No daemon owns its nftables tables (`--own-tables=false`), wherever this stands: others can change them while
    /// it runs.
    Unowned,
    /// Nothing for so many milliseconds.
    Wait(u32),
    /// The runtime makes the pod, and tries again until it is there.
    Add(usize, &'static str, &'static str),
    /// The runtime ends the pod.
    Delete(usize),
    /// `kubectl delete --force`: the object goes, the container goes on.
    Forget(usize),
    /// Another value of `app`.
    Relabel(usize, &'static str),
    /// The policy is made or changed.
    Policy(usize, PolicySpec),
    /// The policy is deleted.
    Unpolicy(usize),
    /// The gateway is deleted.
    Ungateway(&'static str),
    /// The gateway is made.
    Gateway(&'static str),
    /// SIGKILL.
    Kill(&'static str),
    /// SIGSTOP.
    Hang(&'static str),
    /// It runs again.
    Start(&'static str),
    /// The node's cable is pulled out.
    Unplug(&'static str),
    /// And put back.
    Plug(&'static str),
    /// The node loses the label of gateways.
    Leave(&'static str),
    /// And gets it back.
    Join(&'static str),
    /// The policy's manifest is damaged.
    Damage(usize, Harm),
    /// The pod's manifest is damaged.
    DamagePod(usize, Harm),
    /// All damaged manifests are put right.
    Repair,
    /// See [`Junk`].
    Junk(&'static str, Junk),
    /// Somebody deletes one of Egret's rules, by its number modulo how many there are.
    Remove(&'static str, usize),
    /// Somebody takes the tunnel device down.
    Down(&'static str),
    /// See [`Flush`].
    Flush(&'static str, Flush),
    /// `conntrack -F`.
    Conntrack(&'static str),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Unowned => write!(f, "unowned"),
            Step::Wait(ms) => write!(f, "wait {ms}"),
            Step::Add(pod, node, app) => write!(f, "add p{pod} {node} {app}"),
            Step::Delete(pod) => write!(f, "delete p{pod}"),
            Step::Forget(pod) => write!(f, "forget p{pod}"),
            Step::Relabel(pod, app) => write!(f, "relabel p{pod} {app}"),
            Step::Policy(policy, spec) => {
                let address = spec.address.map_or_else(|| "any".to_owned(), |a| a.to_string());
                let fallback = if spec.fallback { "fallback" } else { "block" };
                let app = spec.app.unwrap_or("all");
                write!(f, "policy q{policy} {app} {} {address} {} {fallback}", spec.cover, spec.families)
            }
            Step::Unpolicy(policy) => write!(f, "unpolicy q{policy}"),
            Step::Ungateway(gateway) => write!(f, "ungateway {gateway}"),
            Step::Gateway(gateway) => write!(f, "gateway {gateway}"),
            Step::Kill(daemon) => write!(f, "kill {daemon}"),
            Step::Hang(daemon) => write!(f, "hang {daemon}"),
            Step::Start(daemon) => write!(f, "start {daemon}"),
            Step::Unplug(node) => write!(f, "unplug {node}"),
            Step::Plug(node) => write!(f, "plug {node}"),
            Step::Leave(node) => write!(f, "leave {node}"),
            Step::Join(node) => write!(f, "join {node}"),
            Step::Damage(policy, harm) => write!(f, "damage q{policy} {harm}"),
            Step::DamagePod(pod, harm) => write!(f, "damage p{pod} {harm}"),
            Step::Repair => write!(f, "repair"),
            Step::Junk(node, junk) => write!(f, "junk {node} {junk}"),
            Step::Remove(node, which) => write!(f, "remove {node} {which}"),
            Step::Down(node) => write!(f, "down {node}"),
            Step::Flush(node, flush) => write!(f, "flush {node} {flush}"),
            Step::Conntrack(node) => write!(f, "conntrack {node}"),
        }
    }
}

impl FromStr for Step {
    type Err = String;
    fn from_str(text: &str) -> Result<Step, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let step = match *words.as_slice() {
            ["unowned"] => Step::Unowned,
            ["wait", ms] => Step::Wait(number(ms)?),
            ["add", pod, node, app] => Step::Add(of('p', pod, PODS)?, known(&NODES, node)?, known(&APPS, app)?),
            ["delete", pod] => Step::Delete(of('p', pod, PODS)?),
            ["forget", pod] => Step::Forget(of('p', pod, PODS)?),
            ["relabel", pod, app] => Step::Relabel(of('p', pod, PODS)?, known(&APPS, app)?),
            ["policy", policy, app, cover, address, families, fallback] => Step::Policy(
                of('q', policy, POLICIES)?,
                PolicySpec {
                    app: if app == "all" { None } else { Some(known(&APPS, app)?) },
                    cover: cover.parse()?,
                    address: if address == "any" { None } else { Some(number(address)?) },
                    families: families.parse()?,
                    fallback: known(&["block", "fallback"], fallback)? == "fallback",
                },
            ),
            ["unpolicy", policy] => Step::Unpolicy(of('q', policy, POLICIES)?),
            ["ungateway", gateway] => Step::Ungateway(known(&GATEWAYS, gateway)?),
            ["gateway", gateway] => Step::Gateway(known(&GATEWAYS, gateway)?),
            ["kill", daemon] => Step::Kill(known(&DAEMONS, daemon)?),
            ["hang", daemon] => Step::Hang(known(&DAEMONS, daemon)?),
            ["start", daemon] => Step::Start(known(&DAEMONS, daemon)?),
            ["unplug", node] => Step::Unplug(known(&NODES, node)?),
            ["plug", node] => Step::Plug(known(&NODES, node)?),
            ["leave", node] => Step::Leave(known(&NODES, node)?),
            ["join", node] => Step::Join(known(&NODES, node)?),
            ["damage", object, harm] if object.starts_with('q') => {
                Step::Damage(of('q', object, POLICIES)?, harm.parse()?)
            }
            ["damage", object, harm] => Step::DamagePod(of('p', object, PODS)?, harm.parse()?),
            ["repair"] => Step::Repair,
            ["junk", node, junk] => Step::Junk(known(&NODES, node)?, junk.parse()?),
            ["remove", node, which] => Step::Remove(known(&NODES, node)?, number(which)?),
            ["down", node] => Step::Down(known(&NODES, node)?),
            ["flush", node, flush] => Step::Flush(known(&NODES, node)?, flush.parse()?),
            ["conntrack", node] => Step::Conntrack(known(&NODES, node)?),
            _ => return Err(format!("{text:?} is no step; tests/fuzz/step.rs lists them")),
        };
        Ok(step)
    }
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{text:?} is no number"))
}

fn of(letter: char, text: &str, limit: usize) -> Result<usize, String> {
    let number: usize = number(text.strip_prefix(letter).unwrap_or_default())?;
    if number < limit { Ok(number) } else { Err(format!("{text:?}: the last one is {letter}{}", limit - 1)) }
}

fn known(all: &[&'static str], text: &str) -> Result<&'static str, String> {
    all.iter().copied().find(|known| *known == text).ok_or_else(|| format!("{text:?} is none of {all:?}"))
}

/// A sequence as it is written: steps with `;` between them.
pub fn written(steps: &[Step]) -> String {
    steps.iter().map(Step::to_string).collect::<Vec<_>>().join("; ")
}

/// Reads a sequence.
///
/// # Errors
/// The step that cannot be read.
pub fn read(text: &str) -> Result<Vec<Step>, String> {
    text.split([';', '\n']).filter(|step| !step.trim().is_empty()).map(str::parse).collect()
}
