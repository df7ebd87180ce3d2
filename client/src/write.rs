//! Storing blocks: in one go, or announced first and filled while others already wait for them.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::{convert, v1};
use kv_arena::FillGuard;
use kv_arena::copy::copy_and_sum;
use kv_block::code::Code;
use kv_block::{BindingId, BlockKey, Checksum, Fault, FaultKind, SequenceHash, Summer};
use kv_shm::{Outcome, Place, Request, StagingSlot};

use crate::binding::Binding;
use crate::error::{Error, bug, timed_out};
use crate::hub::{Hold, Ticket};
use crate::options::{DEADLINE_MAX, PutOptions, before};
use crate::read::{PIECE_BYTES, fault};
use crate::session::{Known, Life, Link, Shm, Way, unix_now};
use crate::worker::Worker;

/// How long to sleep before looking at the staging area again, when another thread may free some of it.
const STAGING_LOOK: Duration = Duration::from_millis(2);

/// A block is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// It was there before; the offered bytes were not needed.
    pub already: bool,
}

impl Worker {
    /// Stores one block.
    pub fn put(&self, binding: &Binding, hash: &SequenceHash, bytes: &[u8]) -> Result<Stored, Error> {
        self.put_with(binding, hash, bytes, &PutOptions::default())
    }

    /// [`Worker::put`] with a say in how it is kept.
    pub fn put_with(
        &self,
        binding: &Binding,
        hash: &SequenceHash,
        bytes: &[u8],
        options: &PutOptions,
    ) -> Result<Stored, Error> {
        let mut stored = self.put_many(binding, &[(*hash, bytes)], options)?;
        stored.pop().unwrap_or_else(|| Err(bug("one block offered, none answered")))
    }

