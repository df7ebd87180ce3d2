//! Blocks that come from pages.
//!
//! ```text
//!   without a pool, or layer by layer    pages --Save--> slots --> sums --> shards
//!   with one                             pages --Gather--> pool --Drain--> slots --> sums --> shards
//!                                                           '--- stays there, once its checksum is known
//! ```
//! Fills of one call that come together are one job. With a pool the many small pieces are copied within the device's
//! memory, and what goes over the bus are whole blocks. Both copies of a block have the same source, the pool's: so the
//! checksum that is made of the one holds for the other.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kv_arena::Slot;
use kv_block::code::Code;
use kv_block::layout::PageIndex;
use kv_block::{BlockKey, Fault};
use kv_gpu::Reserved;
use kv_gpu::copier::{Hosts, Job, JobToken, Step};
use kv_node::FillToken;

use super::order::unfinished;
use super::verify::whole_blocks;
use super::{Engine, FillOrder, Save, Stats, TRY_AGAIN, UnderWay, What, fault_of, late, lock};
use crate::gpu::cache::Cache;
use crate::gpu::sums::{Room, Sum};
use crate::shard::ShardHandle;

/// A slot that is being filled: whose, and with what.
pub(super) struct Filling {
    pages: Arc<[PageIndex]>,
    shard: ShardHandle,
    fill: FillToken,
    key: BlockKey,
    bytes: u32,
}

/// Fills of one call, and the places of their blocks in the pool, if they have such.
pub(super) type Fills = (Arc<Save>, Vec<Filling>, Vec<Reserved>);

/// Tells the shards that their slots were not filled.
pub(super) fn fail(fills: Vec<Filling>, fault: &Fault) {
    for Filling { shard, fill, .. } in fills {
        shard.tell_filled(fill, Err(fault.clone()));
    }
}

/// The copies of a save for what became ready from the `from`th time on, one step for each; `places` is where the
/// blocks begin in the memories of the other side.
fn steps_of(
    save: &Save,
    ready: &[(u16, Option<Arc<kv_gpu::Event>>)],
    from: usize,
    fills: &[Filling],
    place: impl Fn(usize) -> u64,
) -> Vec<Step> {
    let begun = |at: usize| at.checked_sub(1).map_or(0, |before| ready[before].0);
    let step = |at: usize| {
        let (layers, event) = &ready[at];
        let part: Range<u16> = begun(at)..*layers;
        let mut pieces = Vec::new();
        for (other, fill) in fills.iter().enumerate() {
            save.paged.pieces(&fill.pages, part.clone(), (other as u32, place(other)), &mut pieces);
        }
        Step { after: event.clone(), pieces, then: None }
    };
    (from..ready.len()).map(step).collect()
}

impl Engine {
    /// Begins what has come since it was called last, the fills of each call together.
    pub(super) fn begin_fills(&mut self) {
        let mut fills = std::mem::take(&mut self.fills);
        while let Some(first) = fills.first() {
            let save = Arc::clone(&first.save);
            let (same, others) = fills.into_iter().partition(|fill| Arc::ptr_eq(&fill.save, &save));
            fills = others;
            self.begin_save(&save, same);
        }
    }

