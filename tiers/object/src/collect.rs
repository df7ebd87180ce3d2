//! Which packs may be deleted. Nobody holds a lock, and no two clocks are compared: time is counted in rounds, which
//! are objects themselves.
//!
//! ```text
//! name: rounds/<number, 16 hex digits>
//!
//! kvd round
//! format 1
//! round 7
//! grace 3                     rounds for which a pack is condemned, or a node silent, before that counts
//! node gpu-07 3 12 0          a node's newest epoch and generation, and for how many rounds it has not changed
//! dead gpu-03 5               lives up to this epoch do not count any more
//! condemned <id> 6            a pack that nobody used, and since which round
//! crc 9a3c51e0                CRC-32 of everything above
//! ```
//! How a pack goes:
//!
//! ```text
//!            no live manifest lists it       every live node has honoured a round from then on
//!            when a round is written         and none lists it, `grace` rounds later
//!   packed ---------------------------> condemned ---------------------------------> deleted
//!      ^                                    |
//!      +------------------------------------+ a node that uses it honours the round by listing it
//! ```
//! - A **round** is written by whoever gets to it first: its name can be taken once. The loser takes what is there.
//! - A node **honours** a round when its manifest says so. Before that it decides about each condemned pack: list it,
//!   or never use it again. So a pack that was condemned before all live nodes looked, and that none of them lists
//!   afterwards, is used by nobody and will not be.
//! - A node may list a condemned pack again only if it was condemned after the round that the node honoured last:
//!   only then is the collector bound to wait for that node. See [`may_keep`].
//! - A node whose manifest does not change for `grace` rounds is **dead**: that life and the ones before it never
//!   count again, and if it was only away it has to come back with a higher epoch. Every live node writes a new
//!   manifest for every round, so this says that it slept through that many.
//! - Where the manifest of a live node cannot be read, or its newest one is not found, a round condemns nothing: that
//!   node may list any pack.
//! - The grace also covers a list of objects that is late: what it does not show yet is condemned, not deleted, and a
//!   node that was seen before and is not now counts as silent.
//! - A pack whose writer is gone and whose time is not over is listed by a few others, which the round's nodes and the
//!   pack's name pick: what a node wrote outlives it. See [`inherits`].
//! - How long a round lasts is each collector's own affair, measured on its own clock since it first saw the last one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use kv_block::Epoch;

use crate::manifest::{Lines, Manifest, TextError, parsed, sign};
use crate::pack::{PackId, is_node};

/// Where rounds lie.
pub const PREFIX: &str = "rounds/";
/// Rounds of grace where nothing else is said.
pub const GRACE: u64 = 3;

/// What a round knew of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NodeSeen {
    /// Its newest life.
    pub epoch: Epoch,
    /// The newest manifest of that life.
    pub generation: u64,
    /// For how many rounds that has been so.
    pub silent: u64,
}

/// One round of collection.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Round {
    /// Which one; the first is 1.
    pub number: u64,
    /// Rounds for which something has to be so before it counts.
    pub grace: u64,
    /// Live nodes.
    pub nodes: BTreeMap<String, NodeSeen>,
    /// Lives up to this one of a node do not count any more.
    pub dead: BTreeMap<String, Epoch>,
    /// Packs that nobody used, and since which round.
    pub condemned: BTreeMap<PackId, u64>,
}

/// The newest manifest of a node, as a collector found it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ManifestSeen {
    /// The life it is of.
    pub epoch: Epoch,
    /// Which manifest of that life.
    pub generation: u64,
    /// What it says; `None` if it could not be read.
    pub manifest: Option<Manifest>,
}

impl Round {
    /// The name of the object.
    pub fn object(number: u64) -> String {
        format!("{PREFIX}{number:016x}")
    }

    /// Which round an object is, if it is one.
    pub fn number_of(object: &str) -> Option<u64> {
        let number = u64::from_str_radix(object.strip_prefix(PREFIX)?, 16).ok()?;
        (Self::object(number) == object).then_some(number)
    }

