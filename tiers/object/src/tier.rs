//! The object tier: blocks of this node and of all others, in packs on any store.
//!
//! ```text
//!  put --> packer --full or old--> encode --> Put packs/<id> --> index          here
//!  find -> index                   read ----> spans --> Get ranges --> every checksum --> the caller's slots
//!  open, refresh: manifests and rounds of everybody, footers of packs not known yet      tier/discover.rs
//!  publish, collect: what this node uses; what nobody uses any more                      tier/upkeep.rs
//!  inventory: which packs there are, for people                                           tier/inventory.rs
//! ```
//! Nothing runs by itself: the owner calls [`Tier::flush`] when [`Tier::due_in`] says so, [`Tier::refresh`] every few
//! seconds and [`Tier::collect`] now and then. All of it can be called at any time from any task, and a future may be
//! dropped: what became of a write is unknown then, nothing else. Unix time comes from the caller and decides about
//! expiry alone; a wrong clock makes blocks miss early or late, and never deletes what another node uses.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use kv_block::{BlockKey, Epoch, MissReason, Record};
use tokio::time::Instant;

use crate::collect::{GRACE, Round};
use crate::index::{Expired, Found, Index, Known};
use crate::join::join_all;
use crate::landing::Landing;
use crate::manifest::PackRef;
use crate::pack::{Binding, PackId, TRAILER_BYTES, Writer, is_node};
use crate::packer::{Batch, Packer, PackerLimits, Waiting};
use crate::reach::{self, ReachLimits};
use crate::requests::{Kind, RequestError, RequestLimits, RequestReport, Requests, attempts};
use crate::store::{Store, StoreError};

mod discover;
mod inventory;
mod upkeep;

pub use discover::Opened;
pub use inventory::{Inside, PackView};
pub use upkeep::{Collected, Verified};

/// Where packs lie.
pub const PACKS: &str = "packs/";

/// What a tier is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TierConfig {
    /// Name of this node; see [`is_node`].
    pub node: String,
    /// This life of the node: higher than every one before.
    pub epoch: Epoch,
    /// Spreads what many nodes do.
    pub seed: u64,
    /// When packs are made.
    pub packer: PackerLimits,
    /// How far reads reach.
    pub reach: ReachLimits,
    /// How the store is asked.
    pub requests: RequestLimits,
    /// Blocks that would live longer expire after so many seconds; `None`: they live as long as they say.
    pub ttl_s: Option<u32>,
    /// Rounds of grace; see [`crate::collect`]. The same for all nodes.
    pub grace: u64,
    /// Time from one round to the next at least.
    pub round_min: Duration,
    /// What is read of a pack's tail when the length of its footer is not known, in bytes.
    pub tail_bytes: u64,
    /// Blocks that are known at one moment, of all packs; what others wrote beyond that is not read.
    pub blocks_max: usize,
    /// Longest time of one write, and of each request of what nobody waits for.
    pub upkeep_max: Duration,
}

impl TierConfig {
    /// The defaults for this life of a node: a grace of 3 rounds of 10 minutes, tails of 64 KiB, 4 Mi blocks,
    /// 2 minutes.
    pub fn new(node: impl Into<String>, epoch: Epoch) -> Self {
        Self {
            node: node.into(),
            epoch,
            seed: epoch.0,
            packer: PackerLimits::default(),
            reach: ReachLimits::default(),
            requests: RequestLimits::default(),
            ttl_s: None,
            grace: GRACE,
            round_min: Duration::from_secs(600),
            tail_bytes: 64 << 10,
            blocks_max: 1 << 22,
            upkeep_max: Duration::from_secs(120),
        }
    }
}

