//! What is in the pool is summed there, by the device, before anybody may load it.
//!
//! ```text
//!   pages --Gather--> pool --Drain--> slots --sums.rs--> checksum --.
//!                      '----- the device sums -----------------------'--- equal: published, and kept in the pool
//!   host memory --Promote--> pool --- the device sums --- equal to the record: kept in the pool
//! ```
//! So a byte that changes on the bus, in either direction, is found before it counts. Without kernels nobody sums on the
//! device: then the copies are believed, as those that go to pages and come from them without a pool are.

use std::time::Instant;

use kv_arena::{Held, Slot};
use kv_block::Record;
use kv_gpu::copier::{Copier, Hosts, Job, JobToken, PagePiece, Step};
use kv_gpu::{HostBuffer, Kernels, Priority, Reserved, Stream, Summing};

use super::save::{Fills, fail};
use super::{Engine, LAST_COPIES, Stats, UnderWay, What, late, lock};

/// Host memory for sums that is kept to be used again.
const BUFFERS_MAX: usize = 16;
const BUFFER_BYTES: usize = 16 << 10;

/// Who sums, and with what.
pub(super) struct Verifier {
    kernels: Kernels,
    stream: Stream,
    buffers: Vec<HostBuffer>,
}

impl Verifier {
    /// Whatever copies are made by; `None` where there are no kernels.
    pub(super) fn new(copier: &Copier) -> Option<Self> {
        let loaded = copier.kernels().cloned().map_or_else(|| Kernels::load(copier.device()), Ok);
        let verifier = loaded.and_then(|kernels| {
            Ok(Self { stream: copier.device().stream(Priority::Low)?, kernels, buffers: Vec::new() })
        });
        verifier
            .inspect_err(|error| {
                tracing::warn!(gpu = ?copier.device(), %error, "what is in the pool cannot be summed there, and is believed");
            })
            .ok()
    }
}

/// Blocks in the pool that are being summed.
pub(super) struct Verifying {
    /// Each with the places in `sums` of the blocks that it sums.
    summing: Vec<(Summing, Vec<usize>)>,
    /// What came out: CRC-64/NVME of the bytes.
    sums: Vec<Option<u64>>,
    then: Then,
}

/// What it is for.
enum Then {
    /// Their copies to host memory are not done yet.
    Wait,
    /// They are in their slots.
    Publish { fills: Fills, slots: Vec<Slot>, until: Instant },
    /// They are known already.
    Keep { rooms: Vec<Reserved>, records: Vec<Record> },
    /// Nothing comes of it; the places are kept until the device is done.
    Nothing { _rooms: Vec<Reserved> },
}

/// One piece for each block, between the beginning of its memory on the other side and its place in the pool.
pub(super) fn whole_blocks(rooms: &[Reserved]) -> Vec<PagePiece> {
    let piece = |(at, room): (usize, &Reserved)| PagePiece {
        memory: at as u32,
        device_offset: room.offset(),
        other: at as u32,
        other_offset: 0,
        bytes: room.bytes().into(),
    };
    rooms.iter().enumerate().map(piece).collect()
}

impl Engine {
    /// Has the device sum these. `None` where it cannot.
    pub(super) fn verify(&mut self, rooms: &[Reserved]) -> Option<u64> {
        let verifier = self.verifier.as_mut()?;
        let mut groups: Vec<(&Reserved, Vec<usize>)> = Vec::new();
        for (at, room) in rooms.iter().enumerate() {
            match groups.iter_mut().find(|(first, _)| first.memory().is(room.memory())) {
                Some((_, group)) => group.push(at),
                None => groups.push((room, vec![at])),
            }
        }
        let mut summing = Vec::new();
        for (first, group) in groups {
            let run = |at: &usize| rooms[*at].offset()..rooms[*at].offset() + u64::from(rooms[*at].bytes());
            let runs: Vec<_> = group.iter().map(run).collect();
            let wanted = Kernels::checksum_room_bytes(&runs);
            let buffer = match verifier.buffers.pop() {
                Some(buffer) if buffer.len() >= wanted => Ok(buffer),
                _ => self.device.host_buffer(wanted.max(BUFFER_BYTES)),
            };
            let begun = buffer.and_then(|buffer| {
                let begun = verifier.kernels.checksums(&verifier.stream, first.memory(), &runs, buffer);
                begun.map_err(|refused| refused.error)
            });
            match begun {
                Ok(one) => summing.push((one, group)),
                // What is not summed is not kept; nothing else depends on it.
                Err(error) => tracing::debug!(%error, "blocks in the pool could not be summed"),
            }
        }
        let number = self.number();
        let sums = vec![None; rooms.len()];
        self.verifying.insert(number, Verifying { summing, sums, then: Then::Wait });
        Some(number)
    }

    /// The copies to host memory that belong to these sums are over: well, with the slots, or not.
    pub(super) fn drained(&mut self, number: u64, fills: Fills, slots: Option<Vec<Slot>>, until: Instant) {
        let Some(verifying) = self.verifying.get_mut(&number) else { return };
        verifying.then = match slots {
            Some(slots) => Then::Publish { fills, slots, until },
            None => Then::Nothing { _rooms: fills.2 },
        };
        self.conclude(number);
    }