    /// Whether this life of a node does not count any more.
    pub fn is_dead(&self, node: &str, epoch: Epoch) -> bool {
        self.dead.get(node).is_some_and(|dead| epoch <= *dead)
    }

    /// The object's text.
    pub fn encode(&self) -> String {
        let mut text = format!("kvd round\nformat 1\nround {}\ngrace {}\n", self.number, self.grace);
        for (node, NodeSeen { epoch, generation, silent }) in &self.nodes {
            writeln!(text, "node {node} {epoch} {generation} {silent}").expect("memory");
        }
        for (node, epoch) in &self.dead {
            writeln!(text, "dead {node} {epoch}").expect("memory");
        }
        for (id, since) in &self.condemned {
            writeln!(text, "condemned {id} {since}").expect("memory");
        }
        sign(text)
    }

    /// Reads the object's text.
    pub fn parse(bytes: &[u8]) -> Result<Self, TextError> {
        let mut lines = Lines::open(bytes, "kvd round")?;
        let (number, grace) = (lines.number("round")?, lines.number("grace")?);
        let mut round = Self { number, grace, ..Self::default() };
        while let Some([node, epoch, generation, silent]) = lines.list("node")? {
            let seen = NodeSeen {
                epoch: Epoch(parsed(epoch)?),
                generation: parsed(generation)?,
                silent: parsed(silent)?,
            };
            round.nodes.insert(node.to_owned(), seen);
        }
        while let Some([node, epoch]) = lines.list("dead")? {
            round.dead.insert(node.to_owned(), Epoch(parsed(epoch)?));
        }
        while let Some([id, since]) = lines.list("condemned")? {
            round.condemned.insert(parsed(id)?, parsed(since)?);
        }
        let names = round.nodes.keys().chain(round.dead.keys()).all(|node| is_node(node));
        // The one text of these values is the only one accepted: it holds the checksum too.
        if names && round.encode().as_bytes() == bytes { Ok(round) } else { Err(TextError::Broken) }
    }
}

/// The round after `last`, of what a collector found: the packs that are there, and each node's newest manifest.
pub fn next_round(
    last: Option<&Round>,
    grace: u64,
    packs: &BTreeSet<PackId>,
    manifests: &BTreeMap<String, ManifestSeen>,
) -> Round {
    let none = Round::default();
    let last = last.unwrap_or(&none);
    let mut round = Round { number: last.number + 1, grace: grace.max(1), ..Round::default() };
    round.dead.clone_from(&last.dead);
    // A node that was there and is not found now may only be late in the list.
    for node in manifests.keys().chain(last.nodes.keys()).collect::<BTreeSet<_>>() {
        let before = last.nodes.get(node).copied();
        let now = manifests.get(node).map(|seen| (seen.epoch, seen.generation));
        let before_pair = before.map(|before| (before.epoch, before.generation));
        // A late list may show an older manifest than was seen before.
        let Some(newest) = now.max(before_pair) else { continue };
        if round.is_dead(node, newest.0) {
            continue;
        }
        round.dead.remove(node);
        let silent = before
            .filter(|_| before_pair == Some(newest))
            .map_or(0, |before| before.silent.saturating_add(1));
        if silent >= round.grace {
            round.dead.insert(node.clone(), newest.0);
        } else {
            round.nodes.insert(node.clone(), NodeSeen { epoch: newest.0, generation: newest.1, silent });
        }
    }
    // One of them may list any pack: nothing can be said to be used by nobody.
    if !unheard(&round, manifests).is_empty() {
        return round;
    }
    let live = |(node, seen): (&String, &ManifestSeen)| {
        let current = round.nodes.contains_key(node) && !round.is_dead(node, seen.epoch);
        seen.manifest.clone().filter(|_| current)
    };
    let live: Vec<Manifest> = manifests.iter().filter_map(live).collect();
    let used: BTreeSet<PackId> =
        live.iter().flat_map(|manifest| &manifest.packs).map(|pack| pack.id).collect();
    for id in packs.difference(&used) {
        let since = last.condemned.get(id).copied().unwrap_or(round.number);
        round.condemned.insert(*id, since);
    }
    round
}

