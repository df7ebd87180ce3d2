//! Memory that processes share by descriptor or by fabric handle: made with `cuMemCreate`, mapped at addresses that
//! were reserved for it.
//!
//! ```text
//!  owner   create -> handle -> export -> descriptor ---- SCM_RIGHTS, pidfd_getfd ---> import -> handle   another
//!                    map at reserved addresses, allow access                 map at reserved addresses, allow access
//!
//!  in pieces   | piece 0 | piece 1 |     piece 2     |      addresses in a row, reserved as one
//!                   '-- offset          '-- offset + bytes  what somebody made of it: a tensor
//! ```
//! A descriptor is a right: whoever has it has the memory, until it has given it back, whatever the owner does
//! meanwhile, ending included. Nobody can make one up. A fabric handle is the same as 64 bytes, which lead to the
//! memory from other machines of one NVLink domain too; there the machines' own service (IMEX) says who may.
//!
//! PyTorch's `expandable_segments` and vLLM's sleep mode make memory of many such pieces, each with a handle of its
//! own. What somebody says of their lengths is compared with the device's page and memory and, when they are mapped,
//! by the driver with what lies behind them.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use cudarc::driver::sys::{
    CUdeviceptr, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemAllocationProp_st__bindgen_ty_1,
    CUmemAllocationType, CUmemLocation, CUmemLocationType, CUresult,
};

use crate::Error;
use crate::device::Device;
use crate::memory::{Allocation, DeviceMemory, Origin};
use crate::sys::{CudaError, Properties};

/// Pieces that are put together to one memory: 128 GiB in those of 2 MiB that PyTorch makes at least.
pub const PIECES_MAX: usize = 65_536;

pub(crate) const DESCRIPTOR: CUmemAllocationHandleType =
    CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
pub(crate) const FABRIC: CUmemAllocationHandleType = CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_FABRIC;

/// A piece of another process' memory, and how long it is said to be: whole pages of the device.
#[derive(Debug)]
pub enum SharedPiece {
    /// By a descriptor of this process.
    Descriptor {
        /// Closed when the piece is mapped, or was refused.
        fd: OwnedFd,
        /// Length.
        bytes: u64,
    },
    /// By `CUmemFabricHandle`.
    Fabric {
        /// The handle.
        handle: [u8; 64],
        /// Length.
        bytes: u64,
    },
}

impl SharedPiece {
    /// How long it is said to be.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Descriptor { bytes, .. } | Self::Fabric { bytes, .. } => *bytes,
        }
    }
}

/// How long the pieces are together, if each can be what it is said to be.
fn total(
    device: u32,
    lengths: impl Iterator<Item = u64>,
    page_bytes: u64,
    memory_bytes: u64,
) -> Result<u64, Error> {
    let mut total = 0_u64;
    for (piece, bytes) in lengths.enumerate() {
        let wrong = |what| Error::Piece { device, piece, what };
        if bytes == 0 {
            return Err(wrong("it has no bytes; name pieces with memory alone"));
        }
        if !bytes.is_multiple_of(page_bytes) {
            return Err(wrong("its length is not a multiple of the device's page; name whole pieces"));
        }
        total = total
            .checked_add(bytes)
            .filter(|total| *total <= memory_bytes)
            .ok_or_else(|| wrong("with it they are longer than the device's memory"))?;
    }
    Ok(total)
}

/// A handle that is given back when this is dropped.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) device: Device,
    pub(crate) handle: u64,
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

/// Pieces mapped at addresses in a row. Dropped, they are unmapped, and only then do its fields end.
#[derive(Debug)]
pub(crate) struct Mapped {
    addresses: Addresses,
    /// Where each that is mapped begins and how long it is.
    pieces: Vec<(CUdeviceptr, usize)>,
    /// Of memory in one piece; of others nobody needs them once they are mapped.
    handle: Option<Handle>,
}

impl Mapped {
    /// Addresses with nothing there yet.
    fn reserve(device: &Device, bytes: u64) -> Result<Self, Error> {
        let inner = &device.inner;
        let _current = inner.enter()?;
        let (mut start, bytes) = (0, bytes as usize);
        // SAFETY: a place to write to.
        let code = unsafe { (inner.entries().cuMemAddressReserve)(&mut start, bytes, 0, 0, 0) };
        inner.check("cuMemAddressReserve", code)?;
        let addresses = Addresses { device: device.clone(), start, bytes };
        Ok(Self { addresses, pieces: Vec::new(), handle: None })
    }

