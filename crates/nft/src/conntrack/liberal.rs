//! TCP connections whose packets the kernel need not see.

use super::in_flight_reply::{
    BE_LIBERAL, CTA_PROTOINFO, CTA_PROTOINFO_TCP, CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY,
};
use super::*;

/// `IP_CT_TCP_FLAG_MAXACK_SET`, include/uapi/linux/netfilter/nf_conntrack_tcp.h: a reset is judged by the last number that
/// was acknowledged.
const MAXACK_SET: u8 = 0x20;

/// Makes connection tracking accept all packets of these TCP connections, given by their original direction: it will not
/// see all of them, so it cannot judge their numbers. The kernel does the same for connections in its flow tables
/// (`flow_offload_fixup_tcp`). Returns how many connections existed.
///
/// # Errors
/// The socket failed, or the kernel refuses the change.
pub fn set_liberal(socket: &mut Socket, connections: &[Tuple]) -> Result<usize, Error> {
    let mut changed = 0;
    for batch in connections.chunks(BATCH) {
        let (mut datagram, mut pending) = (Vec::new(), BTreeSet::new());
        for out in batch {
            let sequence = socket.next_sequence();
            pending.insert(sequence);
            append_message(&mut datagram, IPCTNL_MSG_CT_NEW, NLM_F_REQUEST | NLM_F_ACK, sequence, |message| {
                message.extend_from_slice(&request(out));
            });
        }
        socket.send(&datagram)?;
        let mut refused = None;
        while !pending.is_empty() {
            socket.receive(|m| {
                if m.kind != NLMSG_ERROR || !pending.remove(&m.sequence) {
                    return;
                }
                match m.acknowledgement() {
                    Ok(()) => changed += 1,
                    Err(e) if e.errno() == Some(ENOENT) => {}
                    Err(e) => refused = Some(e),
                }
            })?;
        }
        if let Some(e) = refused {
            return Err(e);
        }
    }
    Ok(changed)
}

fn request(out: &Tuple) -> Vec<u8> {
    let mut request = out.header();
    request.nested(CTA_TUPLE_ORIG, |tuple| out.write(tuple));
    request.nested(CTA_PROTOINFO, |info| {
        info.nested(CTA_PROTOINFO_TCP, |tcp| {
            // `struct nf_ct_tcp_flags`: flags and mask.
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, &[BE_LIBERAL, BE_LIBERAL | MAXACK_SET]);
            tcp.attribute(CTA_PROTOINFO_TCP_FLAGS_REPLY, &[BE_LIBERAL, BE_LIBERAL | MAXACK_SET]);
        });
    });
    request
}
