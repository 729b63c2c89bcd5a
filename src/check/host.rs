//! What is read of the host: the kernel's version, our capabilities, settings.

use super::Need;
use crate::datapath::sysctl;
use std::{fs, io};

/// Chains on a device's egress came with Linux 5.16, `IFA_PROTO`, by which Egret knows its own addresses, with 5.18.
const KERNEL: (u32, u32) = (5, 18);

/// What the daemon needs; bits of capability sets, include/uapi/linux/capability.h.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")];

/// The kernel's version, the capabilities, and /proc.
pub fn kernel() -> Vec<Need> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![version(release.trim()), capabilities(), proc_sys()]
}

fn version(release: &str) -> Need {
    let newer = format!("Egret needs Linux {}.{} or newer", KERNEL.0, KERNEL.1);
    match parse(release) {
        Some(v) if v >= KERNEL => Need::ok("kernel", release),
        Some(_) => Need::missing("kernel", release, newer),
        None => Need::missing("kernel", format!("version {release:?}"), format!("is /proc mounted? {newer}")),
    }
}

/// `6.18.44-x` is (6, 18).
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn capabilities() -> Need {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let effective = effective.and_then(|v| u64::from_str_radix(v.trim(), 16).ok()).unwrap_or(0);
    let lacking: Vec<&str> = CAPABILITIES.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|c| c.1).collect();
    match lacking[..] {
        [] => Need::ok("capabilities", CAPABILITIES.map(|c| c.1).join(", ")),
        _ => Need::missing(
            "capabilities",
            format!("without {}", lacking.join(", ")),
            "run as root; in a container, on the host's network, add these capabilities",
        ),
    }
}

/// The tunnel device has settings of its own there.
fn proc_sys() -> Need {
    let path = "/proc/sys/net/ipv4/ip_forward";
    match sysctl::writable("ipv4/ip_forward") {
        Ok(()) => Need::ok("/proc/sys", "writable"),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            Need::missing("/proc/sys", format!("no {path}"), "mount /proc: mount -t proc proc /proc")
        }
        Err(e) => Need::missing(
            "/proc/sys",
            format!("{path}: {e}"),
            format!(
                "Egret gives its tunnel device settings; in a container that is not privileged, mount the host's \
                 /proc/sys/net at {}",
                sysctl::WRITABLE_NET
            ),
        ),
    }
}

/// Settings of the host's network. Read after the trials, which make the kernel load what has them.
pub fn settings() -> Vec<Need> {
    let forwarding = "a node whose pods or gateways speak this family must forward it: set it to 1";
    vec![
        expect("IPv4 forwarding", "net/ipv4/ip_forward", "1", forwarding),
        expect("IPv6 forwarding", "net/ipv6/conf/all/forwarding", "1", forwarding),
        expect(
            "conntrack, loose",
            "net/netfilter/nf_conntrack_tcp_loose",
            "1",
            "with 0, a gateway that takes over drops the connections it has not seen from their beginning: set it to 1",
        ),
        conntrack_table(),
        ipvs(),
    ]
}

/// IPVS translates a Service's address after Egret has decided.
fn ipvs() -> Need {
    // Three lines of heading, then what is served; no such file without the module.
    let served = fs::read_to_string("/proc/net/ip_vs").is_ok_and(|table| table.lines().count() > 3);
    if !served {
        return Need::ok("IPVS", "not in use");
    }
    Need::warn(
        "IPVS",
        "in use",
        "a Service whose backend is outside the cluster is reached with the node's address: select the backend's address in \
         policies, or use another mode of kube-proxy",
    )
}

fn read(setting: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/sys/{setting}")).ok().map(|v| v.trim().to_owned())
}

fn expect(name: &'static str, setting: &str, wanted: &str, remedy: &str) -> Need {
    let shown = setting.replace('/', ".");
    match read(setting) {
        Some(value) if value == wanted => Need::ok(name, format!("{shown} = {value}")),
        Some(value) => Need::warn(name, format!("{shown} = {value}"), remedy),
        None => Need::warn(name, format!("no {shown}"), "the kernel lacks this part, or has it switched off"),
    }
}

/// How many connections there can be, and how many there are. Every egress connection is one, on its source node and on
/// its gateway.
fn conntrack_table() -> Need {
    let number = |name: &str| read(&format!("net/netfilter/nf_conntrack_{name}")).and_then(|v| v.parse::<u64>().ok());
    match (number("count"), number("max")) {
        (Some(count), Some(max)) if count.saturating_mul(10) >= max.saturating_mul(8) => Need::warn(
            "conntrack, room",
            format!("{count} of {max} connections"),
            "new connections are dropped when it is full: raise net.netfilter.nf_conntrack_max",
        ),
        (Some(count), Some(max)) => Need::ok("conntrack, room", format!("{count} of {max} connections")),
        _ => Need::warn(
            "conntrack, room",
            "no net.netfilter.nf_conntrack_max",
            "nothing uses connection tracking yet; it comes with Egret's tables",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        for (release, state) in [
            ("6.18.44-fc-v657", State::Ok),
            ("5.18", State::Ok),
            ("5.18.0-rc1", State::Ok),
            ("10.0", State::Ok),
            ("5.9.1", State::Missing),
            ("5.17.15", State::Missing),
            ("4.19.0", State::Missing),
            ("", State::Missing),
            ("linux", State::Missing),
        ] {
            assert_eq!(version(release).state, state, "{release}");
        }
    }
}