    /// Stores many blocks, all under way at once; one answer per block, in order. The error is for all.
    ///
    /// In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends
    /// on it.
    pub fn put_many(
        &self,
        binding: &Binding,
        blocks: &[(SequenceHash, &[u8])],
        options: &PutOptions,
    ) -> Result<Vec<Result<Stored, Error>>, Error> {
        let life = self.life();
        life.check()?;
        let number = self.number(&life, binding)?;
        let asked = Instant::now();
        let until = asked + self.deadline();
        let check = |bytes: &[u8]| check_length(binding, bytes.len());
        let hashes: Vec<SequenceHash> = blocks.iter().map(|(hash, _)| *hash).collect();
        let Way::Shm(shm) = &life.way else {
            let put = |(index, (hash, bytes)): (usize, &(SequenceHash, &[u8]))| {
                check(bytes)?;
                self.put_over_grpc(&life, number, hash, bytes, &options.at(index, &hashes))
            };
            return Ok(blocks.iter().enumerate().map(put).collect());
        };
        let keys = binding.keys(&hashes);
        let first = options.after.map(|hash| binding.key(&hash));
        let places = shm.locate_each(&keys, unix_now());
        // Everything is submitted before anything is waited for; the shard copies meanwhile.
        let mut answers: Vec<Option<Result<Stored, Error>>> = Vec::with_capacity(blocks.len());
        let mut tickets: Vec<(usize, Ticket<'_>)> = Vec::with_capacity(blocks.len());
        for (index, (hash, bytes)) in blocks.iter().enumerate() {
            let (key, (at, known)) = (keys[index], places[index]);
            let link = &shm.links[at];
            let answer = match check(bytes) {
                Err(error) => Some(Err(error)),
                Ok(()) if known == Known::Host && !options.durable => Some(Ok(Stored { already: true })),
                Ok(()) if bytes.len() as u64 > link.staging.len() => {
                    Some(self.put_over_grpc(&life, number, hash, bytes, &options.at(index, &hashes)))
                }
                Ok(()) => {
                    let after = before(index, &keys, first);
                    match submit_put(link, (key, after), number, bytes, options, until) {
                        Ok(ticket) => {
                            tickets.push((index, ticket));
                            None
                        }
                        Err(error) => Some(Err(error)),
                    }
                }
            };
            answers.push(answer);
        }
        for (index, ticket) in tickets {
            answers[index] = Some(ticket.wait(asked, until).and_then(stored));
        }
        Ok(answers
            .into_iter()
            .map(|one| one.unwrap_or_else(|| Err(bug("a put without an answer"))))
            .collect())
    }

    /// Announces a block and gives room to fill it in. Others can wait for it from now on. `None` when there
    /// is nothing to do: it is stored, or somebody else has announced it.
    pub fn reserve(&self, binding: &Binding, hash: &SequenceHash) -> Result<Option<Reservation>, Error> {
        self.reserve_with(binding, hash, &PutOptions::default())
    }

    /// [`Worker::reserve`] with a say in how the block is kept.
    pub fn reserve_with(
        &self,
        binding: &Binding,
        hash: &SequenceHash,
        options: &PutOptions,
    ) -> Result<Option<Reservation>, Error> {
        let life = self.life();
        life.check()?;
        let number = self.number(&life, binding)?;
        let (key, bytes) = (binding.key(hash), binding.block_bytes());
        let until = Instant::now() + self.deadline();
        let announced = |room| Reservation {
            worker: self.clone(),
            life: Arc::clone(&life),
            number,
            hash: *hash,
            key,
            options: *options,
            room: Some(room),
        };
        let over_grpc = || announced(Room::Heap(vec![0; bytes as usize]));
        let Way::Shm(shm) = &life.way else {
            return Ok(self.reserve_over_grpc(&life, number, hash, options)?.then(over_grpc));
        };
        let (link_at, known) = shm.locate(&key, unix_now());
        if matches!(known, Known::Host | Known::Disk | Known::Pending) {
            return Ok(None);
        }
        let link = &shm.links[link_at];
        let staged = match shm.may_write {
            true => None,
            false if u64::from(bytes) > link.staging.len() => {
                return Ok(self.reserve_over_grpc(&life, number, hash, options)?.then(over_grpc));
            }
            false => Some(stage(link, bytes as usize, until)?),
        };
        let asked = Instant::now();
        let request = Request::Reserve {
            key,
            binding: number,
            priority: options.priority,
            ttl_s: options.ttl_s(),
            in_place: shm.may_write,
            after: options.after.map(|hash| binding.key(&hash)),
        };
        let ticket = link.hub.submit(request, Hold::Nothing, until)?;
        let Some(place) = reserved(ticket.wait(asked, until)?)? else { return Ok(None) };
        let room = match staged {
            Some(slot) => Room::Staging(link_at, slot),
            None => lent(link, link_at, place, &key, bytes)?,
        };
        Ok(Some(announced(room)))
    }

    /// [`Worker::reserve_with`] for many blocks, all under way at once; one answer per block, in order. The error
    /// is for all.
    ///
    /// In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends
    /// on it.
    pub fn reserve_many(
        &self,
        binding: &Binding,
        hashes: &[SequenceHash],
        options: &PutOptions,
    ) -> Result<Vec<Result<Option<Reservation>, Error>>, Error> {
        let life = self.life();
        life.check()?;
        let number = self.number(&life, binding)?;
        let shm = match &life.way {
            Way::Shm(shm) if shm.may_write => shm,
            _ => {
                let reserve = |(index, hash)| self.reserve_with(binding, hash, &options.at(index, hashes));
                return Ok(hashes.iter().enumerate().map(reserve).collect());
            }
        };
        let keys = binding.keys(hashes);
        let first = options.after.map(|hash| binding.key(&hash));
        let places = shm.locate_each(&keys, unix_now());
        let asked = Instant::now();
        let until = asked + self.deadline();
        let submit = |(index, (key, (at, known))): (usize, (&BlockKey, &(usize, Known)))| {
            if matches!(known, Known::Host | Known::Disk | Known::Pending) {
                return Ok(None);
            }
            let request = Request::Reserve {
                key: *key,
                binding: number,
                priority: options.priority,
                ttl_s: options.ttl_s(),
                in_place: true,
                after: before(index, &keys, first),
            };
            let link = &shm.links[*at];
            link.hub.submit(request, Hold::Nothing, until).map(|ticket| Some((*at, ticket)))
        };
        let tickets: Vec<_> = keys.iter().zip(&places).enumerate().map(submit).collect();
        let mut answers = Vec::with_capacity(tickets.len());
        for (index, ticket) in tickets.into_iter().enumerate() {
            let (key, hash) = (&keys[index], &hashes[index]);
            let finish = |(at, ticket): (usize, Ticket<'_>)| {
                let Some(place) = reserved(ticket.wait(asked, until)?)? else { return Ok(None) };
                Ok(Some(Reservation {
                    worker: self.clone(),
                    life: Arc::clone(&life),
                    number,
                    hash: *hash,
                    key: *key,
                    options: options.at(index, hashes),
                    room: Some(lent(&shm.links[at], at, place, key, binding.block_bytes())?),
                }))
            };
            answers.push(ticket.and_then(|ticket| ticket.map_or(Ok(None), finish)));
        }
        Ok(answers)
    }

    fn put_over_grpc(
        &self,
        life: &Arc<Life>,
        number: BindingId,
        hash: &SequenceHash,
        bytes: &[u8],
        options: &PutOptions,
    ) -> Result<Stored, Error> {
        let header = v1::PutHeader {
            session: life.session.0,
            binding: number.0.into(),
            sequence_hash: Bytes::copy_from_slice(hash.as_bytes()),
            priority: convert::priority_message(options.priority).into(),
            ttl_s: options.ttl_s(),
            durable: options.durable,
            after: options.after.map_or_else(Bytes::new, |hash| Bytes::copy_from_slice(hash.as_bytes())),
        };
        let body = Bytes::copy_from_slice(bytes);
        let mut messages = vec![v1::PutRequest { header: Some(header), chunk: Bytes::new() }];
        let client = self.client();
        let chunk_bytes = client.chunk_bytes();
        let pieces = (0..body.len()).step_by(chunk_bytes);
        messages.extend(pieces.map(|at| v1::PutRequest {
            header: None,
            chunk: body.slice(at..body.len().min(at + chunk_bytes)),
        }));
        let work = async move {
            let request = client.request(tokio_stream::iter(messages));
            let answer = client.within(client.blocks().put(request)).await?;
            Ok(Stored { already: answer.already })
        };
        self.client().call(work).wait()
    }

    fn reserve_over_grpc(
        &self,
        life: &Arc<Life>,
        number: BindingId,
        hash: &SequenceHash,
        options: &PutOptions,
    ) -> Result<bool, Error> {
        let message = v1::ReserveRequest {
            session: life.session.0,
            names: Some(hash_names(number, hash)),
            priority: convert::priority_message(options.priority).into(),
            ttl_s: options.ttl_s(),
        };
        let client = self.client();
        let work = async move {
            let answer = client.within(client.blocks().reserve(client.request(message))).await?;
            answer.reserved.first().copied().ok_or_else(|| bug("a reserve without an answer"))
        };
        let reserved = self.client().call(work).wait();
        if reserved.as_ref().is_err_and(|error| error.kind() == FaultKind::Timeout) {
            // It may yet be done, and nobody would fill it. Twice: the first may overtake the reserve.
            let client = self.client().with_deadline(DEADLINE_MAX);
            let (session, names) = (life.session.0, hash_names(number, hash));
            self.client().runtime().spawn(async move {
                for wait in [0, 200] {
                    tokio::time::sleep(Duration::from_millis(wait)).await;
                    let message = v1::AbortRequest { session, names: Some(names.clone()) };
                    let _ = client.within(client.blocks().abort(client.request(message))).await;
                }
            });
        }
        reserved
    }
}

fn hash_names(number: BindingId, hash: &SequenceHash) -> v1::Names {
    v1::Names {
        binding: number.0.into(),
        sequence_hashes: vec![Bytes::copy_from_slice(hash.as_bytes())],
        keys: Vec::new(),
    }
}

fn check_length(binding: &Binding, bytes: usize) -> Result<(), Error> {
    let wanted = binding.block_bytes();
    if bytes == wanted as usize {
        return Ok(());
    }
    let text = format!("{bytes} bytes offered, blocks of this binding have {wanted}");
    Err(Fault::new(Code::WrongLength, text).into())
}

/// A staging slot, waiting for one to come back if need be.
fn stage(link: &Link, bytes: usize, until: Instant) -> Result<StagingSlot, Error> {
    loop {
        if let Some(slot) = link.staging.take(bytes) {
            return Ok(slot);
        }
        link.hub.collect();
        if let Some(slot) = link.staging.take(bytes) {
            return Ok(slot);
        }
        let now = Instant::now();
        if now >= until {
            return Err(timed_out("waiting for room in the staging area"));
        }
        let look = until.min(now + STAGING_LOOK);
        if !link.hub.wait_for_any(look) {
            std::thread::sleep(look.saturating_duration_since(now));
        }
    }
}

fn submit_put<'a>(
    link: &'a Link,
    (key, after): (BlockKey, Option<BlockKey>),
    binding: BindingId,
    bytes: &[u8],
    options: &PutOptions,
    until: Instant,
) -> Result<Ticket<'a>, Error> {
    let mut slot = stage(link, bytes.len(), until)?;
    slot.write(bytes);
    let request = Request::Put {
        key,
        binding,
        offset: slot.offset(),
        bytes: bytes.len() as u32,
        priority: options.priority,
        ttl_s: options.ttl_s(),
        durable: options.durable,
        after,
    };
    link.hub.submit(request, Hold::Staging(slot), until)
}

