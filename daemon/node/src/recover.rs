//! The state that is left after a restart: blocks in host memory that an earlier life sealed, and what the
//! disk tier's index names.
//!
//! Nothing is trusted: host blocks are adopted unverified and summed before their first use, disk blocks are
//! summed when they are read. Of two disk copies the store has picked the newer already.

use kv_block::{BindingId, DiskLocation, Record};

use crate::brain::Brain;
use crate::io::{Binding, Keep, Now};

/// Gives the binding of a record, making one known if need be; `None` when no number is left for it.
type Bind<'a> = &'a mut dyn FnMut(&Record) -> Option<Binding>;

impl Brain {
    /// Enters the blocks that the arena adopted and `bind` has a binding for. Gives the number of blocks taken
    /// over.
    pub fn recover_host(&mut self, now: Now, bind: Bind<'_>) -> u64 {
        let mut taken = 0;
        for (slot, generation, record) in self.host.adopted() {
            let expired = record.expires_at != 0 && record.expires_at <= now.unix;
            let binding = if expired { None } else { self.binding_of(&record, bind) };
            let entered = binding.filter(|binding| {
                self.bytes_of(*binding) == record.bytes
                    && self.catalog.find(&record.key).is_none()
                    && self.catalog.publish_host(&record, *binding, (slot, generation)).is_ok()
            });
            let held = self.host.hold(slot, generation);
            match (held, entered) {
                (Some(held), Some(binding)) => {
                    self.entered_host(&held, binding, true);
                    self.unverified.push_back((slot, generation));
                    taken += 1;
                }
                (held, _) => {
                    drop(held);
                    self.host.retire(slot, generation);
                }
            }
        }
        taken
    }

    /// Enters blocks that the disk tier's index names. Gives the number of blocks taken over.
    pub fn recover_disk(&mut self, now: Now, found: &[(Record, DiskLocation)], bind: Bind<'_>) -> u64 {
        let mut taken = 0;
        for (record, at) in found {
            if record.expires_at != 0 && record.expires_at <= now.unix {
                continue;
            }
            let Some(binding) = self.binding_of(record, bind) else { continue };
            if self.bytes_of(binding) != record.bytes {
                continue;
            }
            if self.catalog.recover_disk(record, binding, *at).is_ok() {
                self.entered_disk(&record.key, binding);
                // The copy in host memory may have been sealed with an earlier end.
                let keep = Keep { priority: record.priority, expires_at: record.expires_at };
                self.keep_longer(&record.key, keep);
                taken += 1;
            }
        }
        taken
    }

    fn binding_of(&mut self, record: &Record, bind: Bind<'_>) -> Option<BindingId> {
        if let Some(binding) = self.by_tag.get(&record.tag) {
            return Some(*binding);
        }
        let binding = bind(record)?;
        self.bind(&binding);
        Some(binding.id)
    }
}