/// The live nodes of which it is not known what they list: their newest manifest is of another version, damaged, or late.
pub fn unheard(round: &Round, manifests: &BTreeMap<String, ManifestSeen>) -> Vec<String> {
    let heard = |node: &str, seen: &NodeSeen| {
        let found = manifests.get(node).filter(|found| found.manifest.is_some());
        found.is_some_and(|found| (found.epoch, found.generation) >= (seen.epoch, seen.generation))
    };
    let all = round.nodes.iter().filter(|(node, seen)| !heard(node, seen));
    all.map(|(node, _)| node.clone()).collect()
}

/// The packs that may be deleted once `round` is written, of the manifests that it was made of. It stays so whatever
/// happens afterwards.
pub fn deletable(round: &Round, manifests: &BTreeMap<String, ManifestSeen>) -> Vec<PackId> {
    // The oldest round that some live node has honoured last. One that cannot be read has honoured none.
    let honoured = round.nodes.iter().map(|(node, seen)| {
        let newest = manifests
            .get(node)
            .filter(|found| (found.epoch, found.generation) >= (seen.epoch, seen.generation));
        newest.and_then(|found| found.manifest.as_ref()).map_or(0, |manifest| manifest.round)
    });
    let honoured = honoured.min().unwrap_or(u64::MAX);
    let old_enough = |since: u64| since.saturating_add(round.grace) <= round.number;
    let gone = round.condemned.iter().filter(|(_, since)| **since <= honoured && old_enough(**since));
    gone.map(|(id, _)| *id).collect()
}

/// Whether a node that has honoured `honoured` and now honours `round` may go on using a pack that it uses: anything
/// that is not condemned, and what was condemned so lately that the collector has to wait for this node.
pub fn may_keep(round: &Round, honoured: u64, id: &PackId) -> bool {
    round
        .condemned
        .get(id)
        .is_none_or(|since| *since > honoured && since.saturating_add(round.grace) > round.number)
}

/// Whether a live node keeps a condemned pack for the others, because its writer is gone and its time is not over: as
/// many do as may be lost at once. A pack without an end goes when nobody reads it.
pub fn inherits(round: &Round, node: &str, pack: &PackId, writer: &str, expires_at: u32, now: u32) -> bool {
    if expires_at <= now || round.nodes.contains_key(writer) {
        return false;
    }
    let rank = |node: &str| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&pack.0).update(node.as_bytes());
        *hasher.finalize().as_bytes()
    };
    let own = rank(node);
    round.nodes.keys().filter(|other| rank(other) > own).count() < HEIRS
}

