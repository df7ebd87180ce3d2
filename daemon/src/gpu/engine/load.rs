//! Blocks that go into pages: first those that a device's pool has, then those of host memory.
//!
//! Who calls hears of both as of one. The worker's events are recorded by whichever comes last, so what waits for them
//! waits for both. A block that comes from host memory for the second time is worth a place in the pool.

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kv_arena::Held;
use kv_block::layout::PageIndex;
use kv_block::{BlockKey, Fault};
use kv_gpu::copier::{Hosts, Job, JobToken, Step};
use kv_gpu::{Event, Place};
use tokio::sync::mpsc;

use super::{Engine, LoadNews, LoadOrder, Resident, Stats, UnderWay, What, fault_of};
use crate::gpu::cache::Paged;

/// Blocks of which it is remembered that they were loaded.
const ONCE_MAX: usize = 1 << 16;

/// A load under way.
pub(super) struct Loading {
    news: mpsc::UnboundedSender<LoadNews>,
    paged: Paged,
    by_layer: bool,
    until: Instant,
    /// What is to be recorded by the last part.
    events: Vec<Arc<Event>>,
    /// What the first part waits for.
    after: Option<Arc<Event>>,
    /// What comes from host memory, until that is begun.
    host: Vec<(Held, Arc<[PageIndex]>)>,
}

impl Loading {
    /// Whether nobody waits for it any more.
    pub(super) fn is_unheard(&self) -> bool {
        self.news.is_closed()
    }

    /// It is over.
    pub(super) fn end(self, result: Result<(), Fault>) {
        drop(self.host);
        let _ = self.news.send(LoadNews::Ended(result));
    }

    /// All of it in one step, or a step for each layer.
    fn parts(&self) -> Vec<Range<u16>> {
        let layers = self.paged.layers();
        let each = if self.by_layer { 1 } else { layers };
        (0..layers).step_by(each.into()).map(|layer| layer..layer + each).collect()
    }

    /// The steps of a job; `blocks` are the pages of each block and where it begins in its memory of the other side.
    fn steps(&self, blocks: &[(&[PageIndex], u64)], events: &[Arc<Event>]) -> Vec<Step> {
        let mut events = events.iter().cloned();
        // The first step waits, and the others are behind it.
        let mut after = self.after.clone();
        let step = |part: Range<u16>| {
            let mut pieces = Vec::new();
            for (at, (pages, offset)) in blocks.iter().enumerate() {
                self.paged.pieces(pages, part.clone(), (at as u32, *offset), &mut pieces);
            }
            Step { after: after.take(), pieces, then: events.next() }
        };
        self.parts().into_iter().map(step).collect()
    }
}

/// Blocks that were loaded from host memory lately, each remembered once.
#[derive(Default)]
pub(super) struct Once {
    keys: HashSet<BlockKey>,
    order: VecDeque<BlockKey>,
}

impl Once {
    /// Whether it was loaded before; from now on it was.
    fn again(&mut self, key: BlockKey) -> bool {
        if !self.keys.insert(key) {
            return true;
        }
        self.order.push_back(key);
        if self.order.len() > ONCE_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.keys.remove(&oldest);
        }
        false
    }
}

impl Engine {
    pub(super) fn load(&mut self, order: LoadOrder) {
        let LoadOrder { paged, blocks, by_layer, events, until, after, news } = order;
        let (mut places, mut host) = (Vec::new(), Vec::new());
        for (from, pages) in blocks {
            match from {
                Resident::Pool(place) => places.push((place, pages)),
                Resident::Host(held) => host.push((held, pages)),
            }
        }
        let load = Loading { news, paged, by_layer, until, events, after, host };
        let ready = load.paged.cache.check().and_then(|()| self.is_well());
        let ensured = load.host.iter().try_for_each(|(held, _)| self.arenas.ensure(&self.device, held));
        if let Err(fault) = ready.and_then(|()| ensured.map_err(|error| fault_of(&error))) {
            return load.end(Err(fault));
        }
        let number = self.number();
        self.loads.insert(number, load);
        if places.is_empty() { self.load_host(number, None) } else { self.load_pool(number, places) }
    }

