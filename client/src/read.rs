//! Looking blocks up and reading them: in place where there is shared memory, else as checked copies.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::{convert, v1};
use kv_arena::{Absent, ReadGuard};
use kv_block::code::Code;
use kv_block::{BlockKey, Checksum, Epoch, Fault, MissReason, SequenceHash, Summer, Tier};
use kv_shm::{Outcome, Request};

use crate::binding::Binding;
use crate::client::Client;
use crate::error::{Error, Miss, bug, of_status, timed_out};
use crate::hub::{Hold, Ticket};
use crate::options::{DEADLINE_MAX, before};
use crate::runtime::Call;
use crate::session::{Known, Life, Link, Shm, Way, unix_now};
use crate::worker::{Worker, miss, names_of};

/// Bytes that are copied and summed at a time: little enough to stay in the nearest caches in between.
pub(crate) const PIECE_BYTES: usize = 128 << 10;

/// What is here of a sequence of blocks.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Lookup {
    /// Fastest tier of each block, from the first on, up to the first absent one.
    pub tiers: Vec<Tier>,
    /// The first absent block: its index, and why it is absent. `None` when all are here.
    pub first_miss: Option<(usize, Miss)>,
}

impl Lookup {
    /// Blocks here from the first on, without a gap.
    pub fn prefix(&self) -> usize {
        self.tiers.len()
    }
}

/// Where a block is, as far as this node and its peers know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sighting {
    /// In a tier of this node; [`Tier::Object`]: in no faster one, and with no peer that answered.
    Here(Tier),
    /// In a tier of a peer.
    At {
        /// The peer's name.
        node: String,
        /// Its fastest tier that has the block.
        tier: Tier,
    },
    /// A peer expects it: somebody there is about to store it.
    Expected {
        /// The peer's name.
        node: String,
    },
    /// Nowhere.
    Absent(Miss),
}

/// What asking for a block gave.
#[derive(Debug)]
pub enum Got {
    /// The block, open for reading.
    Block(BlockGuard),
    /// It is not there.
    Miss(Miss),
}

impl Got {
    /// The block, if it is there.
    pub fn block(self) -> Option<BlockGuard> {
        match self {
            Self::Block(block) => Some(block),
            Self::Miss(_) => None,
        }
    }

    /// Why it is not there.
    pub fn miss(&self) -> Option<&Miss> {
        match self {
            Self::Block(_) => None,
            Self::Miss(miss) => Some(miss),
        }
    }
}

/// A block open for reading; dereferences to its bytes, which stay as they are until it is dropped.
#[derive(Debug)]
pub struct BlockGuard {
    bytes: Place,
    epoch: Epoch,
}

#[derive(Debug)]
enum Place {
    /// In the arena. The session stays open as long as somebody reads through it.
    Arena(ReadGuard, #[expect(dead_code, reason = "held for its drop")] Arc<Life>),
    Copy {
        key: BlockKey,
        checksum: Checksum,
        bytes: Vec<u8>,
    },
}

impl BlockGuard {
    /// Its name.
    pub fn key(&self) -> BlockKey {
        match &self.bytes {
            Place::Arena(guard, _) => *guard.key(),
            Place::Copy { key, .. } => *key,
        }
    }

    /// Checksum of its bytes and name.
    pub fn checksum(&self) -> Checksum {
        match &self.bytes {
            Place::Arena(guard, _) => guard.checksum(),
            Place::Copy { checksum, .. } => *checksum,
        }
    }

    /// Reads all bytes and compares them with the checksum.
    pub fn verify(&self) -> bool {
        self.checksum().matches(&self.key(), self)
    }