    /// Maps the next piece, behind the ones before.
    fn map(&mut self, handle: &Handle, bytes: u64) -> Result<(), Error> {
        let inner = &self.addresses.device.inner;
        let _current = inner.enter()?;
        let start = self.pieces.last().map_or(self.addresses.start, |(start, bytes)| start + *bytes as u64);
        let bytes = bytes as usize;
        // SAFETY: our own addresses, which have no piece here yet; the driver compares the length with that of the
        // handle.
        let code = unsafe { (inner.entries().cuMemMap)(start, bytes, 0, handle.handle, 0) };
        inner.check("cuMemMap", code)?;
        self.pieces.push((start, bytes));
        Ok(())
    }

    /// Lets a device read and write all of it.
    fn allow(&self, user: &Device) -> Result<(), Error> {
        let Addresses { device, start, bytes } = &self.addresses;
        let inner = &device.inner;
        let _current = inner.enter()?;
        let flags = CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        let access = CUmemAccessDesc { location: user.location(), flags };
        // SAFETY: one description, of what was just mapped.
        let code = unsafe { (inner.entries().cuMemSetAccess)(*start, *bytes, &access, 1) };
        inner.check("cuMemSetAccess", code)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let inner = &self.addresses.device.inner;
        let Ok(_current) = inner.enter() else { return };
        for (start, bytes) in &self.pieces {
            // SAFETY: mapped once, as a whole; copies hold the memory while they use it.
            let code = unsafe { (inner.entries().cuMemUnmap)(*start, *bytes) };
            let _ = inner.check("cuMemUnmap", code);
        }
    }
}

impl Device {
    fn location(&self) -> CUmemLocation {
        CUmemLocation {
            type_: CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
            id: self.inner.ordinal() as c_int,
        }
    }

    fn properties(&self, kind: CUmemAllocationHandleType) -> CUmemAllocationProp {
        CUmemAllocationProp {
            type_: CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            requestedHandleTypes: kind,
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

    fn page_bytes(&self, properties: &CUmemAllocationProp) -> Result<u64, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let mut page_bytes = 0;
        let least = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: a place to write to, and a description.
        let code =
            unsafe { (inner.entries().cuMemGetAllocationGranularity)(&mut page_bytes, properties, least) };
        inner.check("cuMemGetAllocationGranularity", code)?;
        Ok(page_bytes.max(1) as u64)
    }

    /// Memory of its own that can be shared by descriptor: as much as was asked for, rounded up to its pages.
    pub fn allocate_shared(&self, bytes: u64) -> Result<DeviceMemory, Error> {
        self.create(bytes, DESCRIPTOR)
    }

    /// Memory of its own that can be shared by fabric handle, rounded up as by [`Device::allocate_shared`].
    /// [`Error::NoFabric`] where the device, the driver or the machine has no such thing.
    pub fn allocate_fabric(&self, bytes: u64) -> Result<DeviceMemory, Error> {
        let none = Error::NoFabric { device: self.inner.ordinal() };
        if !self.facts().has_fabric {
            return Err(none);
        }
        self.create(bytes, FABRIC).map_err(|error| match error {
            Error::Cuda { call: "cuMemCreate", source, .. } if says_no(&source) => none,
            error => error,
        })
    }

    fn create(&self, bytes: u64, kind: CUmemAllocationHandleType) -> Result<DeviceMemory, Error> {
        let inner = &self.inner;
        let properties = self.properties(kind);
        let page_bytes = self.page_bytes(&properties)?;
        let _current = inner.enter()?;
        let full = Error::Full { device: inner.ordinal(), bytes };
        let Some(rounded) = bytes.max(1).checked_next_multiple_of(page_bytes) else {
            return Err(full);
        };
        let mut handle = 0;
        // SAFETY: a place to write to, and a description.
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
        let handle = self.import_descriptor(descriptor)?;
        self.mapped(handle, bytes).map_err(gone)
    }

    /// Memory that another process made of one or many pieces, `bytes` of it from `offset` on: they are mapped behind
    /// each other, in this order. Nothing that is said of them is believed: [`Error::Piece`], [`Error::ManyPieces`] and
    /// [`Error::Range`] for what cannot be, [`Error::Gone`] for a handle that leads nowhere or to less than was said,
    /// [`Error::OtherDevice`] for memory of another device. After an error nothing is mapped.
    pub fn open_pieces(
        &self,
        pieces: Vec<SharedPiece>,
        offset: u64,
        bytes: u64,
    ) -> Result<DeviceMemory, Error> {
        let device = self.inner.ordinal();
        if pieces.len() > PIECES_MAX {
            return Err(Error::ManyPieces { pieces: pieces.len(), most: PIECES_MAX });
        }
        let page_bytes = self.page_bytes(&self.properties(DESCRIPTOR))?;
        let lengths = pieces.iter().map(SharedPiece::bytes);
        let within = total(device, lengths, page_bytes, self.facts().memory_bytes)?;
        if bytes == 0 || offset > within || bytes > within - offset {
            return Err(Error::Range { what: "the pieces of the memory", offset, bytes, within });
        }
        let is_one = pieces.len() == 1;
        let mut mapped = Mapped::reserve(self, within)?;
        for (at, piece) in pieces.into_iter().enumerate() {
            let handle = match &piece {
                SharedPiece::Descriptor { fd, .. } => self.import_descriptor(fd.as_fd())?,
                SharedPiece::Fabric { handle, .. } => self.import_fabric(handle)?,
            };
            self.check_place(&handle, at)?;
            mapped.map(&handle, piece.bytes()).map_err(gone)?;
            mapped.handle = Some(handle).filter(|_| is_one);
        }
        mapped.allow(self).map_err(gone)?;
        let address = mapped.addresses.start + offset;
        let allocation = Allocation { device: self.clone(), address, bytes, origin: Origin::Mapped(mapped) };
        Ok(DeviceMemory { inner: Arc::new(allocation) })
    }

    fn import_descriptor(&self, descriptor: BorrowedFd<'_>) -> Result<Handle, Error> {
        let word = std::ptr::without_provenance_mut::<c_void>(descriptor.as_raw_fd() as usize);
        // SAFETY: for this kind of handle the address is a descriptor, which is open.
        unsafe { self.import_word(word, DESCRIPTOR) }
    }

    fn import_fabric(&self, handle: &[u8; 64]) -> Result<Handle, Error> {
        if !self.facts().has_fabric {
            return Err(Error::NoFabric { device: self.inner.ordinal() });
        }
        let mut handle = *handle;
        // SAFETY: for this kind of handle it is the address of one, which the driver checks.
        unsafe { self.import_word((&raw mut handle).cast(), FABRIC) }
    }

    /// # Safety
    /// `word` is what the driver wants for this kind of handle.
    unsafe fn import_word(
        &self,
        word: *mut c_void,
        kind: CUmemAllocationHandleType,
    ) -> Result<Handle, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let mut handle = 0;
        // SAFETY: a place to write to; the rest is of the caller.
        let code = unsafe { (inner.entries().cuMemImportFromShareableHandle)(&mut handle, word, kind) };
        inner.check("cuMemImportFromShareableHandle", code).map_err(gone)?;
        Ok(Handle { device: self.clone(), handle })
    }

