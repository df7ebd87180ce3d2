//! What eviction and disk admission do for a request trace: hit ratios and bytes written.
//!
//! Run: `cargo run --release -p kv-tiers --example admission -- TRACE.jsonl [host blocks] [disk blocks]`.
//! A line of the trace is a request, `{"input_length": tokens, "hash_ids": [blocks of 512 tokens]}`, as in
//! Mooncake's published traces; a block that the prompt does not fill is left out. Without sizes a table of
//! several is printed.
//!
//! The host tier runs the real policies. The disk is a log of segments, reclaimed oldest first; blocks read
//! from it since they were written move to the end, which counts as written too. A request hits the run of
//! blocks from its beginning that are in either tier; all its blocks are in the host tier afterwards.
//! `through` writes a block when it is stored, `all` when it leaves the host tier, `frequency` and `budget` if
//! it is admitted then, `6 of 10` within that budget, `foresight` if the rest of the trace asks for it: nobody can write less for all hits.
//! `written/hit` is bytes written to disk for each byte hit in either tier.

use std::collections::{HashMap, VecDeque};

use kv_block::{BlockKey, Priority, Scope, SequenceHash, Slice};
use kv_tiers::admit::{Admission, AdmissionKind};
use kv_tiers::evict::{Policy, PolicyKind};

/// Blocks of one disk segment.
const SEGMENT: usize = 64;
/// Blocks remembered after they left, for each block of the host tier.
const GHOSTS: usize = 4;

#[derive(Clone, Copy, PartialEq)]
enum Writes {
    Through,
    Evicted(AdmissionKind),
    /// Within a budget of so many tenths.
    Share(u8),
    Foresight,
}

/// What the disk knows of a block.
struct OnDisk {
    segment: u64,
    read: bool,
}

/// A log of segments; the oldest is taken back when there are too many.
struct Disk {
    segments_max: usize,
    segments: VecDeque<Vec<BlockKey>>,
    first: u64,
    blocks: HashMap<BlockKey, OnDisk>,
    written: u64,
}

impl Disk {
    fn append(&mut self, key: BlockKey) {
        if self.segments.back().is_none_or(|segment| segment.len() == SEGMENT) {
            self.segments.push_back(Vec::new());
            if self.segments.len() > self.segments_max {
                self.reclaim();
            }
        }
        self.written += 1;
        self.segments.back_mut().expect("just made").push(key);
        let segment = self.first + self.segments.len() as u64 - 1;
        self.blocks.insert(key, OnDisk { segment, read: false });
    }

    fn reclaim(&mut self) {
        let oldest = self.segments.pop_front().expect("more than the most");
        let segment = self.first;
        self.first += 1;
        let alive =
            |disk: &Self, key: &BlockKey| disk.blocks.get(key).is_some_and(|at| at.segment == segment);
        let (mut moves, room) = (Vec::new(), SEGMENT / 2);
        for key in oldest {
            if alive(self, &key) && self.blocks.remove(&key).is_some_and(|at| at.read) && moves.len() < room {
                moves.push(key);
            }
        }
        moves.into_iter().for_each(|key| self.append(key));
    }
}

struct Tiers {
    writes: Writes,
    admission: Admission,
    policy: Box<dyn Policy>,
    host: HashMap<BlockKey, u32>,
    slots: Vec<BlockKey>,
    slots_max: usize,
    /// At which eviction a key left the host tier: the catalog's ghosts.
    ghosts: HashMap<BlockKey, usize>,
    evictions: usize,
    /// How often the rest of the trace asks for a key.
    future: HashMap<BlockKey, u32>,
    disk: Disk,
    hits_host: u64,
    hits_disk: u64,
}

impl Tiers {
    fn new(policy: PolicyKind, writes: Writes, host: usize, disk: usize) -> Self {
        let admission = match writes {
            Writes::Evicted(kind) => Admission::new(kind, host + disk),
            Writes::Share(tenths) => Admission::new(AdmissionKind::Budget, host + disk).with_share(tenths),
            Writes::Through | Writes::Foresight => Admission::new(AdmissionKind::Never, host + disk),
        };
        Self {
            writes,
            admission,
            policy: policy.build(),
            host: HashMap::new(),
            slots: Vec::new(),
            slots_max: host,
            ghosts: HashMap::new(),
            evictions: 0,
            future: HashMap::new(),
            disk: Disk {
                segments_max: disk / SEGMENT,
                segments: VecDeque::new(),
                first: 0,
                blocks: HashMap::new(),
                written: 0,
            },
            hits_host: 0,
            hits_disk: 0,
        }
    }

