//! What every path must do, on a real device: two of them, each with an arena of its own, as two nodes have. Needs an
//! RDMA device: `vm/test` gives it one.

mod common;

use std::sync::Arc;
use std::time::Duration;

use kv_arena::Slab;
use kv_transport::contract::Subject;
use kv_transport::link::Link;
use kv_verbs::{Device, DeviceConfig, Endpoint, Exposure, Rail, Role};

struct Rdma {
    rail: Rail,
    config: DeviceConfig,
}

impl Rdma {
    fn device(&self, arena: &Slab) -> Device {
        let device = Device::open(&self.rail, std::slice::from_ref(arena), &self.config).unwrap();
        assert!(common::eventually(|| device.registered_bytes() == arena.data_bytes()));
        device
    }
}

impl Subject for Rdma {
    fn pair(&mut self, owner: &Slab, reader: &Slab) -> (Box<dyn Link>, Box<dyn Link>) {
        let (owner, reader) = (self.device(owner), self.device(reader));
        let (reader, asks) = Endpoint::open(&reader, Role::Reader, 1).unwrap();
        let (owner, answers) = Endpoint::open(&owner, Role::Owner, 1).unwrap();
        let owner = owner.connect(&asks, Arc::new(|| {})).unwrap();
        let reader = reader.connect(&answers, Arc::new(|| {})).unwrap();
        (Box::new(owner), Box::new(reader))
    }

    fn wait(&mut self) {
        std::thread::sleep(Duration::from_micros(200));
    }

    fn refusal_ends_path(&self) -> bool {
        true
    }
}

/// The device, or the end of the test.
macro_rules! rdma {
    ($config:expr) => {
        match common::rail() {
            Some(rail) => Rdma { rail, config: $config },
            None => return,
        }
    };
}

mod windows {
    use super::*;
    kv_transport::link_contract!(rdma!(DeviceConfig { timeout: 15, ..common::config() }));
}

mod regions {
    use super::*;
    kv_transport::link_contract!(rdma!(DeviceConfig {
        exposure: Some(Exposure::Regions),
        timeout: 15,
        ..common::config()
    }));
}
