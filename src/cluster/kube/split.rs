//! Splits a list of the API server into items while it arrives: 5,000 Nodes are 75 MB of text, and each is needed only
//! for a moment.

/// Splits `{"metadata": …, "items": [A, B, …]}`, with the fields in any order.
#[derive(Debug, Default)]
pub struct Splitter {
    /// Open braces and brackets.
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// The part being read: a key or a value of the outermost object, or an item.
    part: Vec<u8>,
    key: Vec<u8>,
    /// The list's metadata, as text.
    metadata: Vec<u8>,
    /// The list has started.
    started: bool,
}

/// The text is not a complete list.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the list is truncated")]
pub struct Truncated;

impl Splitter {
    /// Takes the next piece of the text, and calls `each` with each complete item.
    pub fn push(&mut self, piece: &[u8], mut each: impl FnMut(&[u8])) {
        for &byte in piece {
            if self.in_string {
                self.part.push(byte);
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            let in_items = self.key == b"\"items\"";
            match byte {
                b' ' | b'\t' | b'\r' | b'\n' => continue,
                b'"' => self.in_string = true,
                b'{' | b'[' => {
                    self.depth += 1;
                    self.started = true;
                    if self.depth == 1 || (self.depth == 2 && in_items) {
                        continue;
                    }
                }
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    match self.depth {
                        0 => self.value(),
                        1 if in_items => self.item(&mut each),
                        _ => self.part.push(byte),
                    }
                    continue;
                }
                b':' if self.depth == 1 => {
                    self.key = std::mem::take(&mut self.part);
                    continue;
                }
                b',' if self.depth == 1 => {
                    self.value();
                    continue;
                }
                b',' if self.depth == 2 && in_items => {
                    self.item(&mut each);
                    continue;
                }
                _ => {}
            }
            self.part.push(byte);
        }
    }

    fn value(&mut self) {
        let value = std::mem::take(&mut self.part);
        if std::mem::take(&mut self.key) == b"\"metadata\"" {
            self.metadata = value;
        }
    }

    fn item(&mut self, each: &mut impl FnMut(&[u8])) {
        if !self.part.is_empty() {
            each(&self.part);
            self.part.clear();
        }
    }

    /// Returns the list's metadata at the end of the text.
    ///
    /// # Errors
    /// The list is not complete.
    pub fn finish(self) -> Result<Vec<u8>, Truncated> {
        if self.started && self.depth == 0 && !self.in_string { Ok(self.metadata) } else { Err(Truncated) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn split(text: &str, piece: usize) -> Result<(Vec<Value>, Value), Truncated> {
        let (mut splitter, mut items) = (Splitter::default(), Vec::new());
        for piece in text.as_bytes().chunks(piece.max(1)) {
            splitter.push(piece, |item| items.push(serde_json::from_slice(item).unwrap()));
        }
        let metadata = splitter.finish()?;
        Ok((items, serde_json::from_slice(&metadata).unwrap_or_default()))
    }

    #[test]
    fn the_order_of_the_fields_does_not_matter() {
        let metadata = json!({"resourceVersion": "7"});
        for text in [
            r#"{"kind":"L","metadata":{"resourceVersion":"7"},"items":[{"a":1},{"b":[2,3]}]}"#,
            "{\"items\": [ {\"a\":1} ,\n{\"b\":[2,3]} ], \"apiVersion\":\"v1\", \"metadata\":{\"resourceVersion\":\"7\"}}\n",
        ] {
            assert_eq!(split(text, 5), Ok((vec![json!({"a": 1}), json!({"b": [2, 3]})], metadata.clone())), "{text}");
        }
        assert_eq!(split(r#"{"items":null,"metadata":{"resourceVersion":"7"}}"#, 3), Ok((vec![], metadata.clone())));
        assert_eq!(split(r#"{"items":[],"metadata":{"resourceVersion":"7"}}"#, 3), Ok((vec![], metadata)));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
            Just(Value::from("\"items\":[{\\\"]}")),
        ];
        leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(".{0,6}|items|metadata", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_item_stays_the_same(items in prop::collection::vec(any_json(), 0..6), piece in 1usize..40) {
            // Items of lists are always objects.
            let items: Vec<Value> = items.into_iter().map(|v| json!({ "v": v })).collect();
            let metadata = json!({"resourceVersion": "1", "remaining": {"items": []}});
            let text = json!({"apiVersion": "v1", "items": items, "kind": "L", "metadata": metadata}).to_string();
            prop_assert_eq!(split(&text, piece), Ok((items, metadata)));
            for end in 0..text.len() {
                if text.is_char_boundary(end) {
                    prop_assert_eq!(split(&text[..end], piece), Err(Truncated));
                }
            }
        }

        #[test]
        fn any_bytes_are_split_or_truncated(
            bytes in prop::collection::vec(prop::sample::select(&b"{}[],:\"\\ ai1"[..]), 0..80), piece in 1usize..9,
        ) {
            let (mut splitter, mut size) = (Splitter::default(), 0);
            bytes.chunks(piece).for_each(|piece| splitter.push(piece, |item| size += item.len()));
            prop_assert!(size <= bytes.len());
            drop(splitter.finish());
        }
    }
}
