//! Stories of the object tier on a store in memory.

mod common;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::{LONG, NOW, binding, config, hits, key, offer, read};
use kv_block::{BlockKey, Epoch, MissReason};
use kv_object::circuit::Standing;
use kv_object::dir::Dir;
use kv_object::landing::Landing;
use kv_object::manifest::Manifest;
use kv_object::memory::Memory;
use kv_object::pack::{PackError, PackId};
use kv_object::packer::PackerLimits;
use kv_object::requests::{Kind, RequestError};
use kv_object::store::{Page, Reply, Store, StoreError};
use kv_object::tier::{
    Got, Inside, PACKS, PackView, SetAside, Stored, Tier, TierConfig, TierError, Verified,
};
use kv_object::unreliable::{Rates, Unreliable};

async fn open(store: &Arc<Memory>, config: TierConfig) -> Tier {
    Tier::open(store.clone(), config, NOW).await.unwrap().0
}

/// Blocks of one prefix, one behind the other.
async fn fill(tier: &Tier, numbers: std::ops::Range<u64>) {
    let first = numbers.start;
    let offers = numbers.clone().map(|n| offer(n, 4000, (n > first).then(|| n - 1), 0)).collect();
    let mut stored = tier.put(NOW, offers).await.unwrap();
    stored.landed.extend(tier.flush(true).await.unwrap().landed);
    assert_eq!(stored.landed.len() as u64, numbers.end - first);
}

fn pack_names(store: &Memory) -> Vec<String> {
    store.with(|objects| objects.keys().filter(|name| name.starts_with(PACKS)).cloned().collect())
}

fn gets(tier: &Tier) -> u64 {
    tier.report().requests.counts[&Kind::Get].requests
}

#[tokio::test]
async fn blocks_wait_until_there_are_enough_and_are_found_when_they_have_landed() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    let stored = tier.put(NOW, (0..8).map(|n| offer(n, 4000, None, 0)).collect()).await.unwrap();
    assert_eq!((stored, pack_names(&store).len()), (Stored::default(), 0), "31 KiB of 32");
    assert_eq!(hits(&tier, &[0, 7]).await, 0);
    let stored = tier.put(NOW, vec![offer(0, 4000, None, 0), offer(8, 4000, None, 0)]).await.unwrap();
    assert_eq!((stored.known, stored.landed.len()), (vec![key(0)], 9));
    assert_eq!(hits(&tier, &(0..9).collect::<Vec<_>>()).await, 9);
    let again = tier.put(NOW, vec![offer(3, 4000, None, 0)]).await.unwrap();
    assert_eq!((again.known, tier.report().totals.packs_written), (vec![key(3)], 1));
}

#[tokio::test(start_paused = true)]
async fn a_block_that_waits_long_enough_is_written_alone() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    assert_eq!(tier.due_in(), None);
    tier.put(NOW, vec![offer(1, 10, None, 0)]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(tier.due_in(), Some(Duration::from_secs(3)));
    assert_eq!(tier.flush(false).await.unwrap(), Stored::default());
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(tier.flush(false).await.unwrap().landed, [key(1)]);
}

#[tokio::test]
async fn what_contradicts_its_record_is_refused() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    let (mut flipped, mut foreign, mut short) =
        (offer(1, 100, None, 0), offer(2, 100, None, 0), offer(3, 100, None, 0));
    flipped.bytes = vec![0; 100].into();
    foreign.record.tag.0 ^= 1;
    short.bytes = short.bytes.slice(1..);
    let stored = tier.put(NOW, vec![flipped, foreign, short]).await.unwrap();
    assert_eq!(stored.refused, [key(1), key(2), key(3)]);
    assert_eq!(tier.report().waiting_bytes, 0);
}

#[tokio::test]
async fn the_same_node_with_an_empty_disk_finds_what_an_earlier_life_wrote() {
    let store = Arc::new(Memory::new());
    fill(&open(&store, config("a", 1)).await, 0..50).await;
    let (tier, opened) = Tier::open(store.clone(), config("a", 2), NOW).await.unwrap();
    assert_eq!((opened.blocks, opened.adopted), (50, opened.packs));
    assert_eq!(hits(&tier, &(0..50).collect::<Vec<_>>()).await, 50);
    // An epoch is lived once.
    for epoch in [1, 2] {
        let again = Tier::open(store.clone(), config("a", epoch), NOW).await;
        assert_eq!(again.err(), Some(TierError::Fenced { epoch: Epoch(epoch), found: Epoch(2) }));
    }
}

