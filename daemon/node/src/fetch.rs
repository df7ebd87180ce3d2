//! Blocks that are not here and that a peer may have, or the object tier.
//!
//! ```text
//!   acquire, prefetch -> not here -> Find -> Offered{record} -> [known binding, room] -> Into -> Landed -> visible
//!                                    ^    |            '--[unknown]--> Decline: the next Offered, or Missed
//!                                    |    -> Missed: no peer has it, none can be reached, none in time
//!                                    '---------' once more, in the object tier
//! ```
//! Which peer, by which path, and what to do when one fails is decided outside ([`FetchOp`]); the brain says what is
//! wanted, finds room, and does not believe a record whose scope, slice and length it does not know. A search has a
//! time limit of its own: whoever waits may leave earlier. A worker that stores the block meanwhile ends the search,
//! and whoever waited gets the worker's block.

use kv_arena::Slot;
use kv_block::{BindingId, BlockKey, MissReason, Record, Tier};

use crate::brain::{Brain, Out, Pending, Source, Stalled, Waiter};
use crate::io::{Command, FetchDone, FetchFrom, FetchOp, FetchToken, Now, OfferToken, PeerId, Reach};
use crate::room::NoRoom;

/// A search in what lies beyond this node.
pub(crate) struct Fetching {
    key: BlockKey,
    /// Where.
    from: FetchFrom,
    /// Why the block is not here; what whoever waits is told when nobody there has it either.
    why: MissReason,
    stage: Stage,
}

enum Stage {
    /// It is looked for.
    Searching,
    /// It can be read, and waits for room.
    Offered(OfferToken, Record, BindingId),
    /// Its bytes are on their way.
    Reading(Record, BindingId),
}

/// What a block was served from.
#[derive(Clone, Copy)]
pub(crate) enum Served {
    By(Tier),
    Peer,
}

impl From<FetchFrom> for Served {
    fn from(from: FetchFrom) -> Self {
        match from {
            FetchFrom::Peers => Self::Peer,
            FetchFrom::Object => Self::By(Tier::Object),
        }
    }
}

impl Served {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::By(tier) => tier.name(),
            Self::Peer => "peer",
        }
    }

    pub(crate) fn tier(self) -> Tier {
        match self {
            Self::By(tier) => tier,
            Self::Peer => Tier::Host,
        }
    }
}

impl Brain {
    /// Starts to look for a block beyond this node. On success it is pending; otherwise, why it cannot be had.
    pub(crate) fn fetch(
        &mut self,
        now: Now,
        key: BlockKey,
        why: MissReason,
        reach: Reach,
        out: &mut Out,
    ) -> Result<(), MissReason> {
        let (from, hint) = match reach {
            Reach::Further { hint } if self.config.peers => (FetchFrom::Peers, hint),
            Reach::Further { .. } | Reach::Object if self.config.object.is_some() => {
                (FetchFrom::Object, None)
            }
            Reach::Here | Reach::Further { .. } | Reach::Object => return Err(why),
        };
        if self.fetches.len() >= self.config.fetches_max {
            return Err(MissReason::Overloaded);
        }
        let fetch = self.search(now, key, why, (from, hint), out);
        self.pending.insert(key, Pending::from(Source::Fetching { fetch }));
        Ok(())
    }

    fn search(
        &mut self,
        now: Now,
        key: BlockKey,
        why: MissReason,
        (from, hint): (FetchFrom, Option<PeerId>),
        out: &mut Out,
    ) -> FetchToken {
        let fetch = FetchToken(self.number());
        self.fetches.insert(fetch, Fetching { key, from, why, stage: Stage::Searching });
        let object_limit_ms = self.config.object.as_ref().map_or(0, |object| object.fetch_limit_ms);
        let deadline = now.micros.plus_ms(match from {
            FetchFrom::Peers => self.config.fetch_limit_ms,
            FetchFrom::Object => object_limit_ms,
        });
        out.push(Command::Fetch(from, FetchOp::Find { fetch, key, hint, deadline }));
        fetch
    }

