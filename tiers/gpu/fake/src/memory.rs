//! Device memory: a memory file per allocation, which another process can open while this one holds it.
//!
//! A memory file has no name anywhere, so a process that crashes leaves nothing behind; the memory goes when the
//! last of those that mapped it ends. The handle of an allocation says where the file is found meanwhile:
//! ```text
//! 0 "kvfakecu" | 8 process | 12 descriptor | 16 generation | 24 bytes | 32 kind | 36 zero
//! ```
//! The descriptor may have become another file since. So the file is called by its generation, a number that does not
//! come twice, and a handle whose file is called otherwise is stale.

use std::ffi::c_void;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::sys::CUresult;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::Code;

const MAGIC: [u8; 8] = *b"kvfakecu";

/// What a handle is of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Memory = 1,
    Event = 2,
    /// Of memory for other machines: here as there.
    Fabric = 3,
}

/// A memory file, mapped; or addresses where others are mapped, which has none.
pub(crate) struct Mapping {
    address: *mut u8,
    pub(crate) bytes: usize,
    file: Option<OwnedFd>,
    /// The last four bits are the device's number.
    pub(crate) generation: u64,
    /// The kinds of handles that it may be exported as (`CUmemAllocationHandleType`).
    pub(crate) kinds: u32,
}

// SAFETY: an address of shared memory, which any thread may use; who orders the accesses is the caller's business, as
// on a device.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

fn file_name(generation: u64) -> String {
    format!("fake-cuda-{generation:016x}")
}

impl Mapping {
    pub(crate) fn new(bytes: usize) -> Result<Self, Code> {
        Self::on(0, bytes, 0)
    }

