//! Memory and events of another process, by handle.
//!
//! The owner makes a handle, sends it by whatever way, and must keep the memory until the other has closed it: the
//! driver says that what happens otherwise is undefined. When the owner ends, the driver keeps the memory until the
//! last who opened it has closed it; then it is not the owner's any more, and nobody writes it.
//!
//! A handle names the whole allocation. An engine's tensors are pieces of larger allocations, and so is what
//! `cuMemAlloc` gives below 2 MiB: who opens one can reach its neighbours. Memory of `cuMemCreate` (PyTorch's
//! `expandable_segments`) has no such handle: see [`crate::shared`].
//!
//! An event is both sides' once it is opened: either records it, waits for it and asks about it, each on streams of its
//! own. Who waits takes what was recorded last, so the two must agree in another way who records when. When its maker
//! destroys it, what the other does with it is undefined.

use std::ffi::c_char;
use std::sync::Arc;

use cudarc::driver::sys::{CUipcEventHandle, CUipcMemHandle, CUresult};

use crate::Error;
use crate::device::Device;
use crate::driver::Uuid;
use crate::memory::{Allocation, DeviceMemory, Origin};
use crate::stream::Event;

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`, the one flag there is; without it nothing can be opened.
const LAZY_ENABLE_PEER_ACCESS: u32 = 1;

/// Memory of a device, as other processes of the machine can be told of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemoryHandle {
    /// Whose memory; ordinals differ between processes.
    pub device: Uuid,
    /// The driver's word for the allocation.
    pub handle: [u8; 64],
    /// Where in the allocation it begins.
    pub offset: u64,
    /// How much it is.
    pub bytes: u64,
}

/// A shared event, as other processes of the machine can be told of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EventHandle(pub [u8; 64]);

impl DeviceMemory {
    /// A handle for other processes. They can use the memory for as long as this one keeps it.
    pub fn export(&self) -> Result<MemoryHandle, Error> {
        let Allocation { device, address, bytes, .. } = &*self.inner;
        let inner = &device.inner;
        let _current = inner.enter()?;
        let (mut base, mut allocated) = (0, 0);
        // SAFETY: places to write to.
        let code = unsafe { (inner.entries().cuMemGetAddressRange_v2)(&mut base, &mut allocated, *address) };
        inner.check("cuMemGetAddressRange", code)?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: a place to write to. A handle is of an allocation, so it is asked for by where that begins.
        let code = unsafe { (inner.entries().cuIpcGetMemHandle)(&mut handle, base) };
        inner.check("cuIpcGetMemHandle", code)?;
        Ok(MemoryHandle {
            device: device.facts().uuid,
            handle: handle.reserved.map(|byte| byte as u8),
            offset: address - base,
            bytes: *bytes,
        })
    }
}

impl Device {
    /// Opens memory of another process on this device. It is closed with the last clone of what comes back.
    pub fn open_memory(&self, handle: &MemoryHandle) -> Result<DeviceMemory, Error> {
        let inner = &self.inner;
        if handle.device != self.facts().uuid {
            return Err(Error::OtherDevice { device: inner.ordinal(), wanted: handle.device });
        }
        let _current = inner.enter()?;
        let word = CUipcMemHandle { reserved: handle.handle.map(|byte| byte as c_char) };
        let mut base = 0;
        // SAFETY: a place to write to; the driver checks the handle.
        let code =
            unsafe { (inner.entries().cuIpcOpenMemHandle_v2)(&mut base, word, LAZY_ENABLE_PEER_ACCESS) };
        self.opened("cuIpcOpenMemHandle", code)?;
        let mut allocation =
            Allocation { device: self.clone(), address: base, bytes: 0, origin: Origin::Opened(base) };
        // From here on it is closed whatever happens. What the other process says of its length is not believed.
        let (mut start, mut within) = (0, 0);
        // SAFETY: places to write to.
        let code = unsafe { (inner.entries().cuMemGetAddressRange_v2)(&mut start, &mut within, base) };
        inner.check("cuMemGetAddressRange", code)?;
        let (offset, bytes, within) =
            (handle.offset, handle.bytes, (within as u64).saturating_sub(base - start));
        if offset > within || bytes > within - offset {
            return Err(Error::Range { what: "the memory of the handle", offset, bytes, within });
        }
        allocation.address = base + offset;
        allocation.bytes = bytes;
        Ok(DeviceMemory { inner: Arc::new(allocation) })
    }

    /// Opens an event of another process: to be waited for, asked about and recorded, as if it had been made here.
    pub fn open_event(&self, handle: &EventHandle) -> Result<Event, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let word = CUipcEventHandle { reserved: handle.0.map(|byte| byte as c_char) };
        let mut event = std::ptr::null_mut();
        // SAFETY: a place to write to; the driver checks the handle.
        let code = unsafe { (inner.entries().cuIpcOpenEventHandle)(&mut event, word) };
        self.opened("cuIpcOpenEventHandle", code)?;
        Ok(Event { device: self.clone(), event })
    }

    fn opened(&self, call: &'static str, code: u32) -> Result<(), Error> {
        self.inner.check(call, code).map_err(|error| match error {
            Error::Cuda { device, source, .. } if !source.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                Error::Gone { device, source }
            }
            error => error,
        })
    }
}

impl Event {
    /// A handle for other processes, if it was made to be shared.
    pub fn export(&self) -> Result<EventHandle, Error> {
        let inner = &self.device.inner;
        let _current = inner.enter()?;
        let mut handle = CUipcEventHandle { reserved: [0; 64] };
        // SAFETY: a place to write to.
        let code = unsafe { (inner.entries().cuIpcGetEventHandle)(&mut handle, self.event) };
        inner.check("cuIpcGetEventHandle", code)?;
        Ok(EventHandle(handle.reserved.map(|byte| byte as u8)))
    }
}
