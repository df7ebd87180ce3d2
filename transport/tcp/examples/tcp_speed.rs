//! How fast blocks come over TCP, beside what iperf3 moves in the same minute:
//! `cargo run --release -p kv-tcp --example tcp_speed [cubic]`, or with `small` for single small reads alone.
//!
//! The owner is a process of its own, so that each side's CPU time can be told. Every figure of ours includes the
//! checksum of every byte; iperf3 looks at none, and sends one buffer that stays in the caches. So there is a third: a
//! bare loop of blocking sockets over as much memory as ours. Both use the congestion control that is named (loopback with BBR is
//! paced and much slower). The ratios say something when nothing else runs; with two cores, both sides and the
//! measuring thread already share them.

#![expect(clippy::disallowed_methods, reason = "this program measures")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use kv_arena::{Geometry, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Priority, Record, payload};
use kv_tcp::{Dialer, Limits, Listener, ReaderLink, Runtimes, Security, Tls};
use kv_transport::link::{Link, LinkDone, LinkOp};
use kv_wire::message::{ReadId, WantId};
use tokio::runtime::Runtime;

const SESSION: u128 = 1;
const SMALL_BYTES: u32 = 4 << 10;
const SIZES: [u32; 6] = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20];
/// Blocks of each size, together: more than the caches close to a core hold.
const SET_BYTES: u32 = 64 << 20;
/// Reads under way in a stream, together.
const UNDER_WAY_BYTES: u64 = 64 << 20;
const MEASURED: Duration = Duration::from_secs(2);
const CALL_READS: u64 = 10_000;
const SMALL_READS: usize = 3000;
const GIB: f64 = (1u64 << 30) as f64;

/// As a daemon on a machine of two cores has them.
struct Threads {
    light: Runtime,
    bulk: Runtime,
}

impl Threads {
    fn start() -> anyhow::Result<Self> {
        let light = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { light, bulk: kv_tcp::bulk_runtime(2)? })
    }

    fn runtimes(&self) -> Runtimes {
        Runtimes::new(self.light.handle().clone(), self.bulk.handle().clone())
    }
}

fn memory() -> anyhow::Result<ShardMemory> {
    let geometry = Geometry { regions: 24, region_bytes: 64 << 20, table_entries_max: 8 };
    Ok(ShardMemory::anonymous(geometry)?)
}

fn limits(congestion: &str, bulk_connections: usize) -> Limits {
    Limits { bulk_connections, congestion: Some(congestion.to_owned()), ..Limits::default() }
}

fn count(bytes: u32) -> u64 {
    u64::from((SET_BYTES / bytes).min(1024))
}

/// The number of a block says its size.
fn want(bytes: u32, at: u64) -> u64 {
    (u64::from(bytes) << 20) | at
}

/// Blocks are known on both sides by their numbers.
fn record(bytes: u32, at: u64, into: &mut [u8]) -> Record {
    let key = BlockKey::from_halves([want(bytes, at), 1]);
    payload::fill(&key, into);
    let checksum = Checksum::of(&key, into);
    Record { key, checksum, bytes, tag: BindingTag(1), priority: Priority::Normal, expires_at: 0 }
}

fn sizes() -> impl Iterator<Item = u32> {
    SIZES.into_iter().chain([SMALL_BYTES])
}

fn security(folder: &Path, node: &str) -> anyhow::Result<Security> {
    if folder.as_os_str() == "plain" {
        return Ok(Security::Plain);
    }
    let file = |end: &str| folder.join(format!("{node}.{end}"));
    Ok(Security::Mutual(Tls::load(&file("pem"), &file("key"), &folder.join("ca.pem"))?))
}

fn certificates(folder: &Path) -> anyhow::Result<()> {
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate()?)?;
    std::fs::write(folder.join("ca.pem"), ca.pem())?;
    for node in ["owner", "reader"] {
        let key = rcgen::KeyPair::generate()?;
        let cert = rcgen::CertificateParams::new(vec![node.to_owned()])?.signed_by(&key, &ca)?;
        std::fs::write(folder.join(format!("{node}.pem")), cert.pem())?;
        std::fs::write(folder.join(format!("{node}.key")), key.serialize_pem())?;
    }
    Ok(())
}

