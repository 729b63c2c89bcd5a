//! Checks of the host: the kernel's version, this process's capabilities, and settings.

use super::Need;
use crate::datapath::sysctl;
use std::{fs, io};

/// The first upstream release with all that Egret needs: ingress chains of the family inet came with Linux 5.10.
/// A distribution may have brought it to an older one.
pub const KERNEL: (u32, u32) = (5, 10);

/// The capabilities that the daemon needs, with their bits, include/uapi/linux/capability.h.
const CAPABILITIES: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")];

/// Checks the kernel's version, the capabilities, and /proc/sys.
pub fn kernel() -> Vec<Need> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![version(release.trim()), capabilities(), proc_sys()]
}

/// The version is a hint only: the trials decide.
fn version(release: &str) -> Need {
    let newer = format!(
        "upstream, what Egret needs came with Linux {}.{}: it works here if the lines below are ok, as a distribution \
         may have brought it to an older kernel",
        KERNEL.0, KERNEL.1
    );
    match parse(release) {
        Some(v) if v >= KERNEL => Need::ok("kernel", release),
        Some(_) => Need::warn("kernel", release, newer),
        None => Need::warn("kernel", format!("version {release:?}"), format!("check that /proc is mounted; {newer}")),
    }
}

/// Parses the first two numbers: `6.18.44-x` is (6, 18).
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
            "run as root; in a container on the host's network, add these capabilities",
        ),
    }
}

/// The daemon writes the tunnel device's settings there.
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
                "Egret sets its tunnel device's sysctls; in a container that is not privileged, mount the host's \
                 /proc/sys/net at {}",
                sysctl::WRITABLE_NET
            ),
        ),
    }
}

/// Checks settings of the host's network. Call it after the trials, which make the kernel load the modules that have
/// them.
pub fn settings() -> Vec<Need> {
    let forwarding = "a node whose pods or gateways use this family must forward it: set it to 1";
    vec![
        expect("IPv4 forwarding", "net/ipv4/ip_forward", "1", forwarding),
        expect("IPv6 forwarding", "net/ipv6/conf/all/forwarding", "1", forwarding),
        expect(
            "conntrack, loose",
            "net/netfilter/nf_conntrack_tcp_loose",
            "1",
            "with 0, a gateway node that takes over an egress IP drops connections already in progress: set it to 1",
        ),
        conntrack_table(),
        ipvs(),
    ]
}

/// IPVS translates a Service's address after Egret's decision.
fn ipvs() -> Need {
    // The table has three heading lines. Without the module there is no such file.
    let served = fs::read_to_string("/proc/net/ip_vs").is_ok_and(|table| table.lines().count() > 3);
    if !served {
        return Need::ok("IPVS", "not in use");
    }
    Need::warn(
        "IPVS",
        "in use",
        "traffic to a Service whose backend is outside the cluster leaves with the node's address: name the backend's \
         address in policies, or use another mode of kube-proxy",
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
        None => Need::warn(name, format!("no {shown}"), "the kernel lacks this part, or has it disabled"),
    }
}

/// Checks the room in the table of tracked connections. Every egress connection takes an entry on its source node and
/// one on its gateway.
fn conntrack_table() -> Need {
    let number = |name: &str| read(&format!("net/netfilter/nf_conntrack_{name}")).and_then(|v| v.parse::<u64>().ok());
    match (number("count"), number("max")) {
        (Some(count), Some(max)) if count.saturating_mul(10) >= max.saturating_mul(8) => Need::warn(
            "conntrack, room",
            format!("{count} of {max} connections"),
            "when the table is full, new connections are dropped: raise net.netfilter.nf_conntrack_max",
        ),
        (Some(count), Some(max)) => Need::ok("conntrack, room", format!("{count} of {max} connections")),
        _ => Need::warn(
            "conntrack, room",
            "no net.netfilter.nf_conntrack_max",
            "nothing uses connection tracking yet; Egret's tables will",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::NeedState;
    use super::*;

    #[test]
    fn an_old_kernel_version_is_a_hint_only() {
        for (release, state) in [
            ("6.18.44-fc-v657", NeedState::Ok),
            ("5.10", NeedState::Ok),
            ("5.10.0-46-amd64", NeedState::Ok),
            ("10.0", NeedState::Ok),
            ("5.9.1", NeedState::Warn),
            ("5.4.300", NeedState::Warn),
            ("4.19.0", NeedState::Warn),
            ("", NeedState::Warn),
            ("linux", NeedState::Warn),
        ] {
            assert_eq!(version(release).state, state, "{release}");
        }
    }
}