#[tokio::test]
async fn another_node_finds_what_this_one_writes() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&one, 0..20).await;
    assert_eq!(hits(&two, &[3]).await, 0, "nobody said so yet");
    one.refresh(NOW).await.unwrap();
    let count = |kind| two.report().requests.counts.get(&kind).map_or(0, |count| count.requests);
    let gets = count(Kind::Get);
    two.refresh(NOW).await.unwrap();
    assert_eq!(count(Kind::Get), gets + 1, "its manifest says it all");
    assert_eq!(hits(&two, &(0..20).collect::<Vec<_>>()).await, 20);
    let (gets, lists) = (count(Kind::Get), count(Kind::List));
    two.refresh(NOW).await.unwrap();
    assert_eq!(count(Kind::Get), gets, "nothing is read twice");
    assert_eq!(count(Kind::List), lists + 1, "rounds are looked for now and then");
}

#[tokio::test]
async fn whoever_missed_manifests_reads_the_footers() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    for part in 0..5 {
        fill(&one, part * 10..part * 10 + 10).await;
        one.refresh(NOW).await.unwrap();
    }
    let manifests =
        store.with(|objects| objects.keys().filter(|name| name.starts_with("manifests/a/")).count());
    assert_eq!(manifests, 2, "the others are gone, and nobody listed them");
    let gets = |tier: &Tier| tier.report().requests.counts.get(&Kind::Get).map_or(0, |count| count.requests);
    let before = gets(&two);
    two.refresh(NOW).await.unwrap();
    let footers = gets(&two) - before - 1;
    assert!((1..two.report().packs as u64).contains(&footers), "{footers} footers");
    assert_eq!(hits(&two, &(0..50).collect::<Vec<_>>()).await, 50);
}

#[tokio::test]
async fn a_footer_that_is_no_footer_is_read_from_its_pack() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&one, 0..20).await;
    one.refresh(NOW).await.unwrap();
    store.with(|objects| {
        let (_, body) = objects.iter_mut().rfind(|(name, _)| name.starts_with("manifests/a/")).unwrap();
        let mut manifest = Manifest::parse(body).unwrap();
        assert!(!manifest.tails.is_empty());
        for (_, tail) in &mut manifest.tails {
            *tail = tail.iter().map(|byte| byte ^ 1).collect::<Vec<_>>().into();
        }
        *body = manifest.encode().into();
    });
    two.refresh(NOW).await.unwrap();
    assert_eq!(hits(&two, &(0..20).collect::<Vec<_>>()).await, 20);
}

#[tokio::test]
async fn a_directory_is_shared_by_two_nodes_and_outlives_both() {
    let place = tempfile::tempdir().unwrap();
    let store = || Arc::new(Dir::open(place.path()).unwrap()) as Arc<dyn Store>;
    let one = Tier::open(store(), config("a", 1), NOW).await.unwrap().0;
    fill(&one, 0..30).await;
    one.refresh(NOW).await.unwrap();
    let two = Tier::open(store(), config("b", 1), NOW).await.unwrap().0;
    assert_eq!(hits(&two, &(0..30).collect::<Vec<_>>()).await, 30);
    drop((one, two));
    let three = Tier::open(store(), config("c", 1), NOW).await.unwrap().0;
    assert_eq!(hits(&three, &(0..30).collect::<Vec<_>>()).await, 30);
    assert!(three.report().store.starts_with("directory /"));
}

#[tokio::test]
async fn lost_manifests_are_rebuilt_from_the_packs() {
    let store = Arc::new(Memory::new());
    let one = open(&store, config("a", 1)).await;
    fill(&one, 0..30).await;
    one.refresh(NOW).await.unwrap();
    store.with(|objects| objects.retain(|name, _| !name.starts_with("manifests/")));
    let (two, opened) = Tier::open(store.clone(), config("a", 2), NOW).await.unwrap();
    assert_eq!((opened.nodes, opened.blocks, opened.adopted), (0, 30, opened.packs));
    assert_eq!(hits(&two, &(0..30).collect::<Vec<_>>()).await, 30);
    // A damaged one is as good as none.
    store.with(|objects| {
        for (_, body) in objects.iter_mut().filter(|(name, _)| name.starts_with("manifests/")) {
            *body = b"kvd manifest\nformat 1\nrubbish".to_vec().into();
        }
    });
    let (_, opened) = Tier::open(store.clone(), config("a", 3), NOW).await.unwrap();
    assert_eq!((opened.blocks, opened.adopted), (30, opened.packs));
}