    /// Hands all bytes to `write` piece by piece (offset, bytes), in order, and says whether they were those
    /// that the checksum is of: what was written is good only when they were.
    pub fn copy_with<E>(&self, mut write: impl FnMut(usize, &[u8]) -> Result<(), E>) -> Result<bool, E> {
        let mut summer = Summer::new(self.key());
        for (index, piece) in self.chunks(PIECE_BYTES).enumerate() {
            // The sum brings the piece near; the write finds it there.
            summer.update(piece);
            write(index * PIECE_BYTES, piece)?;
        }
        Ok(summer.finish() == self.checksum())
    }

    /// Whether this still is what the daemon would give. False once it was evicted; the bytes stay readable
    /// here all the same. A copy always is.
    pub fn still_valid(&self) -> bool {
        match &self.bytes {
            Place::Arena(guard, _) => guard.still_valid(),
            Place::Copy { .. } => true,
        }
    }

    /// Whether the bytes are read where they lie.
    pub fn is_zero_copy(&self) -> bool {
        matches!(self.bytes, Place::Arena(..))
    }

    /// Life of the daemon that it was acquired in.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn into_vec(self) -> Vec<u8> {
        match self.bytes {
            Place::Copy { bytes, .. } => bytes,
            Place::Arena(guard, _) => guard.to_vec(),
        }
    }
}

impl Deref for BlockGuard {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.bytes {
            Place::Arena(guard, _) => guard,
            Place::Copy { bytes, .. } => bytes,
        }
    }
}

impl AsRef<[u8]> for BlockGuard {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// What a direct look says must happen next.
enum Next<'a> {
    Miss(MissReason),
    /// The daemon can say more, or do something about it.
    Ask(&'a Link),
    /// No hazard cell is free: only a copy can be had.
    Copy,
}

impl Worker {
    /// How many of these blocks, from the first on, are here, and why the first absent one is not. Wakes
    /// nobody up where there is shared memory. When the reason is [`MissReason::NeverStored`],
    /// [`Worker::explain`] may know more.
    pub fn lookup(&self, binding: &Binding, hashes: &[SequenceHash]) -> Result<Lookup, Error> {
        self.lookup_keys(&binding.keys(hashes))
    }

    /// [`Worker::lookup`] by keys, for those who keep them.
    pub fn lookup_keys(&self, keys: &[BlockKey]) -> Result<Lookup, Error> {
        match &self.life().way {
            Way::Shm(shm) => Ok(shm.lookup(keys)),
            Way::Grpc(_) => self.lookup_over_grpc(keys),
        }
    }

    fn lookup_over_grpc(&self, keys: &[BlockKey]) -> Result<Lookup, Error> {
        let (client, session) = (self.client(), self.session());
        let batches: Vec<_> = keys.chunks(client.keys_per_request_max()).map(names_of).collect();
        let ask = self.client().call(async move {
            let mut lookup = Lookup::default();
            for names in batches {
                let message = v1::LookupRequest {
                    names: Some(names),
                    session: session.0,
                    ..v1::LookupRequest::default()
                };
                let answer = client.within(client.blocks().lookup(client.request(message))).await?;
                for found in answer.found {
                    match found.what {
                        Some(v1::found::What::Tier(tier)) => {
                            lookup
                                .tiers
                                .push(convert::tier(tier)?.ok_or_else(|| bug("a hit without a tier"))?);
                        }
                        Some(v1::found::What::Miss(found)) => {
                            lookup.first_miss = Some((lookup.tiers.len(), miss(found)));
                            return Ok(lookup);
                        }
                        None => return Err(bug("a block without an answer")),
                    }
                }
            }
            Ok(lookup)
        });
        ask.wait()
    }

    /// Where each of these blocks is: here, at a peer that the daemon asks, or in the object store. Nothing moves; what is
    /// not on this node comes with [`Worker::prefetch`], or when an acquire waits for it.
    pub fn locate(&self, binding: &Binding, hashes: &[SequenceHash]) -> Call<Vec<Sighting>> {
        self.locate_keys(&binding.keys(hashes), "")
    }