/// Why something of the tier was not done.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TierError {
    /// The store did not do it.
    #[error("the object store: {0}")]
    Request(#[from] RequestError),
    /// This life of the node is over: another one has begun, or it was silent too long. Open again with a higher epoch.
    #[error("epoch {epoch} of this node is over; the object store knows of {found}")]
    Fenced {
        /// This life.
        epoch: Epoch,
        /// The one that counts, or up to which none does.
        found: Epoch,
    },
    /// The configuration is wrong.
    #[error("`{node}` is no name for a node")]
    Node {
        /// What was given.
        node: String,
    },
    /// The newest round of collection is damaged or of another version; until it is removed, nothing is collected.
    #[error("round {number} of collection cannot be read")]
    Round {
        /// Which.
        number: u64,
    },
    /// The store writes over what is there, whatever it is told: of two collectors both would think that they were first.
    #[error("the store does not honour `If-None-Match: *`; nothing is collected there")]
    Overwrites,
    /// There is no such pack.
    #[error("pack {id} is not known")]
    Unknown {
        /// What was asked for.
        id: PackId,
    },
}

impl From<StoreError> for TierError {
    fn from(error: StoreError) -> Self {
        Self::Request(error.into())
    }
}

/// A block to be stored.
#[derive(Clone, Debug)]
pub struct Offer {
    /// What it was stored under; its tag is the record's.
    pub binding: Arc<Binding>,
    /// What it is.
    pub record: Record,
    /// The block before it in its prefix, if that is known: they will lie behind each other.
    pub parent: Option<BlockKey>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What became of blocks that were to be stored. A block that is nowhere in here waits to be packed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stored {
    /// They are in the store now, of this call or an earlier one.
    pub landed: Vec<BlockKey>,
    /// They were there, or wait already.
    pub known: Vec<BlockKey>,
    /// The store did not take them, and nobody has them any more. They may be offered again.
    pub lost: Vec<BlockKey>,
    /// Too much waits already, or the block contradicts its record.
    pub refused: Vec<BlockKey>,
}

/// Packs that are full and not written yet.
#[must_use = "they wait to be written"]
pub struct Full(Vec<Batch>);

impl Full {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A block to be read.
#[derive(Debug)]
pub struct Want<'a> {
    /// Which.
    pub key: BlockKey,
    /// Where its bytes go: at least as many as it has. Written to even when the read ends as a miss.
    pub into: &'a mut [u8],
}

/// What became of a read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Got {
    /// Every byte is there and was checked.
    Read(Record),
    /// It is not to be had, and why.
    Missed(MissReason),
    /// The slot is too short for it.
    TooLong {
        /// Length of the block in bytes.
        bytes: u32,
    },
}

/// Why a pack is known and not used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SetAside {
    /// Another version wrote it, or it is encrypted.
    Incompatible {
        /// The version of its format.
        version: u32,
    },
    /// It is damaged.
    Broken {
        /// How.
        why: String,
    },
}

/// How the tier does.
#[derive(Clone, Debug)]
pub struct TierReport {
    /// Which store.
    pub store: String,
    /// Packs that can be read.
    pub packs: usize,
    /// Length of those packs in bytes.
    pub pack_bytes: u64,
    /// Blocks that can be found.
    pub blocks: usize,
    /// Packs that this node's manifest lists.
    pub packs_listed: usize,
    /// Packs whose footers have not been read yet, or will not be: see [`TierConfig::blocks_max`].
    pub packs_unread: usize,
    /// Packs that are not used, and why.
    pub set_aside: BTreeMap<PackId, SetAside>,
    /// Bytes of blocks that wait to be packed.
    pub waiting_bytes: u64,
    /// Bytes of blocks that are being written.
    pub writing_bytes: u64,
    /// The newest round of collection that this node honours.
    pub round: u64,
    /// A round that cannot be read: nothing is collected until it is removed.
    pub round_unreadable: Option<u64>,
    /// Live nodes whose manifests could not be read when this node last wrote a round: nothing was condemned.
    pub unheard: Vec<String>,
    /// Why the last pack was not written; `None` when it was.
    pub write_trouble: Option<String>,
    /// The store writes over what is there, whatever it is told: nothing is collected.
    pub overwrites: bool,
    /// How the store is asked, and answers.
    pub requests: RequestReport,
    /// What was done so far.
    pub totals: Totals,
}

