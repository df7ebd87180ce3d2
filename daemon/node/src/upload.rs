//! Blocks on their way to the object tier, which all nodes share.
//!
//! ```text
//!   read, pinned, important --note--> looked at when due -- worth it --> Upload --> packed outside: Taken or Known
//!   about to leave host memory -----> looked at now ------- worth it ----'          '-> its slot may go
//!                                                        '- not -------> it leaves as it is
//! ```
//! Which blocks are worth it says [`kv_tiers::upload`]. A copy is made outside as soon as that can be: a block is held
//! for no longer. What became of its pack is heard only when that was lost, and then it is a candidate once more.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use kv_arena::Entry;
use kv_block::{BlockKey, Generation, Priority, SlotId};
use kv_tiers::upload::{Upload, UploadCandidate, upload};

use crate::brain::{Brain, Out};
use crate::io::{Command, Micros, Now, UploadDone, UploadToken};

/// Blocks that wait to be looked at. What is noted beyond that is noted again when it is read again.
const NOTED_MAX: usize = 1 << 16;
/// Of those, how many are looked at in one tick.
const LOOKS_MAX: usize = 256;
/// When a block is looked at again that could not go, in milliseconds.
const AGAIN_MS: u64 = 1000;
/// When it is offered again after it was refused, and after its pack was lost, in milliseconds.
const REFUSED_AGAIN_MS: u64 = 5_000;
const LOST_AGAIN_MS: u64 = 30_000;

/// What is noted, under way, and up.
#[derive(Default)]
pub(crate) struct Uploads {
    /// Noted since the last tick.
    fresh: Vec<BlockKey>,
    /// When each is looked at, and since when it is noted.
    due: BTreeMap<(Micros, u64), (BlockKey, Micros)>,
    noted: HashSet<BlockKey>,
    under_way: HashMap<UploadToken, UnderWay>,
    /// In host memory, and in the object tier or on the way there.
    up: HashSet<BlockKey>,
}

struct UnderWay {
    key: BlockKey,
    slot: SlotId,
    generation: Generation,
    /// Its slot is wanted back.
    leave: bool,
}

impl Uploads {
    /// A block is a candidate from now on. Looked at with the next tick, or later.
    fn note(&mut self, key: &BlockKey) {
        if self.up.contains(key) || self.noted.len() >= NOTED_MAX || !self.noted.insert(*key) {
            return;
        }
        self.fresh.push(*key);
    }

    /// It is not in host memory any more.
    pub(crate) fn left_host(&mut self, key: &BlockKey) {
        self.up.remove(key);
    }

    /// It came from the object tier.
    pub(crate) fn came(&mut self, key: &BlockKey) {
        self.up.insert(*key);
    }

    /// How many are being copied.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way.len()
    }
}

impl Brain {
    /// A block in host memory was read, or is to be kept: it may be worth a place in the object tier.
    pub(crate) fn note_for_upload(&mut self, key: &BlockKey) {
        if self.config.object.is_some() {
            self.uploads.note(key);
        }
    }

    /// A block has entered host memory: those that are asked for go without being read first.
    pub(crate) fn note_if_asked(&mut self, key: &BlockKey, priority: Priority) {
        let Some(object) = &self.config.object else { return };
        if priority == Priority::High || object.upload.reads_min == 0 || self.pins.holds(key) {
            self.uploads.note(key);
        }
    }

    /// Looks at what is due.
    pub(crate) fn look_at_uploads(&mut self, now: Now, out: &mut Out) {
        let Some(object) = self.config.object.clone() else { return };
        for key in std::mem::take(&mut self.uploads.fresh) {
            let number = self.number();
            self.uploads.due.insert((now.micros, number), (key, now.micros));
        }
        for _ in 0..LOOKS_MAX {
            let Some(first) = self.uploads.due.first_entry() else { break };
            if first.key().0 > now.micros || self.uploads.under_way.len() >= object.uploads_max {
                break;
            }
            let (key, since) = first.remove();
            let again = match self.judge(now, &key, since) {
                Some(verdict) if verdict.goes() => {
                    // What somebody pinned while it lies on disk alone has to come up first.
                    let entry = self.catalog.find(&key);
                    let below = entry.filter(|entry| entry.host.is_none());
                    let coming = below.is_some_and(|entry| self.onboard(now, &entry, out).is_ok());
                    if coming || !self.start_upload(&key, false, out) {
                        coming.then_some(AGAIN_MS)
                    } else {
                        None
                    }
                }
                Some(Upload::TooYoung) => Some(object.upload.age_min.as_millis() as u64),
                _ => None,
            };
            match again {
                Some(after_ms) => {
                    let number = self.number();
                    self.uploads.due.insert((now.micros.plus_ms(after_ms), number), (key, since));
                }
                None => {
                    self.uploads.noted.remove(&key);
                }
            }
        }
    }