    /// Refuses a piece that is of another device, or of none: it could be mapped, and every copy would go over the bus.
    /// A driver that cannot say is believed.
    fn check_place(&self, handle: &Handle, piece: usize) -> Result<(), Error> {
        let inner = &self.inner;
        let Some(ask) = inner.driver().calls.optional.cuMemGetAllocationPropertiesFromHandle else {
            return Ok(());
        };
        let _current = inner.enter()?;
        let mut found = Properties::default();
        // SAFETY: a place to write to, and a handle of ours.
        let code = unsafe { ask(&mut found, handle.handle) };
        inner.check("cuMemGetAllocationPropertiesFromHandle", code).map_err(gone)?;
        let device = inner.ordinal();
        if found.location != CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE as u32 {
            return Err(Error::Piece { device, piece, what: "it is not memory of a device; share that" });
        }
        if found.location_id == device as c_int {
            return Ok(());
        }
        let failed = |source| Error::Cuda { device, call: "cuDeviceGet", source };
        let (_, facts) = inner.driver().facts(found.location_id as u32).map_err(failed)?;
        Err(Error::OtherDevice { device, wanted: facts.uuid })
    }

    fn mapped(&self, handle: Handle, bytes: u64) -> Result<DeviceMemory, Error> {
        let mut mapped = Mapped::reserve(self, bytes)?;
        mapped.map(&handle, bytes)?;
        mapped.allow(self)?;
        mapped.handle = Some(handle);
        let address = mapped.addresses.start;
        let allocation = Allocation { device: self.clone(), address, bytes, origin: Origin::Mapped(mapped) };
        Ok(DeviceMemory { inner: Arc::new(allocation) })
    }
}

/// What another process gave does not work.
fn gone(error: Error) -> Error {
    match error {
        Error::Cuda { device, source, .. } if !source.is(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
            Error::Gone { device, source }
        }
        error => error,
    }
}

