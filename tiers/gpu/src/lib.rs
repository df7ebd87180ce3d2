//! GPUs: the CUDA driver found at run time, device memory, batched copies, memory of other processes, spare memory as a
//! tier.
//!
//! ```text
//!  driver   Driver::load: is there one, which devices; or why not      device   a device in use, and its end
//!  memory   device memory; host memory that a device copies to and from
//!  stream   streams and events                                         copy     pages, many at a time
//!  copier   all copies of a device: jobs, bounds, streams
//!  kernel   code of ours on the device, for short pieces              sums     checksums by it
//!  ipc      memory and events of another process, by handle           shared   memory by descriptor, in pieces
//!  export   memory that somebody else in this process made, for other processes
//!  pool     spare memory of a device as a store of blocks              cache    which blocks it keeps
//!  sys      libcuda itself, found at run time
//! ```
//! What must hold: memory belongs to a copy from when it is queued until the device has said that it is done with it.
//! A device that is lost never says so: then the memory is kept until the device's context is gone.

#![expect(unsafe_code, reason = "a device reads and writes memory by address, and its library is C")]

pub mod cache;
pub mod copier;
pub mod copy;
pub mod device;
pub mod driver;
pub mod export;
pub mod ipc;
pub mod kernel;
pub mod memory;
pub mod pool;
pub mod shared;
pub mod stream;
pub mod sums;

mod in_use;
mod pieces;
mod sys;

pub use cache::{Cache, CacheConfig};
pub use copier::{Copier, CopierConfig, CopyDone, Hosts, Job, JobToken, Method, PagePiece, Step};
pub use copy::{Copying, PageCopy, Refused};
pub use device::Device;
pub use driver::{Absent, Driver, Facts, Reach, Uuid, Version};
pub use export::{Exported, ExportedMemory};
pub use ipc::{EventHandle, MemoryHandle};
pub use kernel::Kernels;
pub use memory::{DeviceMemory, HostBuffer, HostRegion, Sink, Source};
pub use pool::{Place, Pool, PoolConfig, Reserved};
pub use shared::SharedPiece;
pub use stream::{Event, Priority, Stream};
pub use sums::Summing;
pub use sys::CudaError;

/// What went wrong with a device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Error {
    /// A call failed, and the device is still there.
    #[error("GPU {device}: {call} failed")]
    Cuda {
        /// Which device.
        device: u32,
        /// Which function of the driver.
        call: &'static str,
        /// What it said.
        source: CudaError,
    },
    /// The device is lost to this process: nothing works in its context any more, and a new one needs a new process.
    #[error("GPU {device} is lost to this process, as {call} said")]
    Lost {
        /// Which device.
        device: u32,
        /// Which function of the driver said so first.
        call: &'static str,
        /// What it said.
        source: CudaError,
    },
    /// There is no room for it.
    #[error("GPU {device} has no room for {bytes} bytes")]
    Full {
        /// Which device.
        device: u32,
        /// How much was asked for.
        bytes: u64,
    },
    /// It goes beyond its memory.
    #[error("{bytes} bytes at {offset} are not within {within} bytes of {what}")]
    Range {
        /// Of what.
        what: &'static str,
        /// From where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// How many there are.
        within: u64,
    },
    /// Host memory that the device does not know, or not as one piece.
    #[error("host memory {host} is not registered with GPU {device}")]
    NotRegistered {
        /// Which device.
        device: u32,
        /// Which of the host memories that were given.
        host: usize,
    },
    /// What was named belongs to another device.
    #[error("GPU {device} is not {wanted}")]
    OtherDevice {
        /// Which device.
        device: u32,
        /// Which was meant.
        wanted: Uuid,
    },
    /// Another process' memory or event cannot be had: it ended, gave it up, or the handle was never right.
    #[error("GPU {device}: the handle leads nowhere")]
    Gone {
        /// Which device.
        device: u32,
        /// What the driver said.
        source: CudaError,
    },
    /// It was not made to be shared in this way.
    #[error("this memory of GPU {device} was not made to be shared with other processes in this way")]
    NotShared {
        /// Which device.
        device: u32,
    },
    /// What is said of a piece of memory cannot be.
    #[error("piece {piece} of the memory for GPU {device}: {what}")]
    Piece {
        /// Which device.
        device: u32,
        /// Which of the pieces, from 0.
        piece: usize,
        /// What is wrong, and what would be right.
        what: &'static str,
    },
    /// Memory is in more pieces than are put together.
    #[error(
        "memory in {pieces} pieces; at most {most} are put together: let the owner make fewer and larger ones"
    )]
    ManyPieces {
        /// How many.
        pieces: usize,
        /// How many may be.
        most: usize,
    },
    /// This process can open no more descriptors, and each piece of memory that is handed over takes one.
    #[error(
        "no descriptor is left after {pieces} pieces of memory: each takes one; raise the limit of open files \
         (RLIMIT_NOFILE, `ulimit -n`)"
    )]
    NoDescriptors {
        /// How many pieces got one.
        pieces: usize,
    },
    /// The device or its driver has no fabric handles: they want NVLink between machines and its daemon (IMEX).
    #[error("GPU {device} has no fabric handles; share its memory by descriptor")]
    NoFabric {
        /// Which device.
        device: u32,
    },
    /// The driver lacks a function; a newer one has it.
    #[error("the CUDA driver has no {call}; a newer one has")]
    NoCall {
        /// Which function.
        call: &'static str,
    },
    /// No device has memory at this address of this process.
    #[error("there is no device memory at {address:#x}")]
    NoMemory {
        /// Which address.
        address: u64,
        /// What the driver said.
        source: CudaError,
    },
    /// The operating system gave no memory.
    #[error("no {bytes} bytes of host memory")]
    HostMemory {
        /// How much.
        bytes: usize,
        /// In the kernel's words.
        errno: i32,
    },
    // Of the copier.
    /// Too much waits for the device already.
    #[error("{waiting} copies of GPU {device} wait already; try again when some of them have ended")]
    Busy {
        /// Which device.
        device: u32,
        /// How many.
        waiting: usize,
    },
    /// A job of this name was taken and has not ended.
    #[error("there is a copy job {token} already; give another name, or wait for its end")]
    JobTwice {
        /// Its name.
        token: u64,
    },
    /// There is no such job, or it takes no more steps.
    #[error("no copy job {token} takes steps: it ended, failed, was cancelled or had its last")]
    NoJob {
        /// The name that was given.
        token: u64,
    },
    /// The device runs no kernels of ours. Copies go without.
    #[error("GPU {device} runs no kernels of ours: {why}")]
    NoKernels {
        /// Which device.
        device: u32,
        /// What is missing or was refused.
        why: String,
    },
    /// Somebody cancelled the job before all of it was queued.
    #[error("the copy job was cancelled")]
    Cancelled,
}
