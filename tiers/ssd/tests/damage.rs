//! Files that were cut, flipped, swapped or put back from the past: what is damaged is not there, what is
//! not damaged still is, and no wrong byte is ever served.

mod common;

use common::{Found, MIB, Node, key, small};
use kv_ssd::segment::{ENTRY_BYTES, HEADER_BYTES, PAGE_BYTES, file_name, parse_segment};
use kv_ssd::{SimDisk, SsdConfig};
use kv_tiers::store::StoreError;

const BLOCKS: u64 = 12;
const SEGMENT: &str = "segment-00000000.kv";

/// A store of one segment with blocks of many lengths and one removal.
fn written() -> (SimDisk, Found) {
    let disk = SimDisk::new(3);
    let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
    for n in 0..BLOCKS {
        let (record, at) = node.write(n, 1 + n as u32 * 5_000).unwrap();
        alive.insert(record.key, (record, at));
    }
    let (_, at) = alive.remove(&key(5)).unwrap();
    node.remove(key(5), at).unwrap();
    drop(node);
    assert!(disk.image(SEGMENT).is_some() && alive.values().all(|(_, at)| at.segment() == 0));
    (disk, alive)
}

/// Opens a copy of `disk` with `image` in place of the segment; every block found must be one that was
/// stored, at its place. Gives what reads back right.
fn readable(disk: &SimDisk, image: &[u8], alive: &Found, what: &str) -> Found {
    let copy = disk.copy();
    copy.put_image(SEGMENT, image);
    let (mut node, found, _) = Node::simulated(&small(), &copy);
    let mut right = Found::new();
    for (key, (record, at)) in found {
        if alive.contains_key(&key) {
            assert_eq!(alive.get(&key), Some(&(record, at)), "{what}");
        }
        match node.read(&record, at) {
            Ok(()) => {
                right.insert(key, (record, at));
            }
            Err(StoreError::Corrupt { .. }) => {}
            Err(other) => panic!("{what}: {other}"),
        }
    }
    right
}

#[test]
fn a_file_cut_anywhere_loses_only_what_was_cut() {
    let (disk, alive) = written();
    let image = disk.image(SEGMENT).unwrap();
    let (_, scan) = parse_segment(&image).unwrap();
    let index_of: std::collections::BTreeMap<_, _> =
        scan.entries.iter().map(|(at, e)| (e.sequence(), *at)).collect();
    assert_eq!(index_of.len() as u64, BLOCKS + 1);
    let index_end = PAGE_BYTES + scan.entries.len() * ENTRY_BYTES;
    let mut cuts: Vec<_> = (0..index_end + 128).step_by(64).collect();
    for (_, at) in alive.values() {
        let start = at.page() as usize * PAGE_BYTES;
        cuts.extend([start, start + 1, start + 512, start + PAGE_BYTES - 1, start + PAGE_BYTES]);
    }
    for cut in cuts {
        let right = readable(&disk, &image[..cut], &alive, &format!("cut at {cut}"));
        let whole = |record: &kv_block::Record, at: kv_block::DiskLocation| {
            at.page() as usize * PAGE_BYTES + (record.bytes as usize).next_multiple_of(PAGE_BYTES) <= cut
        };
        for (key, (record, at)) in &alive {
            assert_eq!(
                right.contains_key(key),
                whole(record, *at),
                "block of {} bytes, cut at {cut}",
                record.bytes
            );
        }
        assert!(right.keys().all(|one| alive.contains_key(one)) || cut < index_end, "cut at {cut}");
    }
}