    fn request(&mut self, keys: &[BlockKey]) {
        for key in keys {
            if self.host.contains_key(key) {
                self.hits_host += 1;
            } else if let Some(at) = self.disk.blocks.get_mut(key) {
                self.hits_disk += 1;
                at.read = true;
            } else {
                break;
            }
        }
        // From the end, so that the beginning of a prompt, of use to more requests, is the newest.
        for key in keys.iter().rev() {
            self.admission.seen(key, self.host.contains_key(key));
            self.future.entry(*key).and_modify(|times| *times -= 1);
            match self.host.get(key) {
                Some(slot) => self.policy.touch(*slot),
                None => self.store(*key),
            }
        }
    }

    fn store(&mut self, key: BlockKey) {
        let slot = if self.slots.len() < self.slots_max {
            self.slots.push(key);
            self.slots.len() as u32 - 1
        } else {
            self.evict()
        };
        self.slots[slot as usize] = key;
        self.host.insert(key, slot);
        let on_disk = self.disk.blocks.contains_key(&key);
        let remembered = |left: &usize| self.evictions - left < GHOSTS * self.slots_max;
        let returning = on_disk || self.ghosts.get(&key).is_some_and(remembered);
        self.policy.insert(slot, Priority::Normal, returning);
        if self.writes == Writes::Through && !on_disk {
            self.disk.append(key);
        }
    }

    fn evict(&mut self) -> u32 {
        let slot = self.policy.victim(&mut |_| true).expect("nothing is pinned");
        let key = self.slots[slot as usize];
        self.host.remove(&key);
        let on_disk = self.disk.blocks.contains_key(&key);
        let admitted = match self.writes {
            Writes::Foresight => self.future[&key] > 0,
            _ => self.admission.leaves(&key, on_disk),
        };
        if admitted && !on_disk {
            self.disk.append(key);
        }
        self.evictions += 1;
        self.ghosts.insert(key, self.evictions);
        slot
    }
}

fn read_trace(path: &str) -> anyhow::Result<Vec<Vec<BlockKey>>> {
    let scope = Scope { model: "trace".into(), tenant: "trace".into(), ..Scope::default() }.id();
    let whole = Slice::whole(1, 1);
    let mut requests = Vec::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let request: serde_json::Value = serde_json::from_str(line)?;
        let full = request["input_length"].as_u64().unwrap_or(0) as usize / 512;
        let ids = request["hash_ids"].as_array().map(Vec::as_slice).unwrap_or_default();
        let ids = ids.iter().take(full).filter_map(serde_json::Value::as_u64);
        requests.push(ids.map(|id| scope.block_key(&SequenceHash::from(id), &whole)).collect());
    }
    Ok(requests)
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: admission TRACE.jsonl [host blocks] [disk blocks]";
    let requests = read_trace(&arguments.next().ok_or_else(|| anyhow::anyhow!(usage))?)?;
    let sizes: Vec<usize> = arguments.map(|text| text.parse()).collect::<Result<_, _>>()?;
    let sizes = match sizes[..] {
        [host, disk] => vec![(host, disk)],
        _ => vec![(2_000, 20_000), (5_000, 50_000), (10_000, 50_000), (20_000, 100_000), (40_000, 200_000)],
    };
    let blocks: u64 = requests.iter().map(|keys| keys.len() as u64).sum();
    println!("{} requests, {blocks} blocks asked for", requests.len());
    println!("  policy      host     disk  writes      hit host  + disk   = all   written  written/hit");
    for (host, disk) in sizes {
        for policy in PolicyKind::ALL {
            for (name, writes) in [
                ("through", Writes::Through),
                ("all", Writes::Evicted(AdmissionKind::All)),
                ("frequency", Writes::Evicted(AdmissionKind::Frequency)),
                ("budget", Writes::Evicted(AdmissionKind::Budget)),
                ("6 of 10", Writes::Share(6)),
                ("8 of 10", Writes::Share(8)),
                ("9 of 10", Writes::Share(9)),
                ("foresight", Writes::Foresight),
            ] {
                let mut tiers = Tiers::new(policy, writes, host, disk);
                requests.iter().flatten().for_each(|key| *tiers.future.entry(*key).or_default() += 1);
                requests.iter().for_each(|keys| tiers.request(keys));
                let ratio = |part: u64| part as f64 / blocks as f64;
                let hits = tiers.hits_host + tiers.hits_disk;
                println!(
                    "  {:8} {host:7}  {disk:7}  {name:9}      {:.3}    {:.3}   {:.3}  {:8}   {:6.2}",
                    policy.name(),
                    ratio(tiers.hits_host),
                    ratio(tiers.hits_disk),
                    ratio(hits),
                    tiers.disk.written,
                    tiers.disk.written as f64 / hits.max(1) as f64,
                );
            }
        }
    }
    Ok(())
}