    /// [`Worker::locate`] by keys, for those who keep them. `node` is a peer that is asked in any case, where there
    /// are more than are asked for one block; empty: nobody in particular.
    pub fn locate_keys(&self, keys: &[BlockKey], node: impl Into<String>) -> Call<Vec<Sighting>> {
        let (client, session, node) = (self.client(), self.session(), node.into());
        let requests: Vec<_> = keys.chunks(client.keys_per_request_max()).map(names_of).collect();
        self.client().call(async move {
            let mut sightings = Vec::new();
            for names in requests {
                let message = v1::LookupRequest {
                    names: Some(names),
                    all: true,
                    session: session.0,
                    peers: true,
                    node: node.clone(),
                };
                let answer = client.within(client.blocks().lookup(client.request(message))).await?;
                for found in answer.found {
                    sightings.push(sighting(found)?);
                }
            }
            Ok(sightings)
        })
    }

    /// Opens a block that is in host memory now.
    pub fn acquire(&self, binding: &Binding, hash: &SequenceHash) -> Result<Got, Error> {
        self.acquire_wait(binding, hash, Duration::ZERO)
    }

    /// [`Worker::acquire`] that waits up to `wait` for a block that is announced, on disk, with a peer of the node, or
    /// in the object store.
    pub fn acquire_wait(&self, binding: &Binding, hash: &SequenceHash, wait: Duration) -> Result<Got, Error> {
        let mut got = self.acquire_keys(&[binding.key(hash)], wait)?;
        got.pop().ok_or_else(|| bug("one block asked for, none answered"))
    }

    /// Opens many blocks at once, in order, waiting up to `wait` for all of them together.
    ///
    /// In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends
    /// on it.
    pub fn acquire_many(
        &self,
        binding: &Binding,
        hashes: &[SequenceHash],
        wait: Duration,
    ) -> Result<Vec<Got>, Error> {
        self.acquire_keys(&binding.keys(hashes), wait)
    }

    /// [`Worker::acquire_many`] by keys, for those who keep them.
    pub fn acquire_keys(&self, keys: &[BlockKey], wait: Duration) -> Result<Vec<Got>, Error> {
        let wait = wait.min(DEADLINE_MAX);
        let life = self.life();
        let Way::Shm(shm) = &life.way else {
            life.check()?;
            // One after the other, within the time of all together.
            let until = Instant::now() + wait;
            let left = || until.saturating_duration_since(Instant::now());
            return keys.iter().map(|key| self.fetch(&life, key, left())).collect();
        };
        let asked = Instant::now();
        let until = asked + if wait.is_zero() { self.deadline() } else { wait };
        let mut got: Vec<Option<Got>> = Vec::with_capacity(keys.len());
        let mut tickets: Vec<(usize, &Link, Ticket<'_>)> = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            let answer = match shm.read(&life, key, !wait.is_zero())? {
                Ok(block) => Some(Got::Block(block)),
                Err(Next::Miss(reason)) => Some(Got::Miss(reason.into())),
                Err(Next::Copy) => Some(self.fetch(&life, key, wait)?),
                Err(Next::Ask(link)) => {
                    life.check()?;
                    let after = before(index, keys, None);
                    let request = Request::Acquire { key: *key, wait: !wait.is_zero(), after };
                    let ticket = link.hub.submit(request, Hold::Nothing, until)?;
                    tickets.push((index, link, ticket));
                    None
                }
            };
            got.push(answer);
        }
        for (index, link, ticket) in tickets {
            let outcome = ticket.wait(asked, until)?;
            got[index] = Some(self.settle(&life, link, &keys[index], outcome, wait)?);
        }
        got.into_iter().map(|one| one.ok_or_else(|| bug("a block without an answer"))).collect()
    }

    /// The bytes of a block, waiting for it up to the deadline; `None` when it is not there.
    pub fn get(&self, binding: &Binding, hash: &SequenceHash) -> Result<Option<Vec<u8>>, Error> {
        let got = self.acquire_wait(binding, hash, self.deadline())?;
        Ok(got.block().map(BlockGuard::into_vec))
    }

