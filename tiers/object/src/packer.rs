//! Gathers blocks until there are enough for a pack, or the first of them has waited long enough.
//!
//! Blocks that expire about the same time share a pack, so that a pack can go as a whole. In a pack, the blocks of one
//! prefix lie behind each other in order, whatever order they came in: that is how they are read again.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use kv_block::{BlockKey, Record};

use crate::pack::{self, BINDINGS_MAX, Binding, Block, Pack, PackError, Writer};

/// When a pack is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PackerLimits {
    /// Bytes of blocks that make a pack.
    pub pack_bytes: u64,
    /// How long the first block of a pack waits for others.
    pub age_max: Duration,
    /// Blocks that expire within this time of each other share a pack.
    pub expiry_span: Duration,
    /// Bytes that wait to be written or are being written, of all packs together.
    pub waiting_bytes_max: u64,
}

impl Default for PackerLimits {
    /// 48 MiB, 10 s, 1 hour, 192 MiB.
    fn default() -> Self {
        Self {
            pack_bytes: 48 << 20,
            age_max: Duration::from_secs(10),
            expiry_span: Duration::from_secs(3600),
            waiting_bytes_max: 192 << 20,
        }
    }
}

/// A block that waits to be packed.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// What it is.
    pub record: Record,
    /// The block before it in its prefix, if there is one and it is known.
    pub parent: Option<BlockKey>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// Blocks that are one pack.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    bindings: Vec<Binding>,
    blocks: Vec<Waiting>,
    bytes: u64,
    since: Duration,
}

impl Batch {
    /// The blocks, in the order in which they came.
    pub fn blocks(&self) -> &[Waiting] {
        &self.blocks
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pack of these blocks.
    pub fn encode(&self, writer: Writer) -> Result<Pack, PackError> {
        let order = chains(&self.blocks);
        let mut before = None;
        let blocks: Vec<_> = order
            .into_iter()
            .map(|index| {
                let Waiting { record, parent, bytes } = &self.blocks[index];
                let follows = parent.is_some() && *parent == before;
                before = Some(record.key);
                Block { record: *record, follows, bytes }
            })
            .collect();
        pack::encode(writer, self.bindings.clone(), &blocks)
    }
}

/// The order in which each block stands behind its parent, if another child does not already; otherwise as they came.
fn chains(blocks: &[Waiting]) -> Vec<usize> {
    // Which chain ends with this block.
    let mut ends: BTreeMap<BlockKey, usize> = BTreeMap::new();
    let mut chains: Vec<Vec<usize>> = Vec::new();
    for (index, block) in blocks.iter().enumerate() {
        let chain = block.parent.and_then(|parent| ends.remove(&parent)).unwrap_or_else(|| {
            chains.push(Vec::new());
            chains.len() - 1
        });
        chains[chain].push(index);
        ends.insert(block.record.key, chain);
    }
    chains.concat()
}

/// What waits to become packs.
#[derive(Debug)]
pub struct Packer {
    limits: PackerLimits,
    /// One for each time of expiry, in steps of `expiry_span`; 0 for what never expires.
    open: BTreeMap<u64, Batch>,
    bytes: u64,
}

impl Packer {
    /// Nothing waits.
    pub fn new(limits: PackerLimits) -> Self {
        Self { limits, open: BTreeMap::new(), bytes: 0 }
    }

    /// Bytes of the blocks that wait.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a block of this length may be added while so many bytes are being written.
    pub fn has_room(&self, writing_bytes: u64, bytes: u32) -> bool {
        let most = self.limits.waiting_bytes_max.max(self.limits.pack_bytes);
        self.bytes + writing_bytes + u64::from(bytes) <= most
    }

    /// Adds a block that was stored under `binding`, and gives the batch that is full with it, if one is.
    pub fn add(&mut self, now: Duration, binding: &Binding, block: Waiting) -> Option<Batch> {
        let span = self.limits.expiry_span.as_secs().max(1);
        let class = u64::from(block.record.expires_at).div_ceil(span);
        let batch = self.open.entry(class).or_insert_with(|| Batch { since: now, ..Batch::default() });
        let tag = binding.tag();
        if !batch.bindings.iter().any(|known| known.tag() == tag) {
            batch.bindings.push(binding.clone());
        }
        let bytes = u64::from(block.record.bytes);
        batch.bytes += bytes;
        self.bytes += bytes;
        batch.blocks.push(block);
        let full = batch.bytes >= self.limits.pack_bytes || batch.bindings.len() >= BINDINGS_MAX;
        if full { self.close(class) } else { None }
    }

    /// A batch whose first block has waited long enough at `now`, or any batch when `all` is to go.
    pub fn due(&mut self, now: Duration, all: bool) -> Option<Batch> {
        let class = self.open.iter().find_map(|(class, batch)| {
            let old = now.saturating_sub(batch.since) >= self.limits.age_max;
            (all || old).then_some(*class)
        });
        class.and_then(|class| self.close(class))
    }

