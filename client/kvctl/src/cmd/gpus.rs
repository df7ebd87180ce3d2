//! GPUs of a node, as several commands speak of them.

use kv_api::v1;

use crate::cmd::describe::missing;
use crate::connect::Daemon;
use crate::exit::{Exit, Failure};
use crate::paint::Paint;
use crate::table::{Cell, Kind, column, fields, section, wide};
use crate::units::{bytes, count, percent};

/// Fewest digits that may stand for a UUID.
const PREFIX_DIGITS_MIN: usize = 4;
const BEGINNING: &str = "GPU-";

/// As `get gpus` lists them.
pub(crate) const GPUS: Kind<v1::GpuInfo> = Kind {
    noun: "gpu",
    name: |gpu| gpu.uuid.clone(),
    columns: &[
        column("GPU", |gpu, _| Cell::count(gpu.ordinal)),
        column("NAME", |gpu, _| Cell::text(&gpu.name)),
        column("STATE", |gpu, _| Cell::state(&gpu.state)),
        column("CACHES", |gpu, _| Cell::count(gpu.caches)),
        column("CACHE-BYTES", |gpu, _| Cell::bytes(gpu.cache_bytes)),
        column("POOL", |gpu, _| pool(gpu, Cell::bytes(gpu.pool_bytes_used))),
        column("COPYING", |gpu, _| Cell::count(gpu.copies_under_way)),
        column("WAITING", |gpu, _| Cell::count(gpu.copies_waiting)),
        column("IN", |gpu, _| Cell::bytes(gpu.bytes_in)),
        column("OUT", |gpu, _| Cell::bytes(gpu.bytes_out)),
        column("FAILED", |gpu, _| Cell::count(gpu.copies_failed)),
        wide("UUID", |gpu, _| Cell::text(&gpu.uuid)),
        wide("BUS", |gpu, _| Cell::text(&gpu.bus)),
        wide("NUMA", |gpu, _| unless_unknown(gpu.numa_node.map(u64::from), u64::to_string)),
        wide("MEMORY", |gpu, _| Cell::bytes(gpu.memory_bytes)),
        wide("FREE", |gpu, _| unless_unknown(gpu.free_bytes, |free| bytes(*free))),
        wide("METHOD", |gpu, _| Cell::text(&gpu.method)),
        wide("POOL-MAX", |gpu, _| pool(gpu, Cell::bytes(gpu.pool_bytes_max))),
        wide("POOL-BLOCKS", |gpu, _| pool(gpu, Cell::count(gpu.pool_blocks))),
        wide("POOL-HITS", |gpu, _| pool(gpu, Cell::count(gpu.pool_hits))),
        wide("COPYING-BYTES", |gpu, _| Cell::bytes(gpu.bytes_under_way)),
        wide("ACROSS", |gpu, _| Cell::bytes(gpu.bytes_across)),
        wide("DONE", |gpu, _| Cell::count(gpu.copies_done)),
        wide("KEPT", |gpu, _| Cell::count(gpu.kept)),
        wide("REACHES", |gpu, _| Cell::count(gpu.reaches.len() as u64)),
        wide("REASON", |gpu, _| Cell::text(&gpu.reason)),
    ],
};

/// What only a GPU with a pool has.
fn pool(gpu: &v1::GpuInfo, cell: Cell) -> Cell {
    if gpu.pool_bytes_max == 0 { Cell::number(0, "-".into()) } else { cell }
}

fn unless_unknown(number: Option<u64>, text: impl FnOnce(&u64) -> String) -> Cell {
    number.map_or_else(|| Cell::number(u64::MAX, "-".into()), |number| Cell::number(number, text(&number)))
}

/// Why none is listed.
pub(crate) fn none(answer: &v1::ListGpusResponse) -> String {
    let why = if answer.absent.is_empty() { "the daemon uses none" } else { &answer.absent };
    format!("no GPUs: {why}; `kvctl doctor` says what is missing, if anything is")
}

/// The GPUs of a daemon, or why there are none.
pub(crate) async fn list(daemon: &Daemon) -> Result<v1::ListGpusResponse, Failure> {
    daemon.within(daemon.admin().list_gpus(daemon.request(v1::ListGpusRequest {}))).await
}

