//! Any text in a file is read or rejected, and quickly.

use super::super::documents::Documents;
use super::{gateway, policy};
use crate::cluster::decode::manifest::{Reader, StatusPath};
use crate::cluster::names::Names;
use proptest::prelude::*;
use std::time::{Duration, Instant};

/// The number of objects in a text, or its first fault.
fn read(text: &str) -> Result<usize, String> {
    let mut names = Names::default();
    let mut reader = Reader { names: &mut names, node: Some("n1"), statuses: StatusPath::InFiles };
    let mut documents = Documents::new(text.as_bytes());
    let mut count = 0;
    while let Some(document) = documents.next().map_err(|e| e.to_string())? {
        count += reader.read(document.text).map_err(|fault| fault.to_string())?.len();
    }
    Ok(count)
}

/// Parts of manifests, and what makes them invalid.
const PARTS: [&str; 24] = [
    "---\n",
    "...\n",
    "%YAML 1.2\n",
    "# note\n",
    "{",
    "}",
    "[",
    "]",
    "- ",
    ": ",
    "\n",
    "  ",
    "\t",
    "&a ",
    "*a ",
    "!!int ",
    "|\n",
    "'",
    "\"",
    "\u{feff}",
    "\u{0}",
    "<<: *a\n",
    "kind: List\nitems:\n",
    "? ",
];

fn good() -> String {
    format!(
        "{}---\n{}---\napiVersion: v1\nkind: Pod\nmetadata: {{ namespace: a, name: b, labels: {{ c: d }} }}\n\
         spec: {{ nodeName: n1 }}\nstatus: {{ podIP: 10.0.0.1 }}\n",
        gateway("g", "192.0.2.50"),
        policy("a", "p", 3)
    )
}

proptest! {
    #[test]
    fn any_file_is_read_or_rejected(
        harm in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..PARTS.len()), 0..4),
    ) {
        let mut text = good();
        prop_assert_eq!(read(&text), Ok(3));
        for (from, size, part) in harm {
            let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let from = boundaries[from.index(boundaries.len())];
            let to = boundaries.iter().copied().find(|at| *at >= from + size.index(12)).unwrap_or(text.len());
            text.replace_range(from..to, PARTS[part]);
        }
        if let Err(fault) = read(&text) {
            prop_assert!(!fault.is_empty());
        }
    }

    #[test]
    fn any_combination_of_yaml_parts_is_read_or_rejected(parts in prop::collection::vec(0..PARTS.len(), 0..30), noise in ".{0,20}") {
        let text: String = parts.iter().map(|part| PARTS[*part]).collect();
        drop((read(&text), read(&noise), read(&(text.clone() + &noise)), read(&(noise.clone() + &text))));
    }
}

#[test]
fn input_that_expands_without_end_is_rejected_quickly() {
    let depth = 50_000;
    let bomb: String = (1..40).map(|i| format!("a{i}: &a{i} [*a{0}, *a{0}, *a{0}]\n", i - 1)).collect();
    let texts = [
        "[".repeat(depth),
        "{\"a\":".repeat(depth),
        "- ".repeat(depth),
        (0..2000).map(|i| format!("{}a:\n", " ".repeat(i))).collect(),
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: b}}\nspec: {}1{}\n",
            "[".repeat(depth),
            "]".repeat(depth)
        ),
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: b}}\na0: &a0 x\n{bomb}"),
    ];
    for text in texts {
        let begin = Instant::now();
        assert!(read(&text).is_err(), "{}", text.chars().take(60).collect::<String>());
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    }
}