#[tokio::test]
async fn neighbours_come_in_one_request_and_the_rest_of_a_prefix_is_known() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    fill(&tier, 0..9).await;
    let before = gets(&tier);
    assert_eq!(hits(&tier, &(0..9).collect::<Vec<_>>()).await, 9);
    assert_eq!(gets(&tier) - before, 1);
    assert_eq!(hits(&tier, &[8, 2, 3, 5]).await, 4);
    let totals = tier.report().totals;
    assert!(totals.bytes_read * 10 <= totals.bytes_used * 13, "{totals:?}");
    assert_eq!(tier.ahead(NOW, &key(2)), (3..9).map(|n| (key(n), 4000)).collect::<Vec<_>>());
    assert_eq!(tier.ahead(NOW, &key(8)), []);
}

#[tokio::test]
async fn a_thousand_blocks_cost_few_requests() {
    let store = Arc::new(Memory::new());
    let limits = PackerLimits { pack_bytes: 1 << 20, ..config("a", 1).packer };
    let tier = open(&store, TierConfig { packer: limits, ..config("a", 1) }).await;
    fill(&tier, 0..1000).await;
    for from in (0..1000).step_by(100) {
        assert_eq!(hits(&tier, &(from..from + 100).collect::<Vec<_>>()).await, 100);
    }
    tier.refresh(NOW).await.unwrap();
    let report = tier.report();
    let requests: u64 = report.requests.counts.values().map(|count| count.requests).sum();
    // Five for each block are what others need, and a fiftieth of that is the goal.
    assert!(requests * 50 <= 5 * 2000, "{requests} requests for 1000 blocks written and read");
    assert!(report.totals.bytes_read * 10 <= report.totals.bytes_used * 13);
}

#[tokio::test]
async fn another_version_is_incompatible_and_a_miss() {
    let store = Arc::new(Memory::new());
    fill(&open(&store, config("a", 1)).await, 0..9).await;
    let name = pack_names(&store).remove(0);
    store.with(|objects| {
        let mut body = objects[&name].to_vec();
        let at = body.len() - 32;
        body[at + 8] = 2;
        let crc = crc32fast::hash(&body[at..at + 28]);
        body[at + 28..].copy_from_slice(&crc.to_le_bytes());
        objects.insert(name.clone(), body.into());
    });
    let (tier, opened) = Tier::open(store.clone(), config("b", 1), NOW).await.unwrap();
    assert_eq!((opened.incompatible, opened.broken, opened.packs), (1, 0, 0));
    assert_eq!(read(&tier, NOW, LONG, &[0]).await, [Got::Missed(MissReason::NeverStored)]);
    let id = name.strip_prefix(PACKS).unwrap().parse().unwrap();
    assert_eq!(tier.report().set_aside[&id], SetAside::Incompatible { version: 2 });
    let pack_bytes = store.with(|objects| objects[&name].len()) as u64;
    let inside = Inside::Aside(SetAside::Incompatible { version: 2 });
    let seen = tier.inventory(PackId([0; 32])..=PackId([0xff; 32]), 9);
    assert_eq!(seen, [PackView { id, pack_bytes, listed: false, inside }]);
    assert!(tier.pack(&id).is_none());
    assert_eq!(tier.verify(&id).await, Ok(Verified::Incompatible));
}

#[tokio::test]
async fn a_damaged_block_is_a_miss_and_its_neighbours_are_not() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    fill(&tier, 0..9).await;
    let name = pack_names(&store).remove(0);
    let id = name.strip_prefix(PACKS).unwrap().parse().unwrap();
    assert_eq!(tier.verify(&id).await, Ok(Verified::Sound { blocks: 9 }));
    store.with(|objects| {
        let mut body = objects[&name].to_vec();
        body[16 + 4000 * 4 + 7] ^= 1;
        objects.insert(name.clone(), body.into());
    });
    let got = read(&tier, NOW, LONG, &(0..9).collect::<Vec<_>>()).await;
    for (number, got) in got.iter().enumerate() {
        match number {
            4 => assert_eq!(*got, Got::Missed(MissReason::Corrupt)),
            _ => assert!(matches!(got, Got::Read(_)), "block {number}: {got:?}"),
        }
    }
    assert_eq!(tier.report().totals.checksum_failures, 2, "it was read again");
    let damaged = Verified::Damaged { error: PackError::Block { key: key(4) }, blocks: vec![key(4)] };
    assert_eq!(tier.verify(&id).await, Ok(damaged));
    // It can be stored again, and the other copy serves.
    tier.put(NOW, vec![offer(4, 4000, None, 0)]).await.unwrap();
    tier.flush(true).await.unwrap();
    assert_eq!(hits(&tier, &[4]).await, 1);
}

