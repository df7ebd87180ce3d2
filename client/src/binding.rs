//! A scope and slice as a daemon knows them: how their blocks are called, and their number in this epoch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kv_block::{BindingId, BindingTag, BlockKey, Epoch, Namer, Scope, ScopeId, SequenceHash, Slice};

/// What a worker's blocks mean. Cheap to clone; it stays valid across restarts of the daemon.
#[derive(Clone, Debug)]
pub struct Binding(Arc<Bound>);

#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) scope: Scope,
    id: ScopeId,
    namer: Namer,
    pub(crate) slice: Slice,
    pub(crate) block_bytes: u32,
    /// Epoch and number together, so that a number is never used in another epoch: `epoch << 16 | number`.
    number: AtomicU64,
}

fn pack(epoch: Epoch, number: BindingId) -> u64 {
    epoch.0 << 16 | u64::from(number.0)
}

impl Binding {
    pub(crate) fn new(scope: Scope, slice: Slice, block_bytes: u32) -> Self {
        let id = scope.id();
        let (namer, number) = (id.namer(&slice), AtomicU64::new(u64::MAX));
        Self(Arc::new(Bound { scope, id, namer, slice, block_bytes, number }))
    }

    pub(crate) fn bound(&self) -> &Arc<Bound> {
        &self.0
    }

    /// Its number, if it was registered in this epoch.
    pub(crate) fn number_in(&self, epoch: Epoch) -> Option<BindingId> {
        self.0.number_in(epoch)
    }

    /// The key of the block of these tokens.
    pub fn key(&self, hash: &SequenceHash) -> BlockKey {
        self.0.namer.key(hash)
    }

    /// The keys of many, several times faster than one by one.
    pub fn keys(&self, hashes: &[SequenceHash]) -> Vec<BlockKey> {
        self.0.namer.keys(hashes)
    }

    /// What the bytes mean.
    pub fn scope(&self) -> &Scope {
        &self.0.scope
    }

    /// Name of the scope.
    pub fn scope_id(&self) -> ScopeId {
        self.0.id
    }

    /// Which part of the tensor they are.
    pub fn slice(&self) -> &Slice {
        &self.0.slice
    }

    /// Length of every block in bytes.
    pub fn block_bytes(&self) -> u32 {
        self.0.block_bytes
    }

    /// What events and disks call it.
    pub fn tag(&self) -> BindingTag {
        self.0.id.binding_tag(&self.0.slice, self.0.block_bytes)
    }
}

impl Bound {
    pub(crate) fn number_in(&self, epoch: Epoch) -> Option<BindingId> {
        let packed = self.number.load(Ordering::Acquire);
        (packed >> 16 == epoch.0 & (u64::MAX >> 16)).then_some(BindingId(packed as u16))
    }

    pub(crate) fn set_number(&self, epoch: Epoch, number: BindingId) {
        self.number.store(pack(epoch, number), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_valid_in_its_epoch_alone() {
        let scope = Scope { model: "m".into(), tenant: "t".into(), ..Scope::default() };
        let binding = Binding::new(scope, Slice::whole(1, 1), 4096);
        assert_eq!(binding.number_in(Epoch(1)), None);
        binding.bound().set_number(Epoch(1), BindingId(7));
        assert_eq!(binding.number_in(Epoch(1)), Some(BindingId(7)));
        assert_eq!(binding.number_in(Epoch(2)), None);
    }
}
