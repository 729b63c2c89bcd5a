//! Filters of packets that come in by an interface (tc).

use egret_nft::netlink::{Error, Socket, attributes, string};
use std::collections::BTreeSet;

/// include/uapi/linux/rtnetlink.h.
const RTM_GETQDISC: u16 = 38;
const RTM_GETTFILTER: u16 = 46;
pub(super) const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
/// The filters of packets that come in, include/uapi/linux/pkt_sched.h. The discipline `ingress` takes it as its own.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
/// Length of `struct tcmsg`.
pub(super) const TCMSG: usize = 20;

/// Calls `each` with the kind and the options of each filter of the interface with this index.
///
/// # Errors
/// The filters cannot be read.
pub(super) fn read<T>(
    socket: &mut Socket,
    index: u32,
    begin: impl Fn() -> T,
    each: impl Fn(&mut T, &str, &[u8]),
) -> Result<T, Error> {
    let mut request = [0; TCMSG];
    request[4..8].copy_from_slice(&index.to_ne_bytes());
    request[12..16].copy_from_slice(&CLSACT_INGRESS.to_ne_bytes());
    socket.dump(RTM_GETTFILTER, &request, begin, |found, message| {
        let (mut kind, mut options) = (String::new(), &[][..]);
        for (attribute, value) in attributes(message.get(TCMSG..).unwrap_or_default()) {
            match attribute {
                TCA_KIND => kind = string(value),
                TCA_OPTIONS => options = value,
                _ => {}
            }
        }
        each(found, &kind, options);
    })
}

/// The interfaces with a queueing discipline that can filter what comes in.
///
/// # Errors
/// The disciplines cannot be read.
pub fn filtered(socket: &mut Socket) -> Result<BTreeSet<u32>, Error> {
    socket.dump(RTM_GETQDISC, &[0; TCMSG], BTreeSet::new, |found, message| {
        let kinds = attributes(message.get(TCMSG..).unwrap_or_default()).filter(|(kind, _)| *kind == TCA_KIND);
        let filters = |value: &[u8]| matches!(&*string(value), "ingress" | "clsact");
        if kinds.map(|(_, value)| value).any(filters) {
            let index = message.get(4..8).and_then(|index| index.try_into().ok());
            found.extend(index.map(u32::from_ne_bytes));
        }
    })
}