    /// What becomes of a noted block; `None` when it is gone, or up already. On disk alone, only what is asked for counts.
    fn judge(&self, now: Now, key: &BlockKey, since: Micros) -> Option<Upload> {
        let entry = self.catalog.find(key).filter(|_| !self.uploads.up.contains(key))?;
        let verdict = self.verdict(now, &entry, Some(since))?;
        match (entry.host, entry.disk) {
            (Some(_), _) => Some(verdict),
            (None, Some(_)) => Some(verdict).filter(|verdict| *verdict == Upload::Asked),
            (None, None) => None,
        }
    }

    /// `since` when it is noted; `None` for one that is about to leave host memory.
    fn verdict(&self, now: Now, entry: &Entry, since: Option<Micros>) -> Option<Upload> {
        let object = self.config.object.as_ref()?;
        let life = (entry.expires_at != 0).then(|| entry.expires_at.saturating_sub(now.unix));
        let age = since.map_or(0, |since| now.micros.0.saturating_sub(since.0));
        let candidate = UploadCandidate {
            priority: entry.priority,
            pinned: self.pins.holds(&entry.key),
            reads: entry.frequency.into(),
            age: Duration::from_micros(age),
            life: life.map(|seconds| Duration::from_secs(seconds.into())),
            leaving: since.is_none(),
        };
        Some(upload(&candidate, &object.upload))
    }

    /// A block is about to leave host memory. True when it goes up first, and leaves after that.
    pub(crate) fn upload_before_it_leaves(&mut self, now: Now, entry: &Entry, out: &mut Out) -> bool {
        let Some(object) = &self.config.object else { return false };
        if self.uploads.up.contains(&entry.key) || self.uploads.under_way.len() >= object.uploads_max {
            return false;
        }
        let goes = self.verdict(now, entry, None).is_some_and(Upload::goes);
        goes && self.start_upload(&entry.key, true, out)
    }

    /// Hands a block in host memory over. False when it cannot be.
    fn start_upload(&mut self, key: &BlockKey, leave: bool, out: &mut Out) -> bool {
        let Some(entry) = self.catalog.find(key) else { return false };
        let held = entry.host.and_then(|(slot, generation)| self.host.hold(slot, generation));
        let Some(held) = held else { return false };
        if !held.is_verified() && !self.verify_held(&held) {
            drop(held);
            self.host_corrupt(key);
            return false;
        }
        let upload = UploadToken(self.number());
        let (slot, generation) = (held.id(), held.generation());
        self.uploads.under_way.insert(upload, UnderWay { key: *key, slot, generation, leave });
        self.leaving += usize::from(leave);
        // It may be kept longer by now than when it was sealed.
        let expires_at = entry.expires_at;
        out.push(Command::Upload {
            upload,
            held,
            binding: entry.binding,
            expires_at,
            parent: self.order.before(key),
        });
        true
    }

    pub(crate) fn upload_done(&mut self, now: Now, done: UploadDone, out: &mut Out) {
        match done {
            UploadDone::Lost { keys } => {
                for key in keys {
                    if self.uploads.up.remove(&key) {
                        self.offer_again(now, &key, LOST_AGAIN_MS);
                    }
                }
            }
            UploadDone::Taken { upload, bytes } => {
                self.counters.upload_blocks += 1;
                self.counters.upload_bytes += u64::from(bytes);
                self.upload_ended(now, upload, true, out);
            }
            UploadDone::Known { upload } => self.upload_ended(now, upload, true, out),
            UploadDone::Refused { upload } => self.upload_ended(now, upload, false, out),
        }
    }

    fn upload_ended(&mut self, now: Now, upload: UploadToken, up: bool, out: &mut Out) {
        let Some(UnderWay { key, slot, generation, leave }) = self.uploads.under_way.remove(&upload) else {
            return;
        };
        self.leaving -= usize::from(leave);
        let there = self.catalog.find(&key).filter(|entry| entry.host == Some((slot, generation)));
        if there.is_some() && up {
            self.uploads.up.insert(key);
        } else if there.is_some() && !leave {
            self.offer_again(now, &key, REFUSED_AGAIN_MS);
        }
        if let Some(entry) = there.filter(|_| leave) {
            if self.pins.holds(&key) {
                self.host.keep(slot, entry.priority);
            } else {
                self.depart(now, &entry, slot, generation, out);
            }
        }
        self.retry_stalled(now, out);
    }

    fn offer_again(&mut self, now: Now, key: &BlockKey, after_ms: u64) {
        if self.uploads.noted.len() < NOTED_MAX && self.uploads.noted.insert(*key) {
            let number = self.number();
            let due = now.micros.plus_ms(after_ms);
            self.uploads.due.insert((due, number), (*key, now.micros));
        }
    }
}