    /// Looks whether the device has summed something; whether it had.
    pub(super) fn look_at_sums(&mut self) -> bool {
        let mut any = false;
        for verifying in self.verifying.values_mut() {
            let Verifying { summing, sums, .. } = verifying;
            summing.retain_mut(|(one, group)| match one.poll() {
                Ok(None) => true,
                Ok(Some((values, buffer))) => {
                    any = true;
                    for (at, value) in group.iter().zip(values) {
                        sums[*at] = Some(value);
                    }
                    if let Some(verifier) = &mut self.verifier
                        && verifier.buffers.len() < BUFFERS_MAX
                        && buffer.len() == BUFFER_BYTES
                    {
                        verifier.buffers.push(buffer);
                    }
                    false
                }
                // It is asked again: to let go of it would be to wait for it.
                Err(error) if !matches!(error, kv_gpu::Error::Lost { .. }) => true,
                Err(error) => {
                    tracing::debug!(%error, "blocks in the pool could not be summed");
                    any = true;
                    false
                }
            });
        }
        if any {
            let all: Vec<u64> = self.verifying.keys().copied().collect();
            all.into_iter().for_each(|number| self.conclude(number));
        }
        any
    }

    /// When all is summed, what it was for is done.
    fn conclude(&mut self, number: u64) {
        let Some(verifying) = self.verifying.get(&number) else { return };
        if !verifying.summing.is_empty() || matches!(verifying.then, Then::Wait) {
            return;
        }
        let Some(Verifying { sums, then, .. }) = self.verifying.remove(&number) else { return };
        match then {
            Then::Wait | Then::Nothing { .. } => {}
            Then::Publish { fills, slots, .. } => self.publish(fills, slots, &sums),
            Then::Keep { rooms, records } => {
                let Some(pool) = &self.pool else { return };
                let mut pool = lock(pool);
                for ((room, record), sum) in rooms.into_iter().zip(records).zip(sums) {
                    match sum {
                        Some(sum) if sum == record.checksum.content(&record.key) => {
                            // Its place may be gone with the device.
                            let _ = pool.seal(room, record);
                        }
                        Some(_) => {
                            Stats::add(&self.stats.damaged, 1);
                            let key = record.key;
                            tracing::warn!(%key, "a block was damaged on its way to the GPU; it is not kept there");
                        }
                        None => {}
                    }
                }
            }
        }
    }

    /// Copies blocks of host memory into the pool: somebody loads them again and again.
    pub(super) fn promote(&mut self, blocks: Vec<Held>) {
        let Some(pool) = &self.pool else { return };
        let (mut held, mut records, mut rooms) = (Vec::new(), Vec::new(), Vec::new());
        {
            let mut pool = lock(pool);
            for block in blocks {
                let record = block.record();
                if pool.has(&record.key, &record) {
                    continue;
                }
                // What finds no room stays in host memory, and comes from there again.
                let Ok(room) = pool.reserve(record.bytes) else { break };
                rooms.push(room);
                records.push(record);
                held.push(block);
            }
        }
        if rooms.is_empty() {
            return;
        }
        let token = JobToken(self.number());
        let bytes = records.iter().map(|record| u64::from(record.bytes)).sum();
        let job = Job {
            token,
            memories: rooms.iter().map(|room| room.memory().clone()).collect(),
            hosts: Hosts::From(held),
            steps: vec![Step { after: None, pieces: whole_blocks(&rooms), then: None }],
            open: false,
            urgent: false,
        };
        let what = What::Promote { rooms, records };
        let until = Instant::now() + LAST_COPIES;
        // When the device has too much to do, it is left as it is.
        let _ = self.submit(job, UnderWay { cache: None, until, over: None, bytes, what });
    }

    /// Blocks are in the pool, and are to be kept there.
    pub(super) fn promoted(&mut self, rooms: Vec<Reserved>, records: Vec<Record>, bytes: u64) {
        Stats::add(&self.stats.bytes_in, bytes);
        match self.verify(&rooms) {
            Some(number) => {
                if let Some(verifying) = self.verifying.get_mut(&number) {
                    verifying.then = Then::Keep { rooms, records };
                }
                self.conclude(number);
            }
            None => {
                let Some(pool) = &self.pool else { return };
                let mut pool = lock(pool);
                for (room, record) in rooms.into_iter().zip(records) {
                    let _ = pool.seal(room, record);
                }
            }
        }
    }

    /// A device that does not sum holds nobody up for ever.
    pub(super) fn give_up_sums(&mut self, now: Instant) {
        for verifying in self.verifying.values_mut() {
            if !matches!(verifying.then, Then::Publish { until, .. } if now >= until + LAST_COPIES) {
                continue;
            }
            let nothing = Then::Nothing { _rooms: Vec::new() };
            if let Then::Publish { fills: (_, fills, rooms), slots, .. } =
                std::mem::replace(&mut verifying.then, nothing)
            {
                drop(slots);
                fail(fills, &late("summing the block on the device"));
                verifying.then = Then::Nothing { _rooms: rooms };
            }
        }
    }
}

impl Verifying {
    /// The daemon ends: whoever waits for it is told.
    pub(super) fn end(self, fault: &kv_block::Fault) {
        // Not dropped: each would wait for the device, and the process ends.
        std::mem::forget(self.summing);
        if let Then::Publish { fills: (_, fills, _), slots, .. } = self.then {
            drop(slots);
            fail(fills, fault);
        }
    }
}