/// Counts since the tier was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Packs written.
    pub packs_written: u64,
    /// Blocks in them.
    pub blocks_written: u64,
    /// Blocks that the store did not take.
    pub blocks_lost: u64,
    /// Blocks read and found right.
    pub blocks_read: u64,
    /// Bytes of those.
    pub bytes_used: u64,
    /// Bytes read of blocks, with what lay between them and what was read again.
    pub bytes_read: u64,
    /// Requests that read blocks, without retries.
    pub reads: u64,
    /// Times that a block's bytes were not its own. None of them was served.
    pub checksum_failures: u64,
    /// Packs that were gone although a block of them was to be read.
    pub packs_gone: u64,
}

/// The object tier.
pub struct Tier {
    store: Arc<dyn Store>,
    config: TierConfig,
    requests: Requests,
    state: Mutex<State>,
    /// One manifest at a time.
    publishing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    index: Index,
    packer: Option<Packer>,
    /// Blocks that wait to be packed or are being written.
    waiting: HashSet<BlockKey>,
    writing_bytes: u64,
    /// What the next manifest lists.
    mine: BTreeMap<PackId, PackRef>,
    /// What it lists differs from the last one.
    changed: bool,
    /// Tails of packs that were written lately, and after which manifest: the next two hold them.
    fresh: Vec<(u64, PackId, Bytes)>,
    sequence: u64,
    generation: u64,
    /// The round that the last manifest honoured.
    honoured: u64,
    /// The newest round that is known, and since when.
    round: Option<Round>,
    round_since: Duration,
    /// When rounds were listed last.
    round_looked: Option<Duration>,
    round_unreadable: Option<u64>,
    /// Nodes that the last round here could not hear.
    unheard: Vec<String>,
    /// Why the last pack was not written.
    write_trouble: Option<String>,
    /// The store writes over what is there.
    overwrites: bool,
    /// Packs that were read from since the last round.
    touched: BTreeSet<PackId>,
    /// The newest manifest read of each node.
    heard: BTreeMap<String, (Epoch, u64)>,
    /// Packs that are there and not known yet: their length, and that of their footer if somebody said so.
    unread: BTreeMap<PackId, (u64, Option<u32>)>,
    /// Packs that are not used: their length, and why.
    set_aside: BTreeMap<PackId, (u64, SetAside)>,
    fenced: Option<Epoch>,
    totals: Totals,
}

impl State {
    fn packer(&mut self) -> &mut Packer {
        self.packer.as_mut().expect("a tier has a packer from the beginning")
    }

    /// Whether the newest round condemned a pack that this node does not list: it may not do so any more.
    fn is_condemned(&self, id: &PackId) -> bool {
        let condemned = self.round.as_ref().is_some_and(|round| round.condemned.contains_key(id));
        condemned && !self.mine.contains_key(id)
    }

    /// The same, and not for the first time: one that was only just written is condemned until its writer lists it.
    fn is_given_up(&self, id: &PackId) -> bool {
        self.is_condemned(id) && self.round.as_ref().is_some_and(|round| round.condemned[id] < round.number)
    }

    /// Whether it was known.
    fn forget(&mut self, id: &PackId) -> bool {
        self.unread.remove(id);
        self.set_aside.remove(id);
        self.touched.remove(id);
        self.changed |= self.mine.remove(id).is_some();
        self.index.remove(id).is_some()
    }
}

fn pack_name(id: &PackId) -> String {
    format!("{PACKS}{id}")
}

