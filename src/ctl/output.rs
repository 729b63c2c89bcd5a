//! How results are shown: text for people, with colours on a terminal, or JSON or YAML for programs.

pub use crate::model::text::{few, number};

use anyhow::Context;
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Write};

/// The value of `-o`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Text; long lists are shortened.
    #[default]
    Text,
    /// Text with more columns; lists are shown whole.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// A result of a command.
pub trait Show: Serialize {
    /// The text for people.
    fn text(&self, view: View) -> String;
}

/// How text is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Lists are shown whole, with more columns.
    pub wide: bool,
    /// Text is coloured.
    pub colour: bool,
}

/// A colour with a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Green.
    Good,
    /// Yellow.
    Doubtful,
    /// Red.
    Bad,
    /// Bold.
    Heading,
}

impl View {
    /// For standard output: coloured on a terminal, unless the variable `NO_COLOR` is set (<https://no-color.org>).
    pub fn of_stdout(wide: bool) -> Self {
        let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        View { wide, colour: !forbidden && std::io::stdout().is_terminal() }
    }

    /// The text in a colour.
    pub fn paint(self, colour: Colour, text: &str) -> String {
        // Select Graphic Rendition, ECMA-48 8.3.117.
        let code = match colour {
            Colour::Good => "32",
            Colour::Doubtful => "33",
            Colour::Bad => "31",
            Colour::Heading => "1",
        };
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The result in a format.
///
/// # Errors
/// It cannot be written as JSON or YAML.
pub fn render<T: Show>(value: &T, format: Format) -> anyhow::Result<String> {
    Ok(match format {
        Format::Text => value.text(View::of_stdout(false)),
        Format::Wide => value.text(View::of_stdout(true)),
        Format::Json => serde_json::to_string_pretty(value).context("cannot write the result as JSON")? + "\n",
        Format::Yaml => serde_saphyr::to_string(value).context("cannot write the result as YAML")?,
    })
}

/// Writes to standard output. A closed pipe is no error: `kubectl egret status | head`.
///
/// # Errors
/// Standard output cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// `1 node`, `2 nodes`; `many` is the plural.
pub fn count(n: usize, one: &str, many: &str) -> String {
    format!("{} {}", number(n), if n == 1 { one } else { many })
}

/// An age in seconds as kubectl shows it, `45s`, `7m`, `3h`, `12d`.
pub fn age(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7_200 => format!("{}m", s / 60),
        s @ 7_200..172_800 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_ages_are_short() {
        assert_eq!(count(1, "policy", "policies"), "1 policy");
        assert_eq!(count(0, "policy", "policies"), "0 policies");
        assert_eq!([-1, 119, 120, 7_199, 7_200, 172_800].map(age), ["0s", "119s", "2m", "119m", "2h", "2d"]);
    }

    #[test]
    fn only_coloured_text_has_escape_codes() {
        let colour = |colour| View { wide: false, colour }.paint(Colour::Bad, "no");
        assert_eq!([false, true].map(colour), ["no".to_owned(), "\x1b[31mno\x1b[0m".to_owned()]);
        assert_eq!(View { wide: false, colour: true }.paint(Colour::Bad, ""), "");
    }
}
