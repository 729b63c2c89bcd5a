//! ARP and IPv6 neighbour discovery frames: announcements of an address, probes for an address, and their parsers.

use egret_nft::mac::Mac;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// EtherTypes, include/uapi/linux/if_ether.h.
pub const ETH_P_ARP: u16 = 0x0806;
/// See [`ETH_P_ARP`].
pub const ETH_P_IPV6: u16 = 0x86dd;
const BROADCAST: Mac = [0xff; 6];
/// The MAC address of [`ALL_NODES`]: 33:33 and the last four bytes of the group address (RFC 2464, section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Length of an Ethernet header.
const ETHERNET: usize = 14;
const ICMPV6: u8 = 58;
/// ICMPv6 type (RFC 4861).
pub const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// The hop limit of neighbour discovery. A forwarded packet has a lower one and is invalid (RFC 4861, section 7.1).
pub const HOP_LIMIT: u8 = 255;
const OVERRIDE: u8 = 0x20;
const TARGET_LINK_LAYER: u8 = 2;
/// The nonce option, by which duplicate address detection recognises its own solicitations (RFC 7527). Other hosts
/// ignore it.
const NONCE: u8 = 14;
const ARP_REQUEST: u16 = 1;
const ARP_REPLY: u16 = 2;

/// The frames that announce on the link that `address` is at `mac`. For IPv4 they are a gratuitous ARP request and a
/// gratuitous reply, because some hosts accept only one of the two. For IPv6 it is an unsolicited neighbour
/// advertisement with the override flag.
pub fn announcements(address: IpAddr, mac: Mac) -> Vec<Vec<u8>> {
    match address {
        IpAddr::V4(a) => vec![
            arp(ARP_REQUEST, mac, a, Mac::default(), a), //
            arp(ARP_REPLY, mac, a, mac, a),
        ],
        IpAddr::V6(a) => {
            let mut body = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
            body.extend_from_slice(&a.octets());
            body.extend_from_slice(&[TARGET_LINK_LAYER, 1]);
            body.extend_from_slice(&mac);
            vec![icmpv6(ALL_NODES_MAC, mac, a, ALL_NODES, body)]
        }
    }
}

/// Six bytes that a probe carries for the host that has the address: see [`probe_frame`].
pub type Claim = [u8; 6];

/// The frame that asks which host has `address` without claiming it: an ARP probe (RFC 5227), or the neighbour
/// solicitation of duplicate address detection (RFC 4862). A `claim` is put where other hosts ignore it: into the ARP
/// probe's target hardware address, or into the solicitation's nonce option.
pub fn probe_frame(address: IpAddr, mac: Mac, claim: Option<Claim>) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => arp(ARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED, claim.unwrap_or_default(), a),
        IpAddr::V6(a) => {
            let [.., x, y, z] = a.octets();
            let mut group = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0).octets();
            group[13..].copy_from_slice(&[x, y, z]);
            let mut body = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
            body.extend_from_slice(&a.octets());
            if let Some(claim) = claim {
                body.extend_from_slice(&[NONCE, 1]);
                body.extend_from_slice(&claim);
            }
            icmpv6([0x33, 0x33, 0xff, x, y, z], mac, Ipv6Addr::UNSPECIFIED, group.into(), body)
        }
    }
}

/// The sender's address and MAC address in an ARP frame; `None` if the frame is a probe or no ARP frame.
pub fn arp_sender(frame: &[u8]) -> Option<(IpAddr, Mac)> {
    let packet = frame.get(ETHERNET..)?;
    // Ethernet, IPv4, and the lengths of their addresses.
    if packet.get(..6)? != [0, 1, 8, 0, 6, 4] {
        return None;
    }
    let mac = Mac::try_from(packet.get(8..14)?).ok()?;
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(14..18)?).ok()?);
    // A probe's sender address is unspecified.
    (!address.is_unspecified()).then_some((address.into(), mac))
}

