//! Which tests run beside which: up to `PLACES` labs share the machine, and a test that measures time has it to itself.
//!
//! Tests are threads of one process, or of several that run at once, so what decides is locks on files (flock(2)),
//! which the kernel takes away from a process that ends. Everybody passes `gate` one after the other, and stays in it
//! until there is room: so a test that wants the machine to itself waits for those that run, and not for those that
//! come.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// So many tests run at once. Most of a lab's time is spent in waiting.
const PLACES: usize = 4;
const DIRECTORY: &str = "/run/egret-lab";

thread_local! {
    /// What this test has. Its second lab needs no second place: two tests could wait for each other's.
    static HELD: RefCell<Weak<Turn>> = const { RefCell::new(Weak::new()) };
}

/// The right to run, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    is_alone: bool,
    _locks: Vec<File>,
}

/// Waits until nothing else runs, and keeps it so. For a test that measures time, or that asks more of the machine
/// than a test beside it could bear; it is the first thing that such a test does.
#[must_use]
pub fn alone() -> Arc<Turn> {
    take(true)
}

/// Waits until there is a place beside others. Labs do it by themselves.
#[must_use]
pub fn beside_others() -> Arc<Turn> {
    take(false)
}

fn take(alone: bool) -> Arc<Turn> {
    if let Some(turn) = HELD.with_borrow(Weak::upgrade) {
        assert!(turn.is_alone || !alone, "a test says before its first lab that it must be alone");
        return turn;
    }
    let locks = if alone { machine() } else { place() };
    let locks = locks.unwrap_or_else(|e| panic!("the locks in {DIRECTORY}: {e}; labs need root"));
    let turn = Arc::new(Turn { is_alone: alone, _locks: locks });
    HELD.set(Arc::downgrade(&turn));
    turn
}

fn machine() -> io::Result<Vec<File>> {
    let gate = open("gate")?;
    gate.lock()?;
    let machine = open("machine")?;
    machine.lock()?;
    Ok(vec![machine])
}

fn place() -> io::Result<Vec<File>> {
    let gate = open("gate")?;
    gate.lock()?;
    let machine = open("machine")?;
    machine.lock_shared()?;
    let mut places = (0..PLACES).map(|n| open(&format!("place-{n}"))).collect::<io::Result<Vec<File>>>()?;
    loop {
        for n in 0..PLACES {
            match places[n].try_lock() {
                Ok(()) => return Ok(vec![machine, places.swap_remove(n)]),
                Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(e)) => return Err(e),
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn open(name: &str) -> io::Result<File> {
    fs::create_dir_all(DIRECTORY)?;
    File::options().create(true).write(true).truncate(false).open(Path::new(DIRECTORY).join(name))
}