#[test]
fn a_flipped_bit_in_a_header_sets_the_file_aside_and_keeps_it() {
    let (disk, alive) = written();
    let mut image = disk.image(SEGMENT).unwrap();
    for bit in 0..HEADER_BYTES * 8 {
        image[bit / 8] ^= 1 << (bit % 8);
        let copy = disk.copy();
        copy.put_image(SEGMENT, &image);
        let (node, found, report) = Node::simulated(&small(), &copy);
        assert!(found.is_empty(), "bit {bit}");
        assert_eq!(report.segments_set_aside, 1, "bit {bit}");
        assert!(report.set_aside[0].contains("aside"), "{:?}", report.set_aside);
        drop(node);
        assert_eq!(copy.image(&format!("{SEGMENT}.aside-1")).unwrap(), image, "bit {bit}: not kept");
        image[bit / 8] ^= 1 << (bit % 8);
    }
    for bit in [HEADER_BYTES * 8, PAGE_BYTES * 8 - 1] {
        image[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(readable(&disk, &image, &alive, "padding"), alive, "nobody reads the padding");
        image[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn ten_thousand_flipped_bits_in_blocks_are_all_found() {
    let (disk, alive) = written();
    let (mut node, found, _) = Node::simulated(&small(), &disk);
    assert_eq!(found, alive);
    let blocks: Vec<_> = alive.values().copied().collect();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..10_000 {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let (record, at) = blocks[round % blocks.len()];
        let bit = (random >> 20) % (u64::from(record.bytes) * 8);
        let bit = u64::from(at.page()) * PAGE_BYTES as u64 * 8 + bit;
        disk.flip(SEGMENT, bit);
        let read = node.read(&record, at);
        assert!(matches!(read, Err(StoreError::Corrupt { .. })), "bit {bit}: {read:?}");
        disk.flip(SEGMENT, bit);
    }
    for (record, at) in blocks {
        assert_eq!(node.read(&record, at), Ok(()));
    }
    assert_eq!(node.store.health().corrupt, 10_000);
}

#[test]
fn swapped_blocks_and_index_pages_are_found() {
    let disk = SimDisk::new(3);
    let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
    for n in 0..40 {
        let (record, at) = node.write(n, 32 << 10).unwrap();
        alive.insert(record.key, (record, at));
    }
    drop(node);
    let names = [file_name(0), file_name(1)];
    let images = names.clone().map(|name| disk.image(&name).unwrap());
    // Two blocks of one length change places: neither is served.
    let copy = disk.copy();
    let mut swapped = images[0].clone();
    let [one, other] = [alive[&key(1)], alive[&key(2)]];
    let place = |at: kv_block::DiskLocation| at.page() as usize * PAGE_BYTES;
    for at in 0..32 << 10 {
        swapped.swap(place(one.1) + at, place(other.1) + at);
    }
    copy.put_image(&names[0], &swapped);
    let (mut node, found, _) = Node::simulated(&small(), &copy);
    assert_eq!(found, alive);
    for (key, (record, at)) in &alive {
        let wrong = [one.0.key, other.0.key].contains(key);
        assert_eq!(node.read(record, *at).is_err(), wrong, "{key}");
    }
    // The index page of one segment lands in another: none of its entries is believed.
    let copy = disk.copy();
    let mut misplaced = images[1].clone();
    misplaced[PAGE_BYTES..2 * PAGE_BYTES].copy_from_slice(&images[0][PAGE_BYTES..2 * PAGE_BYTES]);
    copy.put_image(&names[1], &misplaced);
    let (_, found, report) = Node::simulated(&small(), &copy);
    assert!(found.values().all(|(_, at)| at.segment() == 0));
    assert!(report.entries_broken > 0);
    // A whole file under another name, or from another store.
    let copy = disk.copy();
    copy.put_image(&names[1], &images[0]);
    let (_, found, report) = Node::simulated(&small(), &copy);
    assert_eq!((report.segments_set_aside, found.values().all(|(_, at)| at.segment() == 0)), (1, true));
}

#[test]
fn an_index_of_an_earlier_life_says_nothing() {
    let disk = SimDisk::new(3);
    let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
    let mut n = 0;
    while node.offers.is_empty() {
        let (record, at) = node.write(n, 32 << 10).unwrap();
        alive.insert(record.key, (record, at));
        n += 1;
        node.poll();
    }
    let segment = node.offers[0].0;
    let name = file_name(segment);
    let before = disk.image(&name).unwrap();
    node.reclaim(&mut alive, |_| false);
    drop(node);
    let mut after = disk.image(&name).unwrap();
    after[PAGE_BYTES..].copy_from_slice(&before[PAGE_BYTES..]);
    disk.put_image(&name, &after);
    let (_, found, _) = Node::simulated(&small(), &disk);
    assert_eq!(found, alive, "the released life came back");
}

#[test]
fn another_geometry_is_read_and_given_up_segment_by_segment() {
    let disk = SimDisk::new(3);
    let (mut node, mut alive, _) = Node::simulated(&small(), &disk);
    for n in 0..60 {
        let (record, at) = node.write(n, 32 << 10).unwrap();
        alive.insert(record.key, (record, at));
    }
    drop(node);
    let larger = SsdConfig { segment_bytes: 2 * MIB, ..small() };
    let (mut node, found, _) = Node::simulated(&larger, &disk);
    assert_eq!(found, alive, "what the old geometry holds is still there");
    for n in 100..700 {
        loop {
            match node.write(n, 32 << 10) {
                Ok((record, at)) => {
                    alive.insert(record.key, (record, at));
                    break;
                }
                Err(StoreError::Full) => {
                    for _ in 0..20 {
                        node.poll();
                    }
                    assert!(node.reclaim(&mut alive, |key| common::number(key) == 0));
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
    assert!(alive.contains_key(&key(0)), "moved over");
    for (record, at) in alive.values() {
        assert_eq!(node.read(record, *at), Ok(()));
    }
    drop(node);
    let sizes: Vec<_> =
        (0..8).filter_map(|number| disk.image(&file_name(number))).map(|image| image.len()).collect();
    assert!(sizes.iter().all(|bytes| *bytes == 2 * MIB as usize), "{sizes:?}");
    let (_, found, _) = Node::simulated(&larger, &disk);
    assert_eq!(found, alive);
}
