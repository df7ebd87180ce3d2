//! Places in a pool, for copies on the device that the pool does not make itself.

use super::log::{Hold, Spot};
use crate::memory::DeviceMemory;

/// Where a block lies on the device. As long as this lives it lies there; so a copy from it keeps this until the device
/// is done. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Place {
    pub(super) memory: DeviceMemory,
    pub(super) offset: u64,
    pub(super) bytes: u32,
    pub(super) _hold: Hold,
}

impl Place {
    /// The memory it lies in, among others.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Where in that.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How long the block is.
    pub fn bytes(&self) -> u32 {
        self.bytes
    }
}

/// Room for a block that somebody else copies there: [`super::Pool::seal`] makes it a block. A copy to it keeps this
/// until the device is done: dropped, the room is dead until its segment is released, and then somebody else's.
#[derive(Debug)]
pub struct Reserved {
    pub(super) spot: Spot,
    pub(super) memory: DeviceMemory,
}

impl Reserved {
    /// The memory it lies in, among others.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// Where in that.
    pub fn offset(&self) -> u64 {
        super::offset(self.spot.at)
    }

    /// How much room it is.
    pub fn bytes(&self) -> u32 {
        self.spot.bytes
    }
}
