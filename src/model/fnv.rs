//! A hash with the same result on every machine and in every release.

/// FNV-1a, 64 bits, <http://www.isthe.com/chongo/tech/comp/fnv/>. Inputs that differ only in their last bytes differ
/// in few of the upper bits.
pub fn fnv1a(bytes: impl IntoIterator<Item = u8>) -> u64 {
    let hash = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, hash)
}

/// The rank of a hash in the order of `key`; the highest is first (rendezvous hashing, Thaler and Ravishankar 1998).
pub fn rank(hash: u64, key: u64) -> u64 {
    // The finaliser of SplitMix64: FNV mixes the last letters badly, and names differ in their last letters.
    let mut mixed = hash ^ key.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_equals_the_published_values() {
        assert_eq!(fnv1a([]), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("foobar".bytes()), 0x8594_4171_f739_67e8);
    }
}
