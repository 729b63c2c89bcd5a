//! The kernel's nf_tables: compares tables as they should be with what the kernel holds, and commits the difference in
//! one transaction.

use crate::netlink::{Error, NETLINK_NETFILTER, Socket};
use crate::read::{self, Count};
use crate::table::{self, Held, Key, Table, TableName};
use crate::transaction::{Batch, Ownership, Transaction};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How often a transaction is tried again on a fresh view of the kernel's tables, when somebody else changes them.
const TRIES: usize = 5;
/// The name of a table that is never made.
const TRIAL: &str = "egret-trial";
/// Room for a transaction with some ten thousand elements.
const BUFFER: usize = 16 << 20;

/// Tables in the kernel of the network namespace in which this was opened.
pub struct Nftables {
    socket: Socket,
    /// What the kernel holds, as far as is known: read back once, then kept in sync with what was committed.
    held: BTreeMap<TableName, Held>,
    /// What it held when that was last known of tables of which it is not known now.
    before: BTreeMap<TableName, Held>,
    /// Whether what was read back was not what it had held.
    changed_by_others: bool,
    /// Whether the socket is to own the tables.
    own: bool,
}

impl Nftables {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the caller lacks CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        socket.set_buffers(BUFFER)?;
        Ok(Nftables { socket, held: BTreeMap::new(), before: BTreeMap::new(), changed_by_others: false, own: false })
    }

    /// Lets the socket own the tables that [`apply`](Self::apply) makes, if the kernel can keep them when it closes
    /// (Linux 6.9): nobody else can change them then, and others' `nft flush ruleset` passes them over. Returns whether
    /// it does. A table that goes with its owner's socket (Linux 5.12) would open the node when the daemon ends.
    ///
    /// # Errors
    /// The socket failed.
    pub fn own_tables(&mut self) -> Result<bool, Error> {
        let name = TableName { family: crate::uapi::NFPROTO_INET, name: TRIAL };
        let batch = Transaction::new(&mut self.socket).trial_of_ownership(name);
        self.own = match self.commit(&batch) {
            Ok(()) => true,
            Err(e) if e.errno() == Some(nix::libc::EOPNOTSUPP) => false,
            Err(e) => return Err(e),
        };
        Ok(self.own)
    }

    /// Whether the socket owns the tables that [`apply`](Self::apply) makes.
    pub fn owns_tables(&self) -> bool {
        self.own
    }

    /// The socket's netlink port, by which notifications name who made a change.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Forgets what is known of the kernel, so that the next [`apply`](Self::apply) reads it again.
    pub fn invalidate(&mut self) {
        self.before.append(&mut self.held);
    }

    /// Whether somebody else has changed chains or sets of these tables, and they were mended, since this was last asked. Of
    /// what was changed before this program knew the tables it cannot tell.
    pub fn were_changed_by_others(&mut self) -> bool {
        std::mem::take(&mut self.changed_by_others)
    }

    /// Makes the kernel's tables what `wanted` says, in one transaction. Returns how many changes that took.
    ///
    /// # Errors
    /// The kernel's refusal; then nothing was changed.
    pub fn apply(&mut self, wanted: &[(TableName, Table)]) -> Result<usize, Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut read = false;
            for (name, _) in wanted {
                if !self.held.contains_key(name) {
                    let held = read::table(&mut self.socket, *name)?;
                    self.must_not_be_anothers(*name, &held)?;
                    self.changed_by_others |= self.before.remove(name).is_some_and(|before| !held.is_like(&before));
                    self.held.insert(*name, held);
                    read = true;
                }
            }
            let updated = match self.update_flags(wanted) {
                Ok(updated) => updated,
                Err(e) => {
                    self.held.clear();
                    if tries == TRIES {
                        return Err(e);
                    }
                    continue;
                }
            };
            let mut transaction = Transaction::new(&mut self.socket);
            for (name, table) in wanted {
                transaction.table(*name, &self.held[name], table, Ownership::of(table, self.own));
            }
            let changes = transaction.changes;
            if changes == 0 {
                if read {
                    // Shared with the caller, and not a second copy.
                    self.now_holds(wanted);
                }
                return Ok(updated);
            }
            let batch = transaction.finish();
            match self.commit(&batch) {
                Ok(()) => {
                    self.now_holds(wanted);
                    return Ok(changes + updated);
                }
                Err(e) => {
                    self.invalidate();
                    if tries == TRIES {
                        return Err(e);
                    }
                }
            }
        }
    }

    /// Adopts tables that nobody owns any more, and wakes those that somebody has made dormant: in a transaction of their
    /// own, for the kernel takes no base chain beside new flags (`nf_tables_addchain`). Returns how many there were.
    fn update_flags(&mut self, wanted: &[(TableName, Table)]) -> Result<usize, Error> {
        let others = wanted.iter().filter_map(|(name, table)| {
            let (held, ownership) = (&self.held[name], Ownership::of(table, self.own));
            let flags = ownership.flags(held);
            let differ = held.exists && held.flags != flags && ownership.can_be_given(held);
            differ.then(|| (*name, flags, ownership.owner(self.port())))
        });
        let others: Vec<(TableName, u32, Option<u32>)> = others.collect();
        if others.is_empty() {
            return Ok(0);
        }
        let mut update = Transaction::new(&mut self.socket);
        for (name, flags, _) in &others {
            update.new_table(*name, *flags);
        }
        let batch = update.finish();
        self.commit(&batch)?;
        for (name, flags, owner) in &others {
            if let Some(held) = self.held.get_mut(name) {
                (held.flags, held.owner) = (*flags, *owner);
            }
        }
        Ok(others.len())
    }

    fn now_holds(&mut self, tables: &[(TableName, Table)]) {
        for (name, table) in tables {
            let ownership = Ownership::of(table, self.own);
            let flags = ownership.flags(self.held.get(name).unwrap_or(&Held::default()));
            let owner = ownership.owner(self.port());
            self.held.insert(*name, Held { flags, owner, ..Held::from(table) });
        }
    }

    /// The kernel refuses every change of a table that another socket owns, and does not say whose it is.
    fn must_not_be_anothers(&self, name: TableName, held: &Held) -> Result<(), Error> {
        match held.owner.filter(|owner| *owner != self.port()) {
            None => Ok(()),
            Some(owner) => Err(Error::Kernel {
                errno: nix::libc::EPERM,
                message: format!(
                    "nf_tables' table {:?} is owned by the netlink socket with port {owner}, mostly of the process with that \
                     id: end it",
                    name.name
                ),
                sequence: 0,
            }),
        }
    }

    /// Removes tables, and returns how many were there.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn remove(&mut self, names: &[TableName]) -> Result<usize, Error> {
        let mut removed = 0;
        for name in names {
            self.held.remove(name);
            self.before.remove(name);
            let held = read::without_content(&mut self.socket, *name)?;
            if !held.exists {
                continue;
            }
            self.must_not_be_anothers(*name, &held)?;
            let mut transaction = Transaction::new(&mut self.socket);
            transaction.remove(*name);
            let batch = transaction.finish();
            match self.commit(&batch) {
                Ok(()) => removed += 1,
                Err(e) if e.errno() == Some(nix::libc::ENOENT) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(removed)
    }

    /// The names of a table's chains.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn chains(&mut self, name: TableName) -> Result<Vec<Arc<str>>, Error> {
        Ok(read::table(&mut self.socket, name)?.chains.into_keys().collect())
    }

    /// Reads a table's named counters.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn counters(&mut self, name: TableName) -> Result<BTreeMap<String, Count>, Error> {
        read::counters(&mut self.socket, name)
    }

    /// Reads the counters of a set's elements.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn element_counters(&mut self, name: TableName, set: &str) -> Result<Vec<(Key, Count)>, Error> {
        let mut all = Vec::new();
        read::elements(&mut self.socket, name, set, |key, count| all.push((*key, count)))?;
        Ok(all)
    }

    /// Reads the elements of a set; none if there is no such set.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn elements(&mut self, name: TableName, set: &str) -> Result<table::Elements, Error> {
        match read::elements(&mut self.socket, name, set, |_, _| {}) {
            Err(e) if e.errno() == Some(nix::libc::ENOENT) => Ok(table::Elements::default()),
            other => other,
        }
    }

    /// Sends a batch and waits until the kernel has committed or refused it. The kernel acknowledges only what it
    /// is asked to, which is the last message before the batch's end; errors always come.
    fn commit(&mut self, batch: &Batch) -> Result<(), Error> {
        // The kernel takes a batch in one piece or not at all.
        let longer = batch.bytes.len() > BUFFER;
        if longer {
            self.socket.set_buffers(batch.bytes.len())?;
        }
        let sent = self.socket.send(&batch.bytes);
        if longer {
            self.socket.set_buffers(BUFFER)?;
        }
        sent?;
        let mut refusal: Option<Error> = None;
        loop {
            let mut done = false;
            self.socket.receive(|m| {
                let result = m.acknowledgement();
                // An error of the batch as a whole carries the number of its beginning, and nothing follows it.
                done |= m.sequence == batch.last || (m.sequence == batch.first && result.is_err());
                if let (Err(e), None) = (result, &refusal) {
                    refusal = Some(e);
                }
            })?;
            if done {
                return refusal.map_or(Ok(()), Err);
            }
        }
    }
}
