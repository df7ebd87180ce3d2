//! Which block lies where, in memory: 40 bytes for a block in the list of its pack, and 8 in a table that leads there.
//!
//! One key may lie in several packs. When one of them goes, or its copy turns out damaged, the others still serve.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record};

use crate::pack::{Binding, Entry, Footer, PackId, Writer};
use crate::reach::Step;

/// Where a block lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// In this pack.
    pub pack: PackId,
    /// Its place among the blocks of the pack.
    pub place: u32,
    /// What it is.
    pub record: Record,
    /// Where it begins, in bytes from the start of the pack.
    pub offset: u32,
}

impl Found {
    /// Where it lies, in bytes from the start of the pack.
    pub fn range(&self) -> Range<u64> {
        let from = u64::from(self.offset);
        from..from + u64::from(self.record.bytes)
    }
}

/// What is known about a pack.
#[derive(Clone, Debug)]
pub struct Known {
    /// Its name.
    pub id: PackId,
    /// Who wrote it.
    pub writer: Writer,
    /// Its length in bytes.
    pub pack_bytes: u64,
    /// Length of its footer in bytes.
    pub footer_bytes: u32,
    /// Unix time in seconds after which no block of it counts; 0 when some never expire.
    pub expires_at: u32,
    /// What its blocks were stored under.
    pub bindings: Arc<[Binding]>,
    tags: Vec<BindingTag>,
    entries: Box<[Line]>,
    /// Blocks whose bytes turned out not to be theirs.
    spoilt: u32,
}

impl Known {
    /// Blocks in it.
    pub fn blocks(&self) -> usize {
        self.entries.len()
    }

    /// Blocks in it whose bytes turned out not to be theirs.
    pub fn spoilt(&self) -> u32 {
        self.spoilt
    }

    /// What every block of it is, in order.
    pub fn records(&self) -> impl Iterator<Item = Record> + '_ {
        self.entries().map(|entry| entry.record)
    }

    /// Every block of it, in order.
    pub fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        self.entries.iter().map(|line| Entry {
            record: line.record(&self.tags),
            offset: line.offset,
            follows: line.follows,
        })
    }
}

#[derive(Clone, Copy, Debug)]
struct Line {
    key: BlockKey,
    checksum: Checksum,
    offset: u32,
    bytes: u32,
    expires_at: u32,
    binding: u16,
    priority: Priority,
    follows: bool,
}

const _: () = assert!(size_of::<Line>() == 40, "the head of this file says so");

impl Line {
    fn record(&self, tags: &[BindingTag]) -> Record {
        Record {
            key: self.key,
            checksum: self.checksum,
            bytes: self.bytes,
            tag: tags[usize::from(self.binding)],
            priority: self.priority,
            expires_at: self.expires_at,
        }
    }
}

/// A pack's number here and a block's place in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Spot {
    pack: u32,
    place: u32,
}

/// Every block of every pack that is known.
#[derive(Default)]
pub struct Index {
    packs: Vec<Option<Known>>,
    free: Vec<u32>,
    numbers: HashMap<PackId, u32>,
    table: HashTable<Spot>,
    bytes: u64,
    /// What blocks were stored under, and how many packs have such.
    bindings: HashMap<BindingTag, (Binding, usize)>,
}

/// A key is a digest already.
fn hash(key: &BlockKey) -> u64 {
    key.halves()[0]
}

fn line(packs: &[Option<Known>], spot: Spot) -> &Line {
    let pack = packs[spot.pack as usize].as_ref().expect("the table leads to packs that are there");
    &pack.entries[spot.place as usize]
}

impl Index {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// Packs known.
    pub fn packs(&self) -> impl Iterator<Item = &Known> {
        self.packs.iter().flatten()
    }

    /// Number of packs known.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether no pack is known.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Blocks that can be found, counted once for each pack that they lie in.
    pub fn blocks(&self) -> usize {
        self.table.len()
    }

