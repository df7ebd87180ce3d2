//! Sessions and what they hold. When a session ends, all of it comes back at once.

use std::collections::{HashMap, HashSet};

use kv_arena::Held;
use kv_block::{BlockKey, LeaseId};

use crate::io::Micros;

/// One connected worker or client.
#[derive(Default)]
pub(crate) struct Session {
    pub(crate) leases: HashMap<LeaseId, Lease>,
    pub(crate) leased_bytes: u64,
    /// Blocks announced and not stored.
    pub(crate) announced: HashSet<BlockKey>,
    pub(crate) puts: u64,
    pub(crate) gets: u64,
}

/// A session's right to one block in host memory. Dropping it gives the block back.
pub(crate) struct Lease {
    pub(crate) held: Held,
    pub(crate) since: Micros,
}

impl Session {
    pub(crate) fn grant(&mut self, lease: LeaseId, held: Held, now: Micros) {
        self.leased_bytes += held.len() as u64;
        self.gets += 1;
        self.leases.insert(lease, Lease { held, since: now });
    }

    /// Whether there was such a lease.
    pub(crate) fn release(&mut self, lease: LeaseId) -> bool {
        let Some(lease) = self.leases.remove(&lease) else { return false };
        self.leased_bytes -= lease.held.len() as u64;
        true
    }
}