    pub(crate) fn on(device: usize, bytes: usize, kinds: u32) -> Result<Self, Code> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // The hasher is keyed with chance by every process.
        let generation =
            RandomState::new().hash_one((std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let generation = generation & !0xf | device as u64 & 0xf;
        let no_memory = |_| Code::of(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        let file = rustix::fs::memfd_create(file_name(generation), MemfdFlags::CLOEXEC).map_err(no_memory)?;
        rustix::fs::ftruncate(&file, bytes as u64).map_err(no_memory)?;
        Self::map(file, bytes, generation, kinds)
    }

    fn map(file: OwnedFd, bytes: usize, generation: u64, kinds: u32) -> Result<Self, Code> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let address = address.map_err(|_| Code::of(CUresult::CUDA_ERROR_MAP_FAILED))?.cast();
        Ok(Self { address, bytes, file: Some(file), generation, kinds })
    }

    /// Addresses with nothing there.
    pub(crate) fn addresses(bytes: usize) -> Result<Self, Code> {
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        let address = address.map_err(|_| Code::of(CUresult::CUDA_ERROR_OUT_OF_MEMORY))?.cast();
        Ok(Self { address, bytes, file: None, generation: 0, kinds: 0 })
    }

    /// Maps a piece there, so that what is next to each other is so for the processor too.
    pub(crate) fn lay(&self, offset: usize, piece: &Self) -> Result<(), Code> {
        let failed = || Code::of(CUresult::CUDA_ERROR_MAP_FAILED);
        assert!(offset <= self.bytes && piece.bytes <= self.bytes - offset, "the caller looked");
        let file = piece.file.as_ref().ok_or_else(failed)?;
        let (flags, access) = (MapFlags::SHARED | MapFlags::FIXED, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: within addresses of ours, where nothing is.
        let laid = unsafe { rustix::mm::mmap(self.at(offset).cast(), piece.bytes, access, flags, file, 0) };
        laid.map(|_| ()).map_err(|_| failed())
    }

    /// Makes the addresses empty again.
    pub(crate) fn clear(&self, offset: usize, bytes: usize) -> Result<(), Code> {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset, "the caller looked");
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        // SAFETY: within addresses of ours; no copy uses them, as the caller made sure.
        let cleared =
            unsafe { rustix::mm::mmap_anonymous(self.at(offset).cast(), bytes, ProtFlags::empty(), flags) };
        cleared.map(|_| ()).map_err(|_| Code::of(CUresult::CUDA_ERROR_MAP_FAILED))
    }

    /// Whose memory it is, in every process.
    pub(crate) fn device(&self) -> usize {
        self.generation as usize & 0xf
    }

    fn descriptor_number(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    pub(crate) fn handle(&self, kind: Kind) -> [u8; 64] {
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&MAGIC);
        handle[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        handle[12..16].copy_from_slice(&self.descriptor_number().to_le_bytes());
        handle[16..24].copy_from_slice(&self.generation.to_le_bytes());
        handle[24..32].copy_from_slice(&(self.bytes as u64).to_le_bytes());
        handle[32..36].copy_from_slice(&(kind as u32).to_le_bytes());
        handle
    }

    /// What another process made a handle of, if it still holds it.
    pub(crate) fn open(handle: &[u8; 64], kind: Kind) -> Result<Self, Code> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| handle[at + byte]));
        let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| handle[at + byte]));
        let (process, descriptor, generation, bytes) = (word(8), word(12), long(16), long(24));
        if handle[..8] != MAGIC || word(32) != kind as u32 {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_HANDLE));
        }
        // As the real one says it.
        if process == std::process::id() && kind != Kind::Fabric {
            return Err(Code::of(CUresult::CUDA_ERROR_INVALID_CONTEXT));
        }
        let gone = |_| Code::of(CUresult::CUDA_ERROR_MAP_FAILED);
        let path = format!("/proc/{process}/fd/{descriptor}");
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(gone)?;
        let link =
            rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new()).map_err(gone)?;
        let called = link.to_string_lossy().contains(&file_name(generation));
        let size = rustix::fs::fstat(&file).map_err(gone)?.st_size;
        if !called || size as u64 != bytes {
            return Err(Code::of(CUresult::CUDA_ERROR_MAP_FAILED));
        }
        Self::map(file, bytes as usize, generation, 0)
    }

    /// A descriptor of it for others.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd, Code> {
        let file = self.file.as_ref().ok_or(Code::of(CUresult::CUDA_ERROR_INVALID_VALUE))?;
        file.try_clone().map_err(|_| Code::of(CUresult::CUDA_ERROR_OPERATING_SYSTEM))
    }

    /// What a descriptor is of, if it is one of ours, or of another process' of our kind.
    pub(crate) fn of_descriptor(descriptor: BorrowedFd<'_>) -> Result<Self, Code> {
        let invalid = || Code::of(CUresult::CUDA_ERROR_INVALID_VALUE);
        let file = descriptor.try_clone_to_owned().map_err(|_| invalid())?;
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new());
        let link = link.map_err(|_| invalid())?.to_string_lossy().into_owned();
        let name = link.split_once("fake-cuda-").ok_or_else(invalid)?.1;
        let generation =
            name.get(..16).and_then(|name| u64::from_str_radix(name, 16).ok()).ok_or_else(invalid)?;
        let bytes = rustix::fs::fstat(&file).map_err(|_| invalid())?.st_size;
        Self::map(file, bytes as usize, generation, 1)
    }

    pub(crate) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.bytes);
        self.address.wrapping_add(offset)
    }

    /// The words of an event.
    pub(crate) fn words(&self) -> &[AtomicU64; 2] {
        debug_assert!(self.bytes >= 16);
        // SAFETY: the mapping is longer, page-aligned and lives as long as `self`; everybody who has it uses these
        // words as atomics alone.
        unsafe { &*self.address.cast::<[AtomicU64; 2]>() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what `map` got; copies hold the mapping while they use it.
        let _ = unsafe { rustix::mm::munmap(self.address.cast::<c_void>(), self.bytes) };
    }
}