    /// Turns the shard's answer to an acquire into a block.
    fn settle(
        &self,
        life: &Arc<Life>,
        link: &Link,
        key: &BlockKey,
        outcome: Outcome,
        wait: Duration,
    ) -> Result<Got, Error> {
        match outcome {
            Outcome::Miss(reason) => Ok(Got::Miss(reason.into())),
            Outcome::Fault { code, retry_after_ms } => Err(fault(code, retry_after_ms)),
            Outcome::Leased { lease, slot, generation } => {
                // Our own hazard takes over; the lease has done its work.
                let opened = link.view.read_at(slot, generation);
                let got = match opened {
                    Ok(guard) if guard.key() == key => Ok(Got::Block(life.block(guard))),
                    Ok(_) => Err(bug("a lease on another block")),
                    Err(Absent::HazardsFull) => self.fetch(life, key, wait),
                    Err(absent) => Err(bug(format!("a leased block cannot be opened: {absent:?}"))),
                };
                link.hub.post(Request::Release { lease });
                got
            }
            other => Err(bug(format!("an acquire was answered with {other:?}"))),
        }
    }

    /// A checked copy, over gRPC.
    fn fetch(&self, life: &Arc<Life>, key: &BlockKey, wait: Duration) -> Result<Got, Error> {
        let deadline = self.deadline().max(wait);
        let client = self.client().with_deadline(deadline);
        let message = v1::GetRequest {
            session: life.session.0,
            names: Some(names_of(&[*key])),
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
            node: String::new(),
        };
        let (key, epoch) = (*key, life.epoch);
        let work = async move {
            match tokio::time::timeout(deadline + Duration::from_millis(100), read_all(&client, message, key))
                .await
            {
                Ok(read) => read,
                Err(_) => Err(timed_out("reading the block")),
            }
        };
        let read = self.client().call(work).wait()?;
        Ok(match read {
            Ok(bytes) => Got::Block(BlockGuard { bytes, epoch }),
            Err(miss) => Got::Miss(miss),
        })
    }
}

fn sighting(found: v1::Found) -> Result<Sighting, Error> {
    let v1::Found { what, node } = found;
    Ok(match what {
        Some(v1::found::What::Tier(tier)) => {
            let tier = convert::tier(tier)?.ok_or_else(|| bug("a hit without a tier"))?;
            if node.is_empty() { Sighting::Here(tier) } else { Sighting::At { node, tier } }
        }
        Some(v1::found::What::Miss(_)) if !node.is_empty() => Sighting::Expected { node },
        Some(v1::found::What::Miss(found)) => Sighting::Absent(miss(found)),
        None => return Err(bug("a block without an answer")),
    })
}

async fn read_all(
    client: &Client,
    message: v1::GetRequest,
    key: BlockKey,
) -> Result<Result<Place, Miss>, Error> {
    let mut stream = client.within(client.blocks().get(client.request(message))).await?;
    let mut header = None;
    let mut bytes = Vec::new();
    while let Some(message) = stream.message().await.map_err(|status| of_status(&status))? {
        match (message.what, &header) {
            (Some(v1::get_response::What::Miss(found)), None) => return Ok(Err(miss(found))),
            (Some(v1::get_response::What::Header(found)), None) => {
                bytes.reserve_exact(found.bytes as usize);
                header = Some(found);
            }
            (Some(v1::get_response::What::Chunk(chunk)), Some(header)) => {
                if bytes.len() + chunk.len() > header.bytes as usize {
                    return Err(bug("more bytes than the block has"));
                }
                bytes.extend_from_slice(&chunk);
            }
            _ => return Err(bug("a block's messages came out of order")),
        }
    }
    let header = header.ok_or_else(|| bug("a block without a header"))?;
    let checksum = Checksum(header.checksum);
    if bytes.len() != header.bytes as usize
        || header.key != key.as_bytes()[..]
        || !checksum.matches(&key, &bytes)
    {
        return Err(Fault::new(Code::CorruptHost, format!("block {key} arrived damaged")).into());
    }
    Ok(Ok(Place::Copy { key, checksum, bytes }))
}

