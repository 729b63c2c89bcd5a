//! Attributes of netlink messages: a length, a type and a value, padded to four bytes (`struct nlattr`).

use super::{align, pad, u16_at};

/// The upper two bits of an attribute's type are flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

/// Appends netlink attributes to a byte vector.
pub trait Attributes {
    /// Appends an attribute.
    fn attribute(&mut self, kind: u16, value: &[u8]);
    /// Appends an attribute with a NUL-terminated text.
    fn text(&mut self, kind: u16, value: &str);
    /// Appends an attribute with a number in network byte order, which nf_tables and ctnetlink use.
    fn be32(&mut self, kind: u16, value: u32);
    /// Appends a nested attribute that contains the attributes that `fill` appends.
    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>));
}

impl Attributes for Vec<u8> {
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.extend_from_slice(&kind.to_ne_bytes());
        self.extend_from_slice(value);
        pad(self);
    }

    fn text(&mut self, kind: u16, value: &str) {
        self.extend_from_slice(&((4 + value.len() + 1) as u16).to_ne_bytes());
        self.extend_from_slice(&kind.to_ne_bytes());
        self.extend_from_slice(value.as_bytes());
        self.push(0);
        pad(self);
    }

    fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
        let start = self.len();
        self.extend_from_slice(&[0; 4]);
        fill(self);
        let len = (self.len() - start) as u16;
        self[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self[start + 2..start + 4].copy_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
    }
}

/// Iterates over attributes: the type without its flags, and the value. The iteration ends at the first attribute
/// whose length exceeds the remaining bytes.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        if bytes.len() < 4 {
            return None;
        }
        let len = u16_at(bytes, 0) as usize;
        if len < 4 || len > bytes.len() {
            return None;
        }
        let item = (u16_at(bytes, 2) & NLA_TYPE_MASK, &bytes[4..len]);
        bytes = &bytes[align(len).min(bytes.len())..];
        Some(item)
    })
}

/// Decodes an attribute's text up to its NUL byte.
pub fn string(value: &[u8]) -> String {
    String::from_utf8_lossy(value.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}
