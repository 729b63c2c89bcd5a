//! The wire format of requests between gateway nodes: do the probes of this gateway succeed on your node?

use std::time::Duration;

/// The first bytes of each message: its type and the version of the format.
pub const MAGIC: [u8; 4] = *b"egu\x01";
const REQUEST: u8 = 1;
const ANSWER: u8 = 2;

/// A request, or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks about the probes with this number.
    Request {
        /// The number of the gateway's probes of a family.
        probes: u64,
        /// The time of the request on the asking node's clock, in milliseconds. The answer repeats it.
        asked: u64,
    },
    /// The probes succeed.
    Answer {
        /// The number of the probes.
        probes: u64,
        /// The time of the request.
        asked: u64,
        /// How long ago the newest answered probe was sent, in milliseconds.
        age: u32,
    },
}

impl Message {
    /// Encodes the message.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, probes, asked, age) = match *self {
            Message::Request { probes, asked } => (REQUEST, probes, asked, None),
            Message::Answer { probes, asked, age } => (ANSWER, probes, asked, Some(age)),
        };
        let mut bytes = MAGIC.to_vec();
        bytes.push(kind);
        bytes.extend_from_slice(&probes.to_be_bytes());
        bytes.extend_from_slice(&asked.to_be_bytes());
        bytes.extend(age.into_iter().flat_map(u32::to_be_bytes));
        bytes
    }

    /// Decodes a message; `None` if the bytes are no message of this version.
    pub fn decode(bytes: &[u8]) -> Option<Message> {
        let (kind, rest) = bytes.strip_prefix(&MAGIC)?.split_first()?;
        let (probes, rest) = rest.split_first_chunk::<8>()?;
        let (asked, rest) = rest.split_first_chunk::<8>()?;
        let (probes, asked) = (u64::from_be_bytes(*probes), u64::from_be_bytes(*asked));
        match (*kind, <[u8; 4]>::try_from(rest)) {
            (REQUEST, _) if rest.is_empty() => Some(Message::Request { probes, asked }),
            (ANSWER, Ok(age)) => Some(Message::Answer { probes, asked, age: u32::from_be_bytes(age) }),
            _ => None,
        }
    }
}

/// A duration in whole milliseconds, rounded up: an answer that is too old is harmless.
pub fn milliseconds(of: Duration) -> u64 {
    u64::try_from(of.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_messages_are_decoded_back_and_others_are_rejected() {
        let request = Message::Request { probes: 0x0102_0304_0506_0708, asked: 9 };
        let answer = Message::Answer { probes: 7, asked: u64::MAX, age: 10 };
        for message in [request, answer] {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes), Some(message));
            assert!((0..bytes.len()).all(|length| Message::decode(&bytes[..length]).is_none_or(|m| m != message)));
            assert_eq!(Message::decode(&[bytes.as_slice(), &[0]].concat()), None);
            assert_eq!(Message::decode(&[&[0], &bytes[1..]].concat()), None);
        }
        assert_eq!(milliseconds(Duration::from_micros(1001)), 2);
    }
}