    fn begin_save(&mut self, save: &Arc<Save>, orders: Vec<FillOrder>) {
        let (mut slots, mut fills) = (Vec::with_capacity(orders.len()), Vec::with_capacity(orders.len()));
        for FillOrder { pages, shard, fill, key, bytes, slot, .. } in orders {
            slots.push(slot);
            fills.push(Filling { pages, shard, fill, key, bytes });
        }
        if let Err(fault) = self.can_save(save, &slots).and_then(|()| self.may_stay_open(save, &fills)) {
            // The slots first, here and below, so that the shards find them free.
            drop(slots);
            return fail(fills, &fault);
        }
        let (ready, whole, over) = {
            let state = save.state();
            (state.ready.clone(), state.is_whole(save.paged.layers()), state.over)
        };
        if over {
            // Whoever called is gone, or all was answered: the pages may hold something else by now.
            drop(slots);
            return fail(fills, &unfinished());
        }
        let rooms = if whole { self.rooms(&fills) } else { Vec::new() };
        let cache = Arc::clone(&save.paged.cache);
        let (token, bytes) = (JobToken(self.number()), bytes_of(&fills));
        let gathers = !rooms.is_empty();
        let place = |at: usize| if gathers { rooms[at].offset() } else { 0 };
        let steps = steps_of(save, &ready, 0, &fills, place);
        let memories = cache.tensors.clone();
        let (hosts, what) = if gathers {
            let pool = rooms.iter().map(|room| room.memory().clone()).collect();
            let what = What::Gather { save: Arc::clone(save), fills, slots, rooms };
            (Hosts::ToDevice(pool), what)
        } else {
            let what = What::Save { save: Arc::clone(save), fills, given: ready.len() };
            (Hosts::To(slots), what)
        };
        let job = Job { token, memories, hosts, steps, open: !whole, urgent: false };
        let under_way = UnderWay { cache: Some(cache), until: save.until, over: None, bytes, what };
        self.try_save(job, under_way);
    }

    fn can_save(&self, save: &Save, slots: &[Slot]) -> Result<(), Fault> {
        save.paged.cache.check()?;
        self.is_well()?;
        if Instant::now() >= save.until {
            return Err(late("copying the block from the device"));
        }
        let ensured = slots.iter().try_for_each(|slot| self.arenas.ensure(&self.device, slot));
        ensured.map_err(|error| fault_of(&error))
    }

    /// Slots that wait for layers are nobody else's meanwhile: there is a bound to them.
    fn may_stay_open(&self, save: &Save, fills: &[Filling]) -> Result<(), Fault> {
        if save.state().is_whole(save.paged.layers()) {
            return Ok(());
        }
        let open = self.jobs.values().filter_map(|job| match &job.what {
            What::Save { save, .. } if !save.state().is_whole(save.paged.layers()) => Some(job.bytes),
            _ => None,
        });
        let open = open.sum::<u64>().saturating_add(bytes_of(fills));
        if open <= self.open_bytes_max {
            return Ok(());
        }
        let text = format!(
            "{open} bytes of blocks would wait for their layers, {} may (a quarter of host memory)",
            self.open_bytes_max
        );
        Err(Fault::new(Code::QueueFull, text).retry_after(TRY_AGAIN))
    }

    /// Room in the pool for all of these, or for none.
    fn rooms(&self, fills: &[Filling]) -> Vec<Reserved> {
        let Some(pool) = &self.pool else { return Vec::new() };
        let mut pool = lock(pool);
        let rooms: Result<Vec<_>, _> = fills.iter().map(|fill| pool.reserve(fill.bytes)).collect();
        rooms.unwrap_or_default()
    }

    fn try_save(&mut self, job: Job, under_way: UnderWay) {
        let Err(refused) = self.submit(job, under_way) else { return };
        let (job, under_way, fault) = *refused;
        drop(job);
        match under_way.what {
            What::Save { fills, .. } => fail(fills, &fault),
            What::Drain { save, fills, rooms, verify } => {
                fail(fills, &fault);
                if let Some(number) = verify {
                    self.drained(number, (save, Vec::new(), rooms), None, Instant::now());
                }
            }
            What::Gather { fills, slots, .. } => {
                drop(slots);
                fail(fills, &fault);
            }
            What::Spread { .. } | What::Load { .. } | What::Promote { .. } => {}
        }
    }

