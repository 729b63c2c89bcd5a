//! Named limits: token buckets that rules find in maps.

use super::read::be64;
use super::uapi::*;
use crate::netlink::{Attributes, attributes};
use std::fmt;

/// The seconds of `NFTA_LIMIT_UNIT`.
const SECOND: u64 = 1;
const UNITS: [&str; 3] = ["bytes", "kbytes", "mbytes"];

/// `limit rate over`: a rule that uses it ends for packets within the limit, and continues for those beyond it. The
/// kernel cannot change a named limit (`nft_limit_obj_ops` has no `update`), so another number needs another name.
///
/// The bucket holds what arrives in one second, and the burst (`nft_limit_init`: a second is the smallest unit).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// Bytes a second, at least 1.
    pub rate: u64,
    /// Bytes that the bucket holds in addition. A packet longer than rate and burst together is always beyond it.
    pub burst: u32,
}

impl Limit {
    /// Appends the content of `NFTA_OBJ_DATA`.
    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.attribute(NFTA_LIMIT_RATE, &self.rate.to_be_bytes());
        out.attribute(NFTA_LIMIT_UNIT, &SECOND.to_be_bytes());
        out.be32(NFTA_LIMIT_BURST, self.burst);
        out.be32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKT_BYTES);
        out.be32(NFTA_LIMIT_FLAGS, NFT_LIMIT_F_INV);
    }

    /// Reads the content of `NFTA_OBJ_DATA`. A limit of another kind, which this crate did not make, is one of rate 0.
    pub(super) fn decode(data: &[u8]) -> Limit {
        let (mut limit, mut kind) = (Limit { rate: 0, burst: 0 }, (0, 0, 0));
        for (attribute, value) in attributes(data) {
            let number = || value.try_into().map(u32::from_be_bytes).unwrap_or_default();
            match attribute {
                NFTA_LIMIT_RATE => limit.rate = be64(value),
                NFTA_LIMIT_UNIT => kind.0 = be64(value),
                NFTA_LIMIT_BURST => limit.burst = number(),
                NFTA_LIMIT_TYPE => kind.1 = number(),
                NFTA_LIMIT_FLAGS => kind.2 = number(),
                _ => {}
            }
        }
        if kind == (SECOND, NFT_LIMIT_PKT_BYTES, NFT_LIMIT_F_INV) { limit } else { Limit { rate: 0, ..limit } }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rate over {}/second", in_units(self.rate))?;
        if self.burst > 0 { write!(f, " burst {}", in_units(self.burst.into())) } else { Ok(()) }
    }
}

/// A number of bytes in the largest unit that divides it, as nft prints it.
fn in_units(bytes: u64) -> String {
    let (mut number, mut unit) = (bytes, 0);
    while number > 0 && number.is_multiple_of(1024) && unit + 1 < UNITS.len() {
        number /= 1024;
        unit += 1;
    }
    format!("{number} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_printed_as_nft_prints_them() {
        let text = |rate, burst| Limit { rate, burst }.to_string();
        assert_eq!(text(12_500_000, 65_536), "rate over 12500000 bytes/second burst 64 kbytes");
        assert_eq!(text(1 << 20, 0), "rate over 1 mbytes/second");
        assert_eq!(text(3 << 30, 1000), "rate over 3072 mbytes/second burst 1000 bytes");
    }

    #[test]
    fn a_limit_is_read_as_it_was_written_and_another_kind_is_not_ours() {
        let limit = Limit { rate: 12_500_000, burst: 65_536 };
        let mut bytes = Vec::new();
        limit.encode(&mut bytes);
        assert_eq!(Limit::decode(&bytes), limit);
        bytes.be32(NFTA_LIMIT_FLAGS, 0);
        assert_eq!(Limit::decode(&bytes).rate, 0);
        assert_eq!(Limit::decode(&bytes[..7]).rate, 0);
    }
}
