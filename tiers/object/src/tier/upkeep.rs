//! What this node uses is said, what nobody uses goes: manifests, rounds, deletion, and a look at whole packs.

use std::collections::BTreeMap;

use bytes::Bytes;
use kv_block::BlockKey;

use crate::collect::{Round, deletable, inherits, may_keep, next_round, unheard};
use crate::manifest::{self, Manifest, ManifestName, PackRef};
use crate::pack::{self, PackError, PackId, Tail};
use crate::requests::{Kind, RequestError, attempts};
use crate::store::StoreError;

use super::discover::Newest;
use super::{SetAside, State, Tier, TierError, pack_name};

/// Where it is found out whether a store heeds "if absent".
const PROBES: &str = "probes/";
/// Every so many manifests, all that are older are looked for: some may have stayed when they should have gone.
const LIST_EVERY: u64 = 16;
/// Tails that one manifest holds at most, in bytes. Of other packs each node reads the footer.
const TAILS_BYTES_MAX: usize = 1 << 20;
/// Rounds are listed so many times between two of them at most.
const LOOKS_A_ROUND: u32 = 8;
/// Rounds that stay, so that a list that is late still leads to one.
const ROUNDS_KEPT: u64 = 4;

/// What a collection came to.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Collected {
    /// The round that was written, or would be; 0 when it is too early for one, or another node was first.
    pub round: u64,
    /// Packs that are there.
    pub packs: usize,
    /// Packs that nobody uses; they go in a later round if that stays so.
    pub condemned: usize,
    /// Packs that were deleted, or would be.
    pub deleted: Vec<PackId>,
    /// Length of those in bytes.
    pub deleted_bytes: u64,
    /// Nodes that were silent too long and do not count any more.
    pub dead: Vec<String>,
    /// Live nodes whose manifests could not be read; nothing is condemned then.
    pub unheard: Vec<String>,
}

/// What a look at a whole pack came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verified {
    /// Every byte is what was sealed.
    Sound {
        /// Blocks in it.
        blocks: usize,
    },
    /// It is damaged.
    Damaged {
        /// How.
        error: PackError,
        /// Blocks of it that are not what was sealed; all of them when the pack cannot be read at all.
        blocks: Vec<BlockKey>,
    },
    /// It is of another version, or encrypted.
    Incompatible,
    /// It is not there.
    Absent,
}

/// Whether something was written under a name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wrote {
    Ours,
    Another,
}

impl State {
    /// What the next manifest says of new packs: once more what the one before said, for whoever did not see that.
    fn tails(&mut self) -> Vec<(PackId, Bytes)> {
        let Self { fresh, generation, mine, .. } = self;
        fresh.retain(|(after, id, _)| after + 2 >= *generation && mine.contains_key(id));
        let mut room = TAILS_BYTES_MAX;
        let newest = fresh.iter().rev().take_while(|(_, _, tail)| {
            let fits = tail.len() <= room;
            room -= tail.len().min(room);
            fits
        });
        let mut tails: Vec<_> = newest.map(|(_, id, tail)| (*id, tail.clone())).collect();
        tails.sort_by_key(|(id, _)| *id);
        tails
    }
}

