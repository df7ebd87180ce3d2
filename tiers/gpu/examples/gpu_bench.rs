//! What copies cost on this machine's GPU: pages between device memory and the arena by each method, beside one large
//! copy of pinned memory in the same run; device to device; copies under computation; memory of another process;
//! checksums.
//!
//! ```sh
//! KVD_CUDA=real cargo run --release -p kv-gpu --example gpu_bench -- --json figures.json
//! cargo run -p kv-gpu --example gpu_bench     # no GPU: on our driver over host memory, where figures mean nothing
//! ```
//! Each figure is the median of several runs, alternating between what is compared. `--bytes` says how much one run
//! copies. `tiers/gpu/check` runs it with the tests, also on a machine without cargo.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::cell::RefCell;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kv_arena::{Geometry, Held, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Priority as Importance, Record};
use kv_gpu::{
    Copier, CopierConfig, CopyDone, Device, DeviceMemory, Driver, HostRegion, Hosts, Job, JobToken, Kernels,
    MemoryHandle, Method, PageCopy, PagePiece, Priority, Step, Uuid,
};
use serde_json::{Value, json};

type Anything<T> = Result<T, Box<dyn std::error::Error>>;

const PAGES: [u64; 5] = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 2 << 20];
const METHODS: [(Method, &str); 4] =
    [(Method::Kernel, "kernel"), (Method::Batch, "batch"), (Method::Loop, "loop"), (Method::Auto, "auto")];
/// A block of the arena; its pages lie apart on the device.
const BLOCK: u64 = 2 << 20;
/// Who waits for longer than this waits for nothing.
const LIMIT: Duration = Duration::from_secs(60);
/// Before a line of the other process.
const SAYS: &str = "other process: ";

fn main() -> Anything<()> {
    let mut arguments = std::env::args().skip(1);
    let is_real = std::env::var("KVD_CUDA").is_ok_and(|value| value == "real");
    let (mut bytes, mut json) = (if is_real { 256 << 20 } else { 8 << 20 }, None);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} wants a value"));
        match argument.as_str() {
            "--bytes" => bytes = value()?.parse::<u64>()?.next_multiple_of(4 * BLOCK),
            "--json" => json = Some(value()?),
            "--other-process" => return other_process(&driver(is_real)?, bytes),
            _ => return Err(format!("{argument} is unknown: there are --bytes N and --json FILE").into()),
        }
    }
    let driver = driver(is_real)?;
    let device = driver.open(0)?;
    let runs = if is_real { 7 } else { 1 };
    let about = about(&driver, &device, is_real, bytes);
    for (key, value) in about.as_object().into_iter().flatten() {
        println!("{key:16} {value}");
    }
    let machine = Machine::new(&device, bytes, runs)?;
    let mut figures = json!({ "about": about });
    figures["up"] = scattered(&machine, Way::Up)?;
    figures["down"] = scattered(&machine, Way::Down)?;
    figures["across"] = scattered(&machine, Way::Across)?;
    figures["overlap"] = overlap(&machine)?;
    figures["other_process"] = with_another_process(&machine)?;
    figures["checksums"] = checksums(&machine)?;
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_string_pretty(&figures)?)?;
    }
    if !is_real {
        println!(
            "\nThis was our own driver over host memory: it ran to its end, and the figures mean nothing."
        );
    }
    Ok(())
}

fn driver(is_real: bool) -> Anything<Driver> {
    if is_real {
        return Ok(Driver::load()?);
    }
    let here = std::env::current_exe()?;
    let folder = here.parent().ok_or("a program lies in a folder")?;
    let places = [folder.join("libfake_cuda.so"), folder.join("../deps/libfake_cuda.so")];
    let found = places.iter().find(|place| place.exists());
    let found =
        found.ok_or("KVD_CUDA=real takes the machine's driver; without it, build the fake one first")?;
    Ok(Driver::load_from(found.as_os_str())?)
}

fn about(driver: &Driver, device: &Device, is_real: bool, bytes: u64) -> Value {
    let facts = device.facts();
    let kernel_module = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let kernel_module = if is_real { kernel_module.lines().next().unwrap_or_default() } else { "none" };
    json!({
        "gpu": facts.name, "uuid": facts.uuid.to_string(), "pci": facts.pci,
        "capability": format!("{}.{}", facts.capability.0, facts.capability.1),
        "copy_engines": facts.copy_engines, "cuda": driver.version().to_string(), "driver": kernel_module,
        "date": date(SystemTime::now()), "bytes": bytes, "meaningful": is_real && !cfg!(debug_assertions),
    })
}

