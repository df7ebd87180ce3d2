//! Blocks whose bytes prove whose they are, and a tier to put them into.

#![allow(dead_code, unreachable_pub, reason = "each test file takes what it needs")]

pub mod proxy;
pub mod storm;

use std::sync::Arc;
use std::time::Duration;

use kv_block::{BlockKey, Checksum, Epoch, Priority, Record, ScopeId, Slice, payload};
use kv_object::pack::Binding;
use kv_object::packer::PackerLimits;
use kv_object::tier::{Got, Offer, Tier, TierConfig, Want};

/// Unix time in seconds of every test that does not care.
pub const NOW: u32 = 1_800_000_000;
/// Long enough for anything.
pub const LONG: Duration = Duration::from_secs(300);

/// A key that a number gives.
pub fn key(number: u64) -> BlockKey {
    BlockKey::from_halves([number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, number])
}

/// What all blocks of a test are stored under.
pub fn binding() -> Arc<Binding> {
    let about = r#"{"model":"m","tenant":"a"}"#.to_owned();
    Arc::new(Binding { scope: ScopeId([7; 32]), slice: Slice::whole(2, 4), block_bytes: 4096, about })
}

/// A block of so many bytes, the next of the prefix that `parent` belongs to.
pub fn offer(number: u64, bytes: u32, parent: Option<u64>, expires_at: u32) -> Offer {
    let key_of = key;
    let (key, binding) = (key(number), binding());
    let mut content = vec![0; bytes as usize];
    payload::fill(&key, &mut content);
    let checksum = Checksum::of(&key, &content);
    let record = Record { key, checksum, bytes, tag: binding.tag(), priority: Priority::Normal, expires_at };
    Offer { binding, record, parent: parent.map(key_of), bytes: content.into() }
}

/// Small packs, and no patience.
pub fn config(node: &str, epoch: u64) -> TierConfig {
    let packer =
        PackerLimits { pack_bytes: 32 << 10, age_max: Duration::from_secs(5), ..PackerLimits::default() };
    TierConfig { packer, round_min: Duration::from_secs(60), ..TierConfig::new(node, Epoch(epoch)) }
}

/// Reads blocks, and looks at every byte of what is said to be read.
pub async fn read(tier: &Tier, now: u32, within: Duration, numbers: &[u64]) -> Vec<Got> {
    let mut slots: Vec<Vec<u8>> = numbers.iter().map(|_| vec![0xee; 8192]).collect();
    let mut wants: Vec<Want<'_>> =
        numbers.iter().zip(&mut slots).map(|(number, slot)| Want { key: key(*number), into: slot }).collect();
    let got = tier.read(now, within, &mut wants).await;
    assert_eq!(got.len(), numbers.len());
    for ((got, number), slot) in got.iter().zip(numbers).zip(&slots) {
        if let Got::Read(record) = got {
            assert_eq!(record.key, key(*number));
            let content = &slot[..record.bytes as usize];
            assert_eq!(
                payload::first_wrong_byte(&key(*number), content),
                None,
                "a wrong byte of block {number}"
            );
            assert!(slot[record.bytes as usize..].iter().all(|byte| *byte == 0xee), "bytes behind the block");
        }
    }
    got
}

/// How many of them are there.
pub async fn hits(tier: &Tier, numbers: &[u64]) -> usize {
    let got = read(tier, NOW, LONG, numbers).await;
    got.iter().filter(|got| matches!(got, Got::Read(_))).count()
}