impl Life {
    fn block(self: &Arc<Self>, guard: ReadGuard) -> BlockGuard {
        BlockGuard { bytes: Place::Arena(guard, Arc::clone(self)), epoch: self.epoch }
    }
}

impl Shm {
    fn lookup(&self, keys: &[BlockKey]) -> Lookup {
        let unix = unix_now();
        let mut lookup = Lookup { tiers: Vec::with_capacity(keys.len()), first_miss: None };
        let mut enter = |index: usize, known: Known| {
            let reason = match known {
                Known::Host => {
                    lookup.tiers.push(Tier::Host);
                    return true;
                }
                Known::Disk => {
                    lookup.tiers.push(Tier::Disk);
                    return true;
                }
                Known::Pending => MissReason::NotComplete,
                Known::Gone(reason) => reason,
                Known::Never => MissReason::NeverStored,
                // The entry changed each time we looked. Whoever needs the block asks for it.
                Known::Unclear => MissReason::Overloaded,
            };
            lookup.first_miss = Some((index, reason.into()));
            false
        };
        match &self.links[..] {
            [link] => link.view.find_each(keys, |index, found| {
                let known = found.map_or(Known::Unclear, |entry| Known::of(entry.as_ref(), unix));
                enter(index, known)
            }),
            _ => {
                for (index, key) in keys.iter().enumerate() {
                    if !enter(index, self.locate(key, unix).1) {
                        break;
                    }
                }
            }
        }
        lookup
    }

    /// Opens a block where it lies, or says what to do instead.
    fn read<'a>(
        &'a self,
        life: &Arc<Life>,
        key: &BlockKey,
        wait: bool,
    ) -> Result<Result<BlockGuard, Next<'a>>, Error> {
        let unix = unix_now();
        let link = match &self.links[..] {
            [link] => link,
            links => &links[self.locate(key, unix).0],
        };
        let entry = match link.view.read(key) {
            Ok(guard) => {
                let expires_at = guard.record().expires_at;
                if expires_at != 0 && expires_at <= unix {
                    return Ok(Err(Next::Miss(MissReason::Expired)));
                }
                return Ok(Ok(life.block(guard)));
            }
            Err(Absent::NotFound) => None,
            Err(Absent::Entry(entry)) => Some(entry),
            Err(Absent::HazardsFull) => return Ok(Err(Next::Copy)),
            Err(Absent::Closed) => {
                life.check()?;
                return Err(Fault::new(Code::UnknownSession, "the daemon ended the session").into());
            }
            Err(_) => return Ok(Err(Next::Ask(link))),
        };
        Ok(Err(match Known::of(entry.as_ref(), unix) {
            // Whoever has time has the daemon ask the peers.
            Known::Never | Known::Gone(_) if wait => Next::Ask(link),
            Known::Never => Next::Miss(MissReason::NeverStored),
            Known::Gone(reason) => Next::Miss(reason),
            Known::Pending if !wait => Next::Miss(MissReason::NotComplete),
            Known::Disk if !wait => Next::Miss(MissReason::TierTimeout),
            // In host memory but not verified yet, or worth waiting for.
            Known::Host | Known::Disk | Known::Pending | Known::Unclear => Next::Ask(link),
        }))
    }
}

/// A fault of the ring in words.
pub(crate) fn fault(code: Code, retry_after_ms: u32) -> Error {
    let fault = Fault::new(code, code.title());
    let wait = Duration::from_millis(retry_after_ms.into());
    if wait.is_zero() { fault } else { fault.retry_after(wait) }.into()
}