    /// Length of all packs in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What blocks were stored under, over all packs.
    pub fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.bindings.values().map(|(binding, _)| binding)
    }

    /// What is known about a pack.
    pub fn pack(&self, id: &PackId) -> Option<&Known> {
        self.packs[*self.numbers.get(id)? as usize].as_ref()
    }

    /// Enters a pack, if it is not there yet.
    pub fn insert(&mut self, id: PackId, pack_bytes: u64, footer_bytes: u32, footer: &Footer) {
        if self.numbers.contains_key(&id) {
            return;
        }
        let tags: Vec<_> = footer.bindings.iter().map(Binding::tag).collect();
        let entries = footer.entries.iter().map(|entry| {
            let Record { key, checksum, bytes, tag, priority, expires_at } = entry.record;
            let binding = tags.iter().position(|known| *known == tag).expect("a footer has every binding");
            let binding = u16::try_from(binding).expect("a footer has few bindings");
            let (offset, follows) = (entry.offset, entry.follows);
            Line { key, checksum, offset, bytes, expires_at, binding, priority, follows }
        });
        let known = Known {
            id,
            writer: footer.writer.clone(),
            pack_bytes,
            footer_bytes,
            expires_at: footer.expires_at(),
            bindings: footer.bindings.as_slice().into(),
            entries: entries.collect(),
            tags,
            spoilt: 0,
        };
        let number = self.free.pop().unwrap_or_else(|| {
            self.packs.push(None);
            u32::try_from(self.packs.len() - 1).expect("fewer packs than numbers")
        });
        for (tag, binding) in known.tags.iter().zip(known.bindings.iter()) {
            self.bindings.entry(*tag).or_insert_with(|| (binding.clone(), 0)).1 += 1;
        }
        let count = known.entries.len() as u32;
        self.packs[number as usize] = Some(known);
        self.numbers.insert(id, number);
        self.bytes += pack_bytes;
        for place in 0..count {
            let spot = Spot { pack: number, place };
            let key = hash(&line(&self.packs, spot).key);
            self.table.insert_unique(key, spot, |spot| hash(&line(&self.packs, *spot).key));
        }
    }

    /// Forgets a pack, and every block that lies nowhere else.
    pub fn remove(&mut self, id: &PackId) -> Option<Known> {
        let number = self.numbers.remove(id)?;
        let count = self.packs[number as usize].as_ref().map_or(0, |pack| pack.entries.len() as u32);
        for place in 0..count {
            self.take_out(Spot { pack: number, place });
        }
        let known = self.packs[number as usize].take()?;
        self.free.push(number);
        self.bytes -= known.pack_bytes;
        for tag in &known.tags {
            if let Some((_, packs)) = self.bindings.get_mut(tag) {
                *packs -= 1;
                if *packs == 0 {
                    self.bindings.remove(tag);
                }
            }
        }
        Some(known)
    }

    /// Whether it was there.
    fn take_out(&mut self, spot: Spot) -> bool {
        let key = hash(&line(&self.packs, spot).key);
        match self.table.find_entry(key, |other| *other == spot) {
            Ok(entry) => {
                entry.remove();
                true
            }
            Err(_) => false,
        }
    }

    /// Does not find a block of a pack any more: its bytes are not what they should be.
    pub fn spoil(&mut self, id: &PackId, place: u32) {
        let Some(number) = self.numbers.get(id).copied() else { return };
        let inside = |known: &Known| (place as usize) < known.entries.len();
        if !self.packs[number as usize].as_ref().is_some_and(inside) {
            return;
        }
        if self.take_out(Spot { pack: number, place })
            && let Some(known) = &mut self.packs[number as usize]
        {
            known.spoilt += 1;
        }
    }

    /// Where a block lies that has not expired at `now`, Unix time in seconds; `Err` when it lies somewhere and all of
    /// it has.
    pub fn find(&self, key: &BlockKey, now: u32) -> Result<Option<Found>, Expired> {
        let mut expired = false;
        for spot in self.table.iter_hash(hash(key)) {
            let line = line(&self.packs, *spot);
            if line.key != *key {
                continue;
            }
            if line.expires_at != 0 && line.expires_at <= now {
                expired = true;
                continue;
            }
            let known =
                self.packs[spot.pack as usize].as_ref().expect("the table leads to packs that are there");
            let record = line.record(&known.tags);
            return Ok(Some(Found { pack: known.id, place: spot.place, record, offset: line.offset }));
        }
        if expired { Err(Expired) } else { Ok(None) }
    }

    /// The blocks behind one, and whether each continues the prefix of the one before it.
    pub fn behind(&self, id: &PackId, place: u32) -> impl Iterator<Item = (Step, BlockKey)> + '_ {
        let lines = self.pack(id).map_or(&[][..], |known| &known.entries);
        let behind = lines.get(place as usize + 1..).unwrap_or_default();
        behind.iter().map(|line| (Step { bytes: line.bytes, follows: line.follows }, line.key))
    }
}