/// The day in UTC, as year-month-day.
fn date(now: SystemTime) -> String {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    // Years that begin in March, in eras of 400, so that the odd day comes last.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (of_month, month_of_year) =
        (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = year + era * 400 + u64::from(month_of_year <= 2);
    format!("{year}-{month_of_year:02}-{of_month:02}")
}

/// What is copied, and where to.
struct Machine {
    device: Device,
    /// Before the arena that it is of.
    _region: HostRegion,
    arena: ShardMemory,
    blocks: Vec<Held>,
    memory: DeviceMemory,
    other: DeviceMemory,
    bytes: u64,
    runs: usize,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    Up,
    Down,
    Across,
}

impl Machine {
    fn new(device: &Device, bytes: u64, runs: usize) -> Anything<Self> {
        // The blocks that go up and the slots for those that come down, in regions of sixteen.
        let regions = (2 * bytes / BLOCK).div_ceil(16) as u32 + 1;
        let geometry = Geometry { regions, region_bytes: 16 * BLOCK, table_entries_max: 64 };
        let arena = ShardMemory::anonymous(geometry)?;
        let region = device.register(arena.slab(), 0, arena.slab().data_bytes())?;
        let (memory, other) = (device.allocate(bytes)?, device.allocate(bytes)?);
        let device = device.clone();
        let mut machine =
            Self { device, _region: region, arena, blocks: Vec::new(), memory, other, bytes, runs };
        let seal = |(at, mut slot): (usize, Slot)| {
            slot.iter_mut().step_by(64).for_each(|byte| *byte = at as u8);
            let key = BlockKey([at as u8; 16]);
            let (checksum, bytes) = (Checksum::of(&key, &slot), BLOCK as u32);
            let (tag, priority) = (BindingTag(1), Importance::default());
            slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at: 0 })
        };
        machine.blocks = machine.slots()?.into_iter().enumerate().map(seal).collect();
        Ok(machine)
    }

    fn slots(&self) -> Anything<Vec<Slot>> {
        (0..self.bytes / BLOCK).map(|_| Ok(self.arena.slab().take(BLOCK as u32)?)).collect()
    }

    /// The other side of a copy that way, which whoever copies takes and puts back.
    fn hosts(&self, way: Way) -> Anything<RefCell<Option<Hosts>>> {
        let hosts = match way {
            Way::Up => Hosts::From(self.blocks.clone()),
            Way::Down => Hosts::To(self.slots()?),
            Way::Across => Hosts::FromDevice(vec![self.other.clone()]),
        };
        Ok(RefCell::new(Some(hosts)))
    }

    fn copier(&self, method: Method) -> Anything<Copier> {
        let config = CopierConfig { under_way_bytes_max: u64::MAX, method, ..CopierConfig::default() };
        Ok(Copier::new(&self.device, config)?)
    }

    /// All of the memory in pages, which lie in another order on the device.
    fn pages(&self, way: Way, page: u64) -> Vec<PagePiece> {
        let count = self.bytes / page;
        let block = if way == Way::Across { self.bytes } else { BLOCK };
        let piece = |at: u64| PagePiece {
            memory: 0,
            device_offset: shuffled(at, count) * page,
            other: (at * page / block) as u32,
            other_offset: at * page % block,
            bytes: page,
        };
        (0..count).map(piece).collect()
    }
}

/// A permutation of `count` numbers which leaves no two neighbours beside each other.
fn shuffled(at: u64, count: u64) -> u64 {
    let step = (1..).map(|more| count * 5 / 8 + more).find(|step| gcd(*step, count) == 1).unwrap_or(1);
    at * step % count
}

fn gcd(left: u64, right: u64) -> u64 {
    if right == 0 { left } else { gcd(right, left % right) }
}

/// What is measured: something that says how long it took.
type Rival<'a> = Box<dyn FnMut() -> Anything<Duration> + 'a>;

