//! Finds the host end of a pod's interface.

use crate::attachment::HostInterface;
use crate::protocol::{CniError, codes};
use egret_nft::netlink::{Attributes, Error, NETLINK_ROUTE, Socket, attributes};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{FsType, NSFS_MAGIC, fstatfs};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

/// `RTEXT_FILTER_SKIP_STATS`, include/uapi/linux/rtnetlink.h: the kernel need not collect packet counters.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
/// `NETNSA_NSID` and `NETNSA_FD`, include/uapi/linux/net_namespace.h.
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// `sizeof(struct ifinfomsg)`, include/uapi/linux/rtnetlink.h.
const IFINFOMSG: usize = 16;
/// `sizeof(struct rtgenmsg)`, padded.
const RTGENMSG: usize = 4;
/// Stack of the thread that enters the namespace. It opens one socket.
const STACK_BYTES: usize = 128 * 1024;

/// Finds the host end of the pod's interface, which is the first of `names` that exists in the namespace `netns`.
/// `None` if the interface is no veth, or if its peer is not in this network namespace.
///
/// # Errors
/// `netns` is no network namespace, or the kernel rejects a request.
pub fn host_end(netns: &Path, names: &[&str]) -> Result<Option<HostInterface>, CniError> {
    let namespace = open_namespace(netns)?;
    let mut inside = enter(&namespace).map_err(|e| match e.raw_os_error() {
        Some(libc::EINVAL) => no_namespace(netns, "it is a namespace of another kind"),
        _ => CniError::new(
            codes::IO,
            format!("cannot enter the network namespace {}: {e}", netns.display()),
            "egret-cni must run as root",
        ),
    })?;
    peer(&mut inside, &namespace, names)
        .map_err(|e| CniError::new(codes::KERNEL, format!("cannot read the pod's interface: {e}"), ""))
}

fn open_namespace(netns: &Path) -> Result<File, CniError> {
    // Non-blocking, because opening a FIFO would wait for a writer.
    let options = libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(options).open(netns).map_err(|e| no_namespace(netns, &e))?;
    match fstatfs(&file) {
        Ok(fs) if is_namespace(fs.filesystem_type()) => Ok(file),
        Ok(_) if file.metadata().is_ok_and(|m| m.is_dir()) => Err(no_namespace(netns, "it is a directory")),
        Ok(_) => Err(no_namespace(netns, "it is another kind of file")),
        Err(e) => Err(no_namespace(netns, e)),
    }
}

fn is_namespace(kind: FsType) -> bool {
    kind == NSFS_MAGIC
}

fn no_namespace(netns: &Path, why: impl std::fmt::Display) -> CniError {
    CniError::new(
        codes::INVALID_ENVIRONMENT,
        format!("CNI_NETNS={} is no network namespace: {why}", netns.display()),
        "it must be the pod's namespace file, such as /run/netns/NAME or /proc/PID/ns/net",
    )
}

/// Opens a netlink socket in the namespace. A thread enters it and ends there, so that no other code runs in it.
fn enter(namespace: &File) -> io::Result<Socket> {
    thread::scope(|scope| {
        let inside = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, || {
            #[allow(clippy::disallowed_methods, reason = "this thread is for nothing else")]
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            Socket::open(NETLINK_ROUTE)
        })?;
        inside.join().unwrap_or_else(|_| Err(io::Error::other("the thread that entered it died")))
    })
}

fn peer(inside: &mut Socket, namespace: &File, names: &[&str]) -> Result<Option<HostInterface>, Error> {
    let mut pods = None;
    for name in names {
        pods = link(inside, 0, |out| out.text(libc::IFLA_IFNAME, name))?;
        if pods.is_some() {
            break;
        }
    }
    // Without IFLA_LINK_NETNSID the peer is in the pod's namespace too.
    let Some(pods) = pods.filter(|l| l.is_veth && l.peer_namespace.is_some()) else { return Ok(None) };
    let mut outside = Socket::open(NETLINK_ROUTE)?;
    let Some(hosts) = link(&mut outside, pods.peer, |_| {})? else { return Ok(None) };
    // The index alone proves nothing: most pods' interfaces have the same one. The pair is proven if the host end
    // names the pod's namespace. The namespace has an id on the host by now: the kernel assigned it for the previous
    // response.
    let proven = hosts.is_veth
        && hosts.peer == pods.index
        && hosts.peer_namespace.is_some()
        && hosts.peer_namespace == namespace_id(&mut outside, namespace)?;
    Ok(proven.then_some(HostInterface { index: hosts.index, peer_index: pods.index }))
}

struct Link {
    index: u32,
    is_veth: bool,
    /// `IFLA_LINK`: a veth's peer index.
    peer: u32,
    /// `IFLA_LINK_NETNSID`: the peer's namespace, if it is another one.
    peer_namespace: Option<i32>,
}

/// Requests one link, by its index or by the attributes that `select` appends. `None` if there is no such link.
fn link(socket: &mut Socket, index: u32, select: impl FnOnce(&mut Vec<u8>)) -> Result<Option<Link>, Error> {
    let mut request = vec![0; IFINFOMSG];
    request[4..8].copy_from_slice(&index.to_ne_bytes());
    select(&mut request);
    request.attribute(libc::IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    let answer = match socket.get(libc::RTM_GETLINK, &request) {
        Err(e) if e.errno() == Some(libc::ENODEV) => return Ok(None),
        other => other?,
    };
    let header = answer.get(4..8).and_then(|b| b.try_into().ok()).ok_or(Error::Malformed)?;
    let mut link = Link { index: u32::from_ne_bytes(header), is_veth: false, peer: 0, peer_namespace: None };
    for (kind, value) in attributes(answer.get(IFINFOMSG..).ok_or(Error::Malformed)?) {
        match (kind, <[u8; 4]>::try_from(value)) {
            (libc::IFLA_LINK, Ok(number)) => link.peer = u32::from_ne_bytes(number),
            (libc::IFLA_LINK_NETNSID, Ok(number)) => link.peer_namespace = Some(i32::from_ne_bytes(number)),
            (libc::IFLA_LINKINFO, _) => {
                let mut infos = attributes(value);
                link.is_veth = infos.any(|(kind, value)| kind == libc::IFLA_INFO_KIND && value.starts_with(b"veth\0"));
            }
            _ => {}
        }
    }
    Ok(Some(link))
}

/// The id that the socket's namespace has assigned to `namespace`.
fn namespace_id(socket: &mut Socket, namespace: &File) -> Result<Option<i32>, Error> {
    let mut request = vec![0; RTGENMSG];
    request.attribute(NETNSA_FD, &namespace.as_raw_fd().to_ne_bytes());
    let answer = socket.get(libc::RTM_GETNSID, &request)?;
    let mut all = attributes(answer.get(RTGENMSG..).ok_or(Error::Malformed)?);
    Ok(all.find_map(|(kind, value)| (kind == NETNSA_NSID).then(|| value.try_into().ok().map(i32::from_ne_bytes))?))
}