impl Tier {
    fn new(store: Arc<dyn Store>, config: TierConfig) -> Result<Self, TierError> {
        if !is_node(&config.node) {
            return Err(TierError::Node { node: config.node });
        }
        let requests = Requests::new(config.requests, config.seed);
        let state = State { packer: Some(Packer::new(config.packer)), ..State::default() };
        Ok(Self {
            store,
            config,
            requests,
            state: Mutex::new(state),
            publishing: tokio::sync::Mutex::new(()),
        })
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("nothing panics under this lock"))
    }

    fn upkeep_deadline(&self) -> Instant {
        Instant::now() + self.config.upkeep_max
    }

    /// The tier's name, life and limits.
    pub fn config(&self) -> &TierConfig {
        &self.config
    }

    /// How the tier does.
    pub fn report(&self) -> TierReport {
        let requests = self.requests.report();
        self.with(|state| TierReport {
            store: self.store.describe(),
            packs: state.index.len(),
            pack_bytes: state.index.bytes(),
            blocks: state.index.blocks(),
            packs_listed: state.mine.len(),
            packs_unread: state.unread.len(),
            set_aside: state.set_aside.iter().map(|(id, (_, why))| (*id, why.clone())).collect(),
            waiting_bytes: state.packer().bytes(),
            writing_bytes: state.writing_bytes,
            round: state.honoured,
            round_unreadable: state.round_unreadable,
            unheard: state.unheard.clone(),
            write_trouble: state.write_trouble.clone(),
            overwrites: state.overwrites,
            requests,
            totals: state.totals,
        })
    }

    /// What blocks were stored under, over all packs that can be read.
    pub fn bindings(&self) -> Vec<Binding> {
        self.with(|state| state.index.bindings().cloned().collect())
    }

    /// Every pack that can be read.
    pub fn packs(&self) -> Vec<Known> {
        self.with(|state| state.index.packs().cloned().collect())
    }

    /// What each of these blocks is, or why it would miss, at `now`, Unix time in seconds.
    pub fn find(&self, now: u32, keys: &[BlockKey]) -> Vec<Result<Record, MissReason>> {
        self.with(|state| {
            let found = |key| find_in(&state.index, key, now).map(|found| found.record);
            keys.iter().map(found).collect()
        })
    }

    /// Blocks that continue the prefix of one that is being read, and their lengths in bytes: likely to be wanted next.
    pub fn ahead(&self, now: u32, key: &BlockKey) -> Vec<(BlockKey, u32)> {
        self.with(|state| {
            let Ok(Some(found)) = state.index.find(key, now) else { return Vec::new() };
            let steps = state.index.behind(&found.pack, found.place).map(|(step, _)| step);
            let count = reach::ahead(steps, &self.config.reach);
            let behind = state.index.behind(&found.pack, found.place).take(count);
            behind.map(|(step, key)| (key, step.bytes)).collect()
        })
    }

    /// Which of these are read with one request each: their places in `keys`. What cannot be found stands alone. For
    /// those who would rather have the first blocks early than all at once.
    pub fn spread(&self, now: u32, keys: &[BlockKey]) -> Vec<Vec<usize>> {
        let mut by_pack: BTreeMap<PackId, Vec<(usize, std::ops::Range<u64>)>> = BTreeMap::new();
        let mut groups = Vec::new();
        self.with(|state| {
            for (at, key) in keys.iter().enumerate() {
                match find_in(&state.index, key, now) {
                    Ok(found) => by_pack.entry(found.pack).or_default().push((at, found.range())),
                    Err(_) => groups.push(vec![at]),
                }
            }
        });
        for items in by_pack.into_values() {
            let ranges: Vec<_> = items.iter().map(|(_, range)| range.clone()).collect();
            let spans = reach::spans(&ranges, &self.config.reach).into_iter();
            groups.extend(spans.map(|span| span.wanted.iter().map(|place| items[*place].0).collect()));
        }
        groups
    }

    /// Takes blocks to be packed, at `now`, Unix time in seconds, and writes the packs that are full with them.
    pub async fn put(&self, now: u32, offers: Vec<Offer>) -> Result<Stored, TierError> {
        let (mut stored, full) = self.take(now, offers)?;
        self.write(full.0, &mut stored).await;
        Ok(stored)
    }

    /// The first half of [`Self::put`]: takes blocks to be packed and waits for nothing. Packs that are full now are to
    /// be written with [`Self::write_full`], soon: until then their blocks count as waiting.
    pub fn take(&self, now: u32, offers: Vec<Offer>) -> Result<(Stored, Full), TierError> {
        let mut stored = Stored::default();
        let mut batches = Vec::new();
        let clock = self.requests.now();
        self.with(|state| {
            if let Some(found) = state.fenced {
                return Err(TierError::Fenced { epoch: self.config.epoch, found });
            }
            for Offer { binding, mut record, parent, bytes } in offers {
                let key = record.key;
                if state.waiting.contains(&key) || matches!(state.index.find(&key, now), Ok(Some(_))) {
                    stored.known.push(key);
                    continue;
                }
                let sound = record.bytes > 0
                    && bytes.len() == record.bytes as usize
                    && record.tag == binding.tag()
                    && record.checksum.matches(&key, &bytes);
                let writing = state.writing_bytes;
                if !sound || !state.packer().has_room(writing, record.bytes) {
                    stored.refused.push(key);
                    continue;
                }
                if let Some(ttl) = self.config.ttl_s {
                    let latest = now.saturating_add(ttl);
                    let own = Some(record.expires_at).filter(|at| *at != 0);
                    record.expires_at = own.map_or(latest, |own| own.min(latest));
                }
                state.waiting.insert(key);
                let full = state.packer().add(clock, &binding, Waiting { record, parent, bytes });
                state.writing_bytes += full.as_ref().map_or(0, Batch::bytes);
                batches.extend(full);
            }
            Ok(())
        })?;
        Ok((stored, Full(batches)))
    }

    /// The second half of [`Self::put`]: what became of the packs.
    pub async fn write_full(&self, full: Full) -> Stored {
        let mut stored = Stored::default();
        self.write(full.0, &mut stored).await;
        stored
    }

    /// Writes the packs that have waited long enough, or everything that waits.
    pub async fn flush(&self, all: bool) -> Result<Stored, TierError> {
        let now = self.requests.now();
        let batches = self.with(|state| {
            if let Some(found) = state.fenced {
                return Err(TierError::Fenced { epoch: self.config.epoch, found });
            }
            let due: Vec<Batch> = std::iter::from_fn(|| state.packer().due(now, all)).collect();
            state.writing_bytes += due.iter().map(Batch::bytes).sum::<u64>();
            Ok(due)
        })?;
        let mut stored = Stored::default();
        self.write(batches, &mut stored).await;
        Ok(stored)
    }

    /// How long until [`Self::flush`] has something to do.
    pub fn due_in(&self) -> Option<Duration> {
        let now = self.requests.now();
        self.with(|state| state.packer().due_at()).map(|at| at.saturating_sub(now))
    }

    async fn write(&self, batches: Vec<Batch>, stored: &mut Stored) {
        let writes = batches.iter().map(|batch| self.write_one(batch)).collect();
        let results: Vec<bool> = join_all(writes).await;
        for (batch, landed) in batches.iter().zip(results) {
            let keys = batch.blocks().iter().map(|block| block.record.key);
            if landed { stored.landed.extend(keys) } else { stored.lost.extend(keys) }
        }
    }

    /// Whether the batch is in the store now.
    async fn write_one(&self, batch: &Batch) -> bool {
        // Whatever happens, also that this is dropped, they do not wait any more. It is polled as soon as the batch is
        // closed: nothing is awaited in between.
        let _waiting = NoLonger { tier: self, batch };
        let sequence = self.with(|state| {
            state.sequence += 1;
            state.sequence
        });
        let writer = Writer { node: self.config.node.clone(), epoch: self.config.epoch, sequence };
        // Every block was checked when it was taken.
        let Ok(pack) = batch.encode(writer) else { return false };
        let pack_ref = PackRef {
            id: pack.id,
            pack_bytes: pack.bytes.len() as u64,
            footer_bytes: pack.footer_bytes,
            blocks: pack.footer.entries.len() as u32,
            expires_at: pack.footer.expires_at(),
        };
        // It is this node's before it is there, so that no round is honoured without it.
        self.with(|state| state.mine.insert(pack.id, pack_ref));
        let (name, body) = (pack_name(&pack.id), Bytes::from(pack.bytes));
        let tail = body.slice(body.len() - pack.footer_bytes as usize - TRAILER_BYTES..);
        let deadline = self.upkeep_deadline();
        let result = attempts!(self.requests, Kind::Put, deadline, self.store.put(&name, body.clone()));
        let mut trouble = None;
        let landed = match result {
            Ok(()) => true,
            // An earlier attempt whose answer was lost. Whether all of it arrived is not taken on trust.
            Err(RequestError::Store(StoreError::Exists)) => {
                self.is_whole(&pack.id, pack_ref.pack_bytes).await
            }
            Err(error) => {
                trouble = Some(error.to_string());
                false
            }
        };
        if landed {
            self.requests.moved(Kind::Put, body.len() as u64);
        }
        self.with(|state| {
            state.write_trouble = trouble;
            if landed {
                state.index.insert(pack.id, pack_ref.pack_bytes, pack.footer_bytes, &pack.footer);
                state.changed = true;
                // Its own bytes: the pack goes.
                state.fresh.push((state.generation, pack.id, Bytes::copy_from_slice(&tail)));
                state.totals.packs_written += 1;
                state.totals.blocks_written += u64::from(pack_ref.blocks);
            } else {
                // If it is there after all, a round will find that nobody lists it, or a later life that it is its own.
                state.mine.remove(&pack.id);
                state.totals.blocks_lost += u64::from(pack_ref.blocks);
            }
        });
        landed
    }

    /// Reads blocks, at `now`, Unix time in seconds, within a time; one result for each, in order. Every byte is
    /// checked; what fails is read once more, then another copy, then it is a miss.
    pub async fn read(&self, now: u32, within: Duration, wants: &mut [Want<'_>]) -> Vec<Got> {
        let deadline = Instant::now() + within;
        let mut got = vec![Got::Missed(MissReason::NeverStored); wants.len()];
        // Where a block's bytes were not its own, the last time.
        let mut suspects: Vec<Option<(PackId, u32)>> = vec![None; wants.len()];
        let mut left: Vec<usize> = (0..wants.len()).collect();
        for _ in 0..PASSES_MAX {
            let mut items = Vec::with_capacity(left.len());
            for (index, want) in wants.iter_mut().enumerate() {
                if left.binary_search(&index).is_err() {
                    continue;
                }
                let found = self.with(|state| find_in(&state.index, &want.key, now));
                match found {
                    // A block that failed its checksum everywhere stays that, although it is not found any more.
                    Err(MissReason::NeverStored) if got[index] == Got::Missed(MissReason::Corrupt) => {}
                    Err(reason) => got[index] = Got::Missed(reason),
                    Ok(found) if (found.record.bytes as usize) > want.into.len() => {
                        got[index] = Got::TooLong { bytes: found.record.bytes };
                    }
                    Ok(found) => {
                        let into = &mut want.into[..found.record.bytes as usize];
                        items.push(Item { index, found, into });
                    }
                }
            }
            left.clear();
            for (index, found, result) in self.read_pass(deadline, items).await {
                got[index] = match result {
                    Ok(()) => Got::Read(found.record),
                    Err(reason) => {
                        let place = Some((found.pack, found.place));
                        match reason {
                            MissReason::Corrupt if suspects[index] == place => {
                                self.with(|state| state.index.spoil(&found.pack, found.place));
                                left.push(index);
                            }
                            MissReason::Corrupt => {
                                suspects[index] = place;
                                left.push(index);
                            }
                            // The pack is gone: another one may have it.
                            MissReason::EvictedReclaim => left.push(index),
                            _ => {}
                        }
                        Got::Missed(reason)
                    }
                };
            }
            left.sort_unstable();
            if left.is_empty() {
                break;
            }
        }
        got
    }

    /// Reads each item once. `EvictedReclaim`: its pack is gone.
    async fn read_pass(
        &self,
        deadline: Instant,
        items: Vec<Item<'_>>,
    ) -> Vec<(usize, Found, Result<(), MissReason>)> {
        let mut by_pack: BTreeMap<PackId, Vec<Item<'_>>> = BTreeMap::new();
        for item in items {
            by_pack.entry(item.found.pack).or_default().push(item);
        }
        let mut reads = Vec::new();
        for (pack, items) in by_pack {
            let ranges: Vec<_> = items.iter().map(|item| item.found.range()).collect();
            let mut items: Vec<_> = items.into_iter().map(Some).collect();
            for span in reach::spans(&ranges, &self.config.reach) {
                let items = span.wanted.iter().filter_map(|index| items[*index].take()).collect();
                reads.push(self.read_span(deadline, pack, span.range, items));
            }
        }
        join_all(reads).await.into_iter().flatten().collect()
    }

    async fn read_span(
        &self,
        deadline: Instant,
        pack: PackId,
        range: std::ops::Range<u64>,
        mut items: Vec<Item<'_>>,
    ) -> Vec<(usize, Found, Result<(), MissReason>)> {
        let name = pack_name(&pack);
        let result = {
            let mut landing = Landing::new();
            let mut at = range.start;
            for item in &mut items {
                landing.skip((item.found.range().start - at) as usize);
                landing.fill(&mut *item.into);
                at = item.found.range().end;
            }
            attempts!(self.requests, Kind::Get, deadline, async {
                landing.rewind();
                self.store.get(&name, range.start, &mut landing).await?;
                if landing.is_full() { Ok(()) } else { Err(StoreError::broken("the body ended early")) }
            })
        };
        let bytes = range.end - range.start;
        let whole = match result {
            Ok(()) => {
                self.requests.moved(Kind::Get, bytes);
                Ok(())
            }
            Err(RequestError::Store(StoreError::Absent | StoreError::Short { .. })) => {
                Err(MissReason::EvictedReclaim)
            }
            Err(RequestError::Store(StoreError::Timeout)) => Err(MissReason::TierTimeout),
            Err(_) if Instant::now() >= deadline => Err(MissReason::TierTimeout),
            Err(_) => Err(MissReason::TierDegraded),
        };
        let checked: Vec<_> = items
            .into_iter()
            .map(|Item { index, found, into }| {
                let right = || found.record.checksum.matches(&found.record.key, into);
                let result = whole.and_then(|()| if right() { Ok(()) } else { Err(MissReason::Corrupt) });
                (index, found, result)
            })
            .collect();
        self.with(|state| {
            let totals = &mut state.totals;
            totals.reads += 1;
            totals.bytes_read += if whole.is_ok() { bytes } else { 0 };
            for (_, found, result) in &checked {
                match result {
                    Ok(()) => {
                        totals.blocks_read += 1;
                        totals.bytes_used += u64::from(found.record.bytes);
                    }
                    Err(MissReason::Corrupt) => totals.checksum_failures += 1,
                    Err(_) => {}
                }
            }
            if whole == Err(MissReason::EvictedReclaim) {
                let first = state.forget(&pack);
                state.totals.packs_gone += u64::from(first);
            } else if whole.is_ok() {
                state.touched.insert(pack);
            }
        });
        checked
    }
}

/// A pass reads everything that is left once: the first try, the same again after a checksum failure, other copies.
const PASSES_MAX: usize = 5;

fn find_in(index: &Index, key: &BlockKey, now: u32) -> Result<Found, MissReason> {
    match index.find(key, now) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => Err(MissReason::NeverStored),
        Err(Expired) => Err(MissReason::Expired),
    }
}

/// A block on its way into a caller's slot.
struct Item<'a> {
    index: usize,
    found: Found,
    into: &'a mut [u8],
}

/// Takes the blocks of a batch from those that wait when it is dropped.
struct NoLonger<'a> {
    tier: &'a Tier,
    batch: &'a Batch,
}

impl Drop for NoLonger<'_> {
    fn drop(&mut self) {
        self.tier.with(|state| {
            state.writing_bytes -= self.batch.bytes();
            for block in self.batch.blocks() {
                state.waiting.remove(&block.record.key);
            }
        });
    }
}