/// The median of each, in turns, after one that finds everything cold.
fn compare(runs: usize, rivals: &mut [Rival<'_>]) -> Anything<Vec<Duration>> {
    let mut times = vec![Vec::new(); rivals.len()];
    for run in 0..=runs {
        for (rival, times) in rivals.iter_mut().zip(&mut times) {
            let took = rival()?;
            times.extend((run > 0).then_some(took));
        }
    }
    let median = |mut times: Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

fn gb_per_s(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Runs a job to its end and says how long it took, and what it was given.
fn timed(copier: &mut Copier, job: Job) -> Anything<(Duration, Hosts)> {
    let started = Instant::now();
    copier.submit(job).map_err(|(_, error)| error)?;
    let mut done = Vec::new();
    while started.elapsed() < LIMIT {
        copier.poll(&mut done);
        let took = started.elapsed();
        for done in done.drain(..) {
            if let CopyDone::Ended { hosts, result, .. } = done {
                result?;
                return Ok((took, hosts.ok_or("the device keeps the memory")?));
            }
        }
    }
    Err("a copy does not end".into())
}

/// Waits without a pause, and says how long it took since.
fn until<T>(
    started: Instant,
    mut poll: impl FnMut() -> Result<Option<T>, kv_gpu::Error>,
) -> Anything<(Duration, T)> {
    while started.elapsed() < LIMIT {
        if let Some(found) = poll()? {
            return Ok((started.elapsed(), found));
        }
    }
    Err("a copy does not end".into())
}

fn job(memory: &DeviceMemory, hosts: Hosts, steps: Vec<Step>) -> Job {
    Job { token: JobToken(1), memories: vec![memory.clone()], hosts, steps, open: false, urgent: false }
}

fn step(pieces: Vec<PagePiece>) -> Step {
    Step { after: None, pieces, then: None }
}

/// One copy of everything, to or from pinned memory in one piece.
fn large(machine: &Machine, way: Way) -> Anything<Rival<'_>> {
    let (bytes, stream) = (machine.bytes, machine.device.stream(Priority::Low)?);
    let whole = [PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes }];
    let (memory, other) = (&machine.memory, &machine.other);
    if way == Way::Across {
        return Ok(Box::new(move || {
            let started = Instant::now();
            let mut copying = stream.copy((memory, 0), (other, 0), bytes)?;
            Ok(until(started, || copying.poll())?.0)
        }));
    }
    let mut buffer = machine.device.host_buffer(bytes as usize)?;
    // Pages of a process that nobody has written are not there.
    buffer.fill(1);
    let mut given = Some(vec![buffer]);
    Ok(Box::new(move || {
        let buffers = given.take().ok_or("the buffer comes back")?;
        let started = Instant::now();
        let copying = match way {
            Way::Up => stream.onboard(memory, buffers, &whole),
            _ => stream.offload(memory, buffers, &whole),
        };
        let mut copying = copying.map_err(|refused| refused.error)?;
        let (took, buffers) = until(started, || copying.poll())?;
        given = Some(buffers);
        Ok(took)
    }))
}

/// The same bytes in pages to or from a memory, by one method.
fn paged<'a>(
    machine: &'a Machine,
    memory: &'a DeviceMemory,
    (way, page): (Way, u64),
    hosts: &'a RefCell<Option<Hosts>>,
    copier: &'a mut Copier,
) -> Rival<'a> {
    let pages = machine.pages(way, page);
    Box::new(move || {
        let given = hosts.take().ok_or("the hosts come back")?;
        let (took, given) = timed(copier, job(memory, given, vec![step(pages.clone())]))?;
        hosts.replace(Some(given));
        Ok(took)
    })
}

/// Pages of each size by each method, beside one large copy.
fn scattered(machine: &Machine, way: Way) -> Anything<Value> {
    println!("\n{way:?}: GB/s, and the ratio to one large copy, of which the first column is");
    println!("{:>9} {:>9} {}", "page", "large", METHODS.map(|(_, name)| format!("{name:>16}")).concat());
    let mut found = Vec::new();
    for page in PAGES {
        let mut copiers = METHODS.map(|(method, name)| (name, machine.copier(method), method));
        let hosts = machine.hosts(way)?;
        let mut rivals = vec![large(machine, way)?];
        let mut names = Vec::new();
        for (name, copier, method) in &mut copiers {
            let copier = copier.as_mut().map_err(|error| error.to_string())?;
            // `Auto` may come to one of the others; the others are what was asked for, or not there.
            if copier.method() == *method || *method == Method::Auto {
                rivals.push(paged(machine, &machine.memory, (way, page), &hosts, copier));
                names.push(*name);
            }
        }
        let mut times = compare(machine.runs, &mut rivals)?.into_iter();
        let large = times.next().unwrap_or_default();
        let mut row = json!({ "page": page, "large_gb_per_s": rounded(gb_per_s(machine.bytes, large)) });
        let mut line = format!("{:>7}Ki {:>9.1} ", page >> 10, gb_per_s(machine.bytes, large));
        let times: Vec<_> = names.into_iter().zip(times).collect();
        for (_, name) in METHODS {
            let time = times.iter().find(|(known, _)| *known == name).map(|(_, time)| *time);
            let ratio = time.map(|time| large.as_secs_f64() / time.as_secs_f64());
            row[name] = json!({
                "gb_per_s": time.map(|time| rounded(gb_per_s(machine.bytes, time))),
                "ratio": ratio.map(rounded),
            });
            line += &match (time, ratio) {
                (Some(time), Some(ratio)) => format!("{:>9.1} {ratio:>6.3}", gb_per_s(machine.bytes, time)),
                _ => format!("{:>16}", "-"),
            };
        }
        println!("{line}");
        found.push(row);
    }
    println!("{}", where_they_cross(&found));
    Ok(Value::Array(found))
}