    /// When the next batch has waited long enough.
    pub fn due_at(&self) -> Option<Duration> {
        self.open.values().map(|batch| batch.since + self.limits.age_max).min()
    }

    fn close(&mut self, class: u64) -> Option<Batch> {
        let batch = self.open.remove(&class)?;
        self.bytes -= batch.bytes;
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use kv_block::{Checksum, Epoch, Priority, ScopeId, Slice};

    use super::*;

    const LIMITS: PackerLimits = PackerLimits {
        pack_bytes: 1000,
        age_max: Duration::from_secs(10),
        expiry_span: Duration::from_secs(100),
        waiting_bytes_max: 3000,
    };

    fn binding(number: u8) -> Binding {
        Binding {
            scope: ScopeId([number; 32]),
            slice: Slice::whole(1, 1),
            block_bytes: 100,
            about: String::new(),
        }
    }

    fn block(number: u8, parent: Option<u8>, bytes: u32, expires_at: u32) -> Waiting {
        let (key, content) = (BlockKey([number; 16]), vec![number; bytes as usize]);
        let (checksum, tag) = (Checksum::of(&key, &content), binding(1).tag());
        let record = Record { key, checksum, bytes, tag, priority: Priority::Normal, expires_at };
        Waiting { record, parent: parent.map(|parent| BlockKey([parent; 16])), bytes: content.into() }
    }

    fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    #[test]
    fn a_pack_is_made_when_it_is_full_or_old() {
        let mut packer = Packer::new(LIMITS);
        assert!((0..9).all(|number| packer.add(at(0), &binding(1), block(number, None, 100, 0)).is_none()));
        let full = packer.add(at(1), &binding(1), block(9, None, 100, 0)).unwrap();
        assert_eq!((full.blocks().len(), full.bytes(), packer.bytes()), (10, 1000, 0));
        assert_eq!(packer.due_at(), None);
        assert!(packer.add(at(5), &binding(1), block(1, None, 100, 0)).is_none());
        assert!(packer.add(at(9), &binding(1), block(2, None, 100, 0)).is_none());
        assert_eq!(packer.due_at(), Some(at(15)), "the first one decides");
        assert!(packer.due(at(14), false).is_none());
        assert_eq!(packer.due(at(15), false).unwrap().blocks().len(), 2);
        assert!(packer.due(at(99), true).is_none());
    }

    #[test]
    fn what_expires_together_goes_together() {
        let mut packer = Packer::new(LIMITS);
        for (number, expires_at) in [(1, 0), (2, 950), (3, 1000), (4, 1001), (5, 0), (6, 901)] {
            assert!(packer.add(at(0), &binding(1), block(number, None, 10, expires_at)).is_none());
        }
        let mut packs = Vec::new();
        while let Some(batch) = packer.due(at(0), true) {
            packs.push(batch.blocks().iter().map(|block| block.record.key.0[0]).collect::<Vec<_>>());
        }
        assert_eq!(packs, [vec![1, 5], vec![2, 3, 6], vec![4]]);
        assert_eq!(packer.bytes(), 0);
    }

    #[test]
    fn waiting_blocks_have_a_bound() {
        let mut packer = Packer::new(LIMITS);
        for number in 0..30 {
            assert!(packer.has_room(0, 100) && !packer.has_room(3000, 100));
            let expires_at = u32::from(number) * 100;
            assert!(packer.add(at(0), &binding(1), block(number, None, 100, expires_at)).is_none());
        }
        assert!(!packer.has_room(0, 1));
    }

    #[test]
    fn the_blocks_of_a_prefix_lie_behind_each_other() {
        let mut packer = Packer::new(LIMITS);
        // Two prefixes side by side; 5 is another child of 1; the parent of 6 is elsewhere.
        let came =
            [(1, None), (11, None), (2, Some(1)), (12, Some(11)), (5, Some(1)), (3, Some(2)), (6, Some(99))];
        for (number, parent) in came {
            packer.add(at(0), &binding(1), block(number, parent, 10, 0));
        }
        let batch = packer.due(at(0), true).unwrap();
        let writer = Writer { node: "n".into(), epoch: Epoch(1), sequence: 1 };
        let entries = batch.encode(writer).unwrap().footer.entries;
        let lie: Vec<_> = entries.iter().map(|entry| (entry.record.key.0[0], entry.follows)).collect();
        let wanted = [(1, false), (2, true), (3, true), (11, false), (12, true), (5, false), (6, false)];
        assert_eq!(lie, wanted);
    }

    #[test]
    fn every_binding_of_a_block_is_in_its_pack() {
        let mut packer = Packer::new(LIMITS);
        for number in [1, 2, 1] {
            let mut block = block(number, None, 10, 0);
            block.record.tag = binding(number).tag();
            packer.add(at(0), &binding(number), block);
        }
        let batch = packer.due(at(0), true).unwrap();
        let writer = Writer { node: "n".into(), epoch: Epoch(1), sequence: 1 };
        assert_eq!(batch.encode(writer).unwrap().footer.bindings, [binding(1), binding(2)]);
    }
}
