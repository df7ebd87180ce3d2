//! Pieces: what the driver is asked to copy, by address, in the one space that host and devices share.
//!
//! Pieces that lie side by side on both ends are joined, if both ends are each in one memory: the driver refuses a copy
//! that goes from one registration or allocation into the next, however close they lie. The rest goes in one call where
//! the driver has `cuMemcpyBatchAsync` (CUDA 12.8) and the device knows host memory by its address, else one by one.

use std::ffi::c_void;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUresult,
};

use crate::Error;
use crate::device::Inner;
use crate::memory::DeviceMemory;
use crate::stream::Stream;
use crate::sys::Batch;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    HostToDevice,
    DeviceToHost,
    OnDevices,
}

/// Bytes that lie together on both sides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Piece {
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) bytes: usize,
}

/// The other side of a device's memory: its address and how much it is.
pub(crate) type Place = (u64, u64);

/// Where the bytes are, for the device to read.
pub(crate) fn place_of(bytes: &[u8]) -> Place {
    (bytes.as_ptr().expose_provenance() as u64, bytes.len() as u64)
}

/// Where the bytes are, for the device to write.
pub(crate) fn place_of_mut(bytes: &mut [u8]) -> Place {
    (bytes.as_mut_ptr().expose_provenance() as u64, bytes.len() as u64)
}

/// Bytes of a device's memory and of the other side, by offset.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pair {
    pub(crate) device_offset: u64,
    pub(crate) other_offset: u64,
    pub(crate) bytes: u64,
}

impl Pair {
    /// Where the two lie, the device's first; `what` the other side is called when it does not lie within.
    pub(crate) fn addresses(
        &self,
        device: &DeviceMemory,
        other: Option<&Place>,
        what: &'static str,
    ) -> Result<(u64, u64), Error> {
        let (address, within) = other.copied().unwrap_or((0, 0));
        let Self { device_offset, other_offset, bytes } = *self;
        if other_offset > within || bytes > within - other_offset {
            return Err(Error::Range { what, offset: other_offset, bytes, within });
        }
        Ok((device.address_of(device_offset, bytes)?, address + other_offset))
    }
}

/// Joins pieces that follow each other at both ends. Each comes with the two memories it lies in, by whatever names:
/// pieces of others are not joined.
pub(crate) fn joined<Memories: PartialEq>(pieces: impl Iterator<Item = (Memories, Piece)>) -> Vec<Piece> {
    let (mut joined, mut memories) = (Vec::<Piece>::new(), None);
    for (of, piece) in pieces.filter(|(_, piece)| piece.bytes > 0) {
        match joined.last_mut() {
            Some(last)
                if memories.as_ref() == Some(&of)
                    && last.to + last.bytes as u64 == piece.to
                    && last.from + last.bytes as u64 == piece.from =>
            {
                last.bytes += piece.bytes;
            }
            _ => joined.push(piece),
        }
        memories = Some(of);
    }
    joined
}

impl Inner {
    /// Whether the driver's batched copy, if there is one, takes pieces that go this way. It is given addresses as
    /// they are and no word on which side they are of, so the device must know host memory by the processor's address.
    pub(crate) fn can_batch(&self, direction: Direction) -> bool {
        direction == Direction::OnDevices || self.has_host_addresses
    }
}

impl Stream {
    /// Queues pieces in the best way of the driver's own. After an error, some of them may be under way.
    ///
    /// Who calls this checked that they lie within memory which is not given up before the device is done.
    pub(crate) fn queue(&self, direction: Direction, pieces: &[Piece]) -> Result<(), Error> {
        match self.device().driver().calls.batch {
            Batch::None => self.queue_each(direction, pieces),
            batch if pieces.len() > 1 && self.device().inner.can_batch(direction) => {
                self.queue_batch(batch, pieces)
            }
            _ => self.queue_each(direction, pieces),
        }
    }

