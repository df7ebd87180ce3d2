//! Sessions and what they hold. When a session ends, all of it comes back at once.

use std::collections::{HashMap, HashSet};

use kv_arena::Held;
use kv_block::code::Code;
use kv_block::{BlockKey, Fault, LeaseId};

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
    /// Refuses a lease or an announcement when it has as many of both together as it may.
    pub(crate) fn may_hold_more(&self, max: usize) -> Result<(), Fault> {
        if self.leases.len() + self.announced.len() < max {
            return Ok(());
        }
        let text = format!(
            "the session holds {} leases and {} announcements, as many as it may",
            self.leases.len(),
            self.announced.len()
        );
        Err(Fault::new(Code::TooManyLeases, text))
    }

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
