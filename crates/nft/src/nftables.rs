//! Tables in the kernel's nf_tables. [`Nftables`] compares the desired tables with the observed ones and commits the
//! difference in one transaction.

use crate::netlink::{Error, NETLINK_NETFILTER, Socket};
use crate::read::{self, Count};
use crate::table::{self, Key, ObservedTable, Table, TableName};
use crate::transaction::{Batch, Ownership, Transaction};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How often a transaction is tried again with newly read tables, if other programs change them.
const TRIES: usize = 5;
/// The name of the table in the ownership trial, which is never created.
const TRIAL: &str = "egret-trial";
/// The socket's buffer, bytes: room for a transaction with some ten thousand elements.
const BUFFER: usize = 16 << 20;

/// The tables of one network namespace, the one in which this was opened.
pub struct Nftables {
    socket: Socket,
    /// The observed tables: read once, then updated with what was committed.
    observed: BTreeMap<TableName, ObservedTable>,
    /// The last observed state of tables that must be read again.
    before: BTreeMap<TableName, ObservedTable>,
    /// Whether a table that was read again differed from its last observed state.
    changed_by_others: bool,
    /// Whether the socket should own the tables.
    own: bool,
}

impl Nftables {
    /// Opens a netlink socket in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no nf_tables, or the caller lacks CAP_NET_ADMIN.
    pub fn open() -> Result<Self, Error> {
        let mut socket = Socket::open(NETLINK_NETFILTER)?;
        socket.set_buffers(BUFFER)?;
        Ok(Nftables {
            socket,
            observed: BTreeMap::new(),
            before: BTreeMap::new(),
            changed_by_others: false,
            own: false,
        })
    }

    /// Makes the socket the owner of the tables that [`apply`](Self::apply) creates, if the kernel can keep them when
    /// the socket closes (Linux 6.9). Then no other program can change them, and `nft flush ruleset` skips them.
    /// Returns whether the socket owns them. A table that ends with its owner's socket (Linux 5.12) would leave the
    /// node without rules when the daemon ends.
    ///
    /// # Errors
    /// The socket failed.
    pub fn own_tables(&mut self) -> Result<bool, Error> {
        self.own = self.takes(Ownership::Lasting)?;
        Ok(self.own)
    }

