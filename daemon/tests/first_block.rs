//! Stories of one node over gRPC: what is stored is found, survives, and is never wrong.

mod support;

use kv_api::v1;
use kv_block::FaultKind;
use kv_block::code::Code;
use support::{Door, Home, scope};

const BYTES: u32 = 64 << 10;

fn code(status: &tonic::Status) -> Code {
    kv_api::fault::from_status(status).code
}

#[test]
fn a_block_is_stored_found_and_survives_kill_and_restart() {
    let home = Home::new("survives");
    let mut daemon = home.start();
    let scope = scope("a");
    let mut epoch = 0;
    for life in 0..4 {
        let door = Door::of(&home);
        let binding = door.register(&scope, BYTES);
        for number in 0..life * 100 {
            assert_eq!(
                door.get(&scope, binding, number),
                Ok(v1::Tier::Host),
                "block {number} in life {life}"
            );
        }
        for number in life * 100..(life + 1) * 100 {
            assert!(!door.put(&scope, binding, number, BYTES, false).unwrap());
            assert!(door.put(&scope, binding, number, BYTES, false).unwrap(), "the second time it is there");
        }
        let status = door.status();
        assert_eq!(status.recovery.unwrap().host_blocks, life * 100);
        assert!(status.epoch > epoch, "every life has a larger epoch");
        epoch = status.epoch;
        if life % 2 == 0 {
            daemon.kill();
        } else {
            assert!(daemon.terminate().success());
        }
        daemon = home.start();
    }
}

#[test]
fn durable_blocks_survive_the_loss_of_host_memory() {
    let home = Home::new("durable").set("disk.admission=all");
    let daemon = home.start();
    let scope = scope("a");
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    (0..64).for_each(|number| assert!(!door.put(&scope, binding, number, BYTES, true).unwrap()));
    daemon.kill();
    std::fs::remove_dir_all(home.memory_dir()).unwrap();
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    assert_eq!(door.status().recovery.unwrap().disk_blocks, 64);
    (0..64).for_each(|number| assert_eq!(door.get(&scope, binding, number), Ok(v1::Tier::Disk)));
    (0..64).for_each(|number| assert_eq!(door.get(&scope, binding, number), Ok(v1::Tier::Host)));
}

#[test]
fn what_overflows_host_memory_comes_back_from_disk() {
    let home = Home::sized("overflow", "16MiB", Some("256MiB")).set("disk.admission=all");
    let _daemon = home.start();
    let scope = scope("a");
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    let blocks = 1000; // 62.5 MiB through 16 MiB
    (0..blocks).for_each(|number| assert!(!door.put(&scope, binding, number, BYTES, false).unwrap()));
    let found = (0..blocks).filter(|number| door.get(&scope, binding, *number) == Ok(v1::Tier::Disk)).count();
    assert!(found > 600, "{found} of {blocks} came from disk");
    assert_eq!(door.status().checksum_failures, 0);
}

#[test]
fn a_damaged_block_is_a_miss_and_never_served() {
    let home = Home::new("damaged").set("disk.admission=all");
    let daemon = home.start();
    let scope = scope("a");
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    (0..32).for_each(|number| assert!(!door.put(&scope, binding, number, BYTES, true).unwrap()));
    daemon.kill();
    // One bit in the middle of every 64 KiB of both tiers.
    let data = home.memory_dir().join("shard-0.data");
    flip_every(&data, u64::from(BYTES), 1234);
    let segments = std::fs::read_dir(home.data_dir().join("shard-0")).unwrap();
    for file in segments
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|end| end == "kv"))
    {
        flip_every(&file, u64::from(BYTES), 40_000 + 4096);
    }
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    let mut corrupt = 0;
    for number in 0..32 {
        // A block that escaped the flips on disk is served right; `get` checks every byte.
        if let Err(miss) = door.get(&scope, binding, number) {
            assert_eq!(miss.reason(), v1::MissReason::Corrupt, "block {number}");
            corrupt += 1;
        }
    }
    assert!(corrupt > 16, "{corrupt} of 32 blocks were found damaged");
    assert!(door.status().checksum_failures >= 32, "every host copy was found out");
    let warned = door.status().warnings.iter().any(|warning| warning.code == Code::CorruptDisk.to_string());
    assert!(warned, "quarantined blocks are a warning");
}

fn flip_every(path: &std::path::Path, step: u64, offset: u64) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut at = offset;
    while at < file.metadata().unwrap().len() {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        at += step;
    }
}

