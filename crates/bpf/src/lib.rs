//! Egret's fast path: eBPF programs for established connections (`programs/fast_path.bpf.c`), and their loader.
//!
//! The programs are in this repository as a light skeleton: a program that the kernel runs to create the maps, to find
//! the places of what it reads in its own types (BTF), and to load the others. So neither a compiler nor libbpf nor a
//! parser of ELF is needed. `make bpf` compiles them anew.

mod error;
mod layout;
mod map;
mod skeleton;
mod syscall;

pub use error::LoadError;
pub use layout::{LeaseRequest, Settings, TunnelEnd};
pub use map::Count;
pub use skeleton::{Link, Programs, programs_at};

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// Where pods' packets, and those out of the tunnel device, come in: it sends packets of connections with a lease
    /// straight on.
    Enter,
    /// The same on a gateway's uplink. It takes tunnel packets, too.
    EnterUplink,
    /// The same on an interface to other nodes that is no uplink: it takes tunnel packets alone.
    EnterUnderlay,
    /// Where packets leave into the tunnel: it gives leases.
    LeaveTunnel,
    /// Where packets leave by a gateway's uplink, or to another node: it gives leases, and completes those of packets that
    /// go into the tunnel.
    LeaveUplink,
    /// Where packets leave to a pod: it gives leases.
    LeavePod,
}

impl Program {
    const fn name(self) -> &'static str {
        match self {
            Program::Enter => "enter",
            Program::EnterUplink => "enter_uplink",
            Program::EnterUnderlay => "enter_underlay",
            Program::LeaveTunnel => "leave_tunnel",
            Program::LeaveUplink => "leave_uplink",
            Program::LeavePod => "leave_pod",
        }
    }

    fn hook(self) -> Hook {
        match self {
            Program::Enter | Program::EnterUplink | Program::EnterUnderlay => Hook::Ingress,
            Program::LeaveTunnel | Program::LeaveUplink | Program::LeavePod => Hook::Egress,
        }
    }
}

/// A hook of an interface, where programs of all parties run one after the other (tcx).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in.
    Ingress,
    /// Packets that leave.
    Egress,
}

impl Hook {
    /// `BPF_TCX_INGRESS`, `BPF_TCX_EGRESS`, include/uapi/linux/bpf.h.
    const fn attach_type(self) -> u32 {
        match self {
            Hook::Ingress => 46,
            Hook::Egress => 47,
        }
    }
}
