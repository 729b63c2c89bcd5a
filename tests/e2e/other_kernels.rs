//! What needs parts that not every kernel has: netem, VLAN, bonding, WireGuard, IPIP. `make vm-test` runs these
//! with kernels that have them: `make vm-test KERNEL=6.12 T='--ignored other_kernels::netem'`.

mod before_tcx;
mod netem;
mod underlays;
mod uplinks;