/// The GPU with this number, or whose UUID begins so: with `GPU-` or without, and with `gpu/` before it or not.
pub(crate) fn pick<'a>(answer: &'a v1::ListGpusResponse, text: &str) -> Result<&'a v1::GpuInfo, Failure> {
    let name = text.strip_prefix("gpu/").unwrap_or(text);
    if answer.gpus.is_empty() {
        let why = if answer.absent.is_empty() { String::new() } else { format!(": {}", answer.absent) };
        return Err(Failure::new(Exit::NotFound, format!("there is no GPU `{name}`, nor any other{why}"))
            .help("`kvctl doctor` says what is missing, if anything is"));
    }
    // A number that some GPU has is never the beginning of another's UUID.
    let number = name.parse::<u32>().ok();
    if let Some(gpu) = answer.gpus.iter().find(|gpu| Some(gpu.ordinal) == number) {
        return Ok(gpu);
    }
    let upper = name.to_ascii_uppercase();
    let digits = upper.strip_prefix(BEGINNING).unwrap_or(&upper);
    let begins = |gpu: &&v1::GpuInfo| {
        let uuid = gpu.uuid.to_ascii_uppercase();
        uuid.strip_prefix(BEGINNING).unwrap_or(&uuid).starts_with(digits)
    };
    if digits.len() < PREFIX_DIGITS_MIN {
        return Err(missing("gpu", name, "kvctl get gpus"));
    }
    let found: Vec<_> = answer.gpus.iter().filter(begins).collect();
    match found[..] {
        [gpu] => Ok(gpu),
        [] => Err(missing("gpu", name, "kvctl get gpus -o wide")),
        _ => Err(Failure::usage(format!("the UUIDs of {} GPUs begin with `{name}`", found.len()))
            .help("give more of it: `kvctl get gpus -o wide` shows them")),
    }
}