    /// Asks whether the kernel takes this table, and makes nothing. Nothing may have the name.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn try_out(&mut self, family: u8, table: &Table) -> Result<(), Error> {
        let batch = Transaction::new(&mut self.socket).trial(TableName { family, name: TRIAL }, table, Ownership::None);
        self.commit(&batch)
    }

    /// Whether a table can have an owner and go with its socket ([`Lifetime::OfSocket`](table::Lifetime::OfSocket), Linux
    /// 5.12).
    ///
    /// # Errors
    /// The socket failed.
    pub fn can_end_with_socket(&mut self) -> Result<bool, Error> {
        self.takes(Ownership::WithSocket)
    }

    /// Whether the kernel knows tables with such an owner.
    fn takes(&mut self, ownership: Ownership) -> Result<bool, Error> {
        let name = TableName { family: crate::uapi::NFPROTO_INET, name: TRIAL };
        let batch = Transaction::new(&mut self.socket).trial(name, &Table::default(), ownership);
        match self.commit(&batch) {
            Ok(()) => Ok(true),
            // Flags of a table that the kernel does not know: `EINVAL` before Linux 5.13.
            Err(e) if matches!(e.errno(), Some(nix::libc::EOPNOTSUPP | nix::libc::EINVAL)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Whether the socket owns the tables that [`apply`](Self::apply) makes.
    pub fn owns_tables(&self) -> bool {
        self.own
    }

    /// The socket's netlink port, which identifies this program in notifications of changes.
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// Forgets the observed tables, so that the next [`apply`](Self::apply) reads them again.
    pub fn invalidate(&mut self) {
        self.before.append(&mut self.observed);
    }

    /// Whether another program has changed chains or sets of these tables since the last call, and they were
    /// corrected. Changes that were made before this program had read the tables are not noticed.
    pub fn were_changed_by_others(&mut self) -> bool {
        std::mem::take(&mut self.changed_by_others)
    }

    /// Makes the kernel's tables equal to `wanted`, in one transaction. Returns the number of changes.
    ///
    /// # Errors
    pub fn apply(&mut self, wanted: &[(TableName, Table)]) -> Result<usize, Error> {
        let mut tries = 0;
        loop {
            tries += 1;
            let mut read = false;
            for (name, _) in wanted {
                if !self.observed.contains_key(name) {
                    let observed = read::table(&mut self.socket, *name)?;
                    self.must_not_be_anothers(*name, &observed)?;
                    self.changed_by_others |=
                        self.before.remove(name).is_some_and(|before| !observed.is_same_as(&before));
                    self.observed.insert(*name, observed);
                    read = true;
                }
            }
            let updated = match self.update_flags(wanted) {
                Ok(updated) => updated,
                Err(e) => {
                    self.observed.clear();
                    if tries == TRIES {
                        return Err(e);
                    }
                    continue;
                }
            };
            let mut transaction = Transaction::new(&mut self.socket);
            for (name, table) in wanted {
                transaction.table(*name, &self.observed[name], table, Ownership::of(table, self.own));
            }
            let changes = transaction.changes;
            if changes == 0 {
                if read {
                    // Shares the content with the caller instead of copying it.
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

    /// Adopts tables that have lost their owner, and activates tables that another program has made dormant. This is
    /// a separate transaction, because the kernel accepts no base chain together with new flags
    /// (`nf_tables_addchain`). Returns the number of changed tables.
    fn update_flags(&mut self, wanted: &[(TableName, Table)]) -> Result<usize, Error> {
        let others = wanted.iter().filter_map(|(name, table)| {
            let (observed, ownership) = (&self.observed[name], Ownership::of(table, self.own));
            let flags = ownership.flags(observed);
            let differ = observed.exists && observed.flags != flags && ownership.can_be_given(observed);
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
            if let Some(observed) = self.observed.get_mut(name) {
                (observed.flags, observed.owner) = (*flags, *owner);
            }
        }
        Ok(others.len())
    }

    fn now_holds(&mut self, tables: &[(TableName, Table)]) {
        for (name, table) in tables {
            let ownership = Ownership::of(table, self.own);
            let flags = ownership.flags(self.observed.get(name).unwrap_or(&ObservedTable::default()));
            let owner = ownership.owner(self.port());
            self.observed.insert(*name, ObservedTable { flags, owner, ..ObservedTable::from(table) });
        }
    }

    /// Fails if another socket owns the table. The kernel would reject every change without naming the owner.
    fn must_not_be_anothers(&self, name: TableName, observed: &ObservedTable) -> Result<(), Error> {
        match observed.owner.filter(|owner| *owner != self.port()) {
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

    /// Removes tables, and returns how many of them existed.
    ///
    /// # Errors
    /// The kernel rejected a removal, or another socket owns the table.
    pub fn remove(&mut self, names: &[TableName]) -> Result<usize, Error> {
        let mut removed = 0;
        for name in names {
            self.observed.remove(name);
            self.before.remove(name);
            let observed = read::without_content(&mut self.socket, *name)?;
            if !observed.exists {
                continue;
            }
            self.must_not_be_anothers(*name, &observed)?;
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

    /// Reads the names of a table's chains. A table that does not exist has none.
    ///
    /// # Errors
    /// The kernel rejected the request.
    pub fn chains(&mut self, name: TableName) -> Result<Vec<Arc<str>>, Error> {
        Ok(read::table(&mut self.socket, name)?.chains.into_keys().collect())
    }

    /// The hash of each rule of a chain, by the kernel's handle of the rule: as in [`Chain::rules`](table::Chain::rules).
    ///
    /// # Errors
    /// There is no such chain, or the socket failed.
    pub fn rule_hashes(&mut self, name: TableName, chain: &str) -> Result<BTreeMap<u64, u64>, Error> {
        read::handles(&mut self.socket, name, chain)
    }

    /// Reads a table's named counters. A table that does not exist has none.
    ///
    /// # Errors
    /// The kernel rejected the request.
    pub fn counters(&mut self, name: TableName) -> Result<BTreeMap<String, Count>, Error> {
        read::counters(&mut self.socket, name)
    }

    /// Reads the counters of a set's elements.
    ///
    /// # Errors
    /// The kernel rejected the request, or there is no such set (`ENOENT`).
    pub fn element_counters(&mut self, name: TableName, set: &str) -> Result<Vec<(Key, Count)>, Error> {
        let mut all = Vec::new();
        read::elements(&mut self.socket, name, set, |key, count| all.push((*key, count)))?;
        Ok(all)
    }

    /// Reads the elements of a set. The result is empty if there is no such set.
    ///
    /// # Errors
    /// The kernel rejected the request.
    pub fn elements(&mut self, name: TableName, set: &str) -> Result<table::Elements, Error> {
        match read::elements(&mut self.socket, name, set, |_, _| {}) {
            Err(e) if e.errno() == Some(nix::libc::ENOENT) => Ok(table::Elements::default()),
            other => other,
        }
    }

    /// Sends a batch and waits until the kernel has committed or rejected it. The kernel acknowledges only messages
    /// that ask for it, which is the last one before the batch's end. Errors are always reported.
    fn commit(&mut self, batch: &Batch) -> Result<(), Error> {
        // The kernel accepts a batch only as one datagram.
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
                // An error of the whole batch has the sequence number of its beginning, and nothing follows it.
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
