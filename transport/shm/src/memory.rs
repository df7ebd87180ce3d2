//! The memory file of one session with one shard: made by the daemon, checked and mapped by both.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::region::Region;
use crate::ring::worker_ends;
use crate::{Bell, Collector, Error, Layout, ShardRing, ShardStaging, Submitter, WorkerStaging};

/// Nobody can make the file shorter (a reader would die), longer, or take these promises back.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// What the daemon keeps of a session with one shard.
pub struct ShardEnd {
    /// Both rings.
    pub ring: ShardRing,
    /// The worker's staging area, to copy from.
    pub staging: ShardStaging,
}

/// What the worker keeps of a session with one shard.
pub struct WorkerEnd {
    /// To ask.
    pub submitter: Submitter,
    /// To hear the answers.
    pub collector: Collector,
    /// Where the bytes of blocks are put.
    pub staging: WorkerStaging,
}

/// The daemon's side: makes and seals the memory file and a bell. Gives the shard's end, and the two
/// descriptors that the worker gets: memory file, then its end of the bell.
pub fn create(layout: Layout) -> Result<(ShardEnd, [OwnedFd; 2]), Error> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("kvd-ring", flags).map_err(Error::io("creating the ring memory"))?;
    rustix::fs::ftruncate(&file, layout.total_bytes()).map_err(Error::io("sizing the ring memory"))?;
    rustix::fs::fcntl_add_seals(&file, SEALS).map_err(Error::io("sealing the ring memory"))?;
    let (worker_bell, shard_bell) = Bell::pair()?;
    let region = Region::map(file.as_fd(), layout)?;
    let staging = ShardStaging::new(std::sync::Arc::clone(&region));
    let ring = ShardRing::new(region, shard_bell);
    Ok((ShardEnd { ring, staging }, [file, worker_bell.into()]))
}

/// The worker's side: checks and maps what [`create`] made on the daemon's.
pub fn open(layout: Layout, [file, bell]: [OwnedFd; 2]) -> Result<WorkerEnd, Error> {
    check_seals(file.as_fd())?;
    let found = rustix::fs::fstat(&file).map_err(Error::io("measuring the ring memory"))?.st_size as u64;
    let wanted = layout.total_bytes();
    if found != wanted {
        return Err(Error::Size { found, wanted });
    }
    let region = Region::map(file.as_fd(), layout)?;
    let staging = WorkerStaging::new(std::sync::Arc::clone(&region));
    let (submitter, collector) = worker_ends(&region, Bell::from(bell));
    Ok(WorkerEnd { submitter, collector, staging })
}

