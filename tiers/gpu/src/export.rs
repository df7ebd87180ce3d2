//! Memory of this process that somebody else in it made, for other processes.
//!
//! An engine's worker has its KV cache from PyTorch or from an allocator of its own. All that is known of it is an
//! address and a length; the driver says what lies there, and how others can have it:
//! ```text
//!  address --> which device --> a legacy handle (cuMemAlloc) ------------------------------> Ipc
//!                                   '-- refused: it is mapped from pieces (cuMemMap)
//!                                            '-- piece by piece: retain, export, release --> Pieces
//! ```
//! The memory stays its owner's: nothing is freed, and a piece is only held while it is exported. What an owner has not
//! made to be shared cannot be: PyTorch's `expandable_segments` can, its `cudaMallocAsync` backend cannot.

use std::ffi::{c_int, c_uint, c_void};

use cudarc::driver::sys::{
    CUcontext, CUdeviceptr, CUipcMemHandle, CUpointer_attribute as Attribute, CUresult,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::Error;
use crate::device::Device;
use crate::driver::{Driver, Uuid};
use crate::ipc::MemoryHandle;
use crate::shared::{Handle, PIECES_MAX, SharedPiece, says_no};

/// Memory as other processes of the machine can be told of it.
#[derive(Debug)]
pub struct Exported {
    /// Whose it is; ordinals differ between processes.
    pub device: Uuid,
    /// How to open it: [`Device::open_memory`], [`Device::open_pieces`].
    pub memory: ExportedMemory,
}

/// How memory is handed over.
#[derive(Debug)]
pub enum ExportedMemory {
    /// By one handle of its allocation.
    Ipc(MemoryHandle),
    /// By the pieces that it is mapped from.
    Pieces {
        /// In the order of their addresses. Descriptors are sent (SCM_RIGHTS); a fabric handle is sent as bytes.
        pieces: Vec<SharedPiece>,
        /// Where in the first it begins.
        offset: u64,
        /// How much it is.
        bytes: u64,
    },
}

/// A context of somebody else's, current in this thread as long as this lives.
struct Borrowed {
    driver: Driver,
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: a place to write to; what was pushed last is what `borrow` pushed.
        let _ = unsafe { (self.driver.calls.entries.cuCtxPopCurrent_v2)(&mut popped) };
    }
}

impl Driver {
    /// What other processes need to open `bytes` bytes of device memory at an address of this process, whoever made
    /// them. Memory in pieces takes a descriptor of this process for each, as long as the answer is kept: a cache of
    /// 64 GiB in pieces of 2 MiB wants 32,768, and who exports such may have to raise its limit of open files
    /// (`RLIMIT_NOFILE`) before. [`Error::NoDescriptors`] where none is left, [`Error::NoMemory`] where no device has memory, [`Error::Range`] where it ends before,
    /// [`Error::NotShared`] for memory that was not made to be shared, [`Error::NoCall`] where the driver cannot tell.
    pub fn export_address(&self, address: u64, bytes: u64) -> Result<Exported, Error> {
        if bytes == 0 || address.checked_add(bytes).is_none() {
            return Err(Error::Range {
                what: "the addresses of a device",
                offset: address,
                bytes,
                within: u64::MAX,
            });
        }
        let device = self.open(self.device_of(address)?)?;
        let memory = match self.export_whole(&device, address, bytes)? {
            Some(handle) => ExportedMemory::Ipc(handle),
            None => self.export_pieces(&device, address, bytes)?,
        };
        Ok(Exported { device: device.facts().uuid, memory })
    }

    /// What the driver says of an address.
    ///
    /// # Safety
    /// `T` is what the headers say that it writes for this question.
    unsafe fn ask<T: Copy>(&self, which: Attribute, address: u64, mut answer: T) -> Result<T, Error> {
        const CALL: &str = "cuPointerGetAttribute";
        let ask = self.calls.optional.cuPointerGetAttribute.ok_or(Error::NoCall { call: CALL })?;
        // SAFETY: a place for what it writes, by the caller's word.
        let code = unsafe { ask((&raw mut answer).cast::<c_void>(), which as c_uint, address) };
        self.calls.check(code).map(|()| answer).map_err(|source| Error::NoMemory { address, source })
    }

