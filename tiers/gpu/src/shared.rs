//! Memory that processes share by descriptor: made with `cuMemCreate`, mapped at addresses that were reserved for it.
//!
//! ```text
//!  owner   create -> handle -> export -> descriptor ---- SCM_RIGHTS, pidfd_getfd ---> import -> handle   another
//!                    map at reserved addresses, allow access                 map at reserved addresses, allow access
//! ```
//! A descriptor is a right: whoever has it has the memory, until it has given it back, whatever the owner does
//! meanwhile, ending included. Nobody can make one up. PyTorch's `expandable_segments` are made of such pieces, each
//! with a descriptor of its own.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1,
    CUmemAllocationType, CUmemLocation, CUmemLocationType, CUresult,
};

use crate::Error;
use crate::device::Device;
use crate::memory::{Allocation, DeviceMemory, Origin};

const DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// A handle that is given back when this is dropped.
#[derive(Debug)]
struct Handle {
    device: Device,
    handle: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let inner = &self.device.inner;
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: the driver gave it once; what is mapped stays until it is unmapped.
        let code = unsafe { (inner.entries().cuMemRelease)(self.handle) };
        let _ = inner.check("cuMemRelease", code);
    }
}

/// Addresses that are given back when this is dropped.
#[derive(Debug)]
struct Addresses {
    device: Device,
    start: CUdeviceptr,
    bytes: usize,
}

impl Drop for Addresses {
    fn drop(&mut self) {
        let inner = &self.device.inner;
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: reserved once, as long as it is said here; nothing is mapped there any more.
        let code = unsafe { (inner.entries().cuMemAddressFree)(self.start, self.bytes) };
        let _ = inner.check("cuMemAddressFree", code);
    }
}

/// A handle mapped at addresses. Dropped, it is unmapped, and only then do its fields end.
#[derive(Debug)]
pub(crate) struct Mapped {
    addresses: Addresses,
    handle: Handle,
}

impl Mapped {
    fn new(handle: Handle, bytes: usize) -> Result<Self, Error> {
        let device = handle.device.clone();
        let inner = &device.inner;
        let _current = inner.enter()?;
        let mut start = 0;
        // SAFETY: a place to write to.
        let code = unsafe { (inner.entries().cuMemAddressReserve)(&mut start, bytes, 0, 0, 0) };
        inner.check("cuMemAddressReserve", code)?;
        let addresses = Addresses { device: device.clone(), start, bytes };
        // SAFETY: our own addresses; the driver compares the length with that of the handle.
        let code = unsafe { (inner.entries().cuMemMap)(start, bytes, 0, handle.handle, 0) };
        inner.check("cuMemMap", code)?;
        let mapped = Self { addresses, handle };
        let flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = CUmemAccessDesc { location: device.location(), flags };
        // SAFETY: one description, of what was just mapped.
        let code = unsafe { (inner.entries().cuMemSetAccess)(start, bytes, &access, 1) };
        inner.check("cuMemSetAccess", code)?;
        Ok(mapped)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let inner = &self.handle.device.inner;
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: mapped once, as a whole; copies hold the memory while they use it.
        let code = unsafe { (inner.entries().cuMemUnmap)(self.addresses.start, self.addresses.bytes) };
        let _ = inner.check("cuMemUnmap", code);
    }
}

impl Device {
    fn location(&self) -> CUmemLocation {
        CUmemLocation {
            type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.inner.ordinal() as c_int,
        }
    }

    fn properties(&self) -> CUmemAllocationProp {
        CUmemAllocationProp {
            type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: DESCRIPTOR,
            location: self.location(),
            win32HandleMetaData: std::ptr::null_mut(),
            allocFlags: CUmemAllocationProp_st__bindgen_ty_1 {
                compressionType: 0,
                gpuDirectRDMACapable: 0,
                usage: 0,
                reserved: [0; 4],
            },
        }
    }

    /// Memory of its own that can be shared by descriptor: as much as was asked for, rounded up to its pages.
    pub fn allocate_shared(&self, bytes: u64) -> Result<DeviceMemory, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let (properties, mut page_bytes) = (self.properties(), 0);
        let least = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: a place to write to, and a description.
        let code =
            unsafe { (inner.entries().cuMemGetAllocationGranularity)(&mut page_bytes, &properties, least) };
        inner.check("cuMemGetAllocationGranularity", code)?;
        let full = Error::Full { device: inner.ordinal(), bytes };
        let Some(rounded) = bytes.max(1).checked_next_multiple_of(page_bytes.max(1) as u64) else {
            return Err(full);
        };
        let mut handle = 0;
        // SAFETY: as above.
        let code = unsafe { (inner.entries().cuMemCreate)(&mut handle, rounded as usize, &properties, 0) };
        if code == CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32 {
            return Err(full);
        }
        inner.check("cuMemCreate", code)?;
        self.mapped(Handle { device: self.clone(), handle }, rounded)
    }

    /// Memory that another process exported. `bytes` is how much that process says it is; the driver refuses to map
    /// more than the memory has.
    pub fn import(&self, descriptor: BorrowedFd<'_>, bytes: u64) -> Result<DeviceMemory, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let mut handle = 0;
        let word = std::ptr::without_provenance_mut::<c_void>(descriptor.as_raw_fd() as usize);
        // SAFETY: a place to write to; for this kind of handle the address is a descriptor, which is open.
        let code = unsafe { (inner.entries().cuMemImportFromShareableHandle)(&mut handle, word, DESCRIPTOR) };
        inner.check("cuMemImportFromShareableHandle", code).map_err(gone)?;
        self.mapped(Handle { device: self.clone(), handle }, bytes).map_err(gone)
    }

    fn mapped(&self, handle: Handle, bytes: u64) -> Result<DeviceMemory, Error> {
        let mapped = Mapped::new(handle, bytes as usize)?;
        let address = mapped.addresses.start;
        let allocation = Allocation { device: self.clone(), address, bytes, origin: Origin::Mapped(mapped) };
        Ok(DeviceMemory { inner: Arc::new(allocation) })
    }
}

/// What another process gave does not work.
fn gone(error: Error) -> Error {
    match error {
        Error::Cuda { device, source, .. } => Error::Gone { device, source },
        error => error,
    }
}

impl DeviceMemory {
    /// A descriptor for other processes. Memory that was not made to be shared has none.
    pub fn export_descriptor(&self) -> Result<OwnedFd, Error> {
        let device = &self.inner.device;
        let Origin::Mapped(Mapped { handle, .. }) = &self.inner.origin else {
            return Err(Error::NotShared { device: device.inner.ordinal() });
        };
        let entries = device.inner.entries();
        let _current = device.inner.enter()?;
        let mut descriptor: c_int = -1;
        let place = (&raw mut descriptor).cast();
        // SAFETY: for this kind of handle it is a place for a descriptor.
        let code = unsafe { (entries.cuMemExportToShareableHandle)(place, handle.handle, DESCRIPTOR, 0) };
        device.inner.check("cuMemExportToShareableHandle", code)?;
        // SAFETY: the driver opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