#[tokio::test]
async fn a_pack_that_is_gone_is_forgotten_and_a_copy_elsewhere_serves() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&one, 0..5).await;
    fill(&two, 3..5).await;
    one.refresh(NOW).await.unwrap();
    two.refresh(NOW).await.unwrap();
    one.refresh(NOW).await.unwrap();
    let of_one = one.packs().into_iter().find(|pack| pack.writer.node == "a").unwrap().id;
    store.with(|objects| objects.remove(&format!("{PACKS}{of_one}")));
    let got = read(&one, NOW, LONG, &[0, 3, 4]).await;
    assert_eq!(got[0], Got::Missed(MissReason::NeverStored));
    assert!(matches!(got[1..], [Got::Read(_), Got::Read(_)]), "{got:?}");
    assert_eq!(one.report().totals.packs_gone, 1);
    assert_eq!(one.verify(&of_one).await, Ok(Verified::Absent));
}

#[tokio::test]
async fn slots_that_are_too_short_and_blocks_that_are_wanted_twice() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, config("a", 1)).await;
    fill(&tier, 0..3).await;
    let (mut short, mut long, mut again) = (vec![0; 3999], vec![0; 4000], vec![0; 5000]);
    let mut wants = [
        kv_object::tier::Want { key: key(1), into: &mut short },
        kv_object::tier::Want { key: key(1), into: &mut long },
        kv_object::tier::Want { key: key(1), into: &mut again },
    ];
    let got = tier.read(NOW, LONG, &mut wants).await;
    assert!(matches!(got[..], [Got::TooLong { bytes: 4000 }, Got::Read(_), Got::Read(_)]), "{got:?}");
    assert_eq!(long[..], again[..4000]);
}

#[tokio::test]
async fn what_has_expired_misses_and_goes_as_a_pack() {
    let store = Arc::new(Memory::new());
    let tier = open(&store, TierConfig { ttl_s: Some(7200), ..config("a", 1) }).await;
    tier.put(NOW, vec![offer(1, 100, None, 0), offer(2, 100, None, NOW + 60)]).await.unwrap();
    tier.flush(true).await.unwrap();
    assert_eq!(pack_names(&store).len(), 2, "what expires at another time is another pack");
    let at = |second| {
        let found = tier.find(NOW + second, &[key(1), key(2)]);
        found.into_iter().map(Result::err).collect::<Vec<_>>()
    };
    assert_eq!(at(59), [None, None]);
    assert_eq!(at(60), [None, Some(MissReason::Expired)]);
    assert_eq!(at(7200), [Some(MissReason::Expired), Some(MissReason::Expired)]);
    tier.refresh(NOW + 60).await.unwrap();
    assert_eq!(tier.report().packs_listed, 1);
}

