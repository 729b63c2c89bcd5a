//! Log of connections whose source port translation changed. The datapath logs the first packet of each, already
//! translated, to a group of nfnetlink_log.
//!
//! Events of connection tracking would report them, too, but the kernel would send a message for every connection of
//! the host.

use crate::datapath::netlink_reader::{NetlinkReader, Read};
use anyhow::{Context, Result};
use egret_nft::conntrack::Tuple;
use egret_nft::netlink::{Attributes, NETLINK_NETFILTER, Socket, attributes};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The nfnetlink_log group. Each network namespace has its own groups.
pub const GROUP: u16 = 7871;
/// `NFNL_SUBSYS_ULOG` in the upper byte, the message in the lower (include/uapi/linux/netfilter/nfnetlink_log.h).
const NFULNL_MSG_PACKET: u16 = 0x400;
const NFULNL_MSG_CONFIG: u16 = 0x401;
const NFULA_CFG_CMD: u16 = 1;
const NFULA_CFG_MODE: u16 = 2;
const NFULA_CFG_NLBUFSIZ: u16 = 3;
const NFULA_CFG_QTHRESH: u16 = 5;
const NFULNL_CFG_CMD_BIND: u8 = 1;
const NFULNL_COPY_PACKET: u8 = 2;
const NFULA_PAYLOAD: u16 = 9;
const NFGENMSG: usize = 4;
/// Bytes of a packet that the kernel copies: the longest IPv4 header and the ports behind it.
const COPIED: u32 = 64;
/// The size of a log message, bytes: a header, the copied bytes, and further attributes.
const MESSAGE: u32 = 512;
/// The receive buffer, bytes: room for some thousand messages while the processor is busy.
const RECEIVE_BUFFER: usize = 4 << 20;

/// Reads the log. Only one reader is possible in a network namespace.
pub struct PortLog {
    reader: NetlinkReader,
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogRead {
    /// The translated tuple of a connection's first packet.
    Packet(Tuple),
    /// The kernel dropped log messages.
    Lost,
    /// There is no message.
    Nothing,
}

impl PortLog {
    /// Starts to read the log, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel lacks nfnetlink_log, or another program reads the group.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        socket.set_buffers(RECEIVE_BUFFER)?;
        let configure = |socket: &mut Socket, fill: &dyn Fn(&mut Vec<u8>)| {
            // `struct nfgenmsg`: family, version, and the group.
            let mut request = vec![0, 0];
            request.extend_from_slice(&GROUP.to_be_bytes());
            fill(&mut request);
            socket.request(NFULNL_MSG_CONFIG, 0, &request)
        };
        configure(&mut socket, &|m| m.attribute(NFULA_CFG_CMD, &[NFULNL_CFG_CMD_BIND]))
            .context("needs CONFIG_NETFILTER_NETLINK_LOG, the module nfnetlink_log")?;
        configure(&mut socket, &|m| {
            // `struct nfulnl_msg_config_mode`.
            let [a, b, c, d] = COPIED.to_be_bytes();
            m.attribute(NFULA_CFG_MODE, &[a, b, c, d, NFULNL_COPY_PACKET, 0]);
            m.be32(NFULA_CFG_NLBUFSIZ, MESSAGE);
            // The kernel must not batch messages: another node may need one for the connection's second packet.
            m.be32(NFULA_CFG_QTHRESH, 1);
        })
        .context("nfnetlink_log")?;
        Ok(PortLog { reader: NetlinkReader::new(socket)? })
    }

    /// Waits until there may be a message.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn readable(&self) -> io::Result<()> {
        self.reader.readable().await
    }

    /// Reads the next message without waiting.
    ///
    /// # Errors
    /// The socket failed.
    pub fn read_next(&mut self) -> io::Result<LogRead> {
        loop {
            let mut heard = None;
            let read = self.reader.read(|m| {
                if m.kind == NFULNL_MSG_PACKET {
                    heard = heard.or_else(|| packet(m.payload));
                }
            })?;
            match (read, heard) {
                (Read::Datagram, Some(tuple)) => return Ok(LogRead::Packet(tuple)),
                (Read::Datagram, None) => {}
                (Read::Nothing, _) => return Ok(LogRead::Nothing),
                (Read::Lost, _) => return Ok(LogRead::Lost),
            }
        }
    }
}

fn packet(message: &[u8]) -> Option<Tuple> {
    let (_, bytes) = attributes(message.get(NFGENMSG..)?).find(|(kind, _)| *kind == NFULA_PAYLOAD)?;
    tuple_of(bytes)
}

/// The tuple in the headers of an IP packet (RFC 791, RFC 8200). `None` if no ports follow the IP header directly.
fn tuple_of(packet: &[u8]) -> Option<Tuple> {
    let (source, destination, protocol, ports): (IpAddr, IpAddr, u8, usize) = match packet.first()? >> 4 {
        4 => {
            let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?).into());
            (address(12)?, address(16)?, *packet.get(9)?, usize::from(packet[0] & 0xf) * 4)
        }
        6 => {
            let address = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?).into());
            (address(8)?, address(24)?, *packet.get(6)?, 40)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    Some(Tuple { source, destination, protocol, ports: [port(ports)?, port(ports + 2)?] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tuple_is_parsed_with_ip_options_and_not_from_a_truncated_packet() {
        let mut v4 = vec![0x46, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 50, 198, 51, 100, 7, 1, 1, 1, 0];
        v4.extend([0x9c, 0x40, 0, 80]);
        let tuple = Tuple {
            source: "192.0.2.50".parse().unwrap(),
            destination: "198.51.100.7".parse().unwrap(),
            protocol: 6,
            ports: [40_000, 80],
        };
        assert_eq!(tuple_of(&v4), Some(tuple));
        for length in 0..v4.len() {
            assert_eq!(tuple_of(&v4[..length]), None, "{length} bytes");
        }
        let mut v6 = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
        v6.extend("2001:db8::50".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend("2001:db8::100".parse::<Ipv6Addr>().unwrap().octets());
        v6.extend([0, 53, 0x23, 0x29]);
        let tuple = Tuple {
            source: "2001:db8::50".parse().unwrap(),
            destination: "2001:db8::100".parse().unwrap(),
            protocol: 17,
            ports: [53, 9001],
        };
        assert_eq!(tuple_of(&v6), Some(tuple));
    }
}