    /// No peer gives the block: the object tier may have it. Says whether that is asked now.
    fn search_on(&mut self, now: Now, fetch: FetchToken, reason: MissReason, out: &mut Out) -> bool {
        let of_peers = self.fetches.get(&fetch).filter(|fetching| fetching.from == FetchFrom::Peers);
        let (Some(fetching), true) = (of_peers, self.config.object.is_some()) else { return false };
        let (key, before) = (fetching.key, &fetching.stage);
        if let Stage::Reading(_, binding) = *before {
            self.came(binding);
        }
        self.fetches.remove(&fetch);
        let next = self.search(now, key, reason, (FetchFrom::Object, None), out);
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.source = Source::Fetching { fetch: next };
        }
        true
    }

    pub(crate) fn fetch_done(&mut self, now: Now, done: FetchDone, out: &mut Out) {
        match done {
            FetchDone::Offered { fetch, offer, record, ttl_s } => {
                let expires_at = if ttl_s == 0 { 0 } else { now.unix.saturating_add(ttl_s) };
                self.offered(now, fetch, offer, Record { expires_at, ..record }, out);
            }
            FetchDone::Landed { fetch, into } => self.fetched(now, fetch, into, out),
            FetchDone::Missed { fetch, reason } => {
                let Some(fetching) = self.fetches.get(&fetch) else { return };
                let unknown = reason == MissReason::NeverStored;
                let reason = if unknown { fetching.why } else { reason };
                if !self.search_on(now, fetch, reason, out) {
                    self.fetch_failed(now, fetch, reason, out);
                }
                // A slot that it had is free.
                self.retry_stalled(now, out);
            }
        }
    }

    fn offered(&mut self, now: Now, fetch: FetchToken, offer: OfferToken, record: Record, out: &mut Out) {
        let Some(fetching) = self.fetches.get_mut(&fetch) else {
            // Overtaken: whoever stored the block said so already.
            return;
        };
        let from = fetching.from;
        let known = self.by_tag.get(&record.tag).copied().filter(|binding| {
            let bound = self.bindings.get(usize::from(binding.0)).and_then(Option::as_ref);
            bound.is_some_and(|bound| bound.block_bytes == record.bytes)
        });
        let known = known.filter(|_| record.key == fetching.key);
        let next = known.map(|binding| Stage::Offered(offer, record, binding));
        let before = std::mem::replace(&mut fetching.stage, next.unwrap_or(Stage::Searching));
        if let Stage::Reading(_, binding) = before {
            // It did not arrive from one peer, and another one has it. The first slot is free again, or will be.
            self.came(binding);
        }
        if known.is_none() {
            let reason = MissReason::ScopeDiffers;
            return out.push(Command::Fetch(from, FetchOp::Decline { fetch, offer, reason }));
        }
        let queue = self.stalled.contains_key(&record.bytes);
        match if queue { Err(None) } else { self.try_take_in(now, fetch, out) } {
            Ok(()) => {}
            Err(Some(reason)) => self.fetch_refused(now, fetch, reason, out),
            Err(None) if self.stalled_len() >= self.config.stalled_max => {
                self.fetch_refused(now, fetch, MissReason::Overloaded, out);
            }
            Err(None) => self.stalled.entry(record.bytes).or_default().push_back(Stalled::Fetch { fetch }),
        }
    }

    /// Finds a slot and has the block read into it. `Err(None)` when it has to wait for room, else why it cannot be.
    pub(crate) fn try_take_in(
        &mut self,
        now: Now,
        fetch: FetchToken,
        out: &mut Out,
    ) -> Result<(), Option<MissReason>> {
        let Some(Fetching { from, stage: Stage::Offered(offer, record, binding), .. }) =
            self.fetches.get(&fetch)
        else {
            // It ended while it waited.
            return Ok(());
        };
        let (from, offer, record, binding) = (*from, *offer, *record, *binding);
        match self.room(now, record.bytes, self.tenant_of(binding), out) {
            Ok(into) => {
                self.coming(binding);
                if let Some(fetching) = self.fetches.get_mut(&fetch) {
                    fetching.stage = Stage::Reading(record, binding);
                }
                out.push(Command::Fetch(from, FetchOp::Into { fetch, offer, into }));
                Ok(())
            }
            Err(NoRoom::Soon) => Err(None),
            Err(NoRoom::Quota) => Err(Some(MissReason::Quota)),
            Err(_) => Err(Some(MissReason::Overloaded)),
        }
    }

    fn fetched(&mut self, now: Now, fetch: FetchToken, into: Slot, out: &mut Out) {
        let reading = match self.fetches.get(&fetch) {
            Some(Fetching { key, from, stage: Stage::Reading(record, binding), .. }) => {
                Some((*key, *from, *record, *binding))
            }
            // It ended outside in a way that it cannot have from here: so it does here.
            Some(_) => {
                tracing::error!("a block came that nobody was told to send");
                self.fetch_failed(now, fetch, MissReason::PathFailed, out);
                None
            }
            // Overtaken.
            None => None,
        };
        let Some((key, from, record, binding)) = reading else {
            // The slot is free again.
            drop(into);
            return self.retry_stalled(now, out);
        };
        self.fetches.remove(&fetch);
        self.came(binding);
        let block = into.seal(&record);
        let place = (block.id(), block.generation());
        match self.catalog.publish_host(&record, binding, place) {
            Ok(published) => {
                self.count_fetched(from, record.bytes);
                if from == FetchFrom::Object {
                    self.uploads.came(&key);
                }
                self.entered_host(&block, binding, published.returning);
                let puts = self.arrived(now, &key, &block, from.into(), out);
                drop(block);
                self.retry_puts(now, puts, out);
                self.free_ahead(now, out);
            }
            Err(why) => {
                tracing::error!(%key, %why, "a block that came from elsewhere did not enter the catalog");
                drop(block);
                self.host.retire(place.0, place.1);
                self.sweep_wanted = true;
                self.no_fetch(now, &key, MissReason::Overloaded, out);
                self.retry_stalled(now, out);
            }
        }
    }

    fn count_fetched(&mut self, from: FetchFrom, bytes: u32) {
        let counters = &mut self.counters;
        let (blocks, total) = match from {
            FetchFrom::Peers => (&mut counters.fetch_blocks, &mut counters.fetch_bytes),
            FetchFrom::Object => (&mut counters.download_blocks, &mut counters.download_bytes),
        };
        *blocks += 1;
        *total += u64::from(bytes);
    }

    /// The search is given up from this side.
    pub(crate) fn fetch_refused(&mut self, now: Now, fetch: FetchToken, reason: MissReason, out: &mut Out) {
        if let Some(fetching) = self.fetches.get(&fetch) {
            out.push(Command::Fetch(fetching.from, FetchOp::Leave { fetch }));
        }
        self.fetch_failed(now, fetch, reason, out);
    }

    fn fetch_failed(&mut self, now: Now, fetch: FetchToken, reason: MissReason, out: &mut Out) {
        let Some(fetching) = self.fetches.remove(&fetch) else { return };
        if let Stage::Reading(_, binding) = fetching.stage {
            self.came(binding);
        }
        self.no_fetch(now, &fetching.key, reason, out);
    }

    /// Whoever waited for a block from elsewhere misses.
    fn no_fetch(&mut self, now: Now, key: &BlockKey, reason: MissReason, out: &mut Out) {
        let Some(pending) = self.pending.remove(key) else { return };
        for waiter in pending.waiters {
            self.cancel(waiter.timer);
            self.miss(waiter.from, key, reason, out);
        }
        self.retry_puts(now, pending.puts, out);
    }

    /// Somebody here stores the block: the search for it ends. Gives whoever waited for it.
    pub(crate) fn overtake_fetch(&mut self, key: &BlockKey, out: &mut Out) -> Vec<Waiter> {
        let Some(pending) = self.pending.get_mut(key) else { return Vec::new() };
        let Source::Fetching { fetch } = pending.source else { return Vec::new() };
        let waiters = std::mem::take(&mut pending.waiters);
        if let Some(fetching) = self.fetches.remove(&fetch) {
            if let Stage::Reading(_, binding) = fetching.stage {
                self.came(binding);
            }
            out.push(Command::Fetch(fetching.from, FetchOp::Leave { fetch }));
        }
        waiters
    }
}