impl Tier {
    /// Writes an object whose name somebody else may take at the same time.
    async fn write_first(&self, name: &str, text: String) -> Result<Wrote, RequestError> {
        let body = Bytes::from(text);
        let deadline = self.upkeep_deadline();
        match attempts!(self.requests, Kind::Put, deadline, self.store.put(name, body.clone())) {
            Ok(()) => {
                self.requests.moved(Kind::Put, body.len() as u64);
                Ok(Wrote::Ours)
            }
            // Another's, or ours by an attempt whose answer was lost. Read again where it may be damaged on its way.
            Err(RequestError::Store(StoreError::Exists)) => {
                for _ in 0..4 {
                    match self.read_object(name, 0, body.len() as u64).await {
                        Ok(found) if found == body => return Ok(Wrote::Ours),
                        Ok(_) | Err(RequestError::Store(StoreError::Short { .. })) => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(Wrote::Another)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the store writes over what is there although it is told not to.
    pub(super) async fn overwrites(&self) -> Result<bool, TierError> {
        let name = format!("{PROBES}{}/{:016x}", self.config.node, self.config.epoch.0);
        let mut overwrites = false;
        for body in ["first", "second"] {
            let (deadline, body) = (self.upkeep_deadline(), Bytes::from(body));
            match attempts!(self.requests, Kind::Put, deadline, self.store.put(&name, body.clone())) {
                Ok(()) => overwrites = body == "second",
                Err(RequestError::Store(StoreError::Exists)) => overwrites = false,
                Err(error) => return Err(error.into()),
            }
        }
        self.delete(&name).await?;
        Ok(overwrites)
    }

    /// Says what this node uses. The manifests before the last one go.
    pub async fn publish(&self) -> Result<(), TierError> {
        let _one_at_a_time = self.publishing.lock().await;
        let (node, epoch) = (self.config.node.clone(), self.config.epoch);
        // A number is never used twice: what became of a manifest that failed is unknown.
        let manifest = self.with(|state| {
            if let Some(found) = state.fenced {
                return Err(TierError::Fenced { epoch, found });
            }
            state.generation += 1;
            state.changed = false;
            let name = ManifestName { node: node.clone(), epoch, generation: state.generation };
            let packs = state.mine.values().copied().collect();
            Ok(Manifest { name, round: state.honoured, packs, tails: state.tails() })
        })?;
        match self.write_first(&manifest.name.object(), manifest.encode()).await {
            Ok(Wrote::Ours) => {}
            // Somebody else lives this life.
            Ok(Wrote::Another) => {
                self.with(|state| state.fenced = Some(epoch));
                return Err(TierError::Fenced { epoch, found: epoch });
            }
            Err(error) => {
                self.with(|state| state.changed = true);
                return Err(error.into());
            }
        }
        let generation = manifest.name.generation;
        // Its own is no news.
        self.with(|state| state.heard.insert(node.clone(), (epoch, generation)));
        if generation > 2 && !generation.is_multiple_of(LIST_EVERY) {
            let old = ManifestName { node, epoch, generation: generation - 2 };
            return Ok(self.delete(&old.object()).await?);
        }
        for object in self.list_all(&format!("{}{node}/", manifest::PREFIX)).await? {
            let old = ManifestName::parse(&object.name).is_some_and(|name| {
                name.epoch < epoch || (name.epoch == epoch && name.generation + 1 < generation)
            });
            if old {
                self.delete(&object.name).await?;
            }
        }
        Ok(())
    }

    pub(super) async fn publish_if_changed(&self) -> Result<(), TierError> {
        if self.with(|state| state.changed) { self.publish().await } else { Ok(()) }
    }

    async fn delete(&self, name: &str) -> Result<(), RequestError> {
        attempts!(self.requests, Kind::Delete, self.upkeep_deadline(), self.store.delete(name))
    }

    /// Decides about every pack that the newest round condemned, and drops what has expired at `now`.
    pub(super) async fn honour(&self, now: u32) -> Result<(), TierError> {
        let clock = self.requests.now();
        // Rounds are seldom: to hear of one a little later holds up nothing but deletion.
        let looked = self.with(|state| state.round_looked);
        let newest = if looked.is_some_and(|at| clock < at + self.config.round_min / LOOKS_A_ROUND) {
            Newest::None
        } else {
            let newest = self.newest_round().await?;
            self.with(|state| state.round_looked = Some(clock));
            newest
        };
        self.with(|state| {
            let known = state.index.packs().map(|pack| (pack.id, pack.expires_at));
            let packs = known.chain(state.mine.values().map(|pack| (pack.id, pack.expires_at)));
            let gone = packs.filter(|(_, expires_at)| *expires_at != 0 && *expires_at <= now);
            for (id, _) in gone.collect::<Vec<_>>() {
                state.forget(&id);
            }
            let round = match newest {
                Newest::Known(round) if round.number > state.honoured => round,
                _ => return Ok(()),
            };
            if round.is_dead(&self.config.node, self.config.epoch) {
                let found = round.dead[&self.config.node];
                state.fenced = Some(found);
                return Err(TierError::Fenced { epoch: self.config.epoch, found });
            }
            for (id, since) in &round.condemned {
                // What is read here is worth keeping, whoever wrote it.
                let inherited = state.index.pack(id).is_some_and(|pack| {
                    inherits(&round, &self.config.node, id, &pack.writer.node, pack.expires_at, now)
                });
                let used = inherited || state.mine.contains_key(id) || state.touched.contains(id);
                match state.index.pack(id).map(PackRef::of).or_else(|| state.mine.get(id).copied()) {
                    Some(pack) if used && may_keep(&round, state.honoured, id) => {
                        state.mine.insert(*id, pack);
                    }
                    // It may have been written only just: its writer lists it before the next round, or it goes then.
                    Some(_) if *since == round.number => {}
                    _ => {
                        state.forget(id);
                    }
                }
            }
            state.touched.clear();
            state.honoured = round.number;
            state.round_since = clock;
            state.round = Some(round);
            state.changed = true;
            Ok(())
        })
    }

    /// Does not use a pack any more. When no other node does either, collection deletes it.
    pub fn release(&self, id: &PackId) -> Result<(), TierError> {
        self.with(|state| {
            if state.index.pack(id).is_none() && !state.mine.contains_key(id) {
                return Err(TierError::Unknown { id: *id });
            }
            state.forget(id);
            Ok(())
        })
    }

    /// Writes the next round of collection and deletes what it allows. Any node may, all may; too early it does
    /// nothing. `dry_run` writes and deletes nothing, and does not wait. See [`crate::collect`].
    pub async fn collect(&self, dry_run: bool) -> Result<Collected, TierError> {
        if self.with(|state| state.overwrites) {
            return Err(TierError::Overwrites);
        }
        // A round that this node has just heard of begins now, by its own clock.
        let last = match self.newest_round().await? {
            Newest::Known(round) => Some(round),
            Newest::None => None,
            Newest::Unreadable(number) => return Err(TierError::Round { number }),
        };
        let now = self.requests.now();
        let early = self.with(|state| {
            let heard = state.round.as_ref().map_or(0, |round| round.number);
            let newer = last.as_ref().is_some_and(|round| round.number > heard);
            newer || now.saturating_sub(state.round_since) < self.config.round_min
        });
        if early && !dry_run {
            return Ok(Collected::default());
        }
        let listed = self.list_packs().await?;
        let packs = listed.keys().copied().collect();
        // After the packs: a pack that is listed and in no manifest is not one that was only just written and said.
        let manifests = self.newest_manifests(&BTreeMap::new()).await?;
        let round = next_round(last.as_ref(), self.config.grace, &packs, &manifests);
        let deleted = deletable(&round, &manifests);
        let unheard = unheard(&round, &manifests);
        self.with(|state| state.unheard.clone_from(&unheard));
        let was_dead = |node: &String| last.as_ref().is_some_and(|last| last.dead.contains_key(node));
        let collected = Collected {
            round: round.number,
            packs: packs.len(),
            condemned: round.condemned.len(),
            deleted_bytes: deleted.iter().filter_map(|id| listed.get(id)).sum(),
            deleted,
            dead: round.dead.keys().filter(|node| !was_dead(node)).cloned().collect(),
            unheard,
        };
        if dry_run {
            return Ok(collected);
        }
        if self.write_first(&Round::object(round.number), round.encode()).await? == Wrote::Another {
            return Ok(Collected::default());
        }
        for id in &collected.deleted {
            self.delete(&pack_name(id)).await?;
        }
        self.sweep(&round).await?;
        Ok(collected)
    }

    /// Deletes manifests of the dead and rounds that are over.
    async fn sweep(&self, round: &Round) -> Result<(), TierError> {
        for node in round.dead.keys() {
            for object in self.list_all(&format!("{}{node}/", manifest::PREFIX)).await? {
                let dead = |name: ManifestName| round.is_dead(node, name.epoch);
                if ManifestName::parse(&object.name).is_some_and(dead) {
                    self.delete(&object.name).await?;
                }
            }
        }
        for object in self.list_all(crate::collect::PREFIX).await? {
            if Round::number_of(&object.name).is_some_and(|number| number + ROUNDS_KEPT <= round.number) {
                self.delete(&object.name).await?;
            }
        }
        Ok(())
    }

    /// Whether a pack that this node wrote is there as it was written. One that is not goes: nobody knows of it yet.
    pub(super) async fn is_whole(&self, id: &PackId, bytes: u64) -> bool {
        let mut damaged = false;
        // Twice: damage on the way is not damage of the pack.
        for _ in 0..2 {
            damaged = match self.read_object(&pack_name(id), 0, bytes).await {
                Ok(body) if pack::parse(id, &body).is_ok() => return true,
                Ok(_) | Err(RequestError::Store(StoreError::Short { .. })) => true,
                Err(_) => return false,
            };
        }
        if damaged {
            // If that fails too, a round will find that nobody lists it.
            let _ = self.delete(&pack_name(id)).await;
        }
        false
    }

    /// Reads a whole pack and compares every checksum in it. What is damaged is not found any more here; a pack whose
    /// frame is, is set aside as a whole.
    pub async fn verify(&self, id: &PackId) -> Result<Verified, TierError> {
        let known = self.with(|state| state.index.pack(id).cloned());
        let bytes = match known.as_ref().map(|known| known.pack_bytes) {
            Some(bytes) => bytes,
            None => {
                let name = pack_name(id);
                match attempts!(self.requests, Kind::Head, self.upkeep_deadline(), self.store.head(&name)) {
                    Ok(bytes) => bytes,
                    Err(RequestError::Store(StoreError::Absent)) => return Ok(self.absent(id)),
                    Err(error) => return Err(error.into()),
                }
            }
        };
        let mut verified = Verified::Absent;
        // Twice: damage on the way is not damage of the pack.
        for _ in 0..2 {
            let body = match self.read_object(&pack_name(id), 0, bytes).await {
                Ok(body) => body,
                Err(RequestError::Store(StoreError::Absent)) => return Ok(self.absent(id)),
                Err(RequestError::Store(StoreError::Short { bytes: found, wanted })) => {
                    let blocks = known.iter().flat_map(|known| known.records().map(|record| record.key));
                    let error = PackError::Length { found, wanted };
                    return Ok(Verified::Damaged { error, blocks: blocks.collect() });
                }
                Err(error) => return Err(error.into()),
            };
            verified = match pack::parse(id, &body) {
                Ok(Tail::Whole(footer)) => return Ok(Verified::Sound { blocks: footer.entries.len() }),
                // The whole of it was there.
                Ok(Tail::Incompatible { .. } | Tail::More { .. }) => return Ok(Verified::Incompatible),
                Err(error) => Verified::Damaged { error, blocks: self.damaged_blocks(id, &body) },
            };
        }
        // Its blocks are what they were, and what holds them together is not: the next life of a node could read none.
        if let Verified::Damaged { error, blocks } = &verified
            && blocks.is_empty()
        {
            let why = SetAside::Broken { why: error.to_string() };
            self.with(|state| {
                if state.forget(id) {
                    state.set_aside.insert(*id, (bytes, why));
                }
            });
        }
        Ok(verified)
    }

    /// A pack is gone, and not known any more.
    fn absent(&self, id: &PackId) -> Verified {
        self.with(|state| state.forget(id));
        Verified::Absent
    }

    /// The blocks of a pack that `body` does not have as they were sealed, as far as the index knows them.
    fn damaged_blocks(&self, id: &PackId, body: &[u8]) -> Vec<BlockKey> {
        self.with(|state| {
            let Some(known) = state.index.pack(id) else { return Vec::new() };
            let mut offset = pack::HEADER_BYTES;
            let mut damaged = Vec::new();
            for (place, record) in known.records().enumerate() {
                let content = body.get(offset..offset + record.bytes as usize);
                if !content.is_some_and(|content| record.checksum.matches(&record.key, content)) {
                    damaged.push((place as u32, record.key));
                }
                offset += record.bytes as usize;
            }
            for (place, _) in &damaged {
                state.index.spoil(id, *place);
            }
            damaged.into_iter().map(|(_, key)| key).collect()
        })
    }
}
