//! Maps, by their bytes.

use crate::syscall::{Attributes, Command};
use nix::libc::{ENOENT, ENOSPC};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Packets, and their bytes from the IP header on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// The packets.
    pub packets: u64,
    /// The bytes.
    pub bytes: u64,
}

/// The length of `struct count`, programs/fast_path.h.
const COUNT: usize = 16;

#[derive(Debug)]
pub(crate) struct Map(pub(crate) OwnedFd);

impl Map {
    fn attributes<'a>(&self) -> Attributes<'a> {
        Attributes::new().number(0, self.0.as_raw_fd().cast_unsigned())
    }

    pub(crate) fn update(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.attributes().input(8, key).input(16, value).call(Command::MapUpdate).map(drop)
    }

    pub(crate) fn delete(&self, key: &[u8]) -> io::Result<()> {
        match self.attributes().input(8, key).call(Command::MapDelete) {
            Err(e) if e.raw_os_error() != Some(ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    /// Makes these the elements, without a moment in which one that stays is missing.
    pub(crate) fn set<const K: usize, const V: usize>(&self, elements: &BTreeMap<[u8; K], [u8; V]>) -> io::Result<()> {
        for key in self.keys::<K>()?.into_iter().filter(|key| !elements.contains_key(key)) {
            self.delete(&key)?;
        }
        elements.iter().try_for_each(|(key, value)| self.update(key, value))
    }

    /// The keys.
    pub(crate) fn keys<const K: usize>(&self) -> io::Result<Vec<[u8; K]>> {
        let (mut keys, mut next): (Vec<[u8; K]>, [u8; K]) = (Vec::new(), [0; K]);
        loop {
            let before = keys.last().copied();
            let attributes = self.attributes();
            let attributes = match &before {
                Some(key) => attributes.input(8, key),
                None => attributes,
            };
            match attributes.output(16, &mut next).call(Command::MapNextKey) {
                Ok(_) => keys.push(next),
                Err(e) if e.raw_os_error() == Some(ENOENT) => return Ok(keys),
                Err(e) => return Err(e),
            }
        }
    }

    /// The counts of all processors.
    pub(crate) fn count(&self, key: [u8; 4], processors: usize) -> io::Result<Count> {
        let mut values = vec![0; COUNT * processors];
        self.attributes().input(8, &key).output(16, &mut values).call(Command::MapLookup)?;
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
        Ok(values.chunks_exact(COUNT).fold(Count::default(), |sum, one| Count {
            packets: sum.packets + number(&one[..8]),
            bytes: sum.bytes + number(&one[8..]),
        }))
    }

    /// Takes the first element of a queue.
    pub(crate) fn take<const N: usize>(&self) -> io::Result<Option<[u8; N]>> {
        let mut value = [0; N];
        match self.attributes().output(16, &mut value).call(Command::MapLookupAndDelete) {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Creates an array of one element.
    pub(crate) fn of_one(value: &[u8]) -> io::Result<Map> {
        /// `BPF_MAP_TYPE_ARRAY`, include/uapi/linux/bpf.h.
        const ARRAY: u32 = 2;
        let length = u32::try_from(value.len()).map_err(|_| io::Error::from_raw_os_error(ENOSPC))?;
        let attributes = Attributes::new().number(0, ARRAY).number(4, 4).number(8, length).number(12, 1);
        let map = Map({ attributes }.open(Command::MapCreate)?);
        map.update(&[0; 4], value)?;
        Ok(map)
    }
}

/// The number of values that a map with one for each processor has (`num_possible_cpus`).
pub(crate) fn possible_processors() -> io::Result<usize> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::other(format!("possible processors: {text:?}")))
}
