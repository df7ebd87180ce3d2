//! Host memory gets its pages while the node serves: killed in the middle of that, and on a file system that has
//! less than it should.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kv_api::v1;
use kv_arena::{Geometry, HugePages, MemorySpec, ShardMemory};
use kv_block::Epoch;
use kv_block::code::Code;
use support::{Door, Home, scope};

const BYTES: u32 = 64 << 10;
const LONG: u32 = 1 << 20;

fn host_tier(status: &v1::StatusResponse) -> v1::TierInfo {
    status.tiers.iter().find(|tier| tier.tier() == v1::Tier::Host).expect("a host tier").clone()
}

/// Waits until the host tier does not grow any more.
fn grown(door: &Door) -> v1::TierInfo {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        let tier = host_tier(&door.status());
        if tier.state != "growing" {
            return tier;
        }
        assert!(tier.bytes_max <= tier.bytes_wanted && tier.reason.contains("the rest follows"), "{tier:?}");
        assert!(Instant::now() < limit, "host memory never ends growing: {tier:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn killed_while_host_memory_grows_it_goes_on_there_and_no_block_is_lost() {
    let home = Home::sized("grows", "1GiB", Some("256MiB"));
    let scope = scope("a");
    let mut stored = 0;
    for round in 0..4 {
        let daemon = home.start();
        let door = Door::of(&home);
        let binding = door.register(&scope, LONG);
        for number in 0..stored {
            assert_eq!(
                door.get(&scope, binding, number),
                Ok(v1::Tier::Host),
                "block {number}, round {round}"
            );
        }
        // In the end more than the first regions hold, so that some are in what came meanwhile.
        for number in stored..stored + 14 {
            assert!(!door.put(&scope, binding, number, LONG, false).unwrap());
        }
        stored += 14;
        daemon.kill();
        let data = fs::metadata(home.memory_dir().join("shard-0.data")).unwrap();
        eprintln!("round {round}: killed with {} of {} MiB there", data.blocks() >> 11, data.len() >> 20);
    }
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope, LONG);
    let tier = grown(&door);
    assert_eq!((tier.state.as_str(), tier.bytes_max, tier.bytes_wanted), ("ok", 1 << 30, 1 << 30));
    assert!(home.log().contains("host memory is whole"));
    for number in 0..stored {
        assert_eq!(door.get(&scope, binding, number), Ok(v1::Tier::Host), "block {number}");
    }
    assert_eq!(door.status().health, "ok");
}

const INSIDE: &str = "KVD_GROWTH_INSIDE";

/// Runs the named test again in a mount namespace of its own, on a tmpfs of 200 MiB; not at all where this machine
/// gives none.
fn run_inside(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c"])
        .arg(format!("mount -t tmpfs -o size=200m none {} && exec \"$@\"", dir.path().display()))
        .arg("sh")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, dir.path())
        .output();
    let out = match out {
        Ok(out) if out.status.success() => return,
        Ok(out) => String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr),
        Err(error) => error.to_string(),
    };
    assert!(!out.contains("panicked"), "{out}");
    eprintln!("skipped: no mount namespace here: {out}");
}

/// Takes all but `left` bytes of a file system.
fn take_all_but(dir: &Path, left: u64) -> std::path::PathBuf {
    let path = dir.join("somebody-else");
    let file = fs::File::create(&path).unwrap();
    let stat = rustix::fs::fstatvfs(&file).unwrap();
    let bytes = stat.f_bavail * stat.f_frsize - left;
    file.set_len(bytes).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    path
}

#[test]
fn a_file_system_without_the_room_makes_a_smaller_tier_that_says_so_and_never_a_crash() {
    let Some(dir) = std::env::var_os(INSIDE) else {
        run_inside("a_file_system_without_the_room_makes_a_smaller_tier_that_says_so_and_never_a_crash");
        return;
    };
    if kv_arena::numa::has_several_nodes() {
        eprintln!("skipped: the memory is made for one shard, and this machine has several NUMA nodes");
        return;
    }
    let dir = Path::new(&dir);
    let home = Home::sized("short", "128MiB", Some("256MiB"))
        .with_memory(dir)
        .set("host.region_bytes=2MiB")
        .set("catalog.entries_max=10000")
        .set("catalog.ghosts_max=64");

    // What can be known at once is refused at once.
    let other = take_all_but(dir, 100 << 20);
    assert!(!home.start_and_fail().success());
    assert!(home.log().contains("mount -o remount,size="), "{}", home.log());
    fs::remove_file(other).unwrap();

    // Memory as a life leaves it that was killed right after it started; then somebody else comes.
    let spec = MemorySpec {
        dir: dir.to_owned(),
        name: "shard-0".into(),
        geometry: Geometry { regions: 64, region_bytes: 2 << 20, table_entries_max: 10_064 },
        numa_node: None,
        huge: HugePages::Off,
        hugetlbfs_dir: None,
        ready_bytes: 16 << 20,
        promised_bytes: 0,
    };
    let (mut memory, _) = ShardMemory::open(&spec, Epoch(1)).unwrap();
    drop(memory.take_table().unwrap());
    drop(memory);
    // Some is left for slot headers, far from enough for a piece of the arena.
    let other = take_all_but(dir, 2 << 20);

    let mut daemon = home.start();
    let (door, scope) = (Door::of(&home), scope("a"));
    let binding = door.register(&scope, BYTES);
    let tier = grown(&door);
    assert_eq!(
        (tier.state.as_str(), tier.bytes_max, tier.bytes_wanted),
        ("degraded", 16 << 20, 128 << 20),
        "{}",
        home.log()
    );
    assert!(tier.reason.contains("mount -o remount,size="), "{}", tier.reason);
    let status = door.status();
    let warning = status.warnings.iter().find(|warning| warning.code == Code::HostShort.to_string());
    assert!(warning.is_some_and(|warning| warning.text.contains("16MiB of 128MiB")), "{:?}", status.warnings);
    assert_eq!(home.log().matches("host memory stays smaller").count(), 1, "said once");
    // Four times what there is: older blocks leave, nothing else happens.
    for number in 0..1024 {
        assert!(!door.put(&scope, binding, number, BYTES, false).unwrap());
    }
    for number in 1000..1024 {
        assert_eq!(door.get(&scope, binding, number), Ok(v1::Tier::Host));
    }
    assert!(daemon.is_alive());
    assert!(daemon.terminate().success());

    // With room again the next life goes on where this one stopped.
    fs::remove_file(other).unwrap();
    let _daemon = home.start();
    let door = Door::of(&home);
    let tier = grown(&door);
    assert_eq!((tier.state.as_str(), tier.bytes_max), ("ok", 128 << 20));
    assert_eq!(door.get(&scope, door.register(&scope, BYTES), 1023), Ok(v1::Tier::Host));
    assert_eq!(door.status().health, "ok");
}
