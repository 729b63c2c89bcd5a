//! The wire format of requests between gateway nodes: which of these egress IPs do you hold?

use crate::model::marks::EgressId;

/// The first bytes of each message: its type and the version of the format.
pub const MAGIC: [u8; 4] = *b"egh\x01";
const REQUEST: u8 = 1;
const ANSWER: u8 = 2;
/// The largest number of egress IPs in a message. It must stay below the largest message of the tunnel.
pub const AT_ONCE: usize = 500;

/// A request, or its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Whether it is an answer.
    pub is_answer: bool,
    /// A number that the answer repeats.
    pub number: u64,
    /// The egress IPs that are asked for, or those among them that the sender holds.
    pub ids: Vec<EgressId>,
}

impl Message {
    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(if self.is_answer { ANSWER } else { REQUEST });
        bytes.extend_from_slice(&self.number.to_be_bytes());
        bytes.extend(self.ids.iter().flat_map(|id| id.to_be_bytes()));
        bytes
    }

    /// Decodes a message; `None` if the bytes are no message of this version.
    pub fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.strip_prefix(&MAGIC)?.split_first()?;
        let is_answer = match *kind {
            REQUEST => false,
            ANSWER => true,
            _ => return None,
        };
        let (number, rest) = rest.split_first_chunk::<8>()?;
        let (ids, rest) = rest.as_chunks::<2>();
        let ids = ids.iter().map(|id| EgressId::from_be_bytes(*id)).collect();
        rest.is_empty().then_some(Message { is_answer, number: u64::from_be_bytes(*number), ids })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::node_messages::MAX_MESSAGE;

    #[test]
    fn encoded_messages_are_decoded_back_and_others_are_rejected() {
        for is_answer in [false, true] {
            let message = Message { is_answer, number: 0x0102_0304_0506_0708, ids: (1..=AT_ONCE as u16).collect() };
            let bytes = message.encode();
            assert!(bytes.len() <= MAX_MESSAGE);
            assert_eq!(Message::decode(&bytes), Some(message));
            assert_eq!(Message::decode(&bytes[..bytes.len() - 1]), None);
            assert_eq!(Message::decode(&[&[0], &bytes[1..]].concat()), None);
        }
        assert_eq!(Message::decode(b"egh\x01\x03\0\0\0\0\0\0\0\0"), None);
    }
}
