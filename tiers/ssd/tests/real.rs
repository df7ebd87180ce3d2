//! The real file system: a process killed with SIGKILL in the middle of writing, again and again (what it
//! acknowledged is there, and nothing read is wrong), two owners, registered memory.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Found, MIB, Node, key, number};
use kv_ssd::{Engine, Error, HealthState, SsdConfig, SsdStore};
use kv_tiers::store::{BlockStore, StoreDone, StoreError};

const CHILD_DIR: &str = "KV_SSD_KILL_DIR";
const CHILD_ROUND: &str = "KV_SSD_KILL_ROUND";
const ROUNDS: u64 = 12;

fn config(dir: &Path) -> SsdConfig {
    SsdConfig { segment_bytes: 2 * MIB, ..SsdConfig::new(dir, 24 * MIB) }
}

fn open(dir: &Path) -> (Node, Found) {
    let (store, mut recovered) = SsdStore::open(config(dir), Box::new(|| {})).expect("the store opens");
    let found = recovered.by_ref().flatten().map(|(record, at)| (record.key, (record, at))).collect();
    let report = recovered.finish().expect("recovery ends");
    assert_eq!(report.segments_set_aside, 0, "{:?}", report.notes);
    (Node::new(store), found)
}

/// What the child does: writes and removes as fast as it can and says what was acknowledged.
fn write_until_killed(dir: &Path, round: u64) {
    let (mut node, mut alive) = open(dir);
    let mut out = std::io::stdout().lock();
    let mut under_way = BTreeMap::new();
    for step in 0..100_000u64 {
        let n = round * 1_000_000 + step;
        let token = node.begin_write(n, 1 + (n * 7919 % 150_000) as u32);
        under_way.insert(token, n);
        while under_way.len() >= 16 {
            node.poll();
            let ended: Vec<_> =
                under_way.keys().filter(|token| node.done.contains_key(token)).copied().collect();
            let mut full = false;
            for token in ended {
                let n = under_way.remove(&token).expect("just listed");
                let StoreDone::Written { bytes, result, .. } = node.end(token) else { panic!("not a write") };
                let record = bytes.record();
                node.forget(bytes);
                match result {
                    Ok(at) => {
                        alive.insert(record.key, (record, at));
                        writeln!(out, "+{n}").expect("the parent listens");
                    }
                    Err(StoreError::Full) => full = true,
                    Err(other) => panic!("{other}"),
                }
            }
            // An offer may name what has just been acknowledged, so only now. What may be given up is said
            // before it is gone.
            if full && let Some((_, entries)) = node.offers.first() {
                for key in entries.iter().map(|(record, _)| record.key) {
                    writeln!(out, "?{}", number(&key)).expect("the parent listens");
                }
                let keys: Vec<_> = entries.iter().map(|(record, _)| record.key).collect();
                node.reclaim(&mut alive, |key| number(key).is_multiple_of(3));
                for key in keys.iter().filter(|key| alive.contains_key(*key)) {
                    writeln!(out, "+{}", number(key)).expect("the parent listens");
                }
            }
        }
        if step % 11 == 10
            && let Some((key, (_, at))) = alive.iter().next().map(|(key, place)| (*key, *place))
        {
            alive.remove(&key);
            writeln!(out, "?{}", number(&key)).expect("the parent listens");
            if node.remove(key, at).is_ok() {
                writeln!(out, "-{}", number(&key)).expect("the parent listens");
            }
        }
    }
}