fn stored(outcome: Outcome) -> Result<Stored, Error> {
    match outcome {
        Outcome::Stored { already } => Ok(Stored { already }),
        Outcome::AlreadyThere => Ok(Stored { already: true }),
        Outcome::Fault { code, retry_after_ms } => Err(fault(code, retry_after_ms)),
        other => Err(bug(format!("a put was answered with {other:?}"))),
    }
}

/// The place of what was reserved, where it has one; `None` when there was nothing to reserve.
fn reserved(outcome: Outcome) -> Result<Option<Option<Place>>, Error> {
    match outcome {
        Outcome::AlreadyThere => Ok(None),
        Outcome::Reserved { place } => Ok(Some(place)),
        Outcome::Fault { code, retry_after_ms } => Err(fault(code, retry_after_ms)),
        other => Err(bug(format!("a reserve was answered with {other:?}"))),
    }
}

/// Opens the arena slot that was lent for an announced block.
fn lent(link: &Link, at: usize, place: Option<Place>, key: &BlockKey, bytes: u32) -> Result<Room, Error> {
    let Some(Place { slot, generation, .. }) = place else {
        return Err(bug("a reservation in place without a place"));
    };
    link.view.fill(slot, generation, bytes).map(|guard| Room::InPlace(at, guard, None)).map_err(|absent| {
        link.hub.post(Request::Abort { key: *key });
        let text = format!("the reserved slot cannot be opened: {absent:?}");
        Fault::new(Code::QueueFull, text).into()
    })
}

