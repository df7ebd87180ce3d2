//! The copier: jobs in steps under bounds, what they own meanwhile, and that each ends once.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::{Cuda, LONG, cuda, fake, low, pattern, read, write};
use kv_arena::{Geometry, Held, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Priority as Importance, Record};
use kv_gpu::{
    Copier, CopierConfig, CopyDone, Device, DeviceMemory, Error, HostRegion, Hosts, Job, JobToken, Method,
    PagePiece, Step,
};

const PAGE: u64 = 4096;

fn arena() -> ShardMemory {
    ShardMemory::anonymous(Geometry { regions: 8, region_bytes: 2 << 20, table_entries_max: 64 }).unwrap()
}

fn sealed(arena: &ShardMemory, bytes: &[u8]) -> Held {
    let mut slot = arena.slab().take(bytes.len() as u32).unwrap();
    let key = BlockKey([bytes.len() as u8; 16]);
    let checksum = slot.copy_from(&key, bytes);
    let (tag, priority) = (BindingTag(1), Importance::default());
    slot.seal(&Record { key, checksum, bytes: bytes.len() as u32, tag, priority, expires_at: 0 })
}

fn copier(device: &Device, change: impl FnOnce(&mut CopierConfig)) -> Copier {
    let mut config = CopierConfig::default();
    change(&mut config);
    Copier::new(device, config).unwrap()
}

fn job(token: u64, memories: &[&DeviceMemory], hosts: Hosts, steps: Vec<Step>) -> Job {
    let memories = memories.iter().copied().cloned().collect();
    Job { token: JobToken(token), memories, hosts, steps, open: false, urgent: false }
}

fn step(pieces: &[PagePiece]) -> Step {
    Step { after: None, pieces: pieces.to_vec(), then: None }
}

/// All of one and the other from the beginning.
fn whole(bytes: u64) -> Step {
    step(&[PagePiece { memory: 0, device_offset: 0, other: 0, other_offset: 0, bytes }])
}

/// What became of a job, when it is over.
struct End {
    queued: bool,
    steps: usize,
    hosts: Option<Hosts>,
    result: Result<(), Error>,
}

/// Polls until so many jobs have ended. Nothing is said of one that has.
fn ends(copier: &mut Copier, count: usize) -> BTreeMap<u64, End> {
    let (mut ended, mut open) = (BTreeMap::new(), BTreeMap::<u64, (bool, usize)>::new());
    let (started, mut done) = (std::time::Instant::now(), Vec::new());
    while ended.len() < count {
        assert!(started.elapsed() < LONG, "{} of {count} jobs ended", ended.len());
        copier.poll(&mut done);
        for done in done.drain(..) {
            match done {
                CopyDone::Queued { token } => {
                    assert!(!ended.contains_key(&token.0), "{token:?} has ended");
                    let queued = &mut open.entry(token.0).or_default().0;
                    assert!(!*queued, "{token:?} is queued once");
                    *queued = true;
                }
                CopyDone::Step { token, steps } => {
                    assert!(!ended.contains_key(&token.0), "{token:?} has ended");
                    let known = &mut open.entry(token.0).or_default().1;
                    assert!(*known < steps, "{token:?} goes on");
                    *known = steps;
                }
                CopyDone::Ended { token, hosts, result } => {
                    let (queued, steps) = open.remove(&token.0).unwrap_or_default();
                    let end = End { queued, steps, hosts, result };
                    assert!(ended.insert(token.0, end).is_none(), "{token:?} ends once");
                }
            }
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    ended
}

fn only(copier: &mut Copier) -> End {
    let (_, end) = ends(copier, 1).pop_first().unwrap();
    end
}

fn slots(end: End) -> Vec<Slot> {
    end.result.unwrap();
    match end.hosts {
        Some(Hosts::To(slots)) => slots,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_block_goes_up_and_down() {
    let cuda = cuda();
    let device = cuda.driver.open(0).unwrap();
    let arena = arena();
    let region = device.register(arena.slab(), 0, arena.slab().data_bytes()).unwrap();
    let memory = device.allocate(4 * PAGE).unwrap();
    let mut copier = copier(&device, |_| {});
    let bytes = pattern(1, 4 * PAGE as usize);
    let held = sealed(&arena, &bytes);
    copier.submit(job(1, &[&memory], Hosts::From(vec![held]), vec![whole(4 * PAGE)])).unwrap();
    assert!(!copier.is_idle());
    let end = only(&mut copier);
    assert!(end.result.is_ok() && end.queued && end.steps == 1);
    assert!(matches!(end.hosts, Some(Hosts::From(held)) if held.len() == 1));
    let slot = arena.slab().take(4 * PAGE as u32).unwrap();
    copier.submit(job(1, &[&memory], Hosts::To(vec![slot]), vec![whole(4 * PAGE)])).unwrap();
    assert!(slots(only(&mut copier))[0][..4 * PAGE as usize] == bytes[..]);
    assert!(copier.is_idle() && copier.under_way() == (0, 0));
    drop((copier, memory, region, device));
    cuda.is_clean();
}
