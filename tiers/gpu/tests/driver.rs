//! What `Driver::load` makes of a machine without a driver, with half of one, and with one that does not start.

mod common;

use std::ffi::OsStr;

use common::{Fake, is_real};
use kv_gpu::{Absent, Driver};

#[test]
fn a_machine_without_a_driver_says_so() {
    let absent = Driver::load_from(OsStr::new("libcuda-that-nobody-has.so.1")).unwrap_err();
    let Absent::NoLibrary { why } = &absent else { panic!("{absent}") };
    assert!(why.contains("libcuda-that-nobody-has.so.1"), "{why}");
    assert!(absent.to_string().starts_with("no CUDA driver: "), "{absent}");
}

#[test]
fn what_is_no_library_is_no_driver() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("libcuda.so.1");
    for bytes in [&b""[..], b"not a library", &b"\x7fELF\x02\x01\x01"[..]] {
        std::fs::write(&path, bytes).unwrap();
        let absent = Driver::load_from(path.as_os_str()).unwrap_err();
        assert!(matches!(absent, Absent::NoLibrary { .. }), "{absent}");
    }
}

#[test]
fn this_machine_s_driver_is_there_or_said_to_be_missing() {
    match Driver::load() {
        Ok(driver) => {
            println!("{driver:?}, batched copies: {}", driver.has_batched_copies());
            driver.devices().unwrap().iter().for_each(|facts| println!("{facts:?}"));
        }
        Err(absent) => {
            assert!(!is_real(), "KVD_CUDA=real, but {absent}");
            eprintln!("skipped: {absent}");
        }
    }
}

#[test]
fn a_library_that_lacks_a_function_is_refused_by_its_name() {
    for wanted in Driver::symbols() {
        let fake = Fake::without(&[wanted], "");
        match fake.driver() {
            Err(Absent::NoSymbol { library, symbol }) => {
                assert_eq!(symbol, *wanted);
                assert_eq!(library, fake.path().display().to_string());
            }
            other => panic!("without {wanted}: {other:?}"),
        }
    }
}

#[test]
fn a_driver_that_does_not_start_is_asked_why() {
    let table = [
        ("fail=cuInit:1:802", "the CUDA driver does not start: CUDA_ERROR_SYSTEM_NOT_READY (802)"),
        ("fail=cuInit:1:34", "the CUDA driver does not start: CUDA_ERROR_STUB_LIBRARY (34)"),
        ("fail=cuInit:1:4711", "the CUDA driver does not start: an error without a name (4711)"),
        ("fail=cuDriverGetVersion:1:999", "the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999)"),
        ("version=11030", "the CUDA driver is for CUDA 11.3; 11.4 or newer is needed"),
    ];
    for (settings, wanted) in table {
        assert_eq!(Fake::new(settings).driver().unwrap_err().to_string(), wanted);
    }
    for settings in ["devices=0", "fail=cuInit:1:100"] {
        assert_eq!(Fake::new(settings).driver().unwrap_err(), Absent::NoDevice, "{settings}");
    }
}

#[test]
fn devices_are_told_apart() {
    let fake = Fake::new("devices=3;memory=1048576");
    let driver = fake.driver().unwrap();
    assert_eq!(driver.version().to_string(), "13.0");
    let devices = driver.devices().unwrap();
    let uuids: std::collections::BTreeSet<_> = devices.iter().map(|facts| facts.uuid).collect();
    assert_eq!((devices.len(), uuids.len()), (3, 3));
    assert_eq!(devices[1].name, "fake GPU 1");
    assert_eq!(devices[1].pci, "0000:02:00.0");
    assert_eq!(devices[1].memory_bytes, 1 << 20);
    assert_eq!(devices[1].capability, (9, 0));
    assert_eq!(devices[1].uuid.to_string(), "GPU-66616b65-2d63-7564-612d-4750552d0001");
    assert!(driver.open(3).unwrap_err().to_string().contains("GPU 3: cuDeviceGet failed"));
}

#[test]
fn an_old_driver_does_not_know_every_question() {
    for (version, has_fabric) in
        [(11040, false), (12000, false), (12020, false), (12030, true), (13000, true)]
    {
        let facts = Fake::new(&format!("version={version}")).driver().unwrap().devices().unwrap();
        assert!(facts[0].has_shared_events, "{version}");
        assert_eq!(facts[0].has_fabric, has_fabric, "{version}");
    }
}

/// The environment belongs to a process, so this one starts itself again.
#[test]
fn the_fake_driver_takes_settings_from_the_environment() {
    if std::env::var_os("FAKE_CUDA").is_some() {
        let devices = Fake::new("").driver().unwrap().devices().unwrap();
        assert!(devices.len() == 5 && devices[4].memory_bytes == 4096);
        return;
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "the_fake_driver_takes_settings_from_the_environment"]);
    let again = again.env("FAKE_CUDA", "devices=5; memory=4096").output().unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
}

#[test]
fn the_batched_copy_is_taken_in_the_form_that_the_driver_has() {
    const NONE: &[&str] = &[];
    let (both, ask) = (["cuMemcpyBatchAsync", "cuMemcpyBatchAsync_v2"], "cuGetProcAddress_v2");
    let all = [both[0], both[1], ask];
    let table = [
        // What is missing, the version, and whose calls are counted.
        (NONE, 13000, "cuMemcpyBatchAsync_v2"),
        (NONE, 12080, "cuMemcpyBatchAsync"),
        (NONE, 12070, "cuMemcpyHtoDAsync_v2"),
        (&both[..], 13000, "cuMemcpyBatchAsync_v2"),
        (&both[..], 12090, "cuMemcpyBatchAsync"),
        (&both[..], 12070, "cuMemcpyHtoDAsync_v2"),
        (&all[1..], 13000, "cuMemcpyBatchAsync"),
        (&all[..], 13000, "cuMemcpyHtoDAsync_v2"),
    ];
    for (missing, version, counted) in table {
        let fake = Fake::without(missing, &format!("version={version}"));
        let driver = fake.driver().unwrap();
        assert_eq!(driver.has_batched_copies(), counted.contains("Batch"), "{missing:?} {version}");
        let device = driver.open(0).unwrap();
        let (stream, memory) = (common::low(&device), device.allocate(64 << 10).unwrap());
        let bytes = common::pattern(1, 8192);
        let pages = [(0, 8192), (4096, 0)].map(|(host_offset, device_offset)| kv_gpu::PageCopy {
            host: 0,
            host_offset,
            device_offset,
            bytes: 4096,
        });
        let buffer = common::up(&stream, &memory, vec![common::filled(&device, &bytes)], &pages);
        let calls = fake.count(&format!("calls:{counted}"));
        assert_eq!(calls, if counted.contains("Batch") { 1 } else { 2 }, "{missing:?} {version}");
        let back = common::read(&stream, &memory);
        assert!(back[..4096] == bytes[4096..] && back[8192..12288] == bytes[..4096], "{missing:?} {version}");
        drop((buffer, memory, stream, device));
        fake.is_clean();
    }
}