    /// The part that pools have.
    fn load_pool(&mut self, number: u64, places: Vec<(Place, Arc<[PageIndex]>)>) {
        let Some(load) = self.loads.get(&number) else { return };
        let blocks: Vec<(&[PageIndex], u64)> =
            places.iter().map(|(place, pages)| (&pages[..], place.offset())).collect();
        // What waits for the events waits for what comes from host memory, too.
        let events = if load.host.is_empty() { &load.events[..] } else { &[] };
        let steps = load.steps(&blocks, events);
        let memories = places.iter().map(|(place, _)| place.memory().clone()).collect();
        let bytes = places.iter().map(|(place, _)| u64::from(place.bytes())).sum();
        let places = places.into_iter().map(|(place, _)| place).collect();
        let what = What::Spread { load: number, places };
        self.submit_load(number, Hosts::FromDevice(memories), steps, bytes, what, None);
    }

    /// The part that host memory has; all of it where no pool has any.
    fn load_host(&mut self, number: u64, before: Option<JobToken>) {
        let Some(load) = self.loads.get_mut(&number) else { return };
        let (held, pages): (Vec<Held>, Vec<Arc<[PageIndex]>>) =
            std::mem::take(&mut load.host).into_iter().unzip();
        let blocks: Vec<(&[PageIndex], u64)> = pages.iter().map(|pages| (&pages[..], 0)).collect();
        let steps = load.steps(&blocks, &load.events);
        let bytes = held.iter().map(|held| held.len() as u64).sum();
        self.submit_load(number, Hosts::From(held), steps, bytes, What::Load { load: number }, before);
    }

    fn submit_load(
        &mut self,
        number: u64,
        hosts: Hosts,
        steps: Vec<Step>,
        bytes: u64,
        what: What,
        before: Option<JobToken>,
    ) {
        let token = JobToken(self.number());
        let Some(load) = self.loads.get(&number) else { return };
        let (cache, until) = (Arc::clone(&load.paged.cache), load.until);
        let memories = cache.tensors.clone();
        let job = Job { token, memories, hosts, steps, open: false, urgent: true };
        if let Some(before) = before {
            self.goes_on(before, token);
        }
        if let Err(refused) =
            self.submit(job, UnderWay { cache: Some(cache), until, over: None, bytes, what })
        {
            let (job, _, fault) = *refused;
            drop(job);
            self.end_load(number, Err(fault));
        }
    }

    pub(super) fn end_load(&mut self, number: u64, result: Result<(), Fault>) {
        if let Some(load) = self.loads.remove(&number) {
            load.end(result);
        }
    }

    /// The load whose last part this job is.
    fn last_part(&self, token: JobToken) -> Option<&Loading> {
        match self.jobs.get(&token)?.what {
            What::Load { load } => self.loads.get(&load),
            What::Spread { load, .. } => self.loads.get(&load).filter(|load| load.host.is_empty()),
            _ => None,
        }
    }

    /// The device has all of a job in its queue.
    pub(super) fn queued(&self, token: JobToken) {
        if let Some(load) = self.last_part(token) {
            let _ = load.news.send(LoadNews::Queued);
        }
    }

    /// So many steps of a job are done.
    pub(super) fn arrived(&self, token: JobToken, steps: usize) {
        if let Some(load) = self.last_part(token).filter(|load| load.by_layer) {
            let _ = load.news.send(LoadNews::Layers(steps as u16));
        }
    }

    /// The part that pools have is in its pages, or will not be.
    pub(super) fn spread(&mut self, token: JobToken, number: u64, bytes: u64, result: Result<(), Fault>) {
        let Some(load) = self.loads.get(&number) else { return };
        let is_last = load.host.is_empty();
        if result.is_ok() {
            Stats::add(&self.stats.bytes_across, bytes);
        }
        match result.and_then(|()| self.is_well()) {
            Ok(()) if !is_last => self.load_host(number, Some(token)),
            result => self.end_load(number, result),
        }
    }

    /// The part of host memory is in its pages, or will not be.
    pub(super) fn loaded(
        &mut self,
        number: u64,
        bytes: u64,
        hosts: Option<Hosts>,
        result: Result<(), Fault>,
    ) {
        if result.is_ok() {
            Stats::add(&self.stats.bytes_in, bytes);
        }
        self.end_load(number, result.clone());
        // Not while others wait for the same way up: it is for later.
        let for_pool = self.pool.is_some() && self.loads.is_empty();
        let (Ok(()), Some(Hosts::From(held)), true) = (result, hosts, for_pool) else { return };
        let again = held.into_iter().filter(|held| self.once.again(held.record().key)).collect();
        self.promote(again);
    }
}
