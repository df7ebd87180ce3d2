//! Copies of many pages at once, and who owns the memory meanwhile.
//!
//! ```text
//!  hosts ---> Stream::onboard, offload ---> Copying ---> poll, wait ---> hosts     the device is done
//!                     |                        |
//!                  Refused: hosts, error       dropped: waits; then, or when the device is lost, hosts are kept
//! ```
//! A copy takes its host memory and holds its device memory, its stream and the registrations. They come back when an
//! event behind the last page has passed, and no other way: neither an error of a call nor a lost device proves that
//! the device has stopped. What did not come back is kept until the device's context is gone ([`Device::kept`]).
//!
//! How many copies are under way is for those who begin them to bound; the device takes all.
//!
//! Pages that lie side by side on both ends are joined. The rest goes in one call where the driver has
//! `cuMemcpyBatchAsync` (CUDA 12.8), else one by one.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemLocation, CUmemLocationType, CUmemcpyAttributes, CUmemcpySrcAccessOrder, CUresult,
};

use crate::Error;
use crate::device::Device;
use crate::memory::{DeviceMemory, Registered, Sink, Source};
use crate::stream::{Event, Stream, until};
use crate::sys::Batch;

/// How long a copy that is dropped is waited for, and one of which a call failed.
const SETTLE: Duration = Duration::from_secs(10);

/// A page and its two places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageCopy {
    /// Which of the host memories that are given with it.
    pub host: usize,
    /// Where in that.
    pub host_offset: u64,
    /// Where in the device memory.
    pub device_offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// A copy that was not begun, or not all of it.
#[derive(Debug)]
pub struct Refused<H> {
    /// Why.
    pub error: Error,
    /// What was given; `None`: the device may still be using it, so it is kept.
    pub hosts: Option<Vec<H>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    HostToDevice,
    DeviceToHost,
    OnDevices,
}

/// What the driver is asked for: addresses, in the one space that host and devices share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    to: u64,
    from: u64,
    bytes: usize,
}

/// Joins pieces that follow each other at both ends.
fn joined(pieces: impl Iterator<Item = Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces.filter(|piece| piece.bytes > 0) {
        match joined.last_mut() {
            Some(last)
                if last.to + last.bytes as u64 == piece.to && last.from + last.bytes as u64 == piece.from =>
            {
                last.bytes += piece.bytes;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

/// Which pieces the pages are; hosts are told by address and length.
fn plan(
    direction: Direction,
    device: &DeviceMemory,
    hosts: &[(usize, usize)],
    pages: &[PageCopy],
) -> Result<Vec<Piece>, Error> {
    let piece = |page: &PageCopy| {
        let (address, within) =
            hosts.get(page.host).map_or((0, 0), |(address, bytes)| (*address, *bytes as u64));
        let PageCopy { host_offset, device_offset, bytes, .. } = *page;
        if host_offset > within || bytes > within - host_offset {
            return Err(Error::Range { what: "host memory", offset: host_offset, bytes, within });
        }
        let on_device = device.address_of(device_offset, bytes)?;
        let on_host = address as u64 + host_offset;
        Ok(match direction {
            Direction::DeviceToHost => Piece { to: on_host, from: on_device, bytes: bytes as usize },
            _ => Piece { to: on_device, from: on_host, bytes: bytes as usize },
        })
    };
    let pieces: Vec<_> = pages.iter().map(piece).collect::<Result<_, _>>()?;
    Ok(joined(pieces.into_iter()))
}

/// Whether the device says in good time that it is done. A question that fails is asked again, unless it is lost.
fn settles(mut is_done: impl FnMut() -> Result<bool, Error>) -> bool {
    let is_done = || match is_done() {
        Err(Error::Cuda { .. }) => Ok(false),
        answer => answer,
    };
    matches!(until(SETTLE, is_done), Ok(true))
}

/// A copy under way. Dropped, it waits for the device: 10 s, and then it keeps everything for ever.
pub struct Copying<H: Send + 'static> {
    parts: Option<Parts<H>>,
}

struct Parts<H> {
    event: Event,
    stream: Stream,
    devices: Vec<DeviceMemory>,
    /// With the devices that registered it.
    registered: Vec<(Arc<Registered>, Device)>,
    hosts: Vec<H>,
}

impl<H: Send + 'static> Copying<H> {
    /// What was given, when the device is done; it comes once. After an error that is not [`Error::Lost`] it may be
    /// asked again.
    pub fn poll(&mut self) -> Result<Option<Vec<H>>, Error> {
        let Some(parts) = &self.parts else { return Ok(None) };
        match parts.event.is_done() {
            Ok(false) => Ok(None),
            Ok(true) => Ok(self.parts.take().map(|parts| parts.hosts)),
            Err(error) => {
                if matches!(error, Error::Lost { .. }) {
                    self.parts.take().into_iter().for_each(Parts::keep);
                }
                Err(error)
            }
        }
    }

    /// As [`Copying::poll`], after the device is done or the time is over.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Vec<H>>, Error> {
        if let Some(parts) = &self.parts {
            // What this finds, `poll` finds again and deals with.
            let _ = parts.event.wait(limit);
        }
        self.poll()
    }
}

impl<H: Send + 'static> Parts<H> {
    /// The device may be using it until its context is gone.
    fn keep(self) {
        let Self { event, stream, devices, registered, hosts } = self;
        let device = stream.device().clone();
        if device.lost().is_none() {
            // Not lost, only slow beyond measure. To close, free or unregister what it uses would be worse than to
            // lose it, and as the device is held by these, its context stays too.
            std::mem::forget((event, stream, devices, registered, hosts));
            return;
        }
        // What it may still write to on another device cannot be kept by its own.
        let elsewhere = |memory: &DeviceMemory| !Arc::ptr_eq(&memory.device().inner, &device.inner);
        devices.into_iter().filter(elsewhere).for_each(std::mem::forget);
        let registered: Vec<_> = registered.into_iter().map(|(registered, _)| registered).collect();
        device.inner.keep(Box::new((hosts, registered)));
    }
}

