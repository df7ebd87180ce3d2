//! Device memory, and host memory that a device copies to and from by itself.
//!
//! Host memory is registered: its pages stay where they are, and the driver knows that. It is registered once in a
//! process, for all devices, through one of them; the driver refuses a second time. So the list is the driver's, and
//! a copy looks up there whether its host memory is registered and keeps the registration and its device meanwhile.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::driver::sys::{CUdeviceptr, CUresult};
use kv_arena::{Held, Slab, Slot};
use rustix::mm::{MapFlags, ProtFlags};

use crate::Error;
use crate::device::{Device, Inner};
use crate::pieces::Place;
use crate::shared::Mapped;

/// `CU_MEMHOSTREGISTER_PORTABLE`: for all contexts of the process.
const PORTABLE: u32 = 1;
/// `CU_MEMHOSTREGISTER_DEVICEMAP`: kernels reach it too.
const DEVICEMAP: u32 = 2;

/// Memory of a device: our own, or another process' by its handle. Cheap to clone; it goes with its last clone.
///
/// Nobody reads it but the device, so whoever has it may copy to and from it at any time. That two copies do not meet
/// in the same bytes is for those who ask for them to see to.
#[derive(Clone, Debug)]
pub struct DeviceMemory {
    pub(crate) inner: Arc<Allocation>,
}

#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) device: Device,
    pub(crate) address: CUdeviceptr,
    pub(crate) bytes: u64,
    pub(crate) origin: Origin,
}

#[derive(Debug)]
pub(crate) enum Origin {
    /// Allocated here.
    Own,
    /// Another process'; it was opened at this address.
    Opened(CUdeviceptr),
    /// Pieces of memory at addresses that were reserved for them.
    Mapped(Mapped),
}

impl DeviceMemory {
    /// How much it is.
    pub fn bytes(&self) -> u64 {
        self.inner.bytes
    }

    /// Whose it is.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// Whether both are the same memory, not only alike.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The address of a piece of it, if it lies within.
    pub(crate) fn address_of(&self, offset: u64, bytes: u64) -> Result<CUdeviceptr, Error> {
        let within = self.inner.bytes;
        if offset > within || bytes > within - offset {
            return Err(Error::Range { what: "device memory", offset, bytes, within });
        }
        Ok(self.inner.address + offset)
    }
}

impl Device {
    /// Memory of its own, with anything in it.
    pub fn allocate(&self, bytes: u64) -> Result<DeviceMemory, Error> {
        let _current = self.inner.enter()?;
        let mut address = 0;
        // SAFETY: a place to write to.
        let code = unsafe { (self.inner.entries().cuMemAlloc_v2)(&mut address, bytes as usize) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 {
            return Err(Error::Full { device: self.inner.ordinal(), bytes });
        }
        self.inner.check("cuMemAlloc", code)?;
        let allocation = Allocation { device: self.clone(), address, bytes, origin: Origin::Own };
        Ok(DeviceMemory { inner: Arc::new(allocation) })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let inner = &self.device.inner;
        // Memory of a lost device goes with its context. To free it may take as long as all that the device has to do.
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: what the driver gave, given back once; copies hold this while they use it.
        let (call, code) = unsafe {
            match self.origin {
                // It ends by itself, after this.
                Origin::Mapped(_) => return,
                Origin::Own => ("cuMemFree", (inner.entries().cuMemFree_v2)(self.address)),
                Origin::Opened(base) => ("cuIpcCloseMemHandle", (inner.entries().cuIpcCloseMemHandle)(base)),
            }
        };
        // Only a lost device refuses, and that is noted.
        let _ = inner.check(call, code);
    }
}

/// The host memory that a driver has registered, by address, each with the device that did it.
#[derive(Default)]
pub(crate) struct Registry(Mutex<BTreeMap<usize, (*const Inner, Weak<Registered>)>>);

// SAFETY: the pointers are compared and nothing else.
unsafe impl Send for Registry {}
// SAFETY: as above.
unsafe impl Sync for Registry {}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, (*const Inner, Weak<Registered>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registration that covers all of this, and the device that has it.
    pub(crate) fn find(&self, address: usize, bytes: usize) -> Option<(Arc<Registered>, Device)> {
        let below = self.lock().range(..=address).next_back().and_then(|(_, (_, below))| below.upgrade());
        // Outside the lock, which the last user of a registration takes.
        let below = below.filter(|below| below.covers(address, bytes))?;
        let device = below.device.upgrade()?;
        Some((below, Device { inner: device }))
    }

    /// Forgets what a device registered, and says where it was.
    pub(crate) fn take_all_of(&self, device: *const Inner) -> Vec<usize> {
        let mut taken = Vec::new();
        self.lock().retain(|address, (owner, _)| {
            let stays = !ptr::eq(*owner, device);
            if !stays {
                taken.push(*address);
            }
            stays
        });
        taken
    }
}

/// Host memory that is registered until this is dropped.
pub(crate) struct Registered {
    /// Weak, so that memory that is kept for a device does not keep the device.
    device: Weak<Inner>,
    address: usize,
    bytes: usize,
    /// Whose memory it is.
    memory: Option<Box<dyn Any + Send + Sync>>,
}

impl Registered {
    /// Whether all of this lies within.
    pub(crate) fn covers(&self, address: usize, bytes: usize) -> bool {
        let offset = address.checked_sub(self.address);
        offset.is_some_and(|offset| offset <= self.bytes && bytes <= self.bytes - offset)
    }