#[test]
fn other_scopes_never_share_a_byte_and_the_miss_names_the_fields() {
    let home = Home::new("scopes");
    let _daemon = home.start();
    let door = Door::of(&home);
    let ours = scope("a");
    let binding = door.register(&ours, BYTES);
    door.put(&ours, binding, 7, BYTES, false).unwrap();
    let mut other = ours.clone();
    other.weights = "2".into();
    other.lora = "poet".into();
    let other_binding = door.register(&other, BYTES);
    let miss = door.get(&other, other_binding, 7).unwrap_err();
    assert_eq!(
        (miss.reason(), miss.fields),
        (v1::MissReason::ScopeDiffers, vec!["weights".into(), "lora".into()])
    );
    let stranger = scope("b");
    let stranger_binding = door.register(&stranger, BYTES);
    let miss = door.get(&stranger, stranger_binding, 7).unwrap_err();
    assert_eq!(miss.reason(), v1::MissReason::NeverStored, "another tenant's blocks are not spoken of");
}

#[test]
fn wrong_requests_get_typed_faults_and_the_daemon_goes_on() {
    let home = Home::new("faults");
    let mut daemon = home.start();
    let door = Door::of(&home);
    let scope = scope("a");
    let binding = door.register(&scope, BYTES);
    assert_eq!(code(&door.put(&scope, binding, 1, BYTES - 1, false).unwrap_err()), Code::WrongLength);
    assert_eq!(code(&door.put(&scope, binding, 1, BYTES + 1, false).unwrap_err()), Code::WrongLength);
    assert_eq!(code(&door.put(&scope, 99, 1, BYTES, false).unwrap_err()), Code::UnknownBinding);
    let key = |bytes: usize| v1::Names { keys: vec![vec![0; bytes].into()], ..v1::Names::default() };
    let acquire = |session: u64, names| {
        let request = v1::AcquireRequest { session, names, wait_ms: 0, node: String::new() };
        door.runtime.block_on(door.blocks().acquire(request)).unwrap_err()
    };
    assert_eq!(code(&acquire(0, Some(key(16)))), Code::UnknownSession);
    let stale = acquire(77, Some(key(16)));
    assert_eq!(code(&stale), Code::UnknownSession);
    assert_eq!(kv_api::fault::from_status(&stale).kind, FaultKind::Fenced);
    let lookup = |names| {
        let request = v1::LookupRequest { names, ..v1::LookupRequest::default() };
        door.runtime.block_on(door.blocks().lookup(request)).unwrap_err()
    };
    assert_eq!(code(&lookup(None)), Code::BadRequest);
    assert_eq!(code(&lookup(Some(key(15)))), Code::BadRequest);
    let many = v1::Names { keys: vec![vec![0; 16].into(); 5000], ..v1::Names::default() };
    assert_eq!(code(&lookup(Some(many))), Code::BatchTooLarge);
    let pin = v1::PinRequest { names: Some(key(16)), ttl_s: 0, session: 0 };
    assert_eq!(code(&door.runtime.block_on(door.blocks().pin(pin)).unwrap_err()), Code::BadRequest);
    assert!(daemon.is_alive());
    assert!(!door.put(&scope, binding, 1, BYTES, false).unwrap(), "it still stores");
}

#[test]
fn a_broken_or_foreign_directory_is_set_aside_and_the_node_starts() {
    let home = Home::new("aside");
    let daemon = home.start();
    let scope = scope("a");
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    door.put(&scope, binding, 1, BYTES, true).unwrap();
    daemon.kill();
    let meta = home.memory_dir().join("shard-0.meta");
    let mut bytes = std::fs::read(&meta).unwrap();
    bytes[0] ^= 0xff;
    std::fs::write(&meta, &bytes).unwrap();
    let format = home.data_dir().join("shard-0").join("kvd.format");
    std::fs::write(&format, "a format of the future").unwrap();
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope, BYTES);
    assert_eq!(door.get(&scope, binding, 1).unwrap_err().reason(), v1::MissReason::NeverStored);
    assert!(!door.put(&scope, binding, 1, BYTES, true).unwrap(), "it stores anew");
    let kept: Vec<_> =
        std::fs::read_dir(home.memory_dir()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert!(kept.iter().any(|name| name.to_string_lossy().contains("aside")), "kept: {kept:?}");
    let aside: Vec<_> = walk(&home.data_dir());
    assert!(aside.iter().any(|path| path.contains("aside") && path.ends_with(".kv")), "kept: {aside:?}");
    let told = told_aside(&home, &door);
    assert!(told.iter().any(|text| text.contains("host memory of shard 0")), "{told:?}");
    assert!(told.iter().any(|text| text.contains("data directory was set aside into aside-1/")), "{told:?}");
}