impl<H: Send + 'static> Drop for Copying<H> {
    fn drop(&mut self) {
        let Some(parts) = self.parts.take() else { return };
        if !settles(|| parts.event.is_done()) {
            parts.keep();
        }
    }
}

impl Stream {
    /// Copies pages up, to the device.
    pub fn onboard<H: Source>(
        &self,
        to: &DeviceMemory,
        from: Vec<H>,
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let place = |host: &H| {
            let bytes = host.source();
            (bytes.as_ptr().expose_provenance(), bytes.len())
        };
        let places: Vec<_> = from.iter().map(place).collect();
        self.copy_pages(Direction::HostToDevice, to, from, &places, pages)
    }

    /// Copies pages down, from the device.
    pub fn offload<H: Sink>(
        &self,
        from: &DeviceMemory,
        mut to: Vec<H>,
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let place = |host: &mut H| {
            let bytes = host.sink();
            (bytes.as_mut_ptr().expose_provenance(), bytes.len())
        };
        let places: Vec<_> = to.iter_mut().map(place).collect();
        self.copy_pages(Direction::DeviceToHost, from, to, &places, pages)
    }

    /// Copies from one device memory to another, of this device or of two.
    pub fn copy(
        &self,
        (to, to_offset): (&DeviceMemory, u64),
        (from, from_offset): (&DeviceMemory, u64),
        bytes: u64,
    ) -> Result<Copying<()>, Error> {
        let (to_at, from_at) = (to.address_of(to_offset, bytes)?, from.address_of(from_offset, bytes)?);
        let pieces = joined([Piece { to: to_at, from: from_at, bytes: bytes as usize }].into_iter());
        let devices = vec![to.clone(), from.clone()];
        self.start(Direction::OnDevices, &pieces, devices, Vec::new(), Vec::new())
            .map_err(|refused| refused.error)
    }

    fn copy_pages<H: Send + 'static>(
        &self,
        direction: Direction,
        device: &DeviceMemory,
        hosts: Vec<H>,
        places: &[(usize, usize)],
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let registry = &self.device().driver().calls.registry;
        let registration = |(host, (address, bytes)): (usize, &(usize, usize))| {
            let missing = || Error::NotRegistered { device: self.device().facts().ordinal, host };
            registry.find(*address, *bytes).ok_or_else(missing)
        };
        let same = Arc::ptr_eq(&device.device().inner, &self.device().inner);
        let other = || Error::OtherDevice {
            device: self.device().facts().ordinal,
            wanted: device.device().facts().uuid,
        };
        let planned = if same { plan(direction, device, places, pages) } else { Err(other()) };
        let planned = planned.and_then(|pieces| {
            let registered = places.iter().enumerate().map(registration).collect::<Result<Vec<_>, _>>()?;
            Ok((pieces, registered))
        });
        match planned {
            Ok((pieces, registered)) => {
                self.start(direction, &pieces, vec![device.clone()], registered, hosts)
            }
            Err(error) => Err(Refused { error, hosts: Some(hosts) }),
        }
    }

    fn start<H: Send + 'static>(
        &self,
        direction: Direction,
        pieces: &[Piece],
        devices: Vec<DeviceMemory>,
        registered: Vec<(Arc<Registered>, Device)>,
        hosts: Vec<H>,
    ) -> Result<Copying<H>, Refused<H>> {
        let event = match self.device().event(false) {
            Ok(event) => event,
            Err(error) => return Err(Refused { error, hosts: Some(hosts) }),
        };
        let queued = self.queue(direction, pieces);
        // Whatever failed, part of it may be under way: from here on only the device gives the memory back.
        let recorded = event.record(self);
        let parts = Parts { event, stream: self.clone(), devices, registered, hosts };
        let (error, is_done) = match (queued, recorded) {
            (Ok(()), Ok(())) => return Ok(Copying { parts: Some(parts) }),
            (Err(error), Ok(())) => (error, settles(|| parts.event.is_done())),
            (Ok(()) | Err(_), Err(error)) => (error, settles(|| self.is_idle())),
        };
        if is_done {
            return Err(Refused { error, hosts: Some(parts.hosts) });
        }
        parts.keep();
        Err(Refused { error, hosts: None })
    }

    fn queue(&self, direction: Direction, pieces: &[Piece]) -> Result<(), Error> {
        let inner = &self.device().inner;
        let (entries, stream) = (inner.entries(), self.inner.stream);
        let _current = inner.enter()?;
        let batch = inner.driver().calls.batch;
        if pieces.len() > 1 && !matches!(batch, Batch::None) {
            return self.queue_batch(batch, pieces);
        }
        for Piece { to, from, bytes } in pieces.iter().copied() {
            let on_host = |address: u64| std::ptr::with_exposed_provenance_mut::<c_void>(address as usize);
            // SAFETY: within memory that the operation holds until the device is done: `plan` checked the bounds.
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
        // holds until the device is done: `plan` checked the bounds.
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
            assert_eq!(joined(given.clone().into_iter()), wanted, "{given:?}");
        }
    }
}