    /// Where it is.
    pub(crate) fn place(&self) -> Place {
        (self.address as u64, self.bytes as u64)
    }

    /// # Safety
    /// `start` is memory of ours, which stays where it is as long as `memory` lives.
    unsafe fn new(
        device: &Device,
        start: *mut u8,
        bytes: usize,
        memory: Box<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, Error> {
        let inner = &device.inner;
        let _current = inner.enter()?;
        // SAFETY: of the caller.
        let code =
            unsafe { (inner.entries().cuMemHostRegister_v2)(start.cast(), bytes, PORTABLE | DEVICEMAP) };
        inner.check("cuMemHostRegister", code)?;
        let address = start.expose_provenance();
        let registered =
            Arc::new(Self { device: Arc::downgrade(inner), address, bytes, memory: Some(memory) });
        let entry = (Arc::as_ptr(inner), Arc::downgrade(&registered));
        inner.driver().calls.registry.lock().insert(address, entry);
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // Without its device it was unregistered already.
        let Some(inner) = self.device.upgrade() else { return };
        inner.driver().calls.registry.lock().remove(&self.address);
        let unregistered = inner.enter().and_then(|_current| {
            let address = ptr::with_exposed_provenance_mut::<c_void>(self.address);
            // SAFETY: registered once, in `new`; copies hold this while they use the memory.
            let code = unsafe { (inner.entries().cuMemHostUnregister)(address) };
            inner.check("cuMemHostUnregister", code)
        });
        if let (Err(_), Some(memory)) = (unregistered, self.memory.take()) {
            inner.keep(memory);
        }
    }
}

/// Part of an arena, registered until this is dropped: its slots can be copied to and from.
pub struct HostRegion {
    registered: Arc<Registered>,
}

impl HostRegion {
    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.registered.bytes
    }
}

impl Device {
    /// Registers part of an arena for all devices of this process; it must have its memory. No slot may lie across
    /// the ends: whole regions, then.
    pub fn register(&self, slab: &Slab, offset: u64, bytes: u64) -> Result<HostRegion, Error> {
        let within = slab.data_bytes();
        if bytes == 0 || offset > within || bytes > within - offset || !slab.is_backed(offset, bytes) {
            return Err(Error::Range { what: "the arena that has its memory", offset, bytes, within });
        }
        let start = slab.data_range().cast::<u8>().as_ptr().wrapping_add(offset as usize);
        // SAFETY: within the arena's mapping, which a slab keeps and does not move.
        let registered = unsafe { Registered::new(self, start, bytes as usize, Box::new(slab.clone())) }?;
        Ok(HostRegion { registered })
    }

    /// Host memory of our own, registered, zero at first.
    pub fn host_buffer(&self, bytes: usize) -> Result<HostBuffer, Error> {
        let pages =
            Pages::new(bytes).map_err(|error| Error::HostMemory { bytes, errno: error.raw_os_error() })?;
        let start = pages.start;
        // SAFETY: the pages, which are not moved with their owner.
        let registered = unsafe { Registered::new(self, start.as_ptr(), bytes, Box::new(pages)) }?;
        Ok(HostBuffer { start, bytes, _registered: registered })
    }
}

/// Pages of our own.
struct Pages {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: memory that one owner has; see `HostBuffer`.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    fn new(bytes: usize) -> rustix::io::Result<Self> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { start, bytes })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: what `new` got, and nobody has an address of it any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Registered host memory with one owner: a copy takes it and gives it back.
pub struct HostBuffer {
    start: NonNull<u8>,
    bytes: usize,
    /// Has the pages. Copies hold it too, and read no byte by it.
    _registered: Arc<Registered>,
}

impl HostBuffer {
    /// Cuts it into buffers of one length; what is over is nobody's. All have the one registration.
    pub(crate) fn cut(self, bytes: usize) -> Vec<Self> {
        let part = |at: usize| {
            // SAFETY: within the pages, and no two parts meet.
            let start = unsafe { self.start.add(at * bytes) };
            Self { start, bytes, _registered: Arc::clone(&self._registered) }
        };
        (0..self.bytes / bytes).map(part).collect()
    }
}

// SAFETY: bytes with one owner.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; shared, they are only read.
unsafe impl Sync for HostBuffer {}

impl Deref for HostBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: pages of ours, zero at first; a device uses them only while a copy has this.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for HostBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

mod sealed {
    /// Whoever implements this promises that the bytes stay where they are when their owner is moved, and that
    /// nobody writes them while it lives but through it.
    pub trait Stays: Send + 'static {}
}

impl sealed::Stays for HostBuffer {}
impl sealed::Stays for Slot {}
impl sealed::Stays for Held {}

/// Host memory that a device may read from.
pub trait Source: sealed::Stays {
    /// Its bytes.
    fn source(&self) -> &[u8];
}

/// Host memory that a device may write to.
pub trait Sink: sealed::Stays {
    /// Its bytes.
    fn sink(&mut self) -> &mut [u8];
}

impl Source for HostBuffer {
    fn source(&self) -> &[u8] {
        self
    }
}

impl Sink for HostBuffer {
    fn sink(&mut self) -> &mut [u8] {
        self
    }
}

/// A sealed block in the arena.
impl Source for Held {
    fn source(&self) -> &[u8] {
        self
    }
}

/// A slot that is being filled.
impl Sink for Slot {
    fn sink(&mut self) -> &mut [u8] {
        self
    }
}
