//! Splits a YAML stream into documents, with at most one of them in memory.

use std::io::{self, BufRead, Read};

/// The longest document accepted, in bytes. A `List` of a few thousand nodes is shorter.
pub const MAX_DOCUMENT: usize = 64 << 20;

/// The documents of a stream. Comments, blank lines and markers alone are no document.
///
/// A line that starts with `---` or `...` always ends a document: YAML forbids it within any scalar or flow
/// collection (YAML 1.2.2, 9.1.2, `c-forbidden`). So documents can be split without a parser.
pub struct Documents<R> {
    input: R,
    /// Lines read from `input` so far.
    lines: u32,
    /// The current document, or the last one returned, followed by the marker that ended it if that starts the next.
    text: Vec<u8>,
    /// The position of that marker in `text`.
    marker: Option<usize>,
}

/// One document's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// The line of the stream at which the text starts, from 1.
    pub line: u32,
    /// The text, including its `---`.
    pub text: &'a str,
}

/// Why a stream cannot be read further.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The text is invalid.
    #[error("{message}")]
    Text {
        /// The line, from 1.
        line: u32,
        /// What is wrong.
        message: String,
    },
    /// The file could not be read.
    #[error(transparent)]
    Read(#[from] io::Error),
}

impl<R: BufRead> Documents<R> {
    /// Starts at a stream's beginning.
    pub fn new(input: R) -> Self {
        Documents { input, lines: 0, text: Vec::new(), marker: None }
    }

    /// The next document.
    ///
    /// # Errors
    /// The stream cannot be read, is not UTF-8, or a document is longer than [`MAX_DOCUMENT`].
    pub fn next(&mut self) -> Result<Option<Document<'_>>, StreamError> {
        let mut first = self.lines + 1;
        let (mut content, mut started, mut directives) = (false, false, false);
        match self.marker.take() {
            Some(at) => {
                self.text.drain(..at);
                first = self.lines;
                started = true;
                content = has_content(text(&self.text[3..], self.lines)?);
            }
            None => self.text.clear(),
        }
        loop {
            let start = self.text.len();
            if !self.line()? {
                break;
            }
            let line = text(&self.text[start..], self.lines)?;
            match marker(line) {
                Some("---") if content => {
                    self.marker = Some(start);
                    return self.document(first, start).map(Some);
                }
                Some("---") => {
                    content = has_content(&line[3..]);
                    // The text before holds comments, or directives for this document.
                    if started || !directives {
                        self.text.drain(..start);
                        first = self.lines;
                    }
                    started = true;
                }
                Some(_) if content => return self.document(first, start).map(Some),
                Some(_) => {
                    self.text.clear();
                    first = self.lines + 1;
                    (started, directives) = (false, false);
                }
                None if !started && line.starts_with('%') => directives = true,
                None => content |= has_content(line),
            }
        }
        if content { self.document(first, self.text.len()).map(Some) } else { Ok(None) }
    }

    fn document(&self, line: u32, end: usize) -> Result<Document<'_>, StreamError> {
        Ok(Document { line, text: text(&self.text[..end], line)? })
    }

    /// Appends one line to `text`. Returns false at the end of the stream.
    fn line(&mut self) -> Result<bool, StreamError> {
        let start = self.text.len();
        let room = (MAX_DOCUMENT + 1).saturating_sub(start) as u64;
        let read = self.input.by_ref().take(room).read_until(b'\n', &mut self.text)?;
        if read as u64 == room {
            return Err(StreamError::Text {
                line: self.lines + 1,
                message: format!(
                    "the document is longer than {} MiB; write the objects as separate documents, with --- between \
                     them",
                    MAX_DOCUMENT >> 20
                ),
            });
        }
        // A byte order mark is no part of the text.
        if self.lines == 0 && self.text.starts_with("\u{feff}".as_bytes()) {
            self.text.drain(..3);
        }
        self.lines += u32::from(read > 0);
        Ok(read > 0)
    }
}

fn text(bytes: &[u8], line: u32) -> Result<&str, StreamError> {
    std::str::from_utf8(bytes)
        .map_err(|_| StreamError::Text { line, message: "is not UTF-8 text; manifests are written in UTF-8".into() })
}

/// `---` or `...`, if the line is such a marker.
fn marker(line: &str) -> Option<&str> {
    let (start, rest) = line.split_at_checked(3)?;
    let ends = rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']);
    (matches!(start, "---" | "...") && ends).then_some(start)
}

/// Whether the line has anything but blanks and a comment.
fn has_content(line: &str) -> bool {
    let text = line.trim();
    !text.is_empty() && !text.starts_with('#')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<(u32, String)> {
        let mut documents = Documents::new(text.as_bytes());
        let mut all = Vec::new();
        while let Some(d) = documents.next().unwrap() {
            all.push((d.line, d.text.to_owned()));
        }
        all
    }

    #[test]
    fn documents_come_with_their_first_lines() {
        assert_eq!(
            split("a: 1\n---\nb: 2\n--- # three\nc: 3\n"),
            [(1, "a: 1\n".into()), (2, "---\nb: 2\n".into()), (4, "--- # three\nc: 3\n".into())]
        );
    }

    #[test]
    fn empty_documents_are_skipped() {
        assert_eq!(split(""), []);
        assert_eq!(split("\n# nothing\n\n"), []);
        assert_eq!(split("---\n---\n# none\n--- \n\na: 1\n---\n...\n"), [(4, "--- \n\na: 1\n".into())]);
    }

    #[test]
    fn byte_order_marks_and_carriage_returns_are_accepted() {
        assert_eq!(
            split("\u{feff}---\r\na: 1\r\n---\r\nb: 2"),
            [(1, "---\r\na: 1\r\n".into()), (3, "---\r\nb: 2".into())]
        );
    }

    #[test]
    fn directives_stay_with_their_document() {
        assert_eq!(split("%YAML 1.2\n---\na: 1\n"), [(1, "%YAML 1.2\n---\na: 1\n".into())]);
        assert_eq!(split("a: 1\n...\n%YAML 1.2\n---\nb: 2\n").len(), 2);
    }

    #[test]
    fn dashes_within_a_line_or_a_block_are_text() {
        assert_eq!(split("a: |\n  ---\n  x\n----\n").len(), 1);
        assert_eq!(split("---a: 1\n").len(), 1);
    }

    #[test]
    fn text_that_is_not_utf8_is_rejected_with_its_line() {
        let mut documents = Documents::new(&b"a: 1\nb: \xff\xfe\n"[..]);
        let StreamError::Text { line, .. } = documents.next().unwrap_err() else { panic!() };
        assert_eq!(line, 2);
    }
}
