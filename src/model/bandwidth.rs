//! How much may be sent and received by one egress IP.

use super::metadata::Invalid;
use crate::api;
use std::fmt;

/// The smallest bandwidth, bits a second.
const LEAST: u64 = 64_000;
/// The largest one. The kernel multiplies a second's bytes by 10^9 in 64 bits (`nft_limit_init`, net/netfilter/nft_limit.c),
/// and refuses what overflows, with everything else in the transaction; or, an older one, it limits to something else.
const MOST: u64 = 100_000_000_000;
const UNITS: [(&str, u64); 3] = [("Gbit", 1_000_000_000), ("Mbit", 1_000_000), ("Kbit", 1000)];

/// Bits a second, of IP packets with their headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BitRate(u64);

impl BitRate {
    /// Parses `100Mbit`.
    ///
    /// # Errors
    /// It is no number of at most six digits with a unit, less than 64 Kbit/s, or more than 100 Gbit/s.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refused = || format!("{text:?} is not a bandwidth; write a number from 64Kbit to 100Gbit, as in 100Mbit");
        let (number, unit) =
            UNITS.iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit))).ok_or_else(refused)?;
        let is_number = (1..=6).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit());
        let number =
            number.parse::<u64>().ok().filter(|_| is_number && !number.starts_with('0')).ok_or_else(refused)?;
        Some(BitRate(number * unit)).filter(|rate| (LEAST..=MOST).contains(&rate.0)).ok_or_else(refused)
    }

    /// Bytes a second.
    pub fn bytes(self) -> u64 {
        self.0 / 8
    }
}

impl fmt::Display for BitRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = UNITS.iter().find(|(_, unit)| self.0.is_multiple_of(*unit)).unwrap_or(&("bit", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

/// The bandwidth of one egress IP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bandwidth {
    /// What pods may send.
    pub egress: Option<BitRate>,
    /// What pods may receive.
    pub ingress: Option<BitRate>,
}

impl Bandwidth {
    /// Validates `spec.bandwidth`.
    ///
    /// # Errors
    /// No direction is given, or a number is none.
    pub fn new(spec: &api::Bandwidth) -> Result<Self, Invalid> {
        let rate = |name: &str, text: &Option<String>| {
            let parsed = text.as_deref().map(BitRate::parse).transpose();
            parsed.map_err(|refused| Invalid::new(format!("spec.bandwidth.{name}"), refused))
        };
        let bandwidth = Bandwidth { egress: rate("egress", &spec.egress)?, ingress: rate("ingress", &spec.ingress)? };
        if bandwidth == Bandwidth::default() {
            let refused = "has neither egress nor ingress; give one, or leave bandwidth out";
            return Err(Invalid::new("spec.bandwidth", refused));
        }
        Ok(bandwidth)
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.egress, self.ingress) {
            (Some(egress), Some(ingress)) => write!(f, "{egress} to send and {ingress} to receive"),
            (Some(egress), None) => write!(f, "{egress} to send"),
            (None, Some(ingress)) => write!(f, "{ingress} to receive"),
            (None, None) => f.write_str("no limit"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_numbers_with_a_unit() {
        for (text, bytes, shown) in [
            ("64Kbit", 8000, "64Kbit"),
            ("100Mbit", 12_500_000, "100Mbit"),
            ("1000Mbit", 125_000_000, "1Gbit"),
            ("100000Mbit", 12_500_000_000, "100Gbit"),
        ] {
            let rate = BitRate::parse(text).expect(text);
            assert_eq!((rate.bytes(), &*rate.to_string()), (bytes, shown));
        }
        for text in [
            "",
            "100",
            "Mbit",
            "63Kbit",
            "0Mbit",
            "010Mbit",
            "1.5Mbit",
            "-1Mbit",
            "1000000Kbit",
            "100 Mbit",
            "100mbit",
            "101Gbit",
        ] {
            assert!(BitRate::parse(text).is_err_and(|refused| refused.contains("64Kbit to 100Gbit")), "{text:?}");
        }
    }

    #[test]
    fn a_bandwidth_limits_at_least_one_direction() {
        let of = |egress: &str, ingress: &str| {
            let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
            Bandwidth::new(&api::Bandwidth { egress: given(egress), ingress: given(ingress) })
                .map_err(|e| e.to_string())
        };
        assert!(of("", "").is_err_and(|refused| refused.contains("neither egress nor ingress")));
        assert!(of("1Mbit", "fast").is_err_and(|refused| refused.contains("spec.bandwidth.ingress")));
        assert_eq!(of("1Mbit", "").expect("one").to_string(), "1Mbit to send");
        assert_eq!(of("1Mbit", "2Gbit").expect("both").to_string(), "1Mbit to send and 2Gbit to receive");
    }
}