#[test]
fn a_killed_process_leaves_everything_it_acknowledged() {
    if let (Ok(dir), Ok(round)) = (std::env::var(CHILD_DIR), std::env::var(CHILD_ROUND)) {
        return write_until_killed(Path::new(&dir), round.parse().expect("a number"));
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut acknowledged = std::collections::BTreeSet::new();
    let mut removed = std::collections::BTreeSet::new();
    let mut blocks = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_killed_process_leaves_everything_it_acknowledged", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .env(CHILD_ROUND, round.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut count = 0;
        // Killed after some hundred lines, at another point of its work each time; what is still in the
        // pipe was said too.
        for line in lines {
            let line = line.unwrap();
            let (kind, n) = line.split_at_checked(1).unwrap_or_default();
            let Ok(n) = n.parse::<u64>() else { continue };
            match kind {
                "+" => drop(acknowledged.insert(n)),
                "?" => drop(acknowledged.remove(&n)),
                "-" => drop(removed.insert(n)),
                _ => continue,
            }
            count += 1;
            if count == 150 + round * 37 {
                std::thread::sleep(Duration::from_micros(round * 311));
                child.kill().unwrap();
            }
        }
        let status = child.wait().unwrap();
        assert!(count > 100, "the child ended by itself: {status}");
        let (mut node, found) = open(dir.path());
        for (record, at) in found.values() {
            let read = node.read(record, *at);
            let n = number(&record.key);
            assert!(read.is_ok() || !acknowledged.contains(&n), "round {round}, block {n}: {read:?}");
            assert!(!removed.contains(&n), "round {round}: block {n} was removed and came back");
            blocks += 1;
        }
        for n in &acknowledged {
            assert!(found.contains_key(&key(*n)), "round {round}: block {n} was acknowledged and is lost");
        }
        assert_eq!(node.store.usage().in_flight, 0);
    }
    eprintln!("{blocks} blocks read back after {ROUNDS} kills");
}

#[test]
fn a_directory_in_use_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (node, _) = open(dir.path());
    let second = SsdStore::open(config(dir.path()), Box::new(|| {})).map(|_| ()).unwrap_err();
    assert!(matches!(second, Error::InUse { .. }), "{second}");
    drop(node);
    open(dir.path());
}

#[test]
fn blocks_pass_through_registered_memory() {
    for engine in [Engine::Auto, Engine::Threads] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let memory = common::memory();
        let config = SsdConfig { arenas: vec![memory.slab().clone()], engine, ..config(dir.path()) };
        let (store, recovered) = SsdStore::open(config, Box::new(|| {})).unwrap();
        recovered.finish().unwrap();
        let mut node = Node::over(memory, store);
        let mut alive = Found::new();
        for n in 0..100 {
            let (record, at) = node.write(n, 1 + n as u32 * 1_777).unwrap();
            alive.insert(record.key, (record, at));
        }
        for (record, at) in alive.values() {
            assert_eq!(node.read(record, *at), Ok(()));
        }
        eprintln!("{engine:?}: {:?}", node.store.notes());
    }
}

/// Waits until the store is in service, or is not.
fn until_serving(node: &mut Node, wanted: bool) {
    let limit = std::time::Instant::now() + Duration::from_secs(20);
    while (node.store.health().state == HealthState::Healthy) != wanted {
        assert!(std::time::Instant::now() < limit, "{:?}", node.store.health());
        node.poll();
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_directory_that_is_taken_away_takes_the_store_out_of_service_until_it_is_back() {
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (place, away) = (temp.path().join("data"), temp.path().join("away"));
    let (mut node, _) = open(&place);
    let (record, at) = node.write(1, 100_000).unwrap();
    std::fs::rename(&place, &away).unwrap();
    until_serving(&mut node, false);
    assert_eq!(node.write(2, 100_000).map(|_| ()), Err(StoreError::Gone), "nothing is acknowledged");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("kvd.format"), "another one").unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(node.write(2, 100_000).map(|_| ()), Err(StoreError::Gone), "another one is not it");
    std::fs::remove_dir_all(&place).unwrap();
    std::fs::rename(&away, &place).unwrap();
    until_serving(&mut node, true);
    assert_eq!(node.read(&record, at), Ok(()));
    std::fs::remove_dir_all(&place).unwrap();
    until_serving(&mut node, false);
}
