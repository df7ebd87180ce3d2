//! Device memory, and host memory that a device copies to and from by itself.
//!
//! Host memory is registered: its pages stay where they are, and the driver knows that. It is registered once in a
//! process, for all devices, through one of them; the driver refuses a second time. So the list is the driver's, and
//! a copy looks up there whether its host memory is registered and keeps the registration and its device meanwhile.
//!
//! When that one device is lost, the others go on with what it registered: it is given up through one of them, and if
//! the lost one is closed first, its context stays as long as the process, for the registrations would go with it.

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
use crate::driver::Driver;
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

/// The host memory that a driver has registered, and the devices through which it can be given up.
#[derive(Default)]
pub(crate) struct Registry(Mutex<Listed>);

#[derive(Default)]
struct Listed {
    /// By address.
    registered: BTreeMap<usize, Entry>,
    /// All that are open, and some that were.
    devices: Vec<Weak<Inner>>,
}

struct Entry {
    by: *const Inner,
    registered: Weak<Registered>,
    /// The device that did it was lost and is closed, and its context stays.
    outlives: bool,
}

// SAFETY: the pointers are compared and nothing else.
unsafe impl Send for Registry {}
// SAFETY: as above.
unsafe impl Sync for Registry {}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Listed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The registration that covers all of this, and the device that has it; none has it whose context stays.
    pub(crate) fn find(&self, address: usize, bytes: usize) -> Option<(Arc<Registered>, Option<Device>)> {
        let below = self.lock().registered.range(..=address).next_back().and_then(|(_, below)| {
            let registered = below.registered.upgrade()?;
            Some((registered, below.outlives))
        });
        // Outside the lock, which the last user of a registration takes.
        let (below, outlives) = below.filter(|(below, _)| below.covers(address, bytes))?;
        let device = below.device.upgrade().map(|inner| Device { inner });
        (device.is_some() || outlives).then_some((below, device))
    }

    /// A device that was opened.
    pub(crate) fn add(&self, device: &Arc<Inner>) {
        let devices = &mut self.lock().devices;
        devices.retain(|device| device.strong_count() > 0);
        devices.push(Arc::downgrade(device));
    }

    /// A device that is open and not lost, other than the one of this number.
    fn other_than(&self, ordinal: u32) -> Option<Arc<Inner>> {
        let devices = self.lock().devices.clone();
        // Outside the lock, which the last user of a device takes.
        let mut devices = devices.iter().filter_map(Weak::upgrade);
        devices.find(|inner| inner.ordinal() != ordinal && !inner.is_lost())
    }

    /// Forgets what a device registered, and says where it was.
    pub(crate) fn take_all_of(&self, device: *const Inner) -> Vec<usize> {
        let mut taken = Vec::new();
        self.lock().registered.retain(|address, entry| {
            let stays = !ptr::eq(entry.by, device) || entry.outlives;
            if !stays {
                taken.push(*address);
            }
            stays
        });
        taken
    }

    /// Whether others use what a lost device registered. If so, its context must stay for as long as the process, and
    /// they go on.
    pub(crate) fn others_use_what_is_of(&self, device: &Inner) -> bool {
        if self.other_than(device.ordinal()).is_none() {
            return false;
        }
        let mut listed = self.lock();
        let of_device = listed.registered.values_mut();
        let of_device =
            of_device.filter(|entry| ptr::eq(entry.by, device) && entry.registered.strong_count() > 0);
        of_device.map(|entry| entry.outlives = true).count() > 0
    }
}

/// Host memory that is registered until this is dropped.
pub(crate) struct Registered {
    /// Weak, so that memory that is kept for a device does not keep the device.
    device: Weak<Inner>,
    driver: Driver,
    ordinal: u32,
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
        let registered = Arc::new(Self {
            device: Arc::downgrade(inner),
            driver: *inner.driver(),
            ordinal: inner.ordinal(),
            address,
            bytes,
            memory: Some(memory),
        });
        let (by, weak) = (Arc::as_ptr(inner), Arc::downgrade(&registered));
        let entry = Entry { by, registered: weak, outlives: false };
        inner.driver().calls.registry.lock().registered.insert(address, entry);
        Ok(registered)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let (registry, device) = (&self.driver.calls.registry, self.device.upgrade());
        let (at, is_own) = (self.address, |entry: &Entry| ptr::eq(entry.registered.as_ptr(), self));
        let listed = registry.lock().registered.extract_if(at..=at, |_, entry| is_own(entry)).next();
        // Without its device it was unregistered already, unless the context has outlived that.
        if device.is_none() && !listed.is_some_and(|(_, entry)| entry.outlives) {
            return;
        }
        let is_well = |inner: &Arc<Inner>| !inner.is_lost();
        let through = device.clone().filter(is_well).or_else(|| registry.other_than(self.ordinal));
        let unregistered = through.is_some_and(|inner| {
            let Ok(_current) = inner.enter() else { return false };
            let address = ptr::with_exposed_provenance_mut::<c_void>(self.address);
            // SAFETY: registered once, in `new`, for all contexts; copies hold this while they use the memory.
            let code = unsafe { (inner.entries().cuMemHostUnregister)(address) };
            inner.check("cuMemHostUnregister", code).is_ok()
        });
        match (unregistered, self.memory.take(), device) {
            (true, ..) | (_, None, _) => {}
            (false, Some(memory), Some(inner)) => inner.keep(memory),
            // Of a context that stays.
            (false, Some(memory), None) => std::mem::forget(memory),
        }
    }
}

/// Part of an arena, registered until this is dropped: its slots can be copied to and from.
pub struct HostRegion {
    /// Covers it.
    _registered: Arc<Registered>,
    bytes: usize,
    /// Another device that had registered it, and stays in use for this.
    _device: Option<Device>,
}

impl HostRegion {
    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Device {
    /// Registers part of an arena for all devices of this process; it must have its memory. No slot may lie across
    /// the ends: whole regions, then. Where all of it is registered already, through this or another device, that is
    /// shared, and the other device stays in use for it. Where only part of it is, the driver refuses.
    pub fn register(&self, slab: &Slab, offset: u64, bytes: u64) -> Result<HostRegion, Error> {
        let within = slab.data_bytes();
        if bytes == 0 || offset > within || bytes > within - offset || !slab.is_backed(offset, bytes) {
            return Err(Error::Range { what: "the arena that has its memory", offset, bytes, within });
        }
        let start = slab.data_range().cast::<u8>().as_ptr().wrapping_add(offset as usize);
        self.is_there()?;
        let bytes = bytes as usize;
        if let Some((registered, device)) =
            self.driver().calls.registry.find(start.expose_provenance(), bytes)
        {
            let device = device.filter(|device| self.is_same(device).is_err());
            return Ok(HostRegion { _registered: registered, bytes, _device: device });
        }
        // SAFETY: within the arena's mapping, which a slab keeps and does not move.
        let registered = unsafe { Registered::new(self, start, bytes, Box::new(slab.clone())) }?;
        Ok(HostRegion { _registered: registered, bytes, _device: None })
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
