//! MAC addresses.

use std::fmt;

/// A MAC address, in wire order.
pub type Mac = [u8; 6];

/// Shows a MAC address as `02:65:67:00:00:0b`.
pub struct Shown(pub Mac);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The error of [`parse`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address; write six bytes in hexadecimal with colons, 02:65:67:00:00:0b")]
pub struct NotAMac(String);

/// Parses `02:65:67:00:00:0b`; upper case and single digits are fine.
///
/// # Errors
/// The text is something else.
pub fn parse(text: &str) -> Result<Mac, NotAMac> {
    let wrong = || NotAMac(text.to_owned());
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| (1..=2).contains(&p.len()) && p.bytes().all(|c| c.is_ascii_hexdigit()));
        *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(wrong)?;
    }
    if parts.next().is_some() { Err(wrong()) } else { Ok(mac) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displayed_addresses_can_be_parsed() {
        let mac = [0x02, 0x65, 0x67, 0, 0x0a, 0xff];
        assert_eq!(Shown(mac).to_string(), "02:65:67:00:0a:ff");
        assert_eq!(parse("02:65:67:0:A:FF"), Ok(mac));
    }

    #[test]
    fn other_texts_are_rejected() {
        for text in ["", "02", "02:65:67:00:0a", "02:65:67:00:0a:ff:00", "02:65:67:00:0a:+f", "g2:65:67:00:0a:ff"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }
}
