//! The light skeleton: loads all programs by one run of the first.

use crate::error::{LoadError, reason};
use crate::layout::{LeaseRequest, STATE, Settings, TunnelEnd, address as encoded, state};
use crate::map::{Count, Map, possible_processors};
use crate::syscall::{Attributes, Command, address, own};
use crate::{Hook, Program};
use nix::libc::EINVAL;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

static DATA: &[u8] = include_bytes!("../programs/fast_path.data");
static CODE: &[u8] = include_bytes!("../programs/fast_path.code");
/// The order of maps and programs in `struct fast_path_bpf`, as the skeleton has it.
static ORDER: &str = include_str!("../programs/fast_path.order");

/// `BPF_PROG_TYPE_SYSCALL`, `BPF_F_SLEEPABLE`, include/uapi/linux/bpf.h.
const PROG_TYPE_SYSCALL: u32 = 31;
const SLEEPABLE: u32 = 1 << 4;
/// Lengths of `struct bpf_loader_ctx`, `bpf_map_desc`, `bpf_prog_desc`, tools/lib/bpf/skel_internal.h.
const LOADER: usize = 24;
const MAP: usize = 16;
const PROGRAM: usize = 4;
/// Room for a verifier's log, bytes.
const LOG: usize = 1 << 20;
/// The index of the interface `lo`.
const LOOPBACK: u32 = 1;
/// In a key of the map `counts`: packets from the tunnel.
const GATEWAY: u32 = 0x1_0000;

/// The names of maps or of programs, in order.
fn names(kind: &str) -> Vec<&'static str> {
    let line = ORDER.lines().find_map(|line| line.strip_prefix(kind));
    line.unwrap_or_default().split_whitespace().collect()
}

/// The programs, loaded, and attached nowhere. They go when this and all [`Link`]s are dropped, or when the process
/// ends.
#[derive(Debug)]
pub struct Programs {
    programs: BTreeMap<&'static str, OwnedFd>,
    state: Map,
    peers: Map,
    nodes: Map,
    slow_ids: Map,
    slow_ips: Map,
    counts: Map,
    requests: Map,
    processors: usize,
}

/// A program on an interface. It goes with this, or with the interface.
#[derive(Debug)]
pub struct Link(#[expect(dead_code, reason = "it is held open")] OwnedFd);

/// What one run of the loading program made.
struct Loaded {
    maps: Vec<OwnedFd>,
    programs: Vec<OwnedFd>,
}

impl Programs {
    /// Loads the programs into the kernel. They are closed: nothing takes the fast way before
    /// [`set_state`](Self::set_state).
    ///
    /// # Errors
    /// The kernel lacks what they need, or this process may not load any.
    pub fn load(settings: &Settings) -> Result<Self, LoadError> {
        if cfg!(target_endian = "big") {
            return Err(LoadError::ByteOrder);
        }
        // Each network namespace has the interface `lo`.
        programs_at(LOOPBACK, Hook::Ingress).map_err(LoadError::NoHooks)?;
        let processors = possible_processors().map_err(LoadError::Processors)?;
        let loaded = match run(settings, None) {
            Err(LoadError::Rejected { .. }) => run(settings, Some(&mut vec![0; LOG]))?,
            other => other?,
        };
        let mut maps: BTreeMap<_, _> = names("maps").into_iter().zip(loaded.maps).collect();
        let mut map = |name: &str| {
            let missing = || LoadError::Loader(io::Error::other(format!("no map {name}")));
            maps.remove(name).map(Map).ok_or_else(missing)
        };
        Ok(Programs {
            programs: names("programs").into_iter().zip(loaded.programs).collect(),
            state: map("bss")?,
            peers: map("peers")?,
            nodes: map("nodes")?,
            slow_ids: map("slow_ids")?,
            slow_ips: map("slow_ips")?,
            counts: map("counts")?,
            requests: map("requests")?,
            processors,
        })
    }

    /// Puts a program onto an interface of the calling thread's network namespace, behind those that are there.
    ///
    /// # Errors
    /// There is no such interface, or the kernel has no tcx (Linux 6.6).
    pub fn attach(&self, program: Program, interface: u32) -> io::Result<Link> {
        let fd = self.programs.get(program.name()).ok_or_else(|| io::Error::from_raw_os_error(EINVAL))?;
        let attributes = Attributes::new().number(0, fd.as_raw_fd().cast_unsigned()).number(4, interface);
        { attributes.number(8, program.hook().attach_type()) }.open(Command::LinkCreate).map(Link)
    }

    /// Sets the generation of leases, and this node's end of the tunnel. All leases of another generation are void. With
    /// generation 0, or without a tunnel, no packet goes the fast way.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn set_state(&self, generation: u32, tunnel: Option<&TunnelEnd>) -> io::Result<()> {
        self.state.update(&[0; 4], &state(generation, tunnel))
    }

    /// Sets the MAC addresses of the other nodes by the mark of their connections.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn set_peers(&self, peers: &BTreeMap<u32, [u8; 6]>) -> io::Result<()> {
        let value = |mac: &[u8; 6]| [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0];
        self.peers.set(&peers.iter().map(|(mark, mac)| (mark.to_ne_bytes(), value(mac))).collect())
    }

    /// Sets the other nodes' ends of the tunnel, with the index of the interface to each: tunnel packets of connections
    /// with a lease pass the tunnel device by there.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn set_nodes(&self, nodes: &BTreeMap<IpAddr, u32>) -> io::Result<()> {
        self.nodes.set(&nodes.iter().map(|(address, index)| (encoded(*address), index.to_ne_bytes())).collect())
    }

    /// Sets the egress IDs and egress IPs whose packets get no lease. Leases that they have stay until the next generation.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn set_slow(&self, ids: &BTreeSet<u16>, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        self.slow_ids.set(&ids.iter().map(|id| (u32::from(*id).to_ne_bytes(), [1, 0, 0, 0])).collect())?;
        self.slow_ips.set(&addresses.iter().map(|address| (encoded(*address), [1, 0, 0, 0])).collect())
    }

    /// The packets that went the fast way, by egress ID: those of this node's pods, and those that came out of the tunnel.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn counts(&self) -> io::Result<[BTreeMap<u16, Count>; 2]> {
        let mut counts = [BTreeMap::new(), BTreeMap::new()];
        for key in self.counts.keys::<4>()? {
            let number = u32::from_ne_bytes(key);
            let of = &mut counts[usize::from(number & GATEWAY != 0)];
            of.insert((number & !GATEWAY) as u16, self.counts.count(key, self.processors)?);
        }
        Ok(counts)
    }

    /// Takes the oldest request.
    ///
    /// # Errors
    /// As bpf(2).
    pub fn take_request(&self) -> io::Result<Option<LeaseRequest>> {
        Ok(self.requests.take::<{ LeaseRequest::LENGTH }>()?.map(|bytes| LeaseRequest::decode(&bytes)))
    }
}