    fn ordinal_of(&self, address: u64) -> Result<u32, Error> {
        // SAFETY: an `int`.
        let ordinal: c_int =
            unsafe { self.ask(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address, -1) }?;
        u32::try_from(ordinal).map_err(|_| self.no_memory(address))
    }

    fn no_memory(&self, address: u64) -> Error {
        Error::NoMemory { address, source: self.calls.error(CUresult::CUDA_ERROR_INVALID_VALUE as u32) }
    }

    /// Which device has memory there. Some drivers want a context for the question: that of the memory's owner is
    /// current or is a primary one that is in use, and no other is made for it.
    fn device_of(&self, address: u64) -> Result<u32, Error> {
        let error = match self.ordinal_of(address) {
            Err(error @ Error::NoMemory { .. }) => error,
            answer => return answer,
        };
        let Error::NoMemory { source, .. } = &error else { return Err(error) };
        if !source.is(CUresult::CUDA_ERROR_INVALID_CONTEXT) {
            return Err(error);
        }
        for ordinal in 0..self.devices().map(|devices| devices.len() as u32).unwrap_or_default() {
            if !self.is_in_use(ordinal) {
                continue;
            }
            let device = self.open(ordinal)?;
            let _current = device.inner.enter()?;
            if let Ok(found) = self.ordinal_of(address) {
                return Ok(found);
            }
        }
        Err(error)
    }

    fn is_in_use(&self, ordinal: u32) -> bool {
        let (mut device, mut flags, mut active) = (0, 0, 0);
        let entries = &self.calls.entries;
        // SAFETY: places to write to.
        unsafe {
            (entries.cuDeviceGet)(&mut device, ordinal as c_int) == 0
                && (entries.cuDevicePrimaryCtxGetState)(device, &mut flags, &mut active) == 0
                && active != 0
        }
    }

    /// Makes the context current in which memory was made; `None` where it was made in none, or in the device's
    /// primary one.
    fn borrow(&self, address: u64) -> Result<Option<Borrowed>, Error> {
        let none: CUcontext = std::ptr::null_mut();
        // SAFETY: a `CUcontext`.
        let context = unsafe { self.ask(Attribute::CU_POINTER_ATTRIBUTE_CONTEXT, address, none) };
        let context = context.unwrap_or(none);
        if context.is_null() {
            return Ok(None);
        }
        // SAFETY: the driver named it; its owner keeps it as long as the memory that is exported.
        let code = unsafe { (self.calls.entries.cuCtxPushCurrent_v2)(context) };
        self.calls.check(code).map_err(|source| Error::NoMemory { address, source })?;
        Ok(Some(Borrowed { driver: *self }))
    }

    /// By a handle of the whole allocation; `None` when it has none.
    fn export_whole(&self, device: &Device, address: u64, bytes: u64) -> Result<Option<MemoryHandle>, Error> {
        let (inner, entries) = (&device.inner, &self.calls.entries);
        let _primary = inner.enter()?;
        let _borrowed = self.borrow(address)?;
        // A handle is of an allocation, so it is asked for by where that begins. What is mapped need be none.
        let (base, allocated) = match self.range_of(device, address) {
            Err(Error::NoMemory { .. }) => return Ok(None),
            found => found?,
        };
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: a place to write to; the driver checks the address.
        let code = unsafe { (entries.cuIpcGetMemHandle)(&mut handle, base) };
        match inner.check("cuIpcGetMemHandle", code) {
            Ok(()) => {}
            Err(Error::Cuda { source, .. }) if says_no(&source) => return Ok(None),
            Err(error) => return Err(error),
        }
        let within = allocated.saturating_sub(address - base);
        if bytes > within {
            return Err(Error::Range {
                what: "the allocation",
                offset: address - base,
                bytes,
                within: allocated,
            });
        }
        let handle = handle.reserved.map(|byte| byte as u8);
        Ok(Some(MemoryHandle { device: device.facts().uuid, handle, offset: address - base, bytes }))
    }

