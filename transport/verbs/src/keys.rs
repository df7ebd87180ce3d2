//! What a key lets a peer do, and when no more: tried on the device itself, beneath everything that is polite.
//! Needs an RDMA device: `vm/test` gives it one. `KVD_RDMA_LONG=1` tries more keys.

use std::sync::Arc;
use std::time::Instant;

use crate::handles::{Context, Mw, Qp, Request};
use crate::memory::{Memory, Place};
use crate::probe::{Devices, Rail};
use crate::sys;
use crate::trial::{BLOCK, Trial, windows_hold};

fn trial() -> Option<(Trial, Rail)> {
    let wanted = std::env::var("KVD_RDMA_DEVICE").ok();
    let wanted: Vec<_> = wanted.iter().map(|text| text.parse().unwrap()).collect();
    let probe = Devices { wanted, ..Devices::default() }.probe();
    let Some(rail) = probe.usable().next().cloned() else {
        eprintln!("skipped: {}", probe.lines().join("; "));
        return None;
    };
    let context = Arc::new(Context::open(sys::library().unwrap(), &rail.device).unwrap().unwrap());
    Some((Trial::new(&context, &rail).unwrap(), rail))
}

fn bind(trial: &mut Trial, window: &mut Mw, from: Place, bytes: usize) -> u32 {
    let (key, status) = trial.bind(window, from, bytes as u64);
    assert_eq!(status.unwrap(), sys::WC_SUCCESS);
    key
}

fn invalidate(trial: &mut Trial, key: u32) {
    assert_eq!(trial.perform(true, Request::Invalidate { key }).unwrap(), sys::WC_SUCCESS);
}

fn rounds(quick: u32, long: u32) -> u32 {
    if std::env::var_os("KVD_RDMA_LONG").is_some() { long } else { quick }
}

#[test]
fn a_key_is_good_until_it_is_revoked_and_never_after() {
    let Some((mut bench, _)) = trial() else { return };
    let (mut block, mut into) = (bench.slot(BLOCK), bench.slot(BLOCK));
    block.fill(0x11);
    let (from, to) = (bench.memory.place(&block).unwrap(), bench.memory.place(&into).unwrap());
    let mut window = Mw::new(&bench.pd).unwrap();
    let (started, rounds) = (Instant::now(), rounds(1_000, 10_000));
    for round in 0..rounds {
        bench.connect().unwrap();
        let key = bind(&mut bench, &mut window, from, BLOCK);
        if round % 50 == 0 {
            into.fill(0);
            assert_eq!(bench.read(from.at, key, to, BLOCK).unwrap(), sys::WC_SUCCESS);
            assert!(into.iter().all(|byte| *byte == 0x11));
            into.fill(0);
        }
        invalidate(&mut bench, key);
        assert_eq!(
            bench.read(from.at, key, to, BLOCK).unwrap(),
            sys::WC_REM_ACCESS_ERR,
            "round {round}, key {key:#x}"
        );
    }
    assert!(into.iter().all(|byte| *byte == 0), "bytes came by a revoked key");
    eprintln!("{rounds} reads by revoked keys, all refused, in {:?}", started.elapsed());
}

#[test]
fn a_key_that_was_never_given_opens_nothing() {
    let Some((mut bench, _)) = trial() else { return };
    let (mut block, mut into) = (bench.slot(BLOCK), bench.slot(BLOCK));
    block.fill(0x11);
    into.fill(0);
    let (from, to) = (bench.memory.place(&block).unwrap(), bench.memory.place(&into).unwrap());
    let mut window = Mw::new(&bench.pd).unwrap();
    bench.connect().unwrap();
    let mut key = bind(&mut bench, &mut window, from, BLOCK);
    let (started, rounds) = (Instant::now(), rounds(1_000, 20_000));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..rounds {
        // First those that are near: the arena's own key, none, other lives of the window, its neighbours.
        let guess = match round {
            0 => from.local_key,
            1 => 0,
            2..257 => key ^ (round - 1),
            257..320 => key.wrapping_add((round - 256) << 8),
            320..384 => key.wrapping_sub((round - 319) << 8),
            _ => {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u32
            }
        };
        if guess == key {
            continue;
        }
        assert_eq!(bench.read(from.at, guess, to, BLOCK).unwrap(), sys::WC_REM_ACCESS_ERR, "{guess:#x}");
        // The owner's queue pair went with it, and its window.
        bench.connect().unwrap();
        invalidate(&mut bench, key);
        key = bind(&mut bench, &mut window, from, BLOCK);
    }
    assert!(into.iter().all(|byte| *byte == 0), "bytes came by a guessed key");
    assert_eq!(bench.read(from.at, key, to, BLOCK).unwrap(), sys::WC_SUCCESS);
    assert!(into.iter().all(|byte| *byte == 0x11));
    eprintln!("{rounds} reads by guessed keys, all refused, in {:?}", started.elapsed());
}