/// The probed address, the sender's MAC address and the claim of an ARP probe with a claim.
pub fn arp_claim(frame: &[u8]) -> Option<(IpAddr, Mac, Claim)> {
    let packet = frame.get(ETHERNET..)?;
    let is_probe = packet.get(..8)? == [0, 1, 8, 0, 6, 4, 0, ARP_REQUEST as u8] && packet.get(14..18)? == [0; 4];
    let (mac, claim) = (Mac::try_from(packet.get(8..14)?).ok()?, Claim::try_from(packet.get(18..24)?).ok()?);
    let address = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(24..28)?).ok()?);
    (is_probe && claim != Claim::default()).then_some((address.into(), mac, claim))
}

/// As [`arp_claim`], of a neighbour solicitation without its IPv6 header. The MAC address is all zeros, because the
/// solicitation does not contain the sender's.
pub fn solicitation_claim(message: &[u8]) -> Option<(IpAddr, Mac, Claim)> {
    if message.get(..2)? != [NEIGHBOUR_SOLICITATION, 0] {
        return None;
    }
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(message.get(8..24)?).ok()?);
    let claim = option(message.get(24..)?, NONCE)??;
    Some((address.into(), Mac::default(), claim))
}

/// The first six bytes of a neighbour discovery option, the last one of its kind. The outer `None` means that the
/// options are malformed, the inner one that there is no such option.
fn option(mut options: &[u8], wanted: u8) -> Option<Option<[u8; 6]>> {
    let mut found = None;
    while let [kind, eights, ..] = *options {
        let length = usize::from(eights) * 8;
        if length == 0 || length > options.len() {
            return None;
        }
        if kind == wanted {
            found = <[u8; 6]>::try_from(options.get(2..8)?).ok();
        }
        options = &options[length..];
    }
    Some(found)
}

/// The target address and MAC address of a neighbour advertisement without its IPv6 header. The MAC address is all
/// zeros if the message has no such option.
pub fn advertiser(message: &[u8]) -> Option<(IpAddr, Mac)> {
    if message.get(..2)? != [NEIGHBOUR_ADVERTISEMENT, 0] {
        return None;
    }
    let address = Ipv6Addr::from(<[u8; 16]>::try_from(message.get(8..24)?).ok()?);
    let mac = option(message.get(24..)?, TARGET_LINK_LAYER)?.unwrap_or_default();
    Some((address.into(), mac))
}

pub(super) fn ethernet(to: Mac, from: Mac, ethertype: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(ETHERNET + 72);
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame
}

fn arp(operation: u16, from: Mac, sender: Ipv4Addr, to: Mac, target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, from, ETH_P_ARP);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&sender.octets());
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&target.octets());
    frame
}