/// Whether the driver says that something is not to be had in this way, rather than that it failed.
pub(crate) fn says_no(source: &CudaError) -> bool {
    [
        CUresult::CUDA_ERROR_INVALID_VALUE,
        CUresult::CUDA_ERROR_NOT_SUPPORTED,
        CUresult::CUDA_ERROR_NOT_PERMITTED,
        CUresult::CUDA_ERROR_INVALID_DEVICE,
    ]
    .into_iter()
    .any(|no| source.is(no))
}

impl Handle {
    /// A descriptor of it for other processes, when it was made for that.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd, Error> {
        let mut descriptor: c_int = -1;
        // SAFETY: for this kind of handle it is a place for a descriptor.
        unsafe { self.exported((&raw mut descriptor).cast(), DESCRIPTOR) }?;
        // SAFETY: the driver opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    /// A fabric handle of it, when it was made for that.
    pub(crate) fn fabric(&self) -> Result<[u8; 64], Error> {
        if !self.device.facts().has_fabric {
            return Err(Error::NoFabric { device: self.device.inner.ordinal() });
        }
        let mut handle = [0_u8; 64];
        // SAFETY: for this kind of handle it is a place for one: 64 bytes.
        unsafe { self.exported((&raw mut handle).cast(), FABRIC) }?;
        Ok(handle)
    }

    /// # Safety
    /// `place` is one for what this kind of handle is exported as.
    unsafe fn exported(&self, place: *mut c_void, kind: CUmemAllocationHandleType) -> Result<(), Error> {
        let inner = &self.device.inner;
        let _current = inner.enter()?;
        // SAFETY: of the caller; the handle is ours.
        let code = unsafe { (inner.entries().cuMemExportToShareableHandle)(place, self.handle, kind, 0) };
        inner.check("cuMemExportToShareableHandle", code).map_err(|error| match error {
            Error::Cuda { device, source, .. } if says_no(&source) => Error::NotShared { device },
            error => error,
        })
    }
}

impl DeviceMemory {
    /// A descriptor for other processes: of all that was made or imported as one piece. Memory that was not made to be
    /// shared, or is of several pieces, has none.
    pub fn export_descriptor(&self) -> Result<OwnedFd, Error> {
        self.handle()?.descriptor()
    }

    /// A fabric handle for other processes, here and on machines of the same NVLink domain; as
    /// [`DeviceMemory::export_descriptor`].
    pub fn export_fabric(&self) -> Result<[u8; 64], Error> {
        self.handle()?.fabric()
    }

    /// Lets another device read and write it by itself. For what was made or imported in pieces that is a matter of
    /// each such memory, and copies on that device's streams want it; for other memory it is [`Device::reach`].
    pub fn open_to(&self, other: &Device) -> Result<(), Error> {
        match &self.inner.origin {
            Origin::Mapped(mapped) => mapped.allow(other),
            _ => other.reach(&self.inner.device),
        }
    }

    fn handle(&self) -> Result<&Handle, Error> {
        match &self.inner.origin {
            Origin::Mapped(Mapped { handle: Some(handle), .. }) => Ok(handle),
            _ => Err(Error::NotShared { device: self.inner.device.inner.ordinal() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pieces_are_said_to_be_must_be_possible() {
        const PAGE: u64 = 2 << 20;
        let of = |lengths: &[u64]| total(0, lengths.iter().copied(), PAGE, 100 * PAGE);
        let wrong = |lengths: &[u64]| match of(lengths) {
            Err(Error::Piece { piece, .. }) => piece,
            other => panic!("{lengths:?}: {other:?}"),
        };
        assert_eq!(of(&[]), Ok(0));
        assert_eq!(of(&[PAGE, 10 * PAGE]), Ok(11 * PAGE));
        assert_eq!(wrong(&[0]), 0);
        assert_eq!(wrong(&[PAGE, 0]), 1);
        assert_eq!(wrong(&[PAGE, PAGE, PAGE + 1]), 2);
        assert_eq!(wrong(&[PAGE - 1]), 0);
        assert_eq!(wrong(&[u64::MAX / PAGE * PAGE]), 0, "longer than the device's memory");
        assert_eq!(wrong(&[PAGE, u64::MAX / PAGE * PAGE]), 1, "beyond what can be counted");
        assert_eq!(of(&[99 * PAGE, PAGE]), Ok(100 * PAGE));
        assert_eq!(wrong(&[99 * PAGE, PAGE, PAGE]), 2);
    }
}