/// Reads around the block in the middle that went through.
fn read_beyond(
    bench: &mut Trial,
    middle: Place,
    to: Place,
    key: &mut dyn FnMut(&mut Trial) -> u32,
) -> Vec<&'static str> {
    let mut beyond = Vec::new();
    for (what, at, bytes) in [
        ("before", middle.at - 1, 1),
        ("over the beginning", middle.at - 1, 2),
        ("over the end", middle.at + 1, BLOCK),
        ("behind", middle.at + BLOCK as u64, 1),
        ("far behind", middle.at + (64 << 20), 1),
    ] {
        bench.connect().unwrap();
        let key = key(bench);
        assert_eq!(bench.read(middle.at, key, to, BLOCK).unwrap(), sys::WC_SUCCESS);
        assert_eq!(bench.read(middle.at + 100, key, to, 7).unwrap(), sys::WC_SUCCESS);
        match bench.read(at, key, to, bytes).unwrap() {
            sys::WC_SUCCESS => beyond.push(what),
            status => assert_eq!(status, sys::WC_REM_ACCESS_ERR, "{what}"),
        }
        bench.connect().unwrap();
        let write = Request::Write {
            to: middle.at,
            remote_key: key,
            from: to.at,
            local_key: to.local_key,
            bytes: 16,
        };
        assert_ne!(bench.perform(false, write).unwrap(), sys::WC_SUCCESS, "a peer wrote");
    }
    beyond
}

#[test]
fn a_key_opens_its_block_for_reading_and_no_more() {
    let Some((mut bench, rail)) = trial() else { return };
    let (mut block, into) = (bench.slot(3 * BLOCK), bench.slot(3 * BLOCK));
    block.fill(0x11);
    let to = bench.memory.place(&into).unwrap();
    let middle = bench.memory.place(&block[BLOCK..2 * BLOCK]).unwrap();

    // SAFETY: the block outlives the region and is not written.
    let region =
        unsafe { Memory::region(&bench.pd, block[BLOCK..].as_ptr() as usize, BLOCK, middle.at) }.unwrap();
    let by_region = read_beyond(&mut bench, middle, to, &mut |_| region.remote_key());
    assert!(by_region.is_empty(), "{by_region:?}");

    let mut window = Mw::new(&bench.pd).unwrap();
    let mut bound = None;
    let by_window = read_beyond(&mut bench, middle, to, &mut |bench| {
        bound.take().into_iter().for_each(|key| invalidate(bench, key));
        *bound.insert(bind(bench, &mut window, middle, BLOCK))
    });
    assert!(block.iter().all(|byte| *byte == 0x11));
    let trusted = windows_hold(&bench.pd.context, &rail);
    eprintln!("reads beyond a window that went through: {by_window:?}; the trial says {trusted:?}");
    assert_eq!(by_window.is_empty(), trusted.is_ok(), "the trial finds out");
}

#[test]
fn a_window_is_no_use_to_another_queue_pair() {
    let Some((mut bench, _)) = trial() else { return };
    let Some((mut other, _)) = trial() else { return };
    let (mut block, into) = (bench.slot(BLOCK), bench.slot(BLOCK));
    block.fill(0x11);
    // The other pair, but of the same domain.
    other.owner = Qp::new(&bench.pd, &bench.cq, 16, 1).unwrap();
    other.reader = Qp::new(&bench.pd, &bench.cq, 16, 1).unwrap();
    other.cq = Arc::clone(&bench.cq);
    let (from, to) = (bench.memory.place(&block).unwrap(), bench.memory.place(&into).unwrap());
    let mut window = Mw::new(&bench.pd).unwrap();
    bench.connect().unwrap();
    other.connect().unwrap();
    let key = bind(&mut bench, &mut window, from, BLOCK);
    assert_eq!(other.read(from.at, key, to, BLOCK).unwrap(), sys::WC_REM_ACCESS_ERR);
    assert_eq!(bench.read(from.at, key, to, BLOCK).unwrap(), sys::WC_SUCCESS);
}