/// Waits for the next round and has one node write it.
async fn round(collector: &Tier) -> kv_object::tier::Collected {
    tokio::time::sleep(Duration::from_secs(61)).await;
    collector.collect(false).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_nobody_uses_is_collected_and_what_is_read_elsewhere_is_not() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&one, 0..9).await;
    fill(&one, 100..109).await;
    one.refresh(NOW).await.unwrap();
    two.refresh(NOW).await.unwrap();
    let packs: Vec<BlockKey> = one.packs().iter().map(|pack| pack.records().next().unwrap().key).collect();
    assert_eq!(packs.len(), 2);
    for pack in one.packs() {
        one.release(&pack.id).unwrap();
    }
    // The second node reads from one of them.
    assert_eq!(hits(&two, &[0, 1]).await, 2);
    one.refresh(NOW).await.unwrap();
    assert_eq!(one.collect(false).await.unwrap().round, 0, "too early");
    assert_eq!(one.collect(true).await.unwrap().condemned, 2, "a dry run looks at once");
    let mut deleted = 0;
    for number in 1..=6 {
        let collected = round(&one).await;
        assert_eq!(collected.round, number);
        deleted += collected.deleted.len();
        assert!(deleted == 0 || number >= 4, "the grace is three rounds");
        one.refresh(NOW).await.unwrap();
        two.refresh(NOW).await.unwrap();
    }
    assert_eq!((deleted, pack_names(&store).len()), (1, 1));
    assert_eq!((hits(&two, &[0]).await, hits(&two, &[100]).await), (1, 0));
    assert_eq!(two.report().packs_listed, 1, "it goes on listing what it reads");
    let rounds = store.with(|objects| objects.keys().filter(|name| name.starts_with("rounds/")).count());
    assert_eq!(rounds, 4, "old rounds go");
    let manifests =
        store.with(|objects| objects.keys().filter(|name| name.starts_with("manifests/")).count());
    assert_eq!(manifests, 4, "two of each node");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_sleeps_through_the_grace_is_fenced_and_comes_back_with_a_higher_epoch() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&two, 0..9).await;
    two.refresh(NOW).await.unwrap();
    let mut dead = Vec::new();
    for _ in 0..8 {
        dead.extend(round(&one).await.dead);
        one.refresh(NOW).await.unwrap();
    }
    assert_eq!((dead, pack_names(&store).len()), (vec!["b".to_owned()], 0));
    let over = Some(TierError::Fenced { epoch: Epoch(1), found: Epoch(1) });
    assert_eq!(two.refresh(NOW).await.err(), over);
    assert_eq!(two.put(NOW, vec![offer(1, 10, None, 0)]).await.err(), over);
    assert_eq!(hits(&two, &[0]).await, 0, "gone, and nothing wrong is served");
    assert_eq!(Tier::open(store.clone(), config("b", 1), NOW).await.err(), over);
    fill(&open(&store, config("b", 2)).await, 0..9).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_node_wrote_outlives_it_until_its_time_is_over() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    // b wrote them, and is not heard of again.
    let offers = vec![offer(1, 4000, None, NOW + 86_400), offer(2, 4000, None, 0)];
    two.put(NOW, offers).await.unwrap();
    two.flush(true).await.unwrap();
    two.refresh(NOW).await.unwrap();
    one.refresh(NOW).await.unwrap();
    assert_eq!(pack_names(&store).len(), 2);
    for _ in 0..12 {
        round(&one).await;
        one.refresh(NOW).await.unwrap();
    }
    assert_eq!((pack_names(&store).len(), one.report().packs_listed), (1, 1), "what has no end is gone");
    assert_eq!(hits(&one, &[1]).await, 1);
    // A day later.
    for _ in 0..8 {
        one.refresh(NOW + 86_400).await.unwrap();
        round(&one).await;
    }
    assert!(pack_names(&store).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_round_that_cannot_be_read_stops_collection_and_nothing_else() {
    let store = Arc::new(Memory::new());
    let one = open(&store, config("a", 1)).await;
    fill(&one, 0..9).await;
    assert_eq!(round(&one).await.round, 1);
    let name = "rounds/0000000000000001";
    let text = store.with(|objects| objects.insert(name.to_owned(), "kvd round\nformat 2\n".into()).unwrap());
    let two = open(&store, config("b", 1)).await;
    assert_eq!(hits(&two, &(0..9).collect::<Vec<_>>()).await, 9);
    fill(&two, 20..29).await;
    two.refresh(NOW).await.unwrap();
    assert_eq!(two.report().round_unreadable, Some(1));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(two.collect(false).await, Err(TierError::Round { number: 1 }));
    // When it can be read, all goes on.
    store.with(|objects| objects.insert(name.to_owned(), text));
    two.refresh(NOW).await.unwrap();
    assert_eq!((two.report().round_unreadable, two.report().round), (None, 1));
    assert_eq!(round(&two).await.round, 2);
}

#[tokio::test(start_paused = true)]
async fn what_waits_and_what_is_written_has_a_bound() {
    let store = Arc::new(Unreliable::new(Arc::new(Memory::new()), 1));
    let packer = PackerLimits { waiting_bytes_max: 100_000, ..config("a", 1).packer };
    let (tier, _) = Tier::open(store.clone() as Arc<dyn Store>, TierConfig { packer, ..config("a", 1) }, NOW)
        .await
        .unwrap();
    let tier = Arc::new(tier);
    // Every write takes long.
    store.set_rates(Rates { slow: 1000, slow_max: Duration::from_secs(30), ..Rates::default() });
    let writes: Vec<_> = (0..10)
        .map(|group| {
            let tier = tier.clone();
            let offers = (group * 9..group * 9 + 9).map(|n| offer(n, 4000, None, 0)).collect();
            tokio::spawn(async move { tier.put(NOW, offers).await.unwrap() })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(1)).await;
    let report = tier.report();
    assert!(
        report.waiting_bytes + report.writing_bytes <= 100_000 && report.writing_bytes > 60_000,
        "{report:?}"
    );
    let mut refused = 0;
    for write in writes {
        refused += write.await.unwrap().refused.len();
    }
    let report = tier.report();
    assert!(refused > 50 && report.writing_bytes == 0, "{refused} refused, {report:?}");
}

#[tokio::test(start_paused = true)]
async fn of_two_collectors_one_writes_the_round() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    tokio::time::sleep(Duration::from_secs(61)).await;
    let (first, second) = tokio::join!(one.collect(false), two.collect(false));
    let (first, second) = (first.unwrap().round, second.unwrap().round);
    assert_eq!((first.max(second), first.min(second)), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_sick_store_misses_at_once_and_is_found_well_again() {
    let memory = Arc::new(Memory::new());
    let store = Arc::new(Unreliable::new(memory.clone(), 1));
    let (tier, _) = Tier::open(store.clone() as Arc<dyn Store>, config("a", 1), NOW).await.unwrap();
    fill(&tier, 0..9).await;
    store.set_down(true);
    let within = Duration::from_secs(2);
    while tier.report().requests.circuit == Standing::Closed {
        let began = tokio::time::Instant::now();
        read(&tier, NOW, within, &[1]).await;
        assert!(began.elapsed() <= within + Duration::from_millis(10));
    }
    let (asked, began) = (store.operations(), tokio::time::Instant::now());
    for _ in 0..100 {
        assert_eq!(read(&tier, NOW, within, &[1]).await, [Got::Missed(MissReason::TierDegraded)]);
    }
    assert_eq!((store.operations(), began.elapsed()), (asked, Duration::ZERO));
    assert_eq!(tier.refresh(NOW).await, Err(TierError::Request(RequestError::Degraded)));
    // A pack that the store does not take is lost, and may be offered again.
    tier.put(NOW, vec![offer(20, 100, None, 0)]).await.unwrap();
    assert_eq!(tier.flush(true).await.unwrap().lost, [key(20)]);
    store.set_down(false);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(hits(&tier, &[1]).await, 1);
    assert_eq!(tier.put(NOW, vec![offer(20, 100, None, 0)]).await.unwrap(), Stored::default());
    assert_eq!(tier.flush(true).await.unwrap().landed, [key(20)]);
}

/// Keeps the first pack with a bit flipped, and says that it failed.
struct Damaging(Memory, std::sync::atomic::AtomicBool);

impl Store for Damaging {
    fn describe(&self) -> String {
        "damaging".to_owned()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            if !name.starts_with(PACKS) || self.1.swap(true, std::sync::atomic::Ordering::SeqCst) {
                return self.0.put(name, body).await;
            }
            let mut damaged = body.to_vec();
            damaged[20] ^= 1;
            self.0.put(name, damaged.into()).await?;
            Err(StoreError::Broken { why: "the checksum differs".to_owned() })
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        self.0.get(name, from, landing)
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        self.0.head(name)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        self.0.list(prefix, after, limit)
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        self.0.delete(name)
    }
}

#[tokio::test(start_paused = true)]
async fn what_an_earlier_attempt_left_is_looked_at_before_it_counts() {
    let store = Arc::new(Damaging(Memory::new(), false.into()));
    let tier = Tier::open(store.clone() as Arc<dyn Store>, config("a", 1), NOW).await.unwrap().0;
    let offers = || vec![offer(1, 100, None, 0)];
    tier.put(NOW, offers()).await.unwrap();
    assert_eq!(tier.flush(true).await.unwrap().lost, [key(1)]);
    assert_eq!(pack_names(&store.0).len(), 0, "it goes");
    tier.put(NOW, offers()).await.unwrap();
    assert_eq!(tier.flush(true).await.unwrap().landed, [key(1)]);
    assert_eq!(hits(&tier, &[1]).await, 1);
}

#[test]
fn a_node_needs_a_name() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let opened = runtime.block_on(Tier::open(Arc::new(Memory::new()), config("../a", 1), NOW));
    assert_eq!(opened.err(), Some(TierError::Node { node: "../a".into() }));
    assert_eq!(binding().tag(), offer(1, 10, None, 0).record.tag);
}

/// Writes over what is there, as some servers do.
struct Careless(Memory);

impl Store for Careless {
    fn describe(&self) -> String {
        "careless".to_owned()
    }

    fn put<'a>(&'a self, name: &'a str, body: Bytes) -> Reply<'a, ()> {
        Box::pin(async move {
            self.0.with(|objects| objects.insert(name.to_owned(), body));
            Ok(())
        })
    }

    fn get<'a>(&'a self, name: &'a str, from: u64, landing: &'a mut Landing<'_>) -> Reply<'a, ()> {
        self.0.get(name, from, landing)
    }

    fn head<'a>(&'a self, name: &'a str) -> Reply<'a, u64> {
        self.0.head(name)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: Option<&'a str>, limit: usize) -> Reply<'a, Page> {
        self.0.list(prefix, after, limit)
    }

    fn delete<'a>(&'a self, name: &'a str) -> Reply<'a, ()> {
        self.0.delete(name)
    }
}

#[tokio::test(start_paused = true)]
async fn where_a_store_writes_over_what_is_there_nothing_is_collected() {
    let store = Arc::new(Careless(Memory::new()));
    let (tier, opened) = Tier::open(store.clone(), config("a", 1), NOW).await.unwrap();
    assert!(opened.overwrites && tier.report().overwrites);
    fill(&tier, 0..9).await;
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!(tier.collect(false).await, Err(TierError::Overwrites));
    // The rest goes on.
    let two = Tier::open(store.clone(), config("b", 1), NOW).await.unwrap().0;
    assert_eq!(hits(&two, &[0, 8]).await, 2);
    store.0.with(|objects| assert!(objects.keys().all(|name| !name.starts_with("probes/"))));
    let (_, opened) = Tier::open(Arc::new(Memory::new()), config("a", 1), NOW).await.unwrap();
    assert!(!opened.overwrites);
}

#[tokio::test(start_paused = true)]
async fn a_node_whose_manifests_another_cannot_read_keeps_its_packs() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    fill(&one, 0..9).await;
    for _ in 0..8 {
        one.refresh(NOW).await.unwrap();
        // As if a later version had written them.
        store.with(|objects| {
            let theirs = objects.iter_mut().filter(|(name, _)| name.starts_with("manifests/a/"));
            theirs.for_each(|(_, text)| *text = Bytes::from_static(b"kvd manifest\nformat 2\n"));
        });
        let collected = round(&two).await;
        assert_eq!((collected.condemned, collected.unheard), (0, vec!["a".to_owned()]));
        assert_eq!(two.report().unheard, ["a"]);
        two.refresh(NOW).await.unwrap();
    }
    assert_eq!((pack_names(&store).len(), one.report().packs_listed), (1, 1));
    assert_eq!(hits(&one, &[0, 8]).await, 2);
}

#[tokio::test(start_paused = true)]
async fn what_is_written_just_before_a_round_is_found_by_all() {
    let store = Arc::new(Memory::new());
    let (one, two) = (open(&store, config("a", 1)).await, open(&store, config("b", 1)).await);
    // Its writer has not said yet that it uses it.
    fill(&one, 0..9).await;
    two.rescan().await.unwrap();
    assert_eq!(round(&two).await.condemned, 1);
    two.refresh(NOW).await.unwrap();
    let (late, opened) = Tier::open(store.clone(), config("c", 1), NOW).await.unwrap();
    assert_eq!(opened.blocks, 9);
    let finds = |tier: &Tier| tier.find(NOW, &[key(0), key(8)]).iter().filter(|found| found.is_ok()).count();
    assert_eq!((finds(&two), finds(&late)), (2, 2));
    one.refresh(NOW).await.unwrap();
    assert_eq!(round(&two).await.condemned, 0);
    for tier in [&one, &two, &late] {
        tier.refresh(NOW).await.unwrap();
        assert_eq!(finds(tier), 2);
    }
}
