//! Another host on the link has an egress IP and answers late. Needs root.

use lab::{EXT4, Lab, manifests};
use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recv, sendto, socket};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 57);
const OTHER_HOST: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// Longer than the wait for an answer before an address is used for the first time.
const SLOW: Duration = Duration::from_millis(45);

/// On `ext`: answers each ARP request for the address after this time, and then a few times more, so that no answer
/// is missed on a busy machine.
fn other_host(lab: &Lab) {
    let namespaces = lab.host("ext").namespaces();
    // The thread ends with the test's process.
    thread::spawn(move || {
        namespaces.enter();
        let all = SockProtocol::EthAll;
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all).expect("a socket");
        let of_eth0 = |name: &str, address: Option<&LinkAddr>| address.copied().filter(|_| name == "eth0");
        let mut interfaces = getifaddrs().expect("interfaces");
        let link = interfaces.find_map(|i| of_eth0(&i.interface_name, i.address.as_ref()?.as_link_addr()));
        let link = link.expect("eth0");
        let mut frame = [0; 2048];
        let mut due: Vec<Instant> = Vec::new();
        loop {
            while let Ok(size) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT) {
                let asks = frame[12..14] == [8, 6] && frame[20..22] == [0, 1] && frame[38..42] == ADDRESS.octets();
                if size >= 42 && asks && frame[6..12] != OTHER_HOST {
                    due.extend((0..50).map(|n| Instant::now() + SLOW + n * Duration::from_millis(20)));
                }
            }
            let now = Instant::now();
            if due.iter().any(|at| *at <= now) {
                due.retain(|at| *at > now);
                let mut answer = [[0xff; 6], OTHER_HOST].concat();
                answer.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
                answer.extend(OTHER_HOST.iter().chain(&ADDRESS.octets()).chain(&[0; 6]).chain(&[0; 4]));
                sendto(socket.as_raw_fd(), &answer, &link, MsgFlags::empty()).expect("send a frame");
            }
            thread::sleep(Duration::from_millis(2));
        }
    });
}

#[test]
fn an_address_of_a_host_that_answers_late_is_given_up() {
    let lab = Lab::scene();
    other_host(&lab);
    let spec = format!("podSelector: {{ matchLabels: {{ app: late }} }}\n  address: {{ ipv4: {ADDRESS} }}");
    lab.write_manifest("late.yaml", &manifests::policy("shop", "late", &spec));
    let is_told = || lab.manifests().statuses().contains("answers for it on the link");
    lab.wait_until("the policy is told who has its address", Duration::from_secs(10), is_told);
    let has = || lab.nodes().iter().any(|n| n.ip("-o addr").contains(&format!(" {ADDRESS}/32 ")));
    lab.wait_until("no node has the address", Duration::from_secs(10), || !has());
    let pod = lab.add_pod("n1", "shop", "late", &[("app", "late")]);
    assert!(pod.udp_who(EXT4).is_err(), "blocked, not leaked");
    assert!(!has() && is_told());
}