    /// More layers of a call are ready, or no more will be.
    pub(super) fn more_is_ready(&mut self, save: &Arc<Save>) {
        // Those that come now have it with the rest.
        self.begin_fills();
        let mut broken = Vec::new();
        for (token, job) in &mut self.jobs {
            let (What::Save { save: this, .. } | What::Gather { save: this, .. }) = &job.what else {
                continue;
            };
            if !Arc::ptr_eq(this, save) || job.over.is_some() {
                continue;
            }
            let state = save.state();
            if state.over {
                broken.push((*token, unfinished()));
                continue;
            }
            let What::Save { fills, given, .. } = &mut job.what else { continue };
            let last = state.ready.len();
            let whole = state.is_whole(save.paged.layers());
            let steps = steps_of(save, &state.ready, *given, fills, |_| 0);
            for (at, step) in (*given..last).zip(steps) {
                if let Err(error) = self.copier.add(*token, step, whole && at + 1 == last) {
                    broken.push((*token, fault_of(&error)));
                    break;
                }
            }
            *given = last;
        }
        for (token, fault) in broken {
            self.give_up(token, fault);
        }
    }

    /// The blocks are together in the pool: from there they go into their slots.
    pub(super) fn gathered(
        &mut self,
        (token, cache, until): (JobToken, Option<Arc<Cache>>, Instant),
        (save, fills, rooms): Fills,
        slots: Vec<Slot>,
        bytes: u64,
        result: Result<(), Fault>,
    ) {
        if let Err(fault) = result.and_then(|()| self.is_well()) {
            drop((slots, rooms));
            return fail(fills, &fault);
        }
        Stats::add(&self.stats.bytes_across, bytes);
        let next = JobToken(self.number());
        let job = Job {
            token: next,
            memories: rooms.iter().map(|room| room.memory().clone()).collect(),
            hosts: Hosts::To(slots),
            steps: vec![Step { after: None, pieces: whole_blocks(&rooms), then: None }],
            open: false,
            urgent: false,
        };
        let verify = self.verify(&rooms);
        let what = What::Drain { save, fills, rooms, verify };
        self.goes_on(token, next);
        self.try_save(job, UnderWay { cache, until, over: None, bytes, what });
    }

    /// The blocks are in their slots, or will not be.
    pub(super) fn saved(
        &mut self,
        (save, fills, rooms): Fills,
        (until, verify): (Instant, Option<u64>),
        bytes: u64,
        hosts: Option<Hosts>,
        result: Result<(), Fault>,
    ) {
        let slots = match (result, hosts) {
            (Ok(()), Some(Hosts::To(slots))) => slots,
            (result, hosts) => {
                drop(hosts);
                let bug = "a copy from a device ended without what it was made into";
                fail(fills, &result.err().unwrap_or_else(|| Fault::new(Code::Bug, bug)));
                if let Some(number) = verify {
                    self.drained(number, (save, Vec::new(), rooms), None, until);
                }
                return;
            }
        };
        Stats::add(&self.stats.bytes_out, bytes);
        match verify {
            Some(number) => self.drained(number, (save, fills, rooms), Some(slots), until),
            None => self.publish((save, fills, rooms), slots, &[]),
        }
    }

    /// Has the blocks summed where they landed, and published. `sums` are those of the device, where it made some.
    pub(super) fn publish(&mut self, (save, fills, rooms): Fills, slots: Vec<Slot>, sums: &[Option<u64>]) {
        let mut rooms = rooms.into_iter();
        for (at, (Filling { shard, fill, key, bytes, .. }, slot)) in fills.into_iter().zip(slots).enumerate()
        {
            let pool = self.pool.clone();
            let room = rooms.next().zip(pool).map(|(reserved, pool)| Room { reserved, pool, tag: save.tag });
            let expected = sums.get(at).copied().flatten();
            let stats = Arc::clone(&self.stats);
            let sum = Sum { save: Arc::clone(&save), shard, fill, key, bytes, slot, room, expected, stats };
            if let Err(back) = self.sums.send(sum) {
                let Sum { shard, fill, slot, .. } = back.0;
                drop(slot);
                shard.tell_filled(fill, Err(super::ends()));
            }
        }
    }
}

fn bytes_of(fills: &[Filling]) -> u64 {
    fills.iter().map(|fill| u64::from(fill.bytes)).sum()
}