    /// Where the allocation at an address begins, and how long it is.
    fn range_of(&self, device: &Device, address: u64) -> Result<(u64, u64), Error> {
        let (mut base, mut bytes) = (0, 0);
        // SAFETY: places to write to.
        let code = unsafe { (self.calls.entries.cuMemGetAddressRange_v2)(&mut base, &mut bytes, address) };
        device.inner.check("cuMemGetAddressRange", code).map_err(|error| match error {
            Error::Cuda { source, .. } => Error::NoMemory { address, source },
            error => error,
        })?;
        if address < base {
            return Err(self.no_memory(address));
        }
        Ok((base, bytes as u64))
    }

    /// Where the piece that is mapped at an address begins, and how long it is. Drivers that do not know the question
    /// (before CUDA 11.7) say the piece as the allocation.
    fn piece_of(&self, device: &Device, address: u64) -> Result<(u64, u64), Error> {
        // SAFETY: a `CUdeviceptr` and a `size_t`.
        let found = unsafe {
            self.ask::<CUdeviceptr>(Attribute::CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address, 0).and_then(
                |base| {
                    let bytes: usize = self.ask(Attribute::CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address, 0)?;
                    Ok((base, bytes as u64))
                },
            )
        };
        let (base, bytes) = found.or_else(|_| self.range_of(device, address))?;
        if address < base || address - base >= bytes || base.checked_add(bytes).is_none() {
            return Err(self.no_memory(address));
        }
        Ok((base, bytes))
    }

    fn export_pieces(&self, device: &Device, address: u64, bytes: u64) -> Result<ExportedMemory, Error> {
        let _primary = device.inner.enter()?;
        let (mut pieces, mut at, mut offset) = (Vec::new(), address, 0);
        while at < address + bytes {
            if pieces.len() == PIECES_MAX {
                return Err(Error::ManyPieces { pieces: PIECES_MAX + 1, most: PIECES_MAX });
            }
            let (base, piece_bytes) = match self.piece_of(device, at) {
                // Something is there, and it ends before what was asked for.
                Err(Error::NoMemory { .. }) if at > address => {
                    let within = at - address;
                    return Err(Error::Range { what: "the mapped memory", offset: 0, bytes, within });
                }
                found => found?,
            };
            let piece = exported(&self.retain(device, at)?, piece_bytes).map_err(|error| match error {
                // A driver has no error of its own for it.
                Error::Cuda { .. } | Error::NotShared { .. } if no_descriptor_is_left() => {
                    Error::NoDescriptors { pieces: pieces.len() }
                }
                error => error,
            })?;
            pieces.push(piece);
            if at == address {
                offset = address - base;
            }
            at = base + piece_bytes;
        }
        Ok(ExportedMemory::Pieces { pieces, offset, bytes })
    }

    /// A handle of the piece that is mapped at an address, given back when it is dropped.
    fn retain(&self, device: &Device, address: u64) -> Result<Handle, Error> {
        const CALL: &str = "cuMemRetainAllocationHandle";
        let retain = self.calls.optional.cuMemRetainAllocationHandle.ok_or(Error::NoCall { call: CALL })?;
        let mut handle = 0;
        let place = std::ptr::without_provenance_mut::<c_void>(address as usize);
        // SAFETY: a place to write to, and an address that the driver looks up.
        let code = unsafe { retain(&mut handle, place) };
        match device.inner.check(CALL, code) {
            Ok(()) => Ok(Handle { device: device.clone(), handle }),
            Err(Error::Cuda { device, source, .. }) if says_no(&source) => Err(Error::NotShared { device }),
            Err(error) => Err(error),
        }
    }
}

fn no_descriptor_is_left() -> bool {
    let opened = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    matches!(opened, Err(Errno::MFILE | Errno::NFILE))
}

/// A piece for other processes: by descriptor where it can be, which no other process can make up.
fn exported(handle: &Handle, bytes: u64) -> Result<SharedPiece, Error> {
    match handle.descriptor() {
        Ok(fd) => Ok(SharedPiece::Descriptor { fd, bytes }),
        Err(error @ Error::NotShared { .. }) => match handle.fabric() {
            Ok(handle) => Ok(SharedPiece::Fabric { handle, bytes }),
            Err(Error::NoFabric { .. }) => Err(error),
            Err(other) => Err(other),
        },
        Err(error) => Err(error),
    }
}