/// Nodes that keep a pack whose writer is gone.
const HEIRS: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{ManifestName, PackRef};
    use crate::random::Random;

    fn id(number: u8) -> PackId {
        PackId([number; 32])
    }

    fn manifest(node: &str, epoch: u64, generation: u64, round: u64, packs: &[u8]) -> ManifestSeen {
        let pack = |number: &u8| PackRef {
            id: id(*number),
            pack_bytes: 1,
            footer_bytes: 1,
            blocks: 1,
            expires_at: 0,
        };
        let name = ManifestName { node: node.into(), epoch: Epoch(epoch), generation };
        let packs: BTreeSet<_> = packs.iter().copied().collect();
        let manifest = Manifest { name, round, packs: packs.iter().map(pack).collect(), tails: vec![] };
        ManifestSeen { epoch: Epoch(epoch), generation, manifest: Some(manifest) }
    }

    fn seen(manifests: &[ManifestSeen]) -> BTreeMap<String, ManifestSeen> {
        let name = |seen: &ManifestSeen| seen.manifest.as_ref().unwrap().name.node.clone();
        manifests.iter().map(|seen| (name(seen), seen.clone())).collect()
    }

    fn packs(numbers: &[u8]) -> BTreeSet<PackId> {
        numbers.iter().map(|number| id(*number)).collect()
    }

    #[test]
    fn a_pack_goes_when_all_have_looked_and_the_grace_is_over() {
        let listed = packs(&[1, 2]);
        let mut round =
            next_round(None, 2, &listed, &seen(&[manifest("a", 1, 1, 0, &[1]), manifest("b", 1, 1, 0, &[])]));
        assert_eq!(round.condemned, [(id(2), 1)].into());
        for (number, b_honoured, gone) in [(2, 0, false), (3, 0, false), (4, 1, true)] {
            let manifests = seen(&[
                manifest("a", 1, number, number - 1, &[1]),
                manifest("b", 1, number, b_honoured, &[]),
            ]);
            round = next_round(Some(&round), 2, &listed, &manifests);
            assert_eq!((round.number, round.condemned[&id(2)]), (number, 1));
            assert_eq!(deletable(&round, &manifests) == [id(2)], gone, "round {number}");
        }
        // Everyone looked at once, and the grace is not over.
        let manifests = seen(&[manifest("a", 1, 9, 1, &[])]);
        let first = next_round(None, 2, &listed, &manifests);
        let second = next_round(Some(&first), 2, &listed, &manifests);
        assert_eq!(deletable(&second, &manifests), []);
    }

    #[test]
    fn who_lists_a_condemned_pack_saves_it() {
        let listed = packs(&[1]);
        let first = next_round(None, 1, &listed, &seen(&[manifest("a", 1, 1, 0, &[])]));
        assert!(may_keep(&first, 0, &id(1)), "the node honoured nothing since");
        let manifests = seen(&[manifest("a", 1, 2, 1, &[1])]);
        let second = next_round(Some(&first), 1, &listed, &manifests);
        assert!(second.condemned.is_empty() && deletable(&second, &manifests).is_empty());
        // Given up is given up.
        assert!(!may_keep(&first, 1, &id(1)));
        assert!(may_keep(&second, 1, &id(1)));
    }

    #[test]
    fn where_a_live_node_cannot_be_heard_nothing_is_condemned() {
        let listed = packs(&[1, 2]);
        let mut manifests = seen(&[manifest("a", 1, 1, 0, &[]), manifest("b", 1, 1, 0, &[1])]);
        let first = next_round(None, 3, &listed, &manifests);
        assert_eq!(first.condemned, [(id(2), 1)].into());
        // Of another version, or damaged, round after round; it writes one for each.
        let mut round = first;
        for generation in 2..9 {
            let unread = ManifestSeen { epoch: Epoch(1), generation, manifest: None };
            manifests.insert("b".into(), unread);
            manifests.insert("a".into(), manifest("a", 1, generation, round.number, &[]));
            round = next_round(Some(&round), 3, &listed, &manifests);
            assert!(round.condemned.is_empty() && round.nodes.contains_key("b"));
            assert_eq!(unheard(&round, &manifests), ["b"]);
            assert_eq!(deletable(&round, &manifests), []);
        }
        // An older one than was seen before says nothing of what is newer.
        manifests.insert("b".into(), manifest("b", 1, 3, 1, &[]));
        assert_eq!(unheard(&round, &manifests), ["b"]);
    }

    #[test]
    fn a_silent_node_is_dead_after_the_grace_and_comes_back_with_a_higher_epoch() {
        let listed = packs(&[1]);
        let silent = seen(&[manifest("a", 5, 1, 0, &[1])]);
        let mut round = next_round(None, 3, &listed, &silent);
        for wanted in 1..3 {
            round = next_round(Some(&round), 3, &listed, &silent);
            assert_eq!(round.nodes["a"].silent, wanted);
            assert!(round.condemned.is_empty(), "as long as it counts");
        }
        round = next_round(Some(&round), 3, &listed, &silent);
        assert!(round.is_dead("a", Epoch(5)) && round.nodes.is_empty());
        assert_eq!(round.condemned, [(id(1), 4)].into());
        // What it says now does not count.
        round = next_round(Some(&round), 3, &listed, &seen(&[manifest("a", 5, 9, 4, &[1])]));
        assert!(round.is_dead("a", Epoch(5)) && round.condemned.contains_key(&id(1)));
        round = next_round(Some(&round), 3, &listed, &seen(&[manifest("a", 6, 1, 4, &[])]));
        assert!(!round.is_dead("a", Epoch(6)) && round.nodes.contains_key("a"));
    }

    #[test]
    fn a_node_that_is_not_found_or_not_readable_holds_the_collector_up() {
        let listed = packs(&[1]);
        let both = seen(&[manifest("a", 1, 1, 0, &[]), manifest("b", 1, 1, 0, &[])]);
        let first = next_round(None, 3, &listed, &both);
        let mut lost = seen(&[manifest("a", 1, 2, 1, &[])]);
        let mut round = first.clone();
        for _ in 0..2 {
            round = next_round(Some(&round), 3, &listed, &lost);
            assert!(round.nodes.contains_key("b"));
            assert_eq!(deletable(&round, &lost), []);
            let a = lost.get_mut("a").unwrap();
            a.generation += 1;
            a.manifest.as_mut().unwrap().name.generation += 1;
        }
        let unread = ManifestSeen { epoch: Epoch(1), generation: 9, manifest: None };
        lost.insert("b".into(), unread);
        round = next_round(Some(&round), 3, &listed, &lost);
        assert!(round.number >= 4 && round.nodes.contains_key("b"));
        assert_eq!(deletable(&round, &lost), [], "nobody knows what it says");
    }

    #[test]
    fn a_few_keep_what_a_node_wrote_that_is_gone() {
        let nodes = |count: u8| {
            let seen = NodeSeen { epoch: Epoch(1), generation: 1, silent: 0 };
            Round { nodes: (0..count).map(|n| (format!("n{n}"), seen)).collect(), ..Round::default() }
        };
        let heirs = |count: u8, pack: u8, writer: &str, expires_at| {
            let round = nodes(count);
            let all =
                round.nodes.keys().filter(|node| inherits(&round, node, &id(pack), writer, expires_at, 100));
            all.cloned().collect::<Vec<_>>()
        };
        assert_eq!(heirs(2, 1, "gone", 101), ["n0", "n1"], "all, where there are few");
        assert_eq!(heirs(9, 1, "gone", 101).len(), HEIRS);
        assert_ne!(heirs(9, 1, "gone", 101), heirs(9, 2, "gone", 101), "not always the same ones");
        assert!(heirs(9, 1, "n4", 101).is_empty(), "who wrote it is there, and does not list it");
        assert!(heirs(9, 1, "gone", 100).is_empty(), "its time is over");
        assert!(heirs(9, 1, "gone", 0).is_empty(), "it has no end");
    }

    #[test]
    fn rounds_go_there_and_back() {
        let round = Round {
            number: 7,
            grace: 3,
            nodes: [("gpu-07".into(), NodeSeen { epoch: Epoch(3), generation: 12, silent: 1 })].into(),
            dead: [("gpu-03".into(), Epoch(5))].into(),
            condemned: [(id(1), 6)].into(),
        };
        assert_eq!(Round::parse(round.encode().as_bytes()), Ok(round.clone()));
        crate::manifest::tests::is_tight(&round.encode(), Round::parse);
        assert_eq!(Round::number_of(&Round::object(7)), Some(7));
        assert!(
            Round::number_of("rounds/7").is_none() && Round::number_of("packs/0000000000000007").is_none()
        );
        let other = round.encode().replace("format 1", "format 2");
        assert_eq!(Round::parse(other.as_bytes()), Err(TextError::Version { found: "2".into() }));
    }

    /// A node as far as collection knows it: what it uses, and what it said last.
    struct Node {
        epoch: u64,
        generation: u64,
        honoured: u64,
        uses: BTreeSet<u8>,
        /// It has said so and does not know better.
        alive: bool,
    }

    /// Random nodes that write, use, give up, sleep and come back, and collectors with lists that are late by less
    /// than the grace: no pack is deleted that a manifest lists whose life is not declared dead.
    #[test]
    fn nothing_that_a_live_manifest_lists_is_ever_deleted() {
        let mut deleted_in_all = 0;
        for seed in 0..3000 {
            let mut random = Random::new(seed);
            let mut nodes: Vec<Node> = (0..3)
                .map(|_| Node { epoch: 1, generation: 0, honoured: 0, uses: BTreeSet::new(), alive: true })
                .collect();
            let name = |index: usize| format!("n{index}");
            let mut packs: BTreeSet<u8> = BTreeSet::new();
            // Every manifest and every set of packs there ever was, so that a list can show an old one.
            let mut manifests: Vec<BTreeMap<String, ManifestSeen>> = vec![BTreeMap::new()];
            let mut rounds: Vec<Round> = vec![];
            // Which manifests there were when each round was written.
            let mut written: Vec<usize> = vec![];
            let mut next_pack = 0;
            for _ in 0..120 {
                let mut now = manifests.last().unwrap().clone();
                let newest = rounds.last().cloned();
                match random.below(10) {
                    // A node writes a pack; it said it was there before it did.
                    0..3 => {
                        let index = random.below(3) as usize;
                        let node = &mut nodes[index];
                        if node.alive && node.generation > 0 && next_pack < 250 {
                            next_pack += 1;
                            packs.insert(next_pack);
                            node.uses.insert(next_pack);
                        }
                    }
                    // A node uses another's pack that it found, or gives one up.
                    3..5 => {
                        let index = random.below(3) as usize;
                        let found =
                            packs.iter().nth(random.below(packs.len().max(1) as u64) as usize).copied();
                        let node = &mut nodes[index];
                        if let Some(found) = found.filter(|_| node.alive && node.generation > 0) {
                            let condemned = newest.as_ref().is_some_and(|round| {
                                round.number <= node.honoured && round.condemned.contains_key(&id(found))
                            });
                            if !node.uses.remove(&found) && !condemned {
                                node.uses.insert(found);
                            }
                        }
                    }
                    // A node reads the newest round, decides, and says so; or finds that it is dead.
                    5..8 => {
                        let index = random.below(3) as usize;
                        let node = &mut nodes[index];
                        if let Some(round) = &newest {
                            if round.is_dead(&name(index), Epoch(node.epoch)) {
                                node.epoch += 1;
                                node.generation = 0;
                                node.uses.clear();
                                node.honoured = round.number;
                            }
                            let honoured = node.honoured;
                            node.uses.retain(|pack| may_keep(round, honoured, &id(*pack)));
                            node.honoured = round.number;
                        }
                        node.alive = true;
                        node.generation += 1;
                        let uses: Vec<u8> = node.uses.iter().copied().collect();
                        now.insert(
                            name(index),
                            manifest(&name(index), node.epoch, node.generation, node.honoured, &uses),
                        );
                    }
                    // A node sleeps.
                    8 => nodes[random.below(3) as usize].alive = false,
                    // Somebody collects; the list of manifests is late by two rounds at most.
                    _ => {
                        let oldest = written.iter().nth_back(1).copied().unwrap_or(0);
                        let late = random.below((manifests.len() - oldest) as u64) as usize;
                        let shown = &manifests[manifests.len() - 1 - late];
                        let listed = packs.iter().map(|pack| id(*pack)).collect();
                        let round = next_round(newest.as_ref(), 3, &listed, shown);
                        for gone in deletable(&round, shown) {
                            deleted_in_all += 1;
                            packs.remove(&gone.0[0]);
                            for (node, seen) in &now {
                                let listed = seen.manifest.as_ref().unwrap().uses(&gone);
                                let dead = round.is_dead(node, seen.epoch);
                                assert!(!listed || dead, "seed {seed}: {gone} went from under {node}");
                            }
                        }
                        rounds.push(round);
                        written.push(manifests.len());
                    }
                }
                manifests.push(now);
            }
        }
        assert!(deleted_in_all > 3000, "it does collect: {deleted_in_all}");
    }
}