/// Room for one announced block; dereferences to its bytes. Fill it, then commit. Dropping takes the
/// announcement back.
#[derive(Debug)]
pub struct Reservation {
    worker: Worker,
    life: Arc<Life>,
    number: BindingId,
    hash: SequenceHash,
    key: BlockKey,
    options: PutOptions,
    /// `None` once committed.
    room: Option<Room>,
}

#[derive(Debug)]
enum Room {
    Staging(usize, StagingSlot),
    /// With the checksum of its bytes, if they were summed on their way.
    InPlace(usize, FillGuard, Option<Checksum>),
    Heap(Vec<u8>),
}

impl Reservation {
    /// Name of the block.
    pub fn key(&self) -> BlockKey {
        self.key
    }

    /// Whether the bytes are written where they will stay.
    pub fn is_in_place(&self) -> bool {
        matches!(self.room, Some(Room::InPlace(..)))
    }

    /// Copies `bytes` to the front, faster than through the slice; in place, a whole block is summed on its way.
    /// Panics when they are longer than the block.
    pub fn write(&mut self, bytes: &[u8]) {
        match &mut self.room {
            Some(Room::Staging(_, slot)) => slot.write(bytes),
            Some(Room::InPlace(_, guard, sum)) if guard.len() == bytes.len() => {
                *sum = Some(copy_and_sum(&self.key, guard, bytes));
            }
            _ => self[..bytes.len()].copy_from_slice(bytes),
        }
    }

    /// Lets `read` bring all bytes of the block piece by piece (offset, piece to fill), in order; in place,
    /// they are summed on their way. The sum is of what landed, whatever the source does meanwhile.
    pub fn fill_with<E>(&mut self, mut read: impl FnMut(usize, &mut [u8]) -> Result<(), E>) -> Result<(), E> {
        let mut summer = Summer::new(self.key);
        for (index, piece) in self.chunks_mut(PIECE_BYTES).enumerate() {
            read(index * PIECE_BYTES, piece)?;
            summer.update(piece);
        }
        if let Some(Room::InPlace(_, _, sum)) = &mut self.room {
            *sum = Some(summer.finish());
        }
        Ok(())
    }