/// What status says was set aside; the log must say each of it too, with the code.
fn told_aside(home: &Home, door: &Door) -> Vec<String> {
    let status = door.status();
    assert_eq!(status.health, "warn");
    let told: Vec<String> =
        status.warnings.into_iter().filter(|one| one.code == "KVD-2003").map(|one| one.text).collect();
    let log = home.log();
    for text in &told {
        let line = log.lines().find(|line| line.contains(text.as_str()));
        assert!(line.is_some_and(|line| line.contains("WARN") && line.contains("KVD-2003")), "{text}: {log}");
    }
    told
}

#[test]
fn a_segment_a_registry_and_a_directory_in_the_place_of_a_file_are_set_aside_and_told() {
    let home = Home::new("aside-more");
    let daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    door.put(&scope("a"), binding, 1, BYTES, true).unwrap();
    daemon.kill();
    let shard = home.data_dir().join("shard-0");
    std::fs::write(shard.join("segment-00000000.kv"), "no segment").unwrap();
    std::fs::write(home.data_dir().join("bindings.json"), "no registry").unwrap();
    let daemon = home.start();
    let door = Door::of(&home);
    let told = told_aside(&home, &door);
    for name in ["segment-00000000.kv.aside-1", "bindings.aside-1"] {
        assert!(told.iter().any(|text| text.contains(name)), "{name}: {told:?}");
    }
    let disk = door.status().tiers.into_iter().find(|tier| tier.tier() == v1::Tier::Disk).unwrap();
    assert!(disk.notes.iter().any(|note| note.contains("aside-1")), "{:?}", disk.notes);
    daemon.kill();
    let format = shard.join("kvd.format");
    std::fs::remove_file(&format).unwrap();
    std::fs::create_dir(&format).unwrap();
    let _daemon = home.start();
    let told = told_aside(&home, &Door::of(&home));
    assert!(told.iter().any(|text| text.contains("kvd.format is not a file")), "{told:?}");
    assert!(shard.join("aside-1/kvd.format").is_dir());
}

#[test]
fn nobody_else_can_read_what_a_daemon_keeps() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let home = Home::new("private");
    std::fs::create_dir(home.data_dir()).unwrap();
    std::fs::set_permissions(home.data_dir(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("a"), BYTES);
    door.put(&scope("a"), binding, 1, BYTES, true).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    let dirs = [home.memory_dir().to_owned(), home.data_dir(), home.data_dir().join("shard-0")];
    for dir in &dirs {
        assert_eq!(mode(dir), 0o700, "{}", dir.display());
    }
    let files = [walk(home.memory_dir()), walk(&home.data_dir())].concat();
    assert!(files.iter().any(|file| file.ends_with("bindings.json")), "{files:?}");
    for file in files {
        assert_eq!(mode(file.as_ref()), 0o600, "{file}");
    }
}

fn walk(dir: &std::path::Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            all.extend(walk(&entry.path()));
        } else {
            all.push(entry.path().display().to_string());
        }
    }
    all
}

#[test]
fn purge_is_durable_and_pins_hold() {
    let home = Home::new("purge").set("disk.admission=all");
    let daemon = home.start();
    let (door, ours, theirs) = (Door::of(&home), scope("a"), scope("b"));
    let (a, b) = (door.register(&ours, BYTES), door.register(&theirs, BYTES));
    for number in 0..40 {
        door.put(&ours, a, number, BYTES, true).unwrap();
        door.put(&theirs, b, number, BYTES, true).unwrap();
    }
    let hash = kv_block::SequenceHash::from(3).as_bytes().to_vec();
    let names = v1::Names { binding: a, sequence_hashes: vec![hash.into()], ..v1::Names::default() };
    let pin = v1::PinRequest { names: Some(names), ttl_s: 600, session: 0 };
    assert_eq!(door.runtime.block_on(door.blocks().pin(pin)).unwrap().into_inner().pinned, 1);
    let last = door.runtime.block_on(async {
        let request = v1::PurgeRequest { tenant: "a".into(), ..v1::PurgeRequest::default() };
        let mut stream = door.admin().purge(request).await.unwrap().into_inner();
        let mut last = v1::Progress::default();
        while let Some(progress) = stream.message().await.unwrap() {
            last = progress;
        }
        last
    });
    assert!(last.finished);
    assert_eq!((last.done, last.failed), (39, 1), "the pinned one stays");
    // A tombstone may still be on its way; a planned end waits for it.
    assert!(daemon.terminate().success());
    let _daemon = home.start();
    let door = Door::of(&home);
    let (a, b) = (door.register(&ours, BYTES), door.register(&theirs, BYTES));
    for number in 0..40 {
        assert_eq!(door.get(&ours, a, number).is_ok(), number == 3, "block {number} of tenant a");
        assert!(door.get(&theirs, b, number).is_ok(), "block {number} of tenant b");
    }
}