/// The block is there and does not count any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Expired;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kv_block::{Epoch, ScopeId, Slice};

    use super::*;
    use crate::pack::Entry;
    use crate::random::Random;

    fn footer(writer: u64, keys: &[(u64, u32)]) -> Footer {
        let binding = Binding {
            scope: ScopeId([1; 32]),
            slice: Slice::whole(1, 1),
            block_bytes: 10,
            about: String::new(),
        };
        let tag = binding.tag();
        let entries = keys.iter().enumerate().map(|(at, (key, expires_at))| {
            let key = BlockKey::from_halves([*key, *key]);
            let (checksum, priority) = (Checksum(writer), Priority::High);
            let record = Record { key, checksum, bytes: 10, tag, priority, expires_at: *expires_at };
            Entry { record, offset: 16 + 10 * at as u32, follows: at % 3 != 0 }
        });
        let writer = Writer { node: "n".into(), epoch: Epoch(1), sequence: writer };
        Footer { writer, entries: entries.collect(), bindings: vec![binding] }
    }

    fn id(number: u64) -> PackId {
        PackId(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    #[test]
    fn it_finds_what_a_map_finds() {
        let mut random = Random::new(3);
        let mut index = Index::new();
        let mut model: BTreeMap<u64, Footer> = BTreeMap::new();
        for step in 0..2000u64 {
            match random.below(3) {
                0 | 1 => {
                    let keys: Vec<_> = (0..random.below(8)).map(|_| (random.below(40), 0)).collect();
                    index.insert(id(step), 100, 50, &footer(step, &keys));
                    model.insert(step, footer(step, &keys));
                }
                _ => {
                    let gone = model.keys().nth(random.below(model.len().max(1) as u64) as usize).copied();
                    if let Some(gone) = gone {
                        assert_eq!(index.remove(&id(gone)).unwrap().blocks(), model[&gone].entries.len());
                        model.remove(&gone);
                    }
                }
            }
            assert_eq!((index.len(), index.bytes()), (model.len(), 100 * model.len() as u64));
            assert_eq!(index.blocks(), model.values().map(|footer| footer.entries.len()).sum::<usize>());
            for key in 0..40 {
                let key = BlockKey::from_halves([key, key]);
                let found = index.find(&key, 7).unwrap();
                let there = |footer: &Footer| footer.entries.iter().any(|entry| entry.record.key == key);
                assert_eq!(found.is_some(), model.values().any(there));
                if let Some(found) = found {
                    let footer = &model[&found.record.checksum.0];
                    let entry = &footer.entries[found.place as usize];
                    assert_eq!((found.pack, found.record), (id(found.record.checksum.0), entry.record));
                    assert_eq!(found.range(), entry.range());
                }
            }
        }
    }

    #[test]
    fn another_copy_serves_when_one_is_spoilt_expired_or_gone() {
        let mut index = Index::new();
        let key = BlockKey::from_halves([5, 5]);
        index.insert(id(1), 100, 50, &footer(1, &[(4, 0), (5, 100)]));
        index.insert(id(2), 100, 50, &footer(2, &[(5, 200)]));
        index.insert(id(3), 100, 50, &footer(3, &[(5, 0)]));
        assert!(matches!(index.find(&key, 150), Ok(Some(found)) if found.pack != id(1)));
        index.spoil(&id(3), 0);
        index.spoil(&id(3), 0);
        index.spoil(&id(3), 7);
        assert_eq!(index.pack(&id(3)).unwrap().spoilt(), 1);
        assert_eq!(index.find(&key, 150).unwrap().unwrap().pack, id(2));
        assert_eq!(index.find(&key, 200), Err(Expired));
        index.remove(&id(2));
        assert_eq!(index.find(&key, 99).unwrap().unwrap().pack, id(1));
        index.remove(&id(1));
        assert_eq!(index.find(&key, 99), Ok(None));
        assert!(index.remove(&id(3)).is_some() && index.is_empty() && index.blocks() == 0);
    }

    #[test]
    fn what_lies_behind_a_block_is_told_in_order() {
        let mut index = Index::new();
        index.insert(id(1), 100, 50, &footer(1, &[(0, 0), (1, 0), (2, 0), (3, 0)]));
        let behind: Vec<_> =
            index.behind(&id(1), 0).map(|(step, key)| (step.follows, key.halves()[0])).collect();
        assert_eq!(behind, [(true, 1), (true, 2), (false, 3)]);
        assert_eq!(index.behind(&id(1), 3).count() + index.behind(&id(2), 0).count(), 0);
    }
}
