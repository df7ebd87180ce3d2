//! Two nodes, one owner and one reader, over a real network: `peers owner PORT [BLOCKS]` and
//! `peers reader ADDRESS [ROUNDS]`. What a control connection does in earnest, one TCP connection does here in lines
//! of text.
//!
//! ```text
//!   reader                                 owner
//!     words <hex> ------------------------->
//!     <------------------------- words <hex>
//!     want <number> <bytes> --------------->       exposes a block of that many bytes
//!     <--- window <address> <key> <checksum>
//!     done <number> ----------------------->       conceals it
//!     <------------------------- concealed
//! ```
//! `peers victim PORT` is an owner that kills itself with SIGKILL when a read has begun; `peers widow ADDRESS` is its
//! reader, which must get every slot back and a broken path. `PEERS_WINDOWS=1` exposes by windows whatever a trial says.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_arena::{Geometry, ShardMemory};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp};
use kv_verbs::{Device, DeviceConfig, Devices, Endpoint, Exposure, Role, VerbsLink};
use kv_wire::message::{ReadId, WantId, Window};

/// Longest that anything may take.
const LIMIT: Duration = Duration::from_secs(60);

fn device() -> (ShardMemory, Device) {
    let wanted: Vec<_> = std::env::var("KVD_RDMA_DEVICE").iter().map(|text| text.parse().unwrap()).collect();
    let probe = Devices { wanted, ..Devices::default() }.probe();
    probe.lines().iter().for_each(|line| println!("{line}"));
    let rail = probe.usable().next().expect("an RDMA device that can be used");
    let geometry = Geometry { regions: 6, region_bytes: 16 << 20, table_entries_max: 8 };
    let memory = ShardMemory::anonymous(geometry).unwrap();
    let exposure = std::env::var_os("PEERS_WINDOWS").map(|_| Exposure::Windows);
    let beat = Duration::from_millis(500);
    let config = DeviceConfig { beat, timeout: 17, exposure, ..DeviceConfig::default() };
    let device = Device::open(rail, &[memory.slab().clone()], &config).unwrap();
    device.notes().iter().for_each(|note| println!("{note}"));
    while device.registered_bytes() < memory.slab().data_bytes() {
        std::thread::sleep(Duration::from_millis(1));
    }
    (memory, device)
}

struct Control {
    lines: BufReader<TcpStream>,
    stream: TcpStream,
}

impl Control {
    fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stream, "{line}").unwrap();
    }

    fn hear(&mut self) -> Option<Vec<String>> {
        let mut line = String::new();
        let count = self.lines.read_line(&mut line).unwrap_or(0);
        (count > 0).then(|| line.split_whitespace().map(str::to_owned).collect())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect()
}

fn connect(device: &Device, role: Role, control: &mut Control) -> VerbsLink {
    let (endpoint, words) = Endpoint::open(device, role, 1).unwrap();
    let nobody = Arc::new(|| {});
    if role == Role::Reader {
        control.say(&format!("words {}", hex(&words)));
        let theirs = unhex(&control.hear().expect("the owner's words")[1]);
        return endpoint.connect(&theirs, nobody).unwrap();
    }
    let theirs = unhex(&control.hear().expect("the reader's words")[1]);
    let link = endpoint.connect(&theirs, nobody).unwrap();
    control.say(&format!("words {}", hex(&words)));
    link
}