/// Refuses a memory file that somebody could still cut short.
pub fn check_seals(file: BorrowedFd<'_>) -> Result<(), Error> {
    let found = rustix::fs::fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    if !found.contains(SEALS) {
        return Err(Error::Unsealed { found: found.bits(), wanted: SEALS.bits() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use kv_block::code::Code;
    use kv_block::{BindingId, BlockKey, Priority};

    use super::*;
    use crate::{Completion, Outcome, Request, Submission};

    fn pair(entries: u32, staging_bytes: u64) -> (ShardEnd, WorkerEnd) {
        let layout = Layout::new(entries, staging_bytes).unwrap();
        let (shard, fds) = create(layout).unwrap();
        (shard, open(layout, fds).unwrap())
    }

    fn ping(id: u64) -> Submission {
        Submission { id, deadline_us: 0, request: Request::Ping }
    }

    #[test]
    fn what_a_worker_asks_is_answered_in_order_across_many_turns_of_the_ring() {
        let (mut shard, mut worker) = pair(8, 0);
        let serving = std::thread::spawn(move || {
            let (mut answered, mut taken) = (0, Vec::new());
            while answered < 20_000 {
                if shard.ring.take(5, &mut taken).unwrap() == 0 {
                    if shard.ring.doze().unwrap() {
                        shard.ring.bell().wait(Duration::from_secs(10)).unwrap();
                        shard.ring.wake();
                    }
                    continue;
                }
                for submission in taken.drain(..) {
                    let id = submission.unwrap().id;
                    shard.ring.push(&Completion { id, outcome: Outcome::Done }).unwrap();
                    answered += 1;
                }
                shard.ring.notify();
            }
        });
        let (mut sent, mut seen, mut got) = (0, 0, Vec::new());
        while seen < 20_000 {
            while sent < 20_000 && worker.submitter.submit(&ping(sent)).is_ok() {
                sent += 1;
            }
            worker.submitter.kick();
            worker.collector.wait(10, Duration::from_secs(10), &mut got).unwrap();
            for completion in got.drain(..) {
                assert_eq!(completion, Completion { id: seen, outcome: Outcome::Done });
                seen += 1;
            }
        }
        serving.join().unwrap();
    }

    #[test]
    fn a_worker_that_does_not_collect_stops_itself() {
        let (mut shard, mut worker) = pair(4, 0);
        let mut taken = Vec::new();
        for id in 0..4 {
            worker.submitter.submit(&ping(id)).unwrap();
        }
        assert!(matches!(worker.submitter.submit(&ping(4)), Err(Error::Full { entries: 4 })));
        assert_eq!(shard.ring.take(100, &mut taken).unwrap(), 4);
        for id in 0..4 {
            shard.ring.push(&Completion { id, outcome: Outcome::Done }).unwrap();
        }
        let done = Completion { id: 9, outcome: Outcome::Done };
        assert!(matches!(shard.ring.push(&done), Err(Error::Unsolicited)));
        assert!(worker.submitter.submit(&ping(4)).is_err(), "nothing was collected");
        let mut got = Vec::new();
        assert_eq!(worker.collector.poll(&mut got).unwrap(), 4);
        worker.submitter.submit(&ping(4)).unwrap();
        assert!(!shard.ring.doze().unwrap(), "there is something to take");
        assert_eq!(shard.ring.take(0, &mut taken).unwrap(), 0);
        assert_eq!(shard.ring.take(1, &mut taken).unwrap(), 1);
        assert!(shard.ring.doze().unwrap());
    }

    #[test]
    fn the_shard_takes_nothing_while_completions_lie_uncollected() {
        let (mut shard, mut worker) = pair(2, 0);
        let mut taken = Vec::new();
        let control = Region::map_for_test(&mut worker);
        worker.submitter.submit(&ping(0)).unwrap();
        worker.submitter.submit(&ping(1)).unwrap();
        shard.ring.take(9, &mut taken).unwrap();
        shard.ring.push(&Completion { id: 0, outcome: Outcome::Done }).unwrap();
        shard.ring.push(&Completion { id: 1, outcome: Outcome::Done }).unwrap();
        // A worker that breaks its own rule: two more, with two completions uncollected.
        control.control().submission_tail.0.store(4, Ordering::Release);
        assert_eq!(shard.ring.take(9, &mut taken).unwrap(), 0);
        assert!(shard.ring.doze().unwrap(), "nothing that could be answered");
    }

    #[test]
    fn impossible_indices_end_the_session() {
        for (tail, head) in [(3, 0), (u32::MAX, 0), (0, 1), (0, u32::MAX - 7)] {
            let (mut shard, mut worker) = pair(2, 0);
            let region = Region::map_for_test(&mut worker);
            region.control().submission_tail.0.store(tail, Ordering::Release);
            region.control().completion_head.0.store(head, Ordering::Release);
            assert!(matches!(shard.ring.take(9, &mut Vec::new()), Err(Error::Index { .. })));
            assert!(shard.ring.doze().is_err());
        }
        let (_shard, mut worker) = pair(2, 0);
        let region = Region::map_for_test(&mut worker);
        region.control().completion_tail.0.store(3, Ordering::Release);
        assert!(matches!(worker.collector.poll(&mut Vec::new()), Err(Error::Index { .. })));
    }

    #[test]
    fn a_worker_that_scribbles_everything_at_full_speed_harms_nobody() {
        let (mut shard, mut worker) = pair(16, 4 * crate::PAGE);
        let region = Region::map_for_test(&mut worker);
        let (stop, rounds, near) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut state = 0x9e37_79b9_7f4a_7c15u64;
                while !stop.load(Ordering::Relaxed) {
                    region.scribble(|| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        // Mostly plausible indices, so that the checks behind the first one are reached.
                        let near = near.load(Ordering::Relaxed);
                        if state & 3 == 0 { state } else { near.wrapping_add((state >> 8) & 15) }
                    });
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
            let (mut out, mut took, mut refused, mut calls) = (Vec::new(), 0u64, 0u64, 0u64);
            while rounds.load(Ordering::Relaxed) < 2_000 || took < 1_000 {
                calls += 1;
                if calls > 50_000_000 {
                    break;
                }
                match shard.ring.take(7, &mut out) {
                    Ok(count) => {
                        assert!(count <= 7 && out.len() == count, "work is bounded");
                        took += count as u64;
                        near.store(took, Ordering::Relaxed);
                    }
                    Err(Error::Index { .. }) => refused += 1,
                    Err(other) => panic!("{other}"),
                }
                assert!(shard.ring.in_flight() <= 16, "never more in flight than entries");
                for submission in out.drain(..) {
                    let id = match submission {
                        Ok(Submission { id, request: Request::Put { offset, bytes, .. }, .. }) => {
                            if let Ok(range) = shard.staging.range(offset, bytes) {
                                range.copy_to(0, &mut vec![0; bytes as usize]);
                            }
                            id
                        }
                        Ok(submission) => submission.id,
                        Err(malformed) => malformed.id,
                    };
                    let outcome = Outcome::Fault { code: Code::BadRequest, retry_after_ms: 0 };
                    shard.ring.push(&Completion { id, outcome }).unwrap();
                }
                shard.ring.notify();
                let _ = shard.ring.doze();
                shard.ring.wake();
            }
            stop.store(true, Ordering::Relaxed);
            assert!(refused > 0, "the scribbler never reached an index");
        });
    }

    #[test]
    fn bytes_put_into_a_slot_arrive_at_the_shard() {
        let (mut shard, mut worker) = pair(4, 64 * crate::PAGE);
        let mut slot = worker.staging.take(10_000).unwrap();
        slot.iter_mut().enumerate().for_each(|(at, byte)| *byte = at as u8);
        let request = Request::Put {
            key: BlockKey([1; 16]),
            binding: BindingId(0),
            offset: slot.offset(),
            bytes: slot.len() as u32,
            priority: Priority::Normal,
            ttl_s: 0,
            durable: false,
            after: None,
        };
        worker.submitter.submit(&Submission { id: 1, deadline_us: 9, request }).unwrap();
        let mut taken = Vec::new();
        shard.ring.take(1, &mut taken).unwrap();
        let Ok(Submission { request: Request::Put { offset, bytes, .. }, .. }) = taken[0] else { panic!() };
        let mut landed = vec![0; bytes as usize];
        shard.staging.range(offset, bytes).unwrap().copy_to(0, &mut landed);
        assert!(landed.iter().enumerate().all(|(at, byte)| *byte == at as u8) && landed.len() == 10_000);
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let layout = Layout::new(2, 0).unwrap();
        let (_shard, [_, bell]) = create(layout).unwrap();
        let open_with = |seals: SealFlags| {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = rustix::fs::memfd_create("test", flags).unwrap();
            rustix::fs::ftruncate(&file, layout.total_bytes()).unwrap();
            rustix::fs::fcntl_add_seals(&file, seals).unwrap();
            open(layout, [file, bell.try_clone().unwrap()])
        };
        for seals in [SealFlags::empty(), SealFlags::SHRINK, SealFlags::SHRINK | SealFlags::GROW] {
            assert!(matches!(open_with(seals), Err(Error::Unsealed { .. })), "{seals:?}");
        }
        assert!(open_with(SEALS).is_ok());
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(layout.total_bytes()).unwrap();
        let refused = open(layout, [plain.into(), bell.try_clone().unwrap()]);
        assert!(matches!(refused, Err(Error::Unsealed { .. })), "an ordinary file has no seals");
    }

    #[test]
    fn memory_of_another_length_is_refused() {
        let (_shard, fds) = create(Layout::new(2, 0).unwrap()).unwrap();
        let refused = open(Layout::new(2, crate::PAGE).unwrap(), fds);
        assert!(matches!(refused, Err(Error::Size { found: 8192, wanted: 12288 })));
    }

    #[test]
    fn a_sealed_file_cannot_be_cut() {
        let (_shard, [file, _]) = create(Layout::new(2, 0).unwrap()).unwrap();
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        assert!(rustix::fs::ftruncate(&file, 1 << 20).is_err());
        assert!(rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).is_err());
    }
}
