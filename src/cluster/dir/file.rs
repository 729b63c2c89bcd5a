//! One file of the directory: its signature, and its last good contents.

use super::documents::{Documents, StreamError};
use crate::cluster::decode::fault::{Fault, options};
use crate::cluster::decode::manifest::{Reader, StatusPath};
use crate::cluster::object::{Identity, Object};
use crate::cluster::refused::{Named, named_in, withheld};
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fs::{File, Metadata, OpenOptions};
use std::hash::BuildHasher;
use std::io::{self, BufReader};
use std::num::NonZeroU64;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The most faults reported for one file.
const MAX_FAULTS: usize = 10;
/// A file whose time stamps are younger than this when it is read can change again without new time stamps: the
/// kernel's clock for them ticks every 1 to 10 ms.
const RACY: Duration = Duration::from_millis(50);

/// A hash of a file's inode, size and times, by which changes are detected. It includes the inode's change time,
/// because some writers reset the modification time.
pub type Signature = NonZeroU64;

/// A file's signature.
pub fn signature(m: &Metadata, hasher: &RandomState) -> Signature {
    let all = (m.dev(), m.ino(), m.size(), (m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
    Signature::new(hasher.hash_one(all)).unwrap_or(Signature::MIN)
}

/// Whether a file that is read at `now` could change later without a new signature.
fn is_racy(m: &Metadata, now: SystemTime) -> bool {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, nanos) = (m.ctime(), m.ctime_nsec()).max((m.mtime(), m.mtime_nsec()));
    let stamp = Duration::new(seconds.try_into().unwrap_or(0), nanos.try_into().unwrap_or(0));
    now < stamp + RACY
}

/// A file's contents. There are thousands of files with one object each.
#[derive(Debug, Default)]
pub enum Contents {
    /// No object.
    #[default]
    Nothing,
    /// One document with one object.
    One(Document, (u32, Object)),
    /// Any other number of documents and objects.
    Many(Box<[Document]>, Box<[(u32, Object)]>),
}

/// A document, which is not parsed again while its text is the same.
#[derive(Clone, Copy, Debug)]
pub struct Document {
    /// Hash of the text.
    hash: u64,
    /// The line of the file that it starts with, from 1.
    line: u32,
    /// The number of objects.
    objects: u32,
}

impl Contents {
    fn new(mut documents: Vec<Document>, mut objects: Vec<(u32, Object)>) -> Self {
        if documents.len() > 1 || objects.len() > 1 {
            return Contents::Many(documents.into(), objects.into());
        }
        match (documents.pop(), objects.pop()) {
            (Some(document), Some(object)) => Contents::One(document, object),
            _ => Contents::Nothing,
        }
    }

    fn parts(&self) -> (&[Document], &[(u32, Object)]) {
        match self {
            Contents::Nothing => (&[], &[]),
            Contents::One(document, object) => (std::slice::from_ref(document), std::slice::from_ref(object)),
            Contents::Many(documents, objects) => (documents, objects),
        }
    }

    /// The objects, with their lines in the file.
    pub fn objects(&self) -> impl Iterator<Item = (u32, &Object)> {
        let (documents, objects) = self.parts();
        let lines = documents.iter().flat_map(|d| std::iter::repeat_n(d.line, d.objects as usize));
        lines.zip(objects).map(|(first, (line, object))| (first + line.saturating_sub(1), object))
    }

    /// The number of objects.
    pub fn len(&self) -> usize {
        self.parts().1.len()
    }
}

/// The result of reading a file.
pub enum Reading {
    /// The file is valid.
    Good(Contents),
    /// The file is invalid: its faults with their lines in the file, and the policies and gateways that it names.
    Bad(Vec<Fault>, Vec<Named>),
    /// The file changed while it was read.
    Busy,
}

/// Reads a file, and parses the documents that `before` does not have. Returns its signature, whether the file can
/// change without a new signature, its length, and the contents.
///
/// # Errors
/// The file cannot be read.
pub fn read(
    path: &Path,
    before: &Contents,
    reader: &mut Reader<'_>,
    hasher: &RandomState,
) -> io::Result<(Signature, bool, u64, Reading)> {
    // Non-blocking, because opening a FIFO would wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    let before_reading = signature(&metadata, hasher);
    let racy = is_racy(&metadata, SystemTime::now());
    let reading = if !metadata.is_file() {
        let message = "is no regular file; move it elsewhere".into();
        Reading::Bad(vec![Fault { line: 1, message, ..Fault::default() }], Vec::new())
    } else if metadata.len() == 0 && before.len() > 0 {
        // Probably truncated by a full disk, or still being written.
        let message = format!(
            "is empty; its {} objects are kept. To remove them, delete the file or leave a comment in it",
            before.len()
        );
        Reading::Bad(vec![Fault { line: 1, message, ..Fault::default() }], Vec::new())
    } else {
        parse(&file, path, before, reader, hasher)?
    };
    let unchanged = signature(&file.metadata()?, hasher) == before_reading;
    Ok((before_reading, racy, metadata.len(), if unchanged { reading } else { Reading::Busy }))
}

fn parse(
    file: &File,
    path: &Path,
    before: &Contents,
    reader: &mut Reader<'_>,
    hasher: &RandomState,
) -> io::Result<Reading> {
    let mut stream = Documents::new(BufReader::with_capacity(32 << 10, file));
    let known = by_hash(before);
    let mut by_name: Option<HashMap<Identity<'_>, &Object>> = None;
    let (mut documents, mut objects, mut faults) = (Vec::new(), Vec::new(), Vec::new());
    let mut named = Vec::new();
    // A status is not an object. An invalid one is reported, and the last good one stays.
    let has_objects = !matches!(reader.statuses, StatusPath::Of(_));
    loop {
        let document = match stream.next() {
            Ok(Some(document)) => document,
            Ok(None) => break,
            Err(StreamError::Read(e)) => return Err(e),
            Err(StreamError::Text { line, message }) => {
                faults.push(Fault { line, message, ..Fault::default() });
                break;
            }
        };
        let hash = hasher.hash_one(document.text);
        let count = objects.len();
        if let Some(same) = known.get(&hash) {
            objects.extend_from_slice(same);
        } else {
            match reader.read(document.text) {
                Ok(new) => {
                    let by_name = by_name
                        .get_or_insert_with(|| before.parts().1.iter().map(|(_, o)| (o.identity(), o)).collect());
                    objects.extend(new.into_iter().map(|(line, object)| match by_name.get(&object.identity()) {
                        Some(before) if before.has_same_contents(&object) => (line, Object::clone(before)),
                        _ => (line, object),
                    }));
                }
                Err(fault) => {
                    let fault = Fault { line: document.line + fault.line.max(1) - 1, ..fault };
                    if has_objects {
                        // Text that is not YAML names no object.
                        let document = serde_saphyr::from_str_with_options(document.text, options());
                        named.extend(named_in(&document.unwrap_or_default(), reader, &fault, &located(path, &fault)));
                    }
                    faults.push(fault);
                }
            }
        }
        if faults.len() >= MAX_FAULTS {
            break;
        }
        let count = (objects.len() - count) as u32;
        documents.push(Document { hash, line: document.line, objects: count });
    }
    if faults.is_empty() {
        return Ok(Reading::Good(Contents::new(documents, objects)));
    }
    if let Some(fault) = faults.first().filter(|_| has_objects) {
        let text = format!("another document of its file is invalid: {}", located(path, fault));
        named.extend(objects.into_iter().filter_map(|(_, object)| withheld(object, &text)));
    }
    Ok(Reading::Bad(faults, named))
}

/// A fault with its file and line.
fn located(path: &Path, fault: &Fault) -> String {
    format!("{}:{}: {fault}", path.display(), fault.line)
}

fn by_hash(contents: &Contents) -> HashMap<u64, &[(u32, Object)]> {
    let (documents, mut rest) = contents.parts();
    let document = |d: &Document| {
        let (own, others) = rest.split_at(d.objects as usize);
        rest = others;
        (d.hash, own)
    };
    documents.iter().map(document).collect()
}