    /// Stores the bytes; whoever waits for the block gets it.
    pub fn commit(mut self) -> Result<Stored, Error> {
        let Some(room) = self.room.take() else { return Err(bug("committed twice")) };
        let asked = Instant::now();
        let until = asked + self.worker.deadline();
        let (key, durable) = (self.key, self.options.durable);
        let (at, request, hold) = match room {
            Room::Heap(bytes) => return self.commit_over_grpc(&bytes),
            Room::Staging(at, slot) => {
                let (offset, bytes) = (slot.offset(), slot.len() as u32);
                (at, Request::Commit { key, offset, bytes, durable }, Hold::Staging(slot))
            }
            Room::InPlace(at, guard, sum) => {
                let checksum = sum.unwrap_or_else(|| Checksum::of(&key, &guard));
                let (slot, generation) = guard.slot();
                let request = Request::CommitInPlace { key, slot, generation, checksum, durable };
                (at, request, Hold::InPlace(guard))
            }
        };
        let link = &shm_of(&self.life)?.links[at];
        self.life.check()?;
        let ticket = link.hub.submit(request, hold, until)?;
        stored(ticket.wait(asked, until)?)
    }

    /// [`Reservation::commit`] for many, all under way at once; one answer for each, in order.
    pub fn commit_many(all: Vec<Self>) -> Vec<Result<Stored, Error>> {
        let asked = Instant::now();
        // Whose session each belongs to outlives its commit.
        let lives: Vec<_> = all.iter().map(|one| Arc::clone(&one.life)).collect();
        type UnderWay<'a> = Result<Stored, (Ticket<'a>, Instant)>;
        fn submit(mut one: Reservation, life: &Life, asked: Instant) -> Result<UnderWay<'_>, Error> {
            let until = asked + one.worker.deadline();
            match one.room.take() {
                Some(Room::InPlace(at, guard, sum)) => {
                    life.check()?;
                    let (key, durable) = (one.key, one.options.durable);
                    let checksum = sum.unwrap_or_else(|| Checksum::of(&key, &guard));
                    let (slot, generation) = guard.slot();
                    let request = Request::CommitInPlace { key, slot, generation, checksum, durable };
                    let hub = &shm_of(life)?.links[at].hub;
                    hub.submit(request, Hold::InPlace(guard), until).map(|ticket| Err((ticket, until)))
                }
                room => {
                    one.room = room;
                    one.commit().map(Ok)
                }
            }
        }
        let under_way: Vec<_> =
            all.into_iter().zip(&lives).map(|(one, life)| submit(one, life, asked)).collect();
        let finish = |one: Result<UnderWay<'_>, Error>| match one? {
            Ok(done) => Ok(done),
            Err((ticket, until)) => stored(ticket.wait(asked, until)?),
        };
        under_way.into_iter().map(finish).collect()
    }

    fn commit_over_grpc(&self, bytes: &[u8]) -> Result<Stored, Error> {
        self.life.check()?;
        self.worker.put_over_grpc(&self.life, self.number, &self.hash, bytes, &self.options)
    }

    fn abort_over_grpc(&self) -> crate::Call<()> {
        let client = self.worker.client();
        let names = Some(hash_names(self.number, &self.hash));
        let message = v1::AbortRequest { session: self.life.session.0, names };
        self.worker.client().call(async move {
            client.within(client.blocks().abort(client.request(message))).await.map(|_| ())
        })
    }
}

fn shm_of(life: &Life) -> Result<&Shm, Error> {
    match &life.way {
        Way::Shm(shm) => Ok(shm),
        Way::Grpc(_) => Err(bug("a slot without shared memory")),
    }
}

impl Deref for Reservation {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.room {
            Some(Room::Staging(_, slot)) => slot,
            Some(Room::InPlace(_, guard, _)) => guard,
            Some(Room::Heap(bytes)) => bytes,
            None => &[],
        }
    }
}

impl DerefMut for Reservation {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.room {
            Some(Room::Staging(_, slot)) => slot,
            Some(Room::InPlace(_, guard, sum)) => {
                *sum = None;
                guard
            }
            Some(Room::Heap(bytes)) => bytes,
            None => &mut [],
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        match self.room.take() {
            None => {}
            Some(Room::Heap(_)) => drop(self.abort_over_grpc()),
            Some(Room::Staging(at, slot)) => {
                // The shard never learned where the bytes are, so the slot may go first.
                drop(slot);
                self.abort(at);
            }
            Some(Room::InPlace(at, guard, _)) => {
                drop(guard);
                self.abort(at);
            }
        }
    }
}

impl Reservation {
    fn abort(&self, at: usize) {
        if let Ok(shm) = shm_of(&self.life) {
            shm.links[at].hub.post(Request::Abort { key: self.key });
        }
    }
}
