//! Which packs there are, for people: those that can be read, and the others with the reason.

use std::ops::RangeInclusive;
use std::sync::Arc;

use kv_block::BlockKey;

use crate::index::Known;
use crate::pack::{Binding, PackId, Writer};

use super::{SetAside, State, Tier, find_in};

/// A pack that is in the store, as far as this node knows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackView {
    /// Its name.
    pub id: PackId,
    /// Its length in bytes.
    pub pack_bytes: u64,
    /// Whether this node's manifest lists it.
    pub listed: bool,
    /// What is in it.
    pub inside: Inside,
}

/// What is known of a pack's blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Inside {
    /// It can be read.
    Blocks {
        /// Who wrote it.
        writer: Writer,
        /// How many blocks.
        blocks: usize,
        /// Of those: found damaged, and not served any more.
        spoilt: u32,
        /// Unix time in seconds after which no block of it counts; 0 when some never expire.
        expires_at: u32,
        /// What they were stored under.
        bindings: Arc<[Binding]>,
    },
    /// It cannot be used, and why.
    Aside(SetAside),
    /// Its footer has not been read.
    Unread,
}

impl Inside {
    fn of(known: &Known) -> Self {
        Self::Blocks {
            writer: known.writer.clone(),
            blocks: known.blocks(),
            spoilt: known.spoilt(),
            expires_at: known.expires_at,
            bindings: Arc::clone(&known.bindings),
        }
    }
}

impl State {
    fn view(&self, id: PackId) -> Option<PackView> {
        let listed = self.mine.contains_key(&id);
        let view = |pack_bytes, inside| Some(PackView { id, pack_bytes, listed, inside });
        if let Some(known) = self.index.pack(&id) {
            return view(known.pack_bytes, Inside::of(known));
        }
        if let Some((bytes, why)) = self.set_aside.get(&id) {
            return view(*bytes, Inside::Aside(why.clone()));
        }
        view(self.unread.get(&id)?.0, Inside::Unread)
    }
}

impl Tier {
    /// The first `count` packs whose names are in this range, in the order of their names.
    pub fn inventory(&self, ids: RangeInclusive<PackId>, count: usize) -> Vec<PackView> {
        self.with(|state| {
            let known = state.index.packs().map(|pack| &pack.id);
            let all = known.chain(state.set_aside.keys()).chain(state.unread.keys());
            let mut found: Vec<PackId> = all.filter(|id| ids.contains(id)).copied().collect();
            found.sort_unstable();
            found.dedup();
            found.into_iter().take(count).filter_map(|id| state.view(id)).collect()
        })
    }

    /// A pack that can be read, with its blocks.
    pub fn pack(&self, id: &PackId) -> Option<Known> {
        self.with(|state| state.index.pack(id).cloned())
    }

    /// The pack that a block would be read from at `now`, Unix time in seconds.
    pub fn pack_of(&self, now: u32, key: &BlockKey) -> Option<PackId> {
        self.with(|state| find_in(&state.index, key, now).ok().map(|found| found.pack))
    }
}