/// The owner's process: says where it listens, serves until its input ends.
fn serve(folder: &Path, congestion: &str) -> anyhow::Result<()> {
    let (threads, memory) = (Threads::start()?, memory()?);
    let (accepts, _accepted) = tokio::sync::mpsc::channel(1);
    let limits = Limits { rejoin: Duration::from_secs(3600), ..limits(congestion, 4) };
    let security = security(folder, "owner")?;
    let listener = Listener::bind(&threads.runtimes(), "127.0.0.1:0".parse()?, security, limits, accepts)?;
    let mut link = listener.sessions().link(SESSION, "reader", Arc::new(|| {}));
    for bytes in sizes() {
        for at in 0..count(bytes) {
            let mut slot = memory.slab().take(bytes)?;
            let record = record(bytes, at, &mut slot[..bytes as usize]);
            let (want, block) = (WantId(want(bytes, at)), slot.seal(&record));
            anyhow::ensure!(link.submit(LinkOp::Expose { want, block }).is_ok(), "an exposure came back");
        }
    }
    println!("{}", listener.local());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

struct Owner {
    child: Child,
    address: SocketAddr,
}

impl Owner {
    fn start(folder: &Path, congestion: &str) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args([Path::new("serve"), folder, Path::new(congestion)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("its output")?).read_line(&mut line)?;
        Ok(Self { child, address: line.trim().parse()? })
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// CPU seconds of a process so far.
fn cpu(process: &str) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().context("a name")?.split_whitespace().collect();
    // User and system time, fields 14 and 15 of the line, in hundredths of a second.
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn wait(&self) {
        let rung = self.rung.lock().expect("no panic");
        *self.changed.wait_while(rung, |rung| !*rung).expect("no panic") = false;
    }
}

struct Reader {
    link: ReaderLink,
    bell: Arc<Bell>,
    records: Vec<(u32, Vec<Record>)>,
    memory: ShardMemory,
    next: u64,
    done: Vec<LinkDone>,
}

impl Reader {
    fn start(threads: &Threads, owner: &Owner, folder: &Path, limits: Limits) -> anyhow::Result<Self> {
        let bell = Arc::new(Bell::default());
        let ring = Arc::clone(&bell);
        let wake = Arc::new(move || {
            *ring.rung.lock().expect("no panic") = true;
            ring.changed.notify_one();
        });
        let dialer = Dialer::new(threads.runtimes(), security(folder, "reader")?, limits);
        let link = dialer.link(owner.address, "owner", SESSION, wake)?;
        let mut scratch = vec![0; SIZES[SIZES.len() - 1] as usize];
        let mut of_size = |bytes| {
            let records = (0..count(bytes)).map(|at| record(bytes, at, &mut scratch[..bytes as usize]));
            (bytes, records.collect())
        };
        let records = sizes().map(&mut of_size).collect();
        let mut reader = Self { link, bell, records, memory: memory()?, next: 0, done: Vec::new() };
        // Until all connections stand.
        for bytes in [SMALL_BYTES, 8 << 20] {
            for _ in 0..8 {
                reader.read(bytes, None)?;
            }
            reader.ended(8, |_, _| Ok(()))?;
        }
        Ok(reader)
    }

    fn read(&mut self, bytes: u32, into: Option<Slot>) -> anyhow::Result<ReadId> {
        self.next += 1;
        let read = ReadId(self.next);
        let (_, records) = self.records.iter().find(|(size, _)| *size == bytes).context("a size")?;
        let at = self.next % records.len() as u64;
        let into = into.map_or_else(|| self.memory.slab().take(bytes), Ok)?;
        let (want, record) = (WantId(want(bytes, at)), records[at as usize]);
        let taken = self.link.submit(LinkOp::Read { read, want, window: None, record, into });
        anyhow::ensure!(taken.is_ok(), "a read came back");
        Ok(read)
    }

    /// Waits for so many reads; each is given to `then`.
    fn ended(
        &mut self,
        count: u64,
        mut then: impl FnMut(&mut Self, (ReadId, Slot)) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.link.kick();
        let mut left = count;
        while left > 0 {
            let mut done = std::mem::take(&mut self.done);
            self.link.poll(&mut done);
            if done.is_empty() {
                self.bell.wait();
            }
            for done in done.drain(..) {
                let LinkDone::Read { read, into, result: Ok(()) } = done else { anyhow::bail!("{done:?}") };
                left = left.saturating_sub(1);
                then(self, (read, into))?;
            }
            self.done = done;
            self.link.kick();
        }
        Ok(())
    }

    /// Reads blocks of one size for a while; gives bytes, and bytes per second.
    fn stream(&mut self, bytes: u32) -> anyhow::Result<(f64, f64)> {
        let mut under_way = (UNDER_WAY_BYTES / u64::from(bytes)).clamp(8, 1024);
        for _ in 0..under_way {
            self.read(bytes, None)?;
        }
        let (start, mut moved) = (Instant::now(), 0u64);
        while under_way > 0 {
            self.ended(1, |reader, (_, slot)| {
                moved += u64::from(bytes);
                if start.elapsed() < MEASURED {
                    reader.read(bytes, Some(slot))?;
                } else {
                    under_way -= 1;
                }
                Ok(())
            })?;
        }
        Ok((moved as f64, moved as f64 / start.elapsed().as_secs_f64()))
    }

    /// One call after the other; gives microseconds per read, sorted.
    fn calls(&mut self) -> anyhow::Result<Vec<f64>> {
        let mut slots = Vec::new();
        for _ in 0..CALL_READS {
            slots.push(self.memory.slab().take(SMALL_BYTES)?);
        }
        let mut each = Vec::new();
        for _ in 0..15 {
            let start = Instant::now();
            for slot in slots.drain(..) {
                self.read(SMALL_BYTES, Some(slot))?;
            }
            self.ended(CALL_READS, |_, (_, slot)| {
                slots.push(slot);
                Ok(())
            })?;
            each.push(start.elapsed().as_secs_f64() * 1e6 / CALL_READS as f64);
        }
        each.sort_by(f64::total_cmp);
        Ok(each)
    }

    /// Small reads one after the other, beside so many long ones under way; gives microseconds, sorted.
    fn small(&mut self, beside: usize) -> anyhow::Result<Vec<f64>> {
        for _ in 0..beside {
            self.read(2 << 20, None)?;
        }
        let (mut each, mut under_way) = (Vec::new(), beside + 1);
        let (mut read, mut start) = (self.read(SMALL_BYTES, None)?, Instant::now());
        while under_way > 0 {
            self.ended(1, |reader, (ended, slot)| {
                let small = ended == read;
                if small {
                    each.push(start.elapsed().as_secs_f64() * 1e6);
                }
                match each.len() < SMALL_READS {
                    true if small => {
                        start = Instant::now();
                        read = reader.read(SMALL_BYTES, Some(slot))?;
                    }
                    true => {
                        reader.read(2 << 20, Some(slot))?;
                    }
                    false => under_way -= 1,
                }
                Ok(())
            })?;
        }
        each.sort_by(f64::total_cmp);
        Ok(each)
    }

    /// Small reads alone, then beside long ones.
    fn small_reads(&mut self) -> anyhow::Result<()> {
        for (name, beside) in [("alone", 0), ("beside a stream of 2 MiB blocks", 16)] {
            let small = self.small(beside)?;
            let (p50, p99) = (at(&small, 0.5), at(&small, 0.99));
            println!("one 4 KiB read at a time, {name}: p50 {p50:.0} us, p99 {p99:.0} us");
        }
        Ok(())
    }
}

/// What iperf3 moves with so many connections: bytes per second, and CPU seconds per GiB of both sides.
fn iperf3(connections: usize, congestion: &str) -> Option<(f64, f64)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0").ok()?.local_addr().ok()?.port().to_string();
    let mut server =
        Command::new("iperf3").args(["-s", "-1", "-p", &port]).stdout(Stdio::null()).spawn().ok()?;
    let (seconds, connections) = (MEASURED.as_secs().to_string(), connections.to_string());
    let to = ["-c", "127.0.0.1", "-p", &port, "-P", &connections, "-t", &seconds];
    let mut told = None;
    // The server takes a moment to listen.
    for _ in 0..20 {
        let mut client = Command::new("iperf3");
        let run = client.args(to).args(["-l", "1M", "-J", "-C", congestion]).output().ok()?;
        let json: serde_json::Value = serde_json::from_slice(&run.stdout).ok()?;
        if json["error"].is_null() {
            told = Some(json);
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = server.kill();
    let _ = server.wait();
    let end = &told.as_ref()?["end"];
    let received = &end["sum_received"];
    let rate = received["bits_per_second"].as_f64()? / 8.0;
    let percent = &end["cpu_utilization_percent"];
    let busy = (percent["host_total"].as_f64()? + percent["remote_total"].as_f64()?) / 100.0;
    Some((rate, busy / (rate / GIB)))
}

/// What a bare loop of blocking sockets moves between two buffers as large as ours, with no word, no checksum and no
/// choice: iperf3 sends one buffer again and again, which the caches keep; blocks come from memory and go there.
fn bare(connections: usize, bytes: u32, congestion: &str) -> anyhow::Result<f64> {
    let moved = std::sync::atomic::AtomicU64::new(0);
    let set = (SET_BYTES as usize / connections).max(bytes as usize);
    let begun = Instant::now();
    std::thread::scope(|scope| -> anyhow::Result<()> {
        for _ in 0..connections {
            let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
            let mut to = std::net::TcpStream::connect(listener.local_addr()?)?;
            let (mut from, _) = listener.accept()?;
            rustix::net::sockopt::set_tcp_congestion(&to, congestion)?;
            let moved = &moved;
            scope.spawn(move || {
                let source = vec![1; set];
                while begun.elapsed() < MEASURED {
                    for piece in source.chunks_exact(bytes as usize) {
                        if to.write_all(piece).is_err() {
                            return;
                        }
                    }
                }
            });
            scope.spawn(move || {
                let mut into = vec![0; set];
                loop {
                    for piece in into.chunks_exact_mut(bytes as usize) {
                        if from.read_exact(piece).is_err() {
                            return;
                        }
                        moved.fetch_add(u64::from(bytes), std::sync::atomic::Ordering::Relaxed);
                    }
                }
            });
        }
        Ok(())
    })?;
    Ok(moved.into_inner() as f64 / begun.elapsed().as_secs_f64())
}

fn at(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

fn streams(
    reader: &mut Reader,
    owner: &Owner,
    connections: usize,
    sizes: &[u32],
    congestion: &str,
) -> anyhow::Result<()> {
    let owner = owner.child.id().to_string();
    let mut before = iperf3(connections, congestion);
    for &bytes in sizes {
        let from = (cpu(&owner)?, cpu("self")?);
        let (moved, rate) = reader.stream(bytes)?;
        let to = (cpu(&owner)?, cpu("self")?);
        let (owner, reader) = ((to.0 - from.0) / (moved / GIB), (to.1 - from.1) / (moved / GIB));
        print!("{connections} x {:>5} KiB  {:>5.2}  cpu {owner:.2} + {reader:.2}", bytes >> 10, rate / GIB);
        // The mean of before and after: what else runs on this machine comes and goes.
        let after = iperf3(connections, congestion);
        match (before, after) {
            (Some(before), Some(after)) => {
                let theirs = f64::midpoint(before.0, after.0);
                let busy = f64::midpoint(before.1, after.1);
                print!("   iperf3 {:>5.2}  cpu {busy:.2}   ratio {:.2}", theirs / GIB, rate / theirs);
            }
            _ => print!("   iperf3 is not here"),
        }
        let bare = bare(connections, bytes, congestion)?;
        println!("   bare loop {:>5.2}   ratio {:.2}", bare / GIB, rate / bare);
        before = after;
    }
    Ok(())
}

fn measure(folder: &Path, congestion: &str) -> anyhow::Result<()> {
    let secured = folder.as_os_str() != "plain";
    let kind = if secured { "mutual TLS" } else { "plain" };
    println!("\n{kind}, {congestion} on both sides: GiB/s, CPU seconds per GiB (owner + reader)");
    let owner = Owner::start(folder, congestion)?;
    let sizes: &[u32] = if secured { &[2 << 20] } else { &SIZES };
    for connections in [1, 4] {
        let threads = Threads::start()?;
        let mut reader = Reader::start(&threads, &owner, folder, limits(congestion, connections))?;
        streams(&mut reader, &owner, connections, sizes, congestion)?;
        if connections == 1 {
            continue;
        }
        let calls = reader.calls()?;
        let (median, best) = (at(&calls, 0.5), calls[0]);
        println!("{CALL_READS} x 4 KiB in one call: {median:.2} us per read (median), {best:.2} (best)");
        reader.small_reads()?;
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["serve", folder, congestion] => serve(Path::new(folder), congestion),
        ["small"] => {
            let owner = Owner::start(Path::new("plain"), "cubic")?;
            let threads = Threads::start()?;
            let mut reader = Reader::start(&threads, &owner, Path::new("plain"), limits("cubic", 4))?;
            (0..3).try_for_each(|_| reader.small_reads())
        }
        [] | [_] => {
            let congestion = args.first().copied().unwrap_or("cubic");
            measure(Path::new("plain"), congestion)?;
            let folder = tempfile::tempdir()?;
            certificates(folder.path())?;
            measure(folder.path(), congestion)
        }
        _ => anyhow::bail!("usage: tcp_speed [small | congestion control]"),
    }
}