/// Waits for the next completion.
fn next(link: &mut VerbsLink) -> LinkDone {
    let end = Instant::now() + LIMIT;
    let mut done = Vec::new();
    loop {
        link.poll(&mut done);
        if let Some(one) = done.pop() {
            assert!(done.is_empty(), "one at a time here");
            return one;
        }
        assert!(Instant::now() < end, "nothing happened for {LIMIT:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn record(number: u64, bytes: u32, checksum: u64) -> Record {
    let key = BlockKey::from_halves([number, !number]);
    let (tag, priority) = (BindingTag(1), Priority::Normal);
    Record { key, checksum: Checksum(checksum), bytes, tag, priority, expires_at: 0 }
}

fn owner(port: &str, dies: bool) {
    let (memory, device) = device();
    let listener = TcpListener::bind(format!("0.0.0.0:{port}")).unwrap();
    let mut control = Control::new(listener.accept().unwrap().0);
    let mut link = connect(&device, Role::Owner, &mut control);
    let mut blocks = 0;
    while let Some(line) = control.hear() {
        let number: u64 = line[1].parse().unwrap();
        let want = WantId(number);
        match line[0].as_str() {
            "want" => {
                let bytes: u32 = line[2].parse().unwrap();
                let mut record = record(number, bytes, 0);
                let mut slot = memory.slab().take(bytes).unwrap();
                payload::fill(&record.key, &mut slot[..bytes as usize]);
                record.checksum = Checksum::of(&record.key, &slot[..bytes as usize]);
                let block = slot.seal(&record);
                link.submit(LinkOp::Expose { want, block }).unwrap();
                link.kick();
                let LinkDone::Exposed { result: Ok(Some(window)), .. } = next(&mut link) else {
                    panic!("the block was not exposed")
                };
                let (address, key, checksum) = (window.address, window.key, record.checksum.0);
                control.say(&format!("window {address} {key} {checksum}"));
                blocks += 1;
            }
            "done" => {
                link.submit(LinkOp::Conceal { want }).unwrap();
                link.kick();
                let LinkDone::Concealed { block, .. } = next(&mut link) else { panic!("not concealed") };
                let (slot, generation) = (block.id(), block.generation());
                drop(block);
                memory.slab().retire(slot, generation).unwrap();
                memory.slab().sweep(&kv_arena::HazardSet::new());
                control.say("concealed");
            }
            "die" if dies => {
                std::thread::sleep(Duration::from_millis(number));
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                    .unwrap();
            }
            other => panic!("the reader said {other}"),
        }
    }
    println!("owner: {blocks} blocks were read and concealed");
}

fn dial(address: &str) -> Control {
    let end = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return Control::new(stream),
            Err(error) => assert!(Instant::now() < end, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn ask(control: &mut Control, number: u64, bytes: u32) -> (Window, Record) {
    control.say(&format!("want {number} {bytes}"));
    let line = control.hear().expect("a window");
    let window = Window { path: 1, address: line[1].parse().unwrap(), key: line[2].parse().unwrap() };
    (window, record(number, bytes, line[3].parse().unwrap()))
}

fn reader(address: &str, rounds: u64) {
    let (memory, device) = device();
    let mut control = dial(address);
    let mut link = connect(&device, Role::Reader, &mut control);
    let (started, mut total) = (Instant::now(), 0);
    for number in 1..=rounds {
        let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let bytes = [1, 4095, 65_536, 300_001, 1 << 20, 1 + (mixed as u32 & 0xf_ffff)][number as usize % 6];
        let (window, record) = ask(&mut control, number, bytes);
        let into = memory.slab().take(bytes).unwrap();
        let (read, want) = (ReadId(number), WantId(number));
        link.submit(LinkOp::Read { read, want, window: Some(window), record, into }).unwrap();
        link.kick();
        let LinkDone::Read { into, result, .. } = next(&mut link) else { panic!("not a read") };
        assert_eq!(result, Ok(()), "{bytes} bytes");
        assert_eq!(payload::first_wrong_byte(&record.key, &into[..bytes as usize]), None);
        total += u64::from(bytes);
        control.say(&format!("done {number}"));
        assert_eq!(control.hear().expect("an answer")[0], "concealed");
    }
    println!("reader: {rounds} blocks, {total} bytes, each byte right, in {:?}", started.elapsed());
}

fn widow(address: &str) {
    let (memory, device) = device();
    let mut control = dial(address);
    let mut link = connect(&device, Role::Reader, &mut control);
    let bytes = 8 << 20;
    let (window, record) = ask(&mut control, 1, bytes);
    for read in 1..=4 {
        let into = memory.slab().take(bytes).unwrap();
        let (read, want) = (ReadId(read), WantId(1));
        link.submit(LinkOp::Read { read, want, window: Some(window), record, into }).unwrap();
    }
    link.kick();
    control.say("die 60");
    let started = Instant::now();
    let (mut done, mut ends, mut first) = (Vec::new(), Vec::new(), None);
    while !matches!(done.last(), Some(LinkDone::Broken { .. })) {
        assert!(started.elapsed() < LIMIT, "the path never broke");
        std::thread::sleep(Duration::from_millis(1));
        link.poll(&mut done);
        first = first.or(if done.is_empty() { None } else { Some(started.elapsed()) });
    }
    let after = started.elapsed();
    for one in done {
        match one {
            LinkDone::Read { into, result, .. } => {
                drop(into);
                ends.push(result);
            }
            LinkDone::Broken { why } => println!("widow: broken after {after:?}: {why}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(ends.len(), 4, "every read came back");
    assert!(matches!(ends.last(), Some(Err(LinkError::Path { .. }))), "{ends:?}");
    let usage = memory.slab().usage();
    assert!(usage.classes.iter().all(|class| class.free == class.slots), "slots are missing: {usage:?}");
    println!("widow: all four reads ended, {ends:?}; every slot is back");
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["owner", port] => owner(port, false),
        ["victim", port] => owner(port, true),
        ["reader", address] => reader(address, 60),
        ["reader", address, rounds] => reader(address, rounds.parse().unwrap()),
        ["widow", address] => widow(address),
        _ => panic!(
            "usage: peers owner PORT | victim PORT | reader ADDRESS:PORT [ROUNDS] | widow ADDRESS:PORT"
        ),
    }
}