    /// As [`Stream::queue`], a call for each.
    pub(crate) fn queue_each(&self, direction: Direction, pieces: &[Piece]) -> Result<(), Error> {
        let inner = &self.device().inner;
        let (entries, stream) = (inner.entries(), self.inner.stream);
        let _current = inner.enter()?;
        for Piece { to, from, bytes } in pieces.iter().copied() {
            let on_host = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
            // SAFETY: within memory that the operation holds until the device is done, as the caller checked.
            let (call, code) = unsafe {
                match direction {
                    Direction::HostToDevice => (
                        "cuMemcpyHtoDAsync",
                        (entries.cuMemcpyHtoDAsync_v2)(to, on_host(from).cast_const(), bytes, stream),
                    ),
                    Direction::DeviceToHost => (
                        "cuMemcpyDtoHAsync",
                        (entries.cuMemcpyDtoHAsync_v2)(on_host(to), from, bytes, stream),
                    ),
                    Direction::OnDevices => {
                        ("cuMemcpyDtoDAsync", (entries.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream))
                    }
                }
            };
            inner.check(call, code)?;
        }
        Ok(())
    }

    fn queue_batch(&self, batch: Batch, pieces: &[Piece]) -> Result<(), Error> {
        let inner = &self.device().inner;
        let _current = inner.enter()?;
        let mut to: Vec<CUdeviceptr> = pieces.iter().map(|piece| piece.to).collect();
        let mut from: Vec<CUdeviceptr> = pieces.iter().map(|piece| piece.from).collect();
        let mut sizes: Vec<usize> = pieces.iter().map(|piece| piece.bytes).collect();
        // No hints: they are for managed memory.
        let anywhere = CUmemLocation { type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        // Read when it is the stream's turn: until then the source belongs to the operation.
        let mut attributes = CUmemcpyAttributes {
            srcAccessOrder: CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: anywhere,
            dstLocHint: anywhere,
            flags: 0,
        };
        // One set of attributes, from the first copy on.
        let mut first = 0;
        let (to, from, sizes) = (to.as_mut_ptr(), from.as_mut_ptr(), sizes.as_mut_ptr());
        let (count, stream) = (pieces.len(), self.inner.stream);
        // SAFETY: lists of `count`, which the driver reads before it returns; the memory is within what the operation
        // holds until the device is done, as the caller checked.
        let code = unsafe {
            match batch {
                Batch::V2(copy) => copy(to, from, sizes, count, &mut attributes, &mut first, 1, stream),
                Batch::V1(copy) => {
                    let mut failed = 0;
                    copy(to, from, sizes, count, &mut attributes, &mut first, 1, &mut failed, stream)
                }
                // Not called without one.
                Batch::None => CUresult::CUDA_ERROR_NOT_SUPPORTED as u32,
            }
        };
        inner.check("cuMemcpyBatchAsync", code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(to: u64, from: u64, bytes: usize) -> Piece {
        Piece { to, from, bytes }
    }

    #[test]
    fn neighbours_on_both_ends_are_joined_and_nothing_else() {
        let table = [
            (vec![], vec![]),
            (vec![piece(0, 100, 0)], vec![]),
            (vec![piece(0, 100, 8), piece(8, 108, 8)], vec![piece(0, 100, 16)]),
            (vec![piece(0, 100, 8), piece(8, 100, 0), piece(8, 108, 8)], vec![piece(0, 100, 16)]),
            (vec![piece(0, 100, 8), piece(8, 116, 8)], vec![piece(0, 100, 8), piece(8, 116, 8)]),
            (vec![piece(0, 100, 8), piece(16, 108, 8)], vec![piece(0, 100, 8), piece(16, 108, 8)]),
            (vec![piece(8, 108, 8), piece(0, 100, 8)], vec![piece(8, 108, 8), piece(0, 100, 8)]),
        ];
        for (given, wanted) in table {
            assert_eq!(joined(given.iter().map(|piece| ((), *piece))), wanted, "{given:?}");
        }
        // In other memories nothing is, on either end.
        let neighbours = [piece(0, 100, 8), piece(8, 108, 8), piece(16, 116, 8)];
        for memories in [[(0, 0), (1, 0), (1, 0)], [(0, 0), (0, 1), (0, 1)]] {
            let wanted = vec![piece(0, 100, 8), piece(8, 108, 16)];
            assert_eq!(joined(memories.into_iter().zip(neighbours)), wanted, "{memories:?}");
        }
    }
}
