//! Removals that somebody asked for: done when no crash brings the block back.
//!
//! The catalog forgets at once. A block that was on disk has a tombstone on its way to the log; the answer waits
//! for the last of them. (A block that is being written is in use, and is not removed.)

use std::collections::HashMap;

use kv_block::Fault;
use kv_block::code::Code;
use kv_tiers::store::StoreError;

use crate::brain::{Brain, Out, Timer, TimerId};
use crate::io::{Micros, Origin, Reply};

/// What becomes of the disk copy of a block that the catalog forgets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DiskCopy {
    /// It goes with its segment.
    WithSegment,
    /// A tombstone keeps it from coming back; the eviction or job of this number waits for that.
    Buried(Option<u64>),
}

/// What is under way for those who wait.
#[derive(Default)]
pub(crate) struct Removals {
    evictions: HashMap<u64, Eviction>,
}

struct Eviction {
    from: Origin,
    timer: Option<TimerId>,
    reply: Reply,
    left: usize,
    unburied: Unburied,
}

impl Removals {
    /// Nobody waits for these any more; their timers.
    pub(crate) fn forget(&mut self, mut gone: impl FnMut(Origin) -> bool) -> Vec<(Origin, Option<TimerId>)> {
        let gone = self.evictions.extract_if(|_, eviction| gone(eviction.from));
        gone.map(|(_, eviction)| (eviction.from, eviction.timer)).collect()
    }
}

impl Brain {
    /// Answers an eviction when the last of its `left` removals is durable.
    pub(crate) fn eviction_asked(
        &mut self,
        number: u64,
        (from, deadline): (Origin, Micros),
        left: usize,
        reply: Reply,
        out: &mut Out,
    ) {
        if left == 0 {
            return self.reply(from, reply, out);
        }
        let timer = self.start_timer(deadline, Timer::Eviction { number });
        self.removals
            .evictions
            .insert(number, Eviction { from, timer, reply, left, unburied: Unburied::default() });
    }

    /// A removal ended, well or not, for the eviction or job that waits for it.
    pub(crate) fn removal_ended(&mut self, number: u64, result: Result<(), StoreError>, out: &mut Out) {
        let Some(eviction) = self.removals.evictions.get_mut(&number) else {
            return self.job_removed(number, result);
        };
        eviction.unburied.count(result);
        eviction.left -= 1;
        if eviction.left > 0 {
            return;
        }
        let Some(eviction) = self.removals.evictions.remove(&number) else { return };
        self.cancel(eviction.timer);
        match eviction.unburied.fault() {
            None => self.reply(eviction.from, eviction.reply, out),
            Some(fault) => self.fault(eviction.from, fault, out),
        }
    }

    pub(crate) fn eviction_late(&mut self, number: u64, out: &mut Out) {
        let Some(eviction) = self.removals.evictions.remove(&number) else { return };
        let text = format!(
            "the blocks are evicted, but {} removals were not on disk in time; a crash could bring those back",
            eviction.left
        );
        self.fault(eviction.from, Fault::new(Code::DeadlinePassed, text), out);
    }
}

/// Removals that did not reach the disk.
#[derive(Default)]
pub(crate) struct Unburied {
    count: usize,
    newest: Option<StoreError>,
}

impl Unburied {
    pub(crate) fn count(&mut self, result: Result<(), StoreError>) {
        if let Err(error) = result {
            self.count += 1;
            self.newest = Some(error);
        }
    }

    /// What that means for whoever asked.
    pub(crate) fn fault(&self) -> Option<Fault> {
        let error = self.newest.as_ref()?;
        let count = self.count;
        let text = format!(
            "the blocks are evicted, but {count} removals did not reach the disk, and a restart may undo them: {error}"
        );
        Some(Fault::new(error.code(), text))
    }
}
