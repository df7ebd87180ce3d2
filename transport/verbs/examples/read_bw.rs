//! How fast blocks are read, one device talking to itself: `read_bw BYTES COUNT [DEPTH]`. Prints MiB/s. The figure to
//! hold it against is `ib_read_bw` with the same size on the same machine; that one compares no checksums.

use std::sync::Arc;
use std::time::Instant;

use kv_arena::{Geometry, Held, ShardMemory};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_transport::link::{Link, LinkDone, LinkOp};
use kv_verbs::{Device, DeviceConfig, Devices, Endpoint, Exposure, Role};
use kv_wire::message::{ReadId, WantId};

fn block(memory: &ShardMemory, number: u64, bytes: u32) -> Held {
    let mut slot = memory.slab().take(bytes).expect("room for a few blocks");
    let key = BlockKey::from_halves([number, !number]);
    payload::fill(&key, &mut slot[..bytes as usize]);
    let checksum = Checksum::of(&key, &slot[..bytes as usize]);
    let tag = BindingTag(1);
    slot.seal(&Record { key, checksum, bytes, tag, priority: Priority::Normal, expires_at: 0 })
}

fn main() {
    let numbers: Vec<u32> =
        std::env::args().skip(1).map(|word| word.parse().expect("read_bw BYTES COUNT [DEPTH]")).collect();
    let [bytes, count, depth] = match numbers[..] {
        [bytes, count] => [bytes, count, 16],
        [bytes, count, depth] => [bytes, count, depth],
        _ => panic!("usage: read_bw BYTES COUNT [DEPTH]"),
    };
    let wanted: Vec<_> = std::env::var("KVD_RDMA_DEVICE").iter().map(|text| text.parse().unwrap()).collect();
    let probe = Devices { wanted, ..Devices::default() }.probe();
    let Some(rail) = probe.usable().next() else {
        println!("skipped: {}", probe.lines().join("; "));
        return;
    };
    let region_bytes = (u64::from(bytes) * u64::from(depth + 4)).next_power_of_two().max(2 << 20);
    let memory = ShardMemory::anonymous(Geometry { regions: 2, region_bytes, table_entries_max: 8 }).unwrap();
    let config = DeviceConfig { exposure: Some(Exposure::Windows), ..DeviceConfig::default() };
    let device = Device::open(rail, &[memory.slab().clone()], &config).unwrap();
    while device.registered_bytes() < memory.slab().data_bytes() {
        std::thread::yield_now();
    }
    let (reader, asks) = Endpoint::open(&device, Role::Reader, 1).unwrap();
    let (owner, answers) = Endpoint::open(&device, Role::Owner, 1).unwrap();
    let me = std::thread::current();
    let mut owner = owner.connect(&asks, Arc::new(|| {})).unwrap();
    let mut reader = reader.connect(&answers, Arc::new(move || me.unpark())).unwrap();

    let blocks: Vec<Held> = (0..4).map(|number| block(&memory, number, bytes)).collect();
    let records: Vec<Record> = blocks.iter().map(Held::record).collect();
    for (block, want) in blocks.into_iter().zip(0..) {
        owner.submit(LinkOp::Expose { want: WantId(want), block }).unwrap();
    }
    owner.kick();
    let mut done = Vec::new();
    while done.len() < records.len() {
        owner.poll(&mut done);
    }
    let mut windows = vec![None; records.len()];
    for one in done.drain(..) {
        let LinkDone::Exposed { want, result } = one else { panic!("{one:?}") };
        windows[want.0 as usize] = result.expect("it can be exposed");
    }
    let mut slots: Vec<_> = (0..depth).map(|_| memory.slab().take(bytes).unwrap()).collect();
    let (mut begun, mut ended) = (0, 0);
    let started = Instant::now();
    while ended < count {
        while begun < count
            && let Some(into) = slots.pop()
        {
            let at = begun as usize % records.len();
            let (read, want) = (ReadId(begun.into()), WantId(at as u64));
            let op = LinkOp::Read { read, want, window: windows[at], record: records[at], into };
            assert!(reader.submit(op).is_ok(), "there is room");
            begun += 1;
        }
        reader.kick();
        reader.poll(&mut done);
        if done.is_empty() {
            std::thread::park();
        }
        for one in done.drain(..) {
            let LinkDone::Read { into, result: Ok(()), .. } = one else { panic!("{one:?}") };
            slots.push(into);
            ended += 1;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{:.2}", f64::from(bytes) * f64::from(count) / seconds / f64::from(1 << 20));
}
