//! A cluster that steps are applied to, and what the fuzzer must remember of it.

use super::capture::{ALL_PORTS, Capture, Seen, Users};
use super::model::{self, SECOND4, SECOND6, namespace};
use super::step::{DAEMONS, Flush, GATEWAYS, Harm, Junk, NODES, PODS, PolicySpec, Step};
use super::timeline::{Life, Timeline};
use super::traffic::Traffic;
use lab::host::Host;
use lab::{Lab, Pod, fault_injection, server, topology};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Between two tries of a runtime to make a pod; a kubelet's are further apart.
const RETRY: Duration = Duration::from_millis(300);

/// A pod that is being made, or is there.
pub struct Slot {
    /// Its life in the timeline.
    pub incarnation: usize,
    node: usize,
    app: &'static str,
    ends: Arc<AtomicBool>,
    adding: Option<JoinHandle<Option<(Pod, Traffic)>>>,
    /// It, and what it sends.
    pub running: Option<(Pod, Traffic)>,
    /// Its object is gone.
    pub forgotten: bool,
}

/// See the module.
pub struct Cluster {
    lab: Arc<Lab>,
    begin: Instant,
    /// What happened so far.
    pub timeline: Timeline,
    /// The pods there are.
    pub slots: BTreeMap<usize, Slot>,
    users: Users,
    capture: Option<Capture>,
    hung: BTreeSet<&'static str>,
    unplugged: BTreeSet<&'static str>,
    left: BTreeSet<&'static str>,
    gateways: BTreeSet<&'static str>,
    /// Manifests that are damaged, with what stood in them.
    damaged: BTreeMap<String, String>,
    written: BTreeMap<usize, Duration>,
    /// Nodes whose records of pods somebody removed.
    records_lost: BTreeSet<usize>,
    /// When somebody deleted a rule of the node.
    removed: BTreeMap<&'static str, Duration>,
}

impl Cluster {
    /// The cluster before the first step: everything runs, there are gateways, namespaces, and neither pods nor policies.
    /// With `owned`, the daemons own their tables, where the kernel lets them.
    pub fn start(owned: bool) -> Cluster {
        let lab = Lab::builder().node_arguments(&[&format!("--own-tables={owned}")]).build();
        let begin = Instant::now();
        let ext = lab.host("ext");
        ext.ip_batch(&[format!("addr add {SECOND4}/24 dev eth0"), format!("addr add {SECOND6}/64 dev eth0 nodad")]);
        let redirects = [("udp", server::UDP_ECHO), ("tcp", server::ECHO)];
        let rules = redirects.map(|(protocol, to)| format!("{protocol} dport {ALL_PORTS} redirect to :{to}\n"));
        let chain = "type nat hook prerouting priority dstnat;";
        ext.nft(&format!("table inet fuzz {{\nchain pre {{\n{chain}\n{}}}\n}}\n", rules.concat()));
        for gateway in GATEWAYS {
            lab.manifests().write_object(&format!("{gateway}.yaml"), &model::gateway(gateway));
        }
        for name in [namespace(0), namespace(1)] {
            lab.add_namespace(name, &[("kubernetes.io/metadata.name", name)]);
        }
        lab.start();
        let users = Users::default();
        let capture = Capture::start(lab.host("ext"), begin, Arc::clone(&users));
        let mut timeline = Timeline::default();
        for daemon in DAEMONS {
            timeline.runs(begin.elapsed(), daemon, true);
        }
        Cluster {
            lab: Arc::new(lab),
            begin,
            timeline,
            slots: BTreeMap::new(),
            users,
            capture: Some(capture),
            hung: BTreeSet::new(),
            unplugged: BTreeSet::new(),
            left: BTreeSet::new(),
            gateways: GATEWAYS.into(),
            damaged: BTreeMap::new(),
            written: BTreeMap::new(),
            records_lost: BTreeSet::new(),
            removed: BTreeMap::new(),
        }
    }