/// What the thresholds of the copier are to be.
fn where_they_cross(rows: &[Value]) -> String {
    let ratio = |row: &Value, name: &str| row[name]["ratio"].as_f64();
    let rival = if rows.iter().any(|row| ratio(row, "batch").is_some()) { "batch" } else { "loop" };
    let is_better = |row: &&Value| ratio(row, "kernel") >= ratio(row, rival);
    if rows.iter().all(|row| ratio(row, "kernel").is_none()) {
        return "there are no kernels".into();
    }
    match rows.iter().take_while(is_better).last() {
        Some(row) => format!("kernel is no worse than {rival} up to pages of {} bytes", row["page"]),
        None => format!("{rival} is better than kernel for all pages"),
    }
}

/// Layers that come up one after the other, each computed with when it is there. Copies on the device stand for the
/// computation, as long as the layers take to come.
fn overlap(machine: &Machine) -> Anything<Value> {
    const LAYERS: u64 = 32;
    const PAGE: u64 = 16 << 10;
    let (device, bytes) = (&machine.device, machine.bytes / LAYERS);
    let mut copier = machine.copier(Method::Auto)?;
    let computing = device.stream(Priority::Low)?;
    let scratch = (device.allocate(bytes)?, device.allocate(bytes)?);
    let events = (0..LAYERS).map(|_| device.event(false).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    // A page of the device belongs to one layer: of each block, every layer has its part.
    let pages = machine.pages(Way::Up, PAGE.min(BLOCK / LAYERS));
    let mut layers = vec![Vec::new(); LAYERS as usize];
    for page in pages {
        layers[(page.other_offset * LAYERS / BLOCK) as usize].push(page);
    }
    let steps = |events: &[Arc<kv_gpu::Event>]| -> Vec<Step> {
        let step = |(pieces, then): (&Vec<PagePiece>, &Arc<kv_gpu::Event>)| Step {
            after: None,
            pieces: pieces.clone(),
            then: Some(Arc::clone(then)),
        };
        layers.iter().zip(events).map(step).collect()
    };
    let compute =
        |times: usize, after: Option<&[Arc<kv_gpu::Event>]>| -> Anything<Vec<kv_gpu::Copying<()>>> {
            let mut under_way = Vec::new();
            for layer in 0..LAYERS as usize {
                after.map_or(Ok(()), |events| computing.wait_for(&events[layer]))?;
                for _ in 0..times {
                    under_way.push(computing.copy((&scratch.0, 0), (&scratch.1, 0), bytes)?);
                }
            }
            Ok(under_way)
        };
    let finish = |started: Instant, mut under_way: Vec<kv_gpu::Copying<()>>| -> Anything<Duration> {
        let Some(mut last) = under_way.pop() else { return Ok(Duration::ZERO) };
        Ok(until(started, || last.poll())?.0)
    };
    let mut hosts = machine.hosts(Way::Up)?.take();
    let mut copy_alone = || -> Anything<Duration> {
        let given = hosts.take().ok_or("the hosts come back")?;
        let (took, given) = timed(&mut copier, job(&machine.memory, given, steps(&events)))?;
        hosts = Some(given);
        Ok(took)
    };
    copy_alone()?;
    let copy = copy_alone()?;
    let started = Instant::now();
    finish(started, compute(1, None)?)?;
    let started = Instant::now();
    let once = finish(started, compute(1, None)?)?;
    let times = (copy.as_secs_f64() / once.as_secs_f64()).round().clamp(1.0, 64.0) as usize;

    let mut together = || -> Anything<Duration> {
        let given = hosts.take().ok_or("the hosts come back")?;
        let (started, mut done) = (Instant::now(), Vec::new());
        copier.submit(job(&machine.memory, given, steps(&events))).map_err(|(_, error)| error)?;
        let mut under_way = None;
        while hosts.is_none() {
            copier.poll(&mut done);
            for done in done.drain(..) {
                match done {
                    // The events are recorded: what computes may wait for them.
                    CopyDone::Queued { .. } => under_way = Some(compute(times, Some(&events))?),
                    CopyDone::Ended { hosts: given, result, .. } => {
                        result?;
                        hosts = given;
                    }
                    CopyDone::Step { .. } => {}
                }
            }
            if started.elapsed() > LIMIT {
                return Err("a copy does not end".into());
            }
        }
        finish(started, under_way.ok_or("it was queued before it ended")?)
    };
    together()?;
    let mut together = (0..machine.runs).map(|_| together()).collect::<Anything<Vec<_>>>()?;
    together.sort();
    let together = together[together.len() / 2];
    let started = Instant::now();
    let computed = finish(started, compute(times, None)?)?;
    let longest = copy.max(computed);
    // Nothing waits: as long as the longer of the two, and what the first layer takes to come.
    let share = longest.as_secs_f64() / together.as_secs_f64();
    let ms = |time: Duration| rounded(time.as_secs_f64() * 1e3);
    println!("\nLayers: {LAYERS} of {bytes} bytes; copies {} ms, computation {} ms", ms(copy), ms(computed));
    println!("        together {} ms: {share:.3} of the longer of the two over that", ms(together));
    Ok(json!({
        "layers": LAYERS, "copy_ms": ms(copy), "compute_ms": ms(computed), "together_ms": ms(together),
        "longer_over_together": rounded(share),
    }))
}

/// A process that has device memory and waits.
struct Other {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Other {
    fn start(bytes: u64) -> Anything<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--bytes", &bytes.to_string(), "--other-process"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().ok_or("it has an output")?);
        Ok(Self { child, lines })
    }

    fn hear(&mut self) -> Anything<Vec<String>> {
        let mut line = String::new();
        while self.lines.read_line(&mut line)? > 0 {
            if let Some(said) = line.strip_prefix(SAYS) {
                return Ok(said.split_whitespace().map(str::to_owned).collect());
            }
            line.clear();
        }
        Err("the other process ended".into())
    }

    fn go_on(&mut self) -> Anything<()> {
        Ok(self.child.stdin.as_mut().ok_or("it has an input")?.write_all(b"\n")?)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Anything<[u8; N]> {
    let byte = |at: usize| text.get(2 * at..2 * at + 2).and_then(|byte| u8::from_str_radix(byte, 16).ok());
    let bytes: Option<Vec<u8>> = (0..N).map(byte).collect();
    Ok(bytes.ok_or("that is no handle")?.as_slice().try_into()?)
}

/// What the other process does: it has memory, hands it over, and says what is in it in the end.
fn other_process(driver: &Driver, bytes: u64) -> Anything<()> {
    let device = driver.open(0)?;
    let memory = device.allocate(bytes)?;
    let MemoryHandle { device: uuid, handle, offset, bytes } = memory.export()?;
    println!("{SAYS}{} {} {offset} {bytes}", hex(&uuid.0), hex(&handle));
    std::io::stdin().read_line(&mut String::new())?;
    let (stream, whole) =
        (device.stream(Priority::Low)?, [PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes }]);
    let copying = stream.offload(&memory, vec![device.host_buffer(bytes as usize)?], &whole);
    let mut copying = copying.map_err(|refused| refused.error)?;
    let hosts = copying.wait(LIMIT)?.ok_or("a copy does not end")?;
    println!("{SAYS}{}", Checksum::of(&KEY, &hosts[0]));
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

const KEY: BlockKey = BlockKey([0; 16]);

/// Pages into memory of another process, beside the same into our own.
fn with_another_process(machine: &Machine) -> Anything<Value> {
    const PAGE: u64 = 64 << 10;
    let mut other = Other::start(machine.bytes)?;
    let said = other.hear()?;
    let [device, handle, offset, bytes] = said.as_slice() else {
        return Err("a handle has four parts".into());
    };
    let handle = MemoryHandle {
        device: Uuid(unhex(device)?),
        handle: unhex(handle)?,
        offset: offset.parse()?,
        bytes: bytes.parse()?,
    };
    let memory = machine.device.open_memory(&handle)?;
    let mut copiers = [machine.copier(Method::Auto)?, machine.copier(Method::Auto)?];
    let ([own, theirs], hosts) = (&mut copiers, machine.hosts(Way::Up)?);
    let mut rivals = [
        paged(machine, &machine.memory, (Way::Up, PAGE), &hosts, own),
        paged(machine, &memory, (Way::Up, PAGE), &hosts, theirs),
    ];
    let times = compare(machine.runs, &mut rivals)?;
    drop(rivals);
    // What they find there is what we put there.
    other.go_on()?;
    let stream = machine.device.stream(Priority::Low)?;
    let whole = [PageCopy { host: 0, host_offset: 0, device_offset: 0, bytes: machine.bytes }];
    let buffer = machine.device.host_buffer(machine.bytes as usize)?;
    let copying = stream.offload(&machine.memory, vec![buffer], &whole).map_err(|refused| refused.error);
    let hosts = copying?.wait(LIMIT)?.ok_or("a copy does not end")?;
    let (here, there) = (Checksum::of(&KEY, &hosts[0]).to_string(), other.hear()?);
    if there != [here.as_str()] {
        return Err(format!("the other process has {there:?}, and we have {here}").into());
    }
    drop(memory);
    other.go_on()?;
    let [own, theirs] = [0, 1].map(|at| gb_per_s(machine.bytes, times[at]));
    println!(
        "\nPages of {PAGE} bytes up, to our own memory and another process': {own:.1} and {theirs:.1} GB/s"
    );
    Ok(json!({
        "page": PAGE, "own_gb_per_s": rounded(own), "other_gb_per_s": rounded(theirs),
        "ratio": rounded(theirs / own),
    }))
}

/// Checksums of blocks on the device, beside one thread of this processor over as much of host memory.
fn checksums(machine: &Machine) -> Anything<Value> {
    let kernels = match Kernels::load(&machine.device) {
        Ok(kernels) => kernels,
        Err(error) => {
            println!("\nChecksums: {error}");
            return Ok(Value::Null);
        }
    };
    let stream = machine.device.stream(Priority::Low)?;
    let held = machine.blocks.clone();
    let mut copier = machine.copier(Method::Auto)?;
    let blocks = machine.bytes / BLOCK;
    let piece = |at: u64| PagePiece {
        memory: 0,
        device_offset: at * BLOCK,
        other: at as u32,
        other_offset: 0,
        bytes: BLOCK,
    };
    let (_, hosts) = timed(
        &mut copier,
        job(&machine.memory, Hosts::From(held), vec![step((0..blocks).map(piece).collect())]),
    )?;
    let Hosts::From(held) = hosts else { return Err("what was given comes back".into()) };
    let runs: Vec<_> = (0..blocks).map(|at| at * BLOCK..(at + 1) * BLOCK).collect();
    let mut room = Some(machine.device.host_buffer(Kernels::checksum_room_bytes(&runs))?);
    let mut found = Vec::new();
    let on_device: Rival<'_> = Box::new(|| {
        let given = room.take().ok_or("the room comes back")?;
        let started = Instant::now();
        let summing = kernels.checksums(&stream, &machine.memory, &runs, given);
        let mut summing = summing.map_err(|refused| refused.error)?;
        let (took, (sums, given)) = until(started, || summing.poll())?;
        (found, room) = (sums, Some(given));
        Ok(took)
    });
    let on_processor: Rival<'_> = Box::new(|| {
        let started = Instant::now();
        held.iter().for_each(|block| {
            black_box(Checksum::of(&KEY, black_box(block)));
        });
        Ok(started.elapsed())
    });
    let times = compare(machine.runs, &mut [on_device, on_processor])?;
    for (block, sum) in held.iter().zip(found) {
        let record = block.record();
        if Checksum::from_content(&record.key, sum) != record.checksum {
            return Err("a checksum of the device is not that of the block".into());
        }
    }
    let [device, processor] = [0, 1].map(|at| gb_per_s(machine.bytes, times[at]));
    println!(
        "\nChecksums of {BLOCK} bytes each: device {device:.1} GB/s, one thread here {processor:.1} GB/s"
    );
    Ok(json!({
        "block": BLOCK, "device_gb_per_s": rounded(device), "thread_gb_per_s": rounded(processor),
    }))
}
