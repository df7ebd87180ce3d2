//! Host memory that devices copy to and from by themselves: it is registered with the driver, a region at a time.
//!
//! To register a region takes a moment, for all its pages are fixed. So a region is registered when the first copy needs
//! it, and the others one after the other while a device that has caches of workers has nothing else to do.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kv_arena::Slab;
use kv_gpu::{Device, Error, HostRegion};

/// The arenas of all shards.
pub struct Arenas {
    slabs: Vec<Slab>,
    registered: Mutex<HashMap<(usize, u64), HostRegion>>,
}

impl Arenas {
    /// Nothing is registered yet.
    pub fn new(slabs: Vec<Slab>) -> Self {
        Self { slabs, registered: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(usize, u64), HostRegion>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that the region is registered in which these bytes of a slot lie.
    pub fn ensure(&self, device: &Device, bytes: &[u8]) -> Result<(), Error> {
        let address = bytes.as_ptr().addr();
        for (at, slab) in self.slabs.iter().enumerate() {
            let start = slab.data_range().cast::<u8>().addr().get();
            if let Some(offset) = address.checked_sub(start)
                && (offset as u64) < slab.data_bytes()
            {
                return self.register(device, at, offset as u64 / slab.region_bytes());
            }
        }
        // Memory of nobody we know: the copy refuses it.
        Ok(())
    }

    fn register(&self, device: &Device, at: usize, region: u64) -> Result<(), Error> {
        let mut registered = self.lock();
        if registered.contains_key(&(at, region)) {
            return Ok(());
        }
        let (slab, bytes) = (&self.slabs[at], self.slabs[at].region_bytes());
        // Registered once, for all devices of the process: what one has done counts for the others, also when it is lost.
        let memory = device.register(slab, region * bytes, bytes)?;
        registered.insert((at, region), memory);
        Ok(())
    }

    /// Registers one region more. `false`: none is left that has its memory, or the driver takes no more.
    pub fn register_next(&self, device: &Device) -> bool {
        for (at, slab) in self.slabs.iter().enumerate() {
            let bytes = slab.region_bytes();
            for region in 0..slab.data_bytes() / bytes {
                let known = self.lock().contains_key(&(at, region));
                if !known && slab.is_backed(region * bytes, bytes) {
                    return self.register(device, at, region).is_ok();
                }
            }
        }
        false
    }
}
