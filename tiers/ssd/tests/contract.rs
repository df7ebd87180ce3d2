//! The contract suite of `kv_tiers`, on every engine.

use std::time::Duration;

use kv_block::{DiskLocation, Record};
use kv_ssd::{Engine, SimDisk, SsdConfig, SsdStore};
use kv_tiers::contract::Subject;

fn config(dir: &std::path::Path, engine: Engine) -> SsdConfig {
    SsdConfig { segment_bytes: 1 << 20, engine, ..SsdConfig::new(dir, 8 << 20) }
}

/// A store on the file system that the tests run on.
struct OnDisk {
    dir: tempfile::TempDir,
    engine: Engine,
}

impl OnDisk {
    fn new(engine: Engine) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { dir, engine }
    }

    fn open_store(&self) -> (SsdStore, Vec<(Record, DiskLocation)>) {
        let opened = SsdStore::open(config(self.dir.path(), self.engine), Box::new(|| {}));
        let (store, mut recovered) = opened.unwrap();
        let found = recovered.by_ref().flatten().collect();
        let report = recovered.finish().unwrap();
        for note in store.notes().iter().chain(&report.notes) {
            eprintln!("note: {note}");
        }
        (store, found)
    }
}

impl Subject for OnDisk {
    type Store = SsdStore;

    fn open(&mut self) -> SsdStore {
        self.open_store().0
    }

    fn reopen(&mut self, store: SsdStore) -> (SsdStore, Vec<(Record, DiskLocation)>) {
        drop(store);
        self.open_store()
    }

    fn wait(&mut self) {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// A store on a simulated disk; a reopening is a power cut.
struct Simulated {
    disk: SimDisk,
}

impl Simulated {
    fn open_store(&self) -> (SsdStore, Vec<(Record, DiskLocation)>) {
        let config = config(std::path::Path::new(""), Engine::Auto);
        let (store, recovered) = SsdStore::open_simulated(&config, &self.disk).unwrap();
        (store, recovered.flatten().collect())
    }
}

impl Subject for Simulated {
    type Store = SsdStore;

    fn open(&mut self) -> SsdStore {
        self.open_store().0
    }

    fn reopen(&mut self, store: SsdStore) -> (SsdStore, Vec<(Record, DiskLocation)>) {
        self.disk.crash();
        drop(store);
        self.open_store()
    }

    fn wait(&mut self) {}
}

mod on_io_uring_or_what_there_is {
    kv_tiers::store_contract!(super::OnDisk::new(kv_ssd::Engine::Auto));
}

mod on_threads {
    kv_tiers::store_contract!(super::OnDisk::new(kv_ssd::Engine::Threads));
}

mod on_a_simulated_disk_that_loses_power {
    kv_tiers::store_contract!(super::Simulated { disk: kv_ssd::SimDisk::new(7) });
}

mod on_a_simulated_disk_that_reorders {
    fn subject() -> super::Simulated {
        let disk = kv_ssd::SimDisk::new(8);
        disk.reorder(true);
        super::Simulated { disk }
    }
    kv_tiers::store_contract!(subject());
}