/// The number of programs on a hook of an interface, of all parties.
///
/// # Errors
/// There is no such interface, or the kernel has no tcx (Linux 6.6).
pub fn programs_at(interface: u32, hook: Hook) -> io::Result<u32> {
    let mut attributes = Attributes::new().number(0, interface).number(4, hook.attach_type());
    attributes.call(Command::ProgQuery)?;
    Ok(attributes.answer(24))
}

/// Runs the loading program. `log` takes what the verifier says of the program that it rejects.
fn run(settings: &Settings, log: Option<&mut Vec<u8>>) -> Result<Loaded, LoadError> {
    let (maps, programs) = (names("maps"), names("programs"));
    let data = Map::of_one(DATA).map_err(LoadError::Loader)?;
    let fds = data.0.as_raw_fd().to_ne_bytes();
    let instructions = u32::try_from(CODE.len() / 8).unwrap_or(u32::MAX);
    let attributes = Attributes::new().number(0, PROG_TYPE_SYSCALL).number(4, instructions).input(8, CODE);
    let attributes = attributes.input(16, c"Dual MIT/GPL".to_bytes_with_nul()).number(44, SLEEPABLE);
    let loader = { attributes.input(120, &fds) }.open(Command::ProgLoad).map_err(LoadError::Loader)?;

    let (rodata, bss) = (settings.encode(), [0; STATE]);
    let mut context = vec![0; LOADER + MAP * maps.len() + PROGRAM * programs.len()];
    let length = u32::try_from(context.len()).unwrap_or(u32::MAX);
    context[..4].copy_from_slice(&length.to_ne_bytes());
    if let Some(log) = &log {
        context[8..12].copy_from_slice(&1_u32.to_ne_bytes());
        context[12..16].copy_from_slice(&u32::try_from(log.len()).unwrap_or(u32::MAX).to_ne_bytes());
        context[16..24].copy_from_slice(&address(log).to_ne_bytes());
    }
    for (at, name) in maps.iter().enumerate() {
        let initial = match *name {
            "rodata" => address(&rodata),
            "bss" => address(&bss),
            _ => 0,
        };
        context[LOADER + MAP * at + 8..][..8].copy_from_slice(&initial.to_ne_bytes());
    }
    let attributes = Attributes::new().number(0, loader.as_raw_fd().cast_unsigned()).number(40, length);
    let mut attributes = attributes.output(48, &mut context);
    let result = attributes.call(Command::ProgRun);
    let returned = attributes.answer(4).cast_signed();
    result.map_err(LoadError::Loader)?;
    if returned < 0 {
        let text = log
            .map(|log| String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned());
        let reason = text.map(|text| reason(&text)).unwrap_or_default();
        return Err(LoadError::Rejected { error: io::Error::from_raw_os_error(-returned), reason });
    }
    let fd = |at: usize| own(i32::from_ne_bytes([context[at], context[at + 1], context[at + 2], context[at + 3]]));
    let maps_end = LOADER + MAP * maps.len();
    Ok(Loaded {
        maps: (0..maps.len()).map(|n| fd(LOADER + MAP * n)).collect(),
        programs: (0..programs.len()).map(|n| fd(maps_end + PROGRAM * n)).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_skeleton_has_the_maps_and_programs_that_are_used() {
        let enter = [Program::Enter, Program::EnterUplink, Program::EnterUnderlay];
        let leave = [Program::LeaveTunnel, Program::LeaveUplink, Program::LeavePod];
        assert_eq!(names("programs"), [enter, leave].concat().into_iter().map(Program::name).collect::<Vec<_>>());
        for map in ["rodata", "bss", "peers", "nodes", "slow_ids", "slow_ips", "counts", "requests"] {
            assert!(names("maps").contains(&map), "{map}");
        }
        assert_eq!(CODE.len() % 8, 0);
    }
}
