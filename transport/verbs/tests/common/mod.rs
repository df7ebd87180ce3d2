//! What the tests on a device share: two ends on one device, each with memory of its own.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses some of it")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_arena::{Geometry, Held, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp};
use kv_verbs::{Device, DeviceConfig, Devices, Endpoint, Exposure, Rail, Role, VerbsLink};
use kv_wire::message::{ReadId, WantId, Window};

/// Longest that anything may take. The emulated machine is slow.
pub const LIMIT: Duration = Duration::from_secs(40);

/// The device to test with: that of `KVD_RDMA_DEVICE`, or the first. Says why when there is none.
pub fn rail() -> Option<Rail> {
    let wanted = std::env::var("KVD_RDMA_DEVICE").ok();
    let wanted: Vec<_> = wanted.iter().map(|text| text.parse().unwrap()).collect();
    let named = !wanted.is_empty();
    let probe = Devices { wanted, register_bytes: 64 << 20, ..Devices::default() }.probe();
    let rail = probe.usable().next().cloned();
    if rail.is_none() {
        let lines = probe.lines().join("; ");
        assert!(!named, "KVD_RDMA_DEVICE cannot be used: {lines}");
        eprintln!("skipped: {lines}");
    }
    rail
}

pub fn memory(mib: u32) -> ShardMemory {
    let region_bytes = 16 << 20;
    let regions = mib.div_ceil(16).max(1);
    ShardMemory::anonymous(Geometry { regions, region_bytes, table_entries_max: 8 }).unwrap()
}

/// Shorter limits than in earnest, so that tests end.
pub fn config() -> DeviceConfig {
    let (beat, silence) = (Duration::from_millis(500), Duration::from_secs(20));
    // Although rxe does not hold them to their bounds: a card does.
    DeviceConfig { beat, silence, exposure: Some(Exposure::Windows), ..Default::default() }
}

/// The device with one arena for both ends.
pub struct Node {
    pub memory: ShardMemory,
    pub device: Device,
}

pub fn node(mib: u32, config: &DeviceConfig) -> Option<Node> {
    let memory = memory(mib);
    let device = Device::open(&rail()?, &[memory.slab().clone()], config).unwrap();
    let registered = || device.registered_bytes() == memory.slab().data_bytes();
    assert!(eventually(registered), "{:?}", device.notes());
    Some(Node { memory, device })
}

pub fn eventually(mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + LIMIT;
    while !holds() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

impl Node {
    /// A connected pair: owner's end, reader's end.
    pub fn pair(&self) -> (End, End) {
        let (reader, asks) = Endpoint::open(&self.device, Role::Reader, 1).unwrap();
        let (owner, answers) = Endpoint::open(&self.device, Role::Owner, 1).unwrap();
        let nobody = || Arc::new(|| {});
        let owner = owner.connect(&asks, nobody()).unwrap();
        let reader = reader.connect(&answers, nobody()).unwrap();
        (End::new(owner), End::new(reader))
    }

    /// A sealed block of that many bytes.
    pub fn block(&self, number: u64, bytes: u32) -> Held {
        let mut slot = self.memory.slab().take(bytes).unwrap();
        let key = BlockKey::from_halves([number, !number]);
        payload::fill(&key, &mut slot[..bytes as usize]);
        let checksum = Checksum::of(&key, &slot[..bytes as usize]);
        let tag = BindingTag(1);
        slot.seal(&Record { key, checksum, bytes, tag, priority: Priority::Normal, expires_at: 0 })
    }

    pub fn slot(&self, bytes: u32) -> Slot {
        let mut slot = self.memory.slab().take(bytes).unwrap();
        slot.fill(0xee);
        slot
    }

    /// Slots that somebody has.
    pub fn used(&self) -> u32 {
        let usage = self.memory.slab().usage();
        usage.classes.iter().map(|class| class.slots - class.free).sum()
    }

    /// Ends a block for good, so that its memory can be taken again.
    pub fn forget(&self, block: Held) {
        let (slot, generation) = (block.id(), block.generation());
        drop(block);
        self.memory.slab().retire(slot, generation).unwrap();
        self.memory.slab().sweep(&kv_arena::HazardSet::new());
    }
}

/// An end with what came of it.
pub struct End {
    pub link: VerbsLink,
    pub done: Vec<LinkDone>,
}

impl End {
    pub fn new(link: VerbsLink) -> Self {
        Self { link, done: Vec::new() }
    }

    pub fn start(&mut self, op: LinkOp) {
        self.link.submit(op).expect("there is room");
        self.link.kick();
    }

    /// Waits for a completion that fits.
    pub fn wait(&mut self, mut fits: impl FnMut(&LinkDone) -> bool, what: &str) -> LinkDone {
        let end = Instant::now() + LIMIT;
        loop {
            self.link.poll(&mut self.done);
            if let Some(at) = self.done.iter().position(&mut fits) {
                return self.done.remove(at);
            }
            assert!(Instant::now() < end, "no {what} came; there is {:?}", self.done);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub fn expose(&mut self, want: u64, block: Held) -> Window {
        self.start(LinkOp::Expose { want: WantId(want), block });
        self.exposed(want).expect("it can be exposed").expect("there is a window")
    }

    pub fn exposed(&mut self, wanted: u64) -> Result<Option<Window>, LinkError> {
        let fits = |done: &LinkDone| matches!(done, LinkDone::Exposed { want, .. } if want.0 == wanted);
        match self.wait(fits, "exposure") {
            LinkDone::Exposed { result, .. } => result,
            _ => unreachable!("it fits"),
        }
    }

    pub fn conceal(&mut self, want: u64) -> Held {
        self.start(LinkOp::Conceal { want: WantId(want) });
        self.concealed(want)
    }

    pub fn concealed(&mut self, wanted: u64) -> Held {
        let fits = |done: &LinkDone| matches!(done, LinkDone::Concealed { want, .. } if want.0 == wanted);
        match self.wait(fits, "concealment") {
            LinkDone::Concealed { block, .. } => block,
            _ => unreachable!("it fits"),
        }
    }

    pub fn read(&mut self, read: u64, window: Window, record: Record, into: Slot) {
        let (read, want) = (ReadId(read), WantId(read));
        self.start(LinkOp::Read { read, want, window: Some(window), record, into });
    }

    pub fn ended(&mut self, wanted: u64) -> (Slot, Result<(), LinkError>) {
        let fits = |done: &LinkDone| matches!(done, LinkDone::Read { read, .. } if read.0 == wanted);
        match self.wait(fits, "end of the read") {
            LinkDone::Read { into, result, .. } => (into, result),
            _ => unreachable!("it fits"),
        }
    }

    /// Waits until the path is gone; everything else must have come before.
    pub fn broken(&mut self) -> LinkError {
        match self.wait(|done| matches!(done, LinkDone::Broken { .. }), "end of the path") {
            LinkDone::Broken { why } => {
                assert_eq!((self.link.usage().in_flight, self.link.usage().bytes), (0, 0));
                why
            }
            _ => unreachable!("it fits"),
        }
    }
}

/// Small numbers from a seed.
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}