fn icmpv6(to: Mac, from: Mac, source: Ipv6Addr, destination: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
    let length = (body.len() as u16).to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], ICMPV6, HOP_LIMIT];
    header.extend_from_slice(&source.octets());
    header.extend_from_slice(&destination.octets());
    // The pseudo-header contains the addresses, the length and the next header (RFC 8200, section 8.1).
    let pseudo = [&header[8..], &[0, 0, length[0], length[1], 0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[pseudo.as_slice(), body.as_slice()].concat());
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(to, from, ETH_P_IPV6);
    frame.extend_from_slice(&header);
    frame.extend_from_slice(&body);
    frame
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
pub(super) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn an_announcement_claims_the_address_and_a_probe_does_not() {
        let v4: IpAddr = "192.0.2.50".parse().unwrap();
        for frame in announcements(v4, MAC) {
            assert_eq!(frame[..6], BROADCAST);
            assert_eq!(arp_sender(&frame), Some((v4, MAC)));
        }
        assert_eq!(arp_sender(&probe_frame(v4, MAC, None)), None);
        let v6: IpAddr = "2001:db8::50".parse().unwrap();
        let frames = announcements(v6, MAC);
        assert_eq!(advertiser(&frames[0][ETHERNET + 40..]), Some((v6, MAC)));
        assert_eq!(advertiser(&probe_frame(v6, MAC, None)[ETHERNET + 40..]), None);
    }

    #[test]
    fn a_solicitation_is_sent_to_the_solicited_node_group() {
        let frame = probe_frame("2001:db8::a1:b2c3".parse().unwrap(), MAC, None);
        assert_eq!(frame[..6], [0x33, 0x33, 0xff, 0xa1, 0xb2, 0xc3]);
        let destination = Ipv6Addr::from(<[u8; 16]>::try_from(&frame[ETHERNET + 24..ETHERNET + 40]).unwrap());
        assert_eq!(destination, "ff02::1:ffa1:b2c3".parse::<Ipv6Addr>().unwrap());
        // The sum over the message, its checksum included, is zero.
        let pseudo = [&frame[ETHERNET + 8..ETHERNET + 40], &[0, 0, 0, 24, 0, 0, 0, ICMPV6]].concat();
        assert_eq!(checksum(&[pseudo.as_slice(), &frame[ETHERNET + 40..]].concat()), 0);
    }

    #[test]
    fn truncated_and_malformed_frames_are_ignored() {
        let frame = announcements("192.0.2.50".parse().unwrap(), MAC).remove(0);
        for length in 0..ETHERNET + 18 {
            assert_eq!(arp_sender(&frame[..length]), None, "{length}");
        }
        let message = &announcements("2001:db8::50".parse().unwrap(), MAC)[0][ETHERNET + 40..];
        for length in 0..24 {
            assert_eq!(advertiser(&message[..length]), None, "{length}");
        }
        let endless = [message, &[1, 0, 0, 0]].concat();
        assert_eq!(advertiser(&endless), None);
    }

    #[test]
    fn only_the_claim_parsers_see_a_claim() {
        const CLAIM: Claim = [1, 2, 3, 4, 5, 6];
        let v4: IpAddr = "192.0.2.50".parse().unwrap();
        let (plain, claims) = (probe_frame(v4, MAC, None), probe_frame(v4, MAC, Some(CLAIM)));
        assert_eq!(arp_claim(&claims), Some((v4, MAC, CLAIM)));
        assert_eq!((arp_claim(&plain), arp_sender(&claims)), (None, None));
        assert!(announcements(v4, MAC).iter().all(|frame| arp_claim(frame).is_none()));
        let v6: IpAddr = "2001:db8::50".parse().unwrap();
        let (plain, claims) = (probe_frame(v6, MAC, None), probe_frame(v6, MAC, Some(CLAIM)));
        let message = |frame: &[u8]| frame[ETHERNET + 40..].to_vec();
        assert_eq!(solicitation_claim(&message(&claims)), Some((v6, Mac::default(), CLAIM)));
        assert_eq!((solicitation_claim(&message(&plain)), advertiser(&message(&claims))), (None, None));
        let pseudo = [&claims[ETHERNET + 8..ETHERNET + 40], &[0, 0, 0, 32, 0, 0, 0, ICMPV6]].concat();
        assert_eq!(checksum(&[pseudo, message(&claims)].concat()), 0);
        for length in 0..claims.len() {
            assert!(arp_claim(&claims[..length]).is_none());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_parsed_within_their_bounds(bytes in vec(any::<u8>(), 0..100), options in vec(0u8..4, 0..40)) {
            let advertisement = [&[NEIGHBOUR_ADVERTISEMENT, 0], &[0; 22][..], &options].concat();
            prop_assert!(advertiser(&bytes).is_none() || bytes.len() >= 24);
            prop_assert!(advertiser(&advertisement).is_none_or(|(address, _)| address == Ipv6Addr::UNSPECIFIED));
            prop_assert!(solicitation_claim(&bytes).is_none() || bytes.len() >= 24);
            let arp = [&[0; ETHERNET][..], &[0, 1, 8, 0, 6, 4], &bytes].concat();
            prop_assert!(arp_claim(&arp).is_none() || bytes.len() >= 12);
            prop_assert!(arp_sender(&arp).is_none() || bytes.len() >= 12);
        }
    }
}