/// All that is known of one of these.
pub(crate) fn page(gpu: &v1::GpuInfo, all: &[v1::GpuInfo], paint: Paint) -> String {
    let others = || all.iter().filter(|other| other.uuid != gpu.uuid);
    let reached = |wanted: bool| {
        let those = others().filter(|other| gpu.reaches.contains(&other.uuid) == wanted);
        those.map(|other| other.ordinal.to_string()).collect::<Vec<_>>().join(", ")
    };
    let free = gpu.free_bytes.map_or(String::new(), |free| format!(", {} free", bytes(free)));
    let head = fields(&[
        ("GPU", gpu.ordinal.to_string()),
        ("UUID", gpu.uuid.clone()),
        ("Name", gpu.name.clone()),
        ("Bus", gpu.bus.clone()),
        ("NUMA node", gpu.numa_node.map_or(String::new(), |node| node.to_string())),
        ("State", gpu.state.clone()),
        ("Reason", gpu.reason.clone()),
        ("Memory", format!("{}{free}", bytes(gpu.memory_bytes))),
        ("Copies by", gpu.method.clone()),
        ("Reaches GPUs", reached(true)),
        ("Does not reach", reached(false)),
    ]);
    let workers = fields(&[("Caches", count(gpu.caches.into())), ("Their memory", bytes(gpu.cache_bytes))]);
    let (used, max) = (gpu.pool_bytes_used, gpu.pool_bytes_max);
    let pool = match max {
        0 => "none\n".into(),
        _ => fields(&[
            ("Used", format!("{} of {} ({})", bytes(used), bytes(max), percent(used, max))),
            ("Blocks", count(gpu.pool_blocks)),
            ("Hits", count(gpu.pool_hits)),
        ]),
    };
    let copies = fields(&[
        ("Under way", format!("{}, {}", count(gpu.copies_under_way), bytes(gpu.bytes_under_way))),
        ("Waiting", count(gpu.copies_waiting)),
        ("From host memory", bytes(gpu.bytes_in)),
        ("To host memory", bytes(gpu.bytes_out)),
        ("Between GPUs", bytes(gpu.bytes_across)),
        ("Done", count(gpu.copies_done)),
        ("Failed", count(gpu.copies_failed)),
        ("Never ended", count(gpu.kept)),
    ]);
    let sections = [("Registered by workers", workers), ("Pool of blocks", pool), ("Copies", copies)];
    head + &sections.iter().map(|(title, text)| section(title, text, paint)).collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(ordinal: u32, uuid: &str, reaches: &[&str]) -> v1::GpuInfo {
        v1::GpuInfo {
            ordinal,
            uuid: uuid.into(),
            state: "ok".into(),
            reaches: reaches.iter().map(|uuid| (*uuid).into()).collect(),
            ..Default::default()
        }
    }

    fn answer() -> v1::ListGpusResponse {
        let gpus = vec![
            gpu(0, "GPU-1234abcd-0000-0000-0000-000000000000", &[]),
            gpu(1, "GPU-1234ffff-0000-0000-0000-000000000000", &[]),
            gpu(7, "GPU-00000000-0000-0000-0000-000000000000", &[]),
        ];
        v1::ListGpusResponse { gpus, ..Default::default() }
    }

    #[test]
    fn a_gpu_goes_by_its_number_or_by_the_beginning_of_its_uuid() {
        let answer = answer();
        for (text, ordinal) in [
            ("0", 0),
            ("gpu/7", 7),
            ("1234a", 0),
            ("GPU-1234F", 1),
            ("gpu-1234ffff", 1),
            ("gpu/GPU-1234abcd-0000-0000-0000-000000000000", 0),
            ("0000", 0),
            ("00000000-", 7),
        ] {
            assert_eq!(pick(&answer, text).map(|gpu| gpu.ordinal), Ok(ordinal), "{text}");
        }
        for (text, exit) in [
            ("2", Exit::NotFound),
            ("GPU-7", Exit::NotFound),
            ("", Exit::NotFound),
            ("GPU-", Exit::NotFound),
            ("H200", Exit::NotFound),
            ("1234", Exit::Usage),
        ] {
            let failure = pick(&answer, text).unwrap_err();
            assert_eq!(failure.exit, exit, "{text}");
            assert!(failure.help.unwrap().contains("kvctl get gpus"), "{text}");
        }
    }

    #[test]
    fn where_there_are_none_every_name_says_why() {
        let answer =
            v1::ListGpusResponse { absent: "no CUDA driver: not found".into(), ..Default::default() };
        let failure = pick(&answer, "0").unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(failure.message.ends_with(": no CUDA driver: not found"), "{failure:?}");
        assert!(none(&answer).starts_with("no GPUs: no CUDA driver: not found; "));
        assert!(none(&v1::ListGpusResponse::default()).starts_with("no GPUs: the daemon uses none; "));
    }

    #[test]
    fn a_gpu_reads_so() {
        let of = v1::GpuInfo {
            name: "NVIDIA H200".into(),
            bus: "0000:3b:00.0".into(),
            numa_node: Some(1),
            memory_bytes: 141 << 30,
            free_bytes: Some(9 << 30),
            method: "auto(batch)".into(),
            caches: 2,
            cache_bytes: 110 << 30,
            pool_bytes_max: 16 << 30,
            pool_bytes_used: 4 << 30,
            pool_blocks: 65_536,
            pool_hits: 12_034,
            copies_under_way: 14,
            bytes_under_way: 3 << 20,
            copies_waiting: 3,
            bytes_in: 12 << 40,
            bytes_out: 5 << 40,
            bytes_across: 1 << 30,
            copies_done: 1_204_331,
            copies_failed: 2,
            kept: 1,
            ..gpu(0, "GPU-1234abcd-0000-0000-0000-000000000000", &["GPU-b"])
        };
        let all = [of.clone(), gpu(1, "GPU-b", &[]), gpu(2, "GPU-c", &[])];
        let wanted = "\
GPU:             0
UUID:            GPU-1234abcd-0000-0000-0000-000000000000
Name:            NVIDIA H200
Bus:             0000:3b:00.0
NUMA node:       1
State:           ok
Reason:          -
Memory:          141GiB, 9.0GiB free
Copies by:       auto(batch)
Reaches GPUs:    1
Does not reach:  2

Registered by workers
  Caches:        2
  Their memory:  110GiB

Pool of blocks
  Used:    4.0GiB of 16.0GiB (25.0%)
  Blocks:  65,536
  Hits:    12,034

Copies
  Under way:         14, 3.0MiB
  Waiting:           3
  From host memory:  12.0TiB
  To host memory:    5.0TiB
  Between GPUs:      1.0GiB
  Done:              1,204,331
  Failed:            2
  Never ended:       1
";
        let page = page(&of, &all, Paint::plain());
        assert_eq!(page, wanted, "\n{page}");
    }

    #[test]
    fn what_a_lost_gpu_does_not_tell_is_left_open() {
        let lost = v1::GpuInfo { state: "lost".into(), reason: "gone\u{1b}".into(), ..gpu(3, "GPU-d", &[]) };
        let page = page(&lost, std::slice::from_ref(&lost), Paint::plain());
        for line in ["NUMA node:       -", "Reason:          gone?", "Memory:          0B", "  none"] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
    }
}