    /// The time since the lab was built.
    pub fn now(&self) -> Duration {
        self.begin.elapsed()
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Does one step. What makes no sense at the time does nothing: so what is left of a sequence is one, too.
    pub fn apply(&mut self, step: Step) {
        self.finish_adding();
        match step {
            Step::Unowned => {}
            Step::Wait(ms) => thread::sleep(Duration::from_millis(ms.into())),
            Step::Add(pod, node, app) => self.add(pod, node, app),
            Step::Delete(pod) => self.delete(pod),
            Step::Forget(pod) => self.forget(pod),
            Step::Relabel(pod, app) => self.relabel(pod, app),
            Step::Policy(policy, spec) => self.write_policy(policy, spec),
            Step::Unpolicy(policy) => self.delete_policy(policy),
            Step::Ungateway(gateway) => {
                if self.gateways.remove(gateway) {
                    self.lab.remove_manifest(&format!("{gateway}.yaml"));
                }
            }
            Step::Gateway(gateway) => self.make_gateway(gateway),
            Step::Kill(daemon) => self.kill(daemon),
            Step::Hang(daemon) => self.hang(daemon),
            Step::Start(daemon) => self.run(daemon),
            Step::Unplug(node) => self.plug(node, false),
            Step::Plug(node) => self.plug(node, true),
            Step::Leave(node) => self.label(node, false),
            Step::Join(node) => self.label(node, true),
            Step::Damage(policy, harm) => self.damage_policy(policy, harm),
            Step::DamagePod(pod, harm) => self.damage_pod(pod, harm),
            Step::Repair => self.repair(),
            Step::Junk(node, junk) => self.junk(node, junk),
            Step::Remove(node, which) => self.remove(node, which),
            Step::Down(node) => {
                self.lab.node(node).try_run(["ip", "link", "set", "egret", "down"]);
            }
            Step::Flush(node, flush) => self.flush(node, flush),
            Step::Conntrack(node) => {
                self.lab.node(node).try_run(["conntrack", "-F"]);
            }
        }
    }

    fn write_policy(&mut self, policy: usize, spec: PolicySpec) {
        let now = self.now();
        self.damaged.remove(&policy_file(policy));
        self.written.insert(policy, now);
        self.timeline.change(now, |p| {
            p.all.insert(policy, spec);
            p.damaged.remove(&policy);
        });
        self.lab.manifests().write_object(&policy_file(policy), &model::manifest(policy, &spec));
    }

    fn delete_policy(&mut self, policy: usize) {
        if self.timeline.now().all.contains_key(&policy) {
            self.damaged.remove(&policy_file(policy));
            let now = self.now();
            self.timeline.change(now, |p| {
                p.all.remove(&policy);
                p.damaged.remove(&policy);
            });
            self.lab.remove_manifest(&policy_file(policy));
        }
    }

    fn kill(&mut self, daemon: &'static str) {
        if self.lab.daemon(daemon).pid().is_some() {
            let now = self.now();
            self.timeline.runs(now, daemon, false);
            self.hung.remove(daemon);
            self.lab.daemon(daemon).kill9();
        }
    }

    fn hang(&mut self, daemon: &'static str) {
        if self.lab.daemon(daemon).pid().is_some() && self.hung.insert(daemon) {
            let now = self.now();
            self.timeline.runs(now, daemon, false);
            self.lab.daemon(daemon).suspend(true);
        }
    }

    /// Adds, as a runtime does: in its own time, again and again.
    fn add(&mut self, pod: usize, node: &'static str, app: &'static str) {
        if self.slots.contains_key(&pod) {
            return;
        }
        let number = node_number(node);
        let incarnation = self.timeline.lives.len();
        self.timeline.lives.push(Life { pod, node: number, apps: vec![(self.now(), app)], lost: None });
        let ends = Arc::new(AtomicBool::new(false));
        let (lab, ended, users, begin) =
            (Arc::clone(&self.lab), Arc::clone(&ends), Arc::clone(&self.users), self.begin);
        let adding = thread::spawn(move || {
            loop {
                let mut made = lab.sandbox(node, namespace(pod), &format!("p{pod}"), &[("app", app)]);
                made.sysctl(&["net.ipv4.ping_group_range=0 2147483647"]);
                let Err(error) = made.attach() else {
                    let traffic = Traffic::start(&made.namespaces(), pod, incarnation, begin, &users);
                    return Some((made, traffic));
                };
                note(&lab, begin, &format!("ADD of p{pod} on {node}: {error}"));
                drop(made.detach());
                made.remove_netns();
                if ended.load(Ordering::Relaxed) {
                    made.forget();
                    return None;
                }
                thread::sleep(RETRY);
            }
        });
        let slot = Slot { incarnation, node: number, app, ends, adding: Some(adding), running: None, forgotten: false };
        self.slots.insert(pod, slot);
    }

    /// Takes over what is made.
    pub fn finish_adding(&mut self) {
        for slot in self.slots.values_mut() {
            if let Some(adding) = slot.adding.take_if(|a| a.is_finished()) {
                slot.running = adding.join().expect("a pod's making");
            }
        }
    }

    /// Pods that the runtime has not been able to make yet.
    pub fn unfinished(&self) -> Vec<usize> {
        self.slots.iter().filter(|(_, slot)| slot.running.is_none()).map(|(pod, _)| *pod).collect()
    }

    fn delete(&mut self, pod: usize) {
        let Some(mut slot) = self.slots.remove(&pod) else { return };
        slot.ends.store(true, Ordering::Relaxed);
        if let Some(adding) = slot.adding.take() {
            slot.running = adding.join().expect("a pod's making");
        }
        self.damaged.remove(&pod_file(pod));
        let Some((made, traffic)) = slot.running else { return };
        traffic.stop();
        // A runtime tries again until it succeeds.
        for _ in 0..20 {
            let Err(error) = made.detach() else { break };
            note(&self.lab, self.begin, &format!("DEL of p{pod}: {error}"));
            thread::sleep(RETRY);
        }
        made.remove_netns();
        if !slot.forgotten {
            made.forget();
        }
    }

    fn forget(&mut self, pod: usize) {
        let now = self.now();
        let Some(slot) = self.slots.get_mut(&pod) else { return };
        if let (Some((made, _)), false) = (&slot.running, slot.forgotten) {
            made.forget();
            slot.forgotten = true;
            self.damaged.remove(&pod_file(pod));
            if self.records_lost.contains(&slot.node) {
                self.timeline.lives[slot.incarnation].lost = Some(now);
            }
        }
    }

    fn relabel(&mut self, pod: usize, app: &'static str) {
        let now = self.now();
        let Some(slot) = self.slots.get_mut(&pod) else { return };
        if let (Some((made, _)), false) = (&mut slot.running, slot.forgotten || slot.app == app) {
            slot.app = app;
            self.damaged.remove(&pod_file(pod));
            self.timeline.lives[slot.incarnation].apps.push((now, app));
            made.relabel(&[("app", app)]);
        }
    }

    fn make_gateway(&mut self, gateway: &'static str) {
        if self.gateways.insert(gateway) {
            self.lab.manifests().write_object(&format!("{gateway}.yaml"), &model::gateway(gateway));
        }
    }

    fn run(&mut self, daemon: &'static str) {
        let process = self.lab.daemon(daemon);
        if self.hung.remove(daemon) {
            process.suspend(false);
        } else if process.pid().is_none() {
            process.restart();
        } else {
            return;
        }
        self.timeline.runs(self.now(), daemon, true);
    }

    fn plug(&mut self, node: &'static str, in_: bool) {
        let changed = if in_ { self.unplugged.remove(node) } else { self.unplugged.insert(node) };
        if changed {
            fault_injection::plugged(&self.lab, node, in_);
        }
    }

    fn label(&mut self, node: &'static str, member: bool) {
        if node.starts_with('g') && (if member { self.left.remove(node) } else { self.left.insert(node) }) {
            fault_injection::label(&self.lab, node, &[("egret.dev/gateway", if member { "true" } else { "no" })]);
        }
    }

    /// Only what everybody has read can be kept by everybody.
    fn damage_policy(&mut self, policy: usize, harm: Harm) {
        let now = self.now();
        let written = self.written.get(&policy).copied().unwrap_or_default();
        if self.timeline.now().all.contains_key(&policy) && self.timeline.all_heard(written, now) {
            self.timeline.change(now, |p| {
                p.damaged.insert(policy);
            });
            self.damage(&policy_file(policy), harm);
        }
    }

    fn damage_pod(&mut self, pod: usize, harm: Harm) {
        let Some(slot) = self.slots.get(&pod).filter(|slot| slot.running.is_some() && !slot.forgotten) else { return };
        let written = self.timeline.lives[slot.incarnation].apps.last().map(|(at, _)| *at).unwrap_or_default();
        if self.timeline.all_heard(written, self.now()) {
            self.damage(&pod_file(pod), harm);
        }
    }

    fn damage(&mut self, file: &str, harm: Harm) {
        if self.damaged.contains_key(file) {
            return;
        }
        let path = self.lab.manifests().path().join(file);
        let whole = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let text = match harm {
            Harm::Empty => String::new(),
            Harm::Half => whole[..whole.len() / 2].to_owned(),
            Harm::Garbage => "\u{1}: [}{ \t-".repeat(40),
        };
        // As an editor does that is interrupted: the same file.
        fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        self.damaged.insert(file.to_owned(), whole);
    }

    fn repair(&mut self) {
        for (file, whole) in std::mem::take(&mut self.damaged) {
            self.lab.write_manifest(&file, &whole);
        }
        let now = self.now();
        if !self.timeline.now().damaged.is_empty() {
            self.timeline.change(now, |p| p.damaged.clear());
        }
    }

    fn junk(&mut self, node: &'static str, junk: Junk) {
        let records = self.lab.node(node).run_dir().join("attachments");
        let number = self.begin.elapsed().as_nanos();
        let path = records.join(format!("junk-{number}"));
        let path = path.as_path();
        let done = match junk {
            Junk::Directory => fs::create_dir(path),
            Junk::Fifo => {
                nix::unistd::mkfifo(path, nix::sys::stat::Mode::from_bits_truncate(0o600)).map_err(Into::into)
            }
            Junk::Circle => symlink(path, path),
            Junk::Device => symlink("/dev/zero", path),
            Junk::Huge => fs::File::create(path).and_then(|file| file.set_len(1 << 33)),
            Junk::Lost => {
                self.lose_records(node_number(node));
                Ok(())
            }
            Junk::Snapshot => {
                let path = self.lab.node(node).state_dir().join("offline-policies.json");
                fs::read_to_string(&path).and_then(|text| fs::write(&path, &text[..text.len() / 2]))
            }
        };
        // There may be no such directory yet.
        if let Err(e) = done {
            note(&self.lab, self.begin, &format!("junk {node} {junk}: {e}"));
        }
    }

    /// A pod of which neither the record nor the object is left is one that nobody knows.
    fn lose_records(&mut self, node: usize) {
        let now = self.now();
        self.records_lost.insert(node);
        for slot in self.slots.values().filter(|slot| slot.node == node && slot.forgotten) {
            self.timeline.lives[slot.incarnation].lost.get_or_insert(now);
        }
        let records = self.lab.nodes()[node].run_dir().join("attachments");
        for entry in fs::read_dir(records).into_iter().flatten().flatten() {
            drop(fs::remove_file(entry.path()));
        }
    }

    /// One rule at a time: only that is promised to be closed.
    fn remove(&mut self, node: &'static str, which: usize) {
        let now = self.now();
        let last = self.removed.get(node).copied();
        let back = self.timeline.running_since(node).map(|since| since.max(last.unwrap_or_default()));
        if last.is_some() && back.is_none_or(|at| at + Duration::from_secs(2) > now) {
            return;
        }
        let rules = self.lab.node(node).egret_rules();
        if let Some(rule) = rules.get(which % rules.len().max(1)) {
            let command = ["nft", "delete", "rule"].into_iter().chain(rule.place.split(' '));
            note(&self.lab, self.begin, &format!("remove {node}: {}: {}", rule.place, rule.text));
            self.lab.node(node).try_run(command);
            self.removed.insert(node, now);
        }
    }

    /// What a flush opens is closed by the daemon.
    fn flush(&mut self, node: &'static str, flush: Flush) {
        if self.timeline.running_since(node).is_none() {
            return;
        }
        self.timeline.flushed(self.now(), node_number(node));
        let host: &Host = self.lab.node(node);
        match flush {
            Flush::Ruleset => {
                host.run(["nft", "flush", "ruleset"]);
                topology::masquerade(self.lab.node(node));
            }
            Flush::Table => drop(host.try_run(["nft", "flush", "table", "inet", "egret"])),
            Flush::Delete => drop(host.try_run(["nft", "delete", "table", "inet", "egret"])),
        }
        self.timeline.flushed(self.now(), node_number(node));
    }

    /// Everything is put right; pods without objects go.
    pub fn heal(&mut self) {
        self.repair();
        DAEMONS.iter().for_each(|daemon| self.run(daemon));
        NODES.iter().for_each(|node| self.plug(node, true));
        NODES.iter().for_each(|node| self.label(node, true));
        GATEWAYS.iter().for_each(|gateway| self.make_gateway(gateway));
        let forgotten: Vec<usize> = self.slots.iter().filter(|(_, s)| s.forgotten).map(|(pod, _)| *pod).collect();
        forgotten.into_iter().for_each(|pod| self.delete(pod));
    }

    /// Ends all pods; what came to the servers.
    pub fn finish(&mut self) -> Vec<Seen> {
        (0..PODS).for_each(|pod| self.delete(pod));
        self.capture.take().map(Capture::stop).unwrap_or_default()
    }
}

fn policy_file(policy: usize) -> String {
    format!("q{policy}.yaml")
}

fn pod_file(pod: usize) -> String {
    format!("pod-{}-p{pod}.yaml", namespace(pod))
}

fn node_number(node: &str) -> usize {
    NODES.iter().position(|n| *n == node).expect("a node of the lab")
}

/// Into a log of its own, beside the daemons'.
fn note(lab: &Lab, begin: Instant, text: &str) {
    use std::io::Write;
    static LOCK: Mutex<()> = Mutex::new(());
    let _one = LOCK.lock();
    let path = lab.directory().join("logs/fuzz.log");
    if let Ok(mut file) = fs::File::options().create(true).append(true).open(path) {
        drop(writeln!(file, "{:.3} {text}", begin.elapsed().as_secs_f64()));
    }
}
