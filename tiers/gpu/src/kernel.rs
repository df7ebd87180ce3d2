//! Kernels: code of ours that runs on the device. It copies many small pieces in one launch, where the driver wants a
//! call or an entry for each, and sums what lies on the device.
//!
//! ```text
//!  kernel/pages.cu --NVRTC 11.8--> kernel/pages.ptx --here, cuModuleLoadData--> tried once --> launches
//!                                                          |                       |
//!                                                          no kernels, and why: everything is copied by the driver
//! ```
//! A launch reads a table out of registered host memory, so the table belongs to the operation as its pages do. Host
//! memory is called by the device's address for it, which need not be the processor's.

use std::ffi::{CStr, c_uint, c_void};
use std::sync::Arc;

use cudarc::driver::sys::{CUdevice_attribute, CUdeviceptr, CUfunction, CUmodule};

use crate::Error;
use crate::device::Device;
use crate::in_use::{InUse, Registrations, SETTLE};
use crate::memory::{HostBuffer, Registered};
use crate::pieces::{Direction, Piece};
use crate::stream::{Priority, Stream};
use crate::sums;
use crate::sys::KernelEntries;

/// Made of `kernel/pages.cu` by `kernel/generate`. It ends with a zero, as the driver wants it.
const PTX: &str = concat!(include_str!("../kernel/pages.ptx"), "\0");

/// Threads of a block; `pages.cu` counts on it.
const THREADS: u32 = 256;
/// A warp copies a piece.
const LANES: u32 = 32;
/// To, from, bytes.
const ENTRY_BYTES: usize = 24;
/// What a table has room for.
const ENTRIES_MAX: usize = TABLE_BYTES / ENTRY_BYTES;
const TABLE_BYTES: usize = 16 << 10;

/// Blocks of a launch to or from host memory. Half a MiB is asked for at once then, which is several times what a bus
/// holds, and most of the device stays free: for kernels of this process, and with MPS for those of others. Without it
/// they wait until the launch is done, however few its blocks. To be measured (`tiers/gpu/check`).
const HOST_BLOCKS_MAX: u32 = 32;
/// Blocks of other launches, for each processor of the device. To be measured.
const BLOCKS_PER_PROCESSOR: u32 = 4;
/// A piece is cut into parts so long at least and at most, so that each warp has some. To be measured.
const PART_BYTES_MIN: usize = 4 << 10;
const PART_BYTES_MAX: usize = 64 << 10;

/// The kernels of a device, loaded and tried. Cheap to clone.
#[derive(Clone)]
pub struct Kernels {
    inner: Arc<Module>,
}

struct Module {
    device: Device,
    entries: &'static KernelEntries,
    module: CUmodule,
    pages: CUfunction,
    checksums: CUfunction,
    processors: u32,
}

// SAFETY: names for the driver, which takes them from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // That of a lost device goes with its context.
        let Ok(_current) = self.device.inner.enter() else { return };
        // SAFETY: loaded once, unloaded once; operations hold the kernels while they use them.
        let code = unsafe { (self.entries.cuModuleUnload)(self.module) };
        let _ = self.device.inner.check("cuModuleUnload", code);
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "kernels of {:?}", self.inner.device)
    }
}

/// The device's addresses of registered host memory, where they are not the processor's: start, bytes, and the
/// device's start.
#[derive(Debug, Default)]
pub(crate) struct Reach(Vec<(u64, u64, u64)>);

impl Reach {
    /// Device memory, and host memory outside of what is registered, is called as it is.
    fn of(&self, address: u64) -> u64 {
        let holds = |(start, bytes, _): &&(u64, u64, u64)| (*start..start + bytes).contains(&address);
        self.0.iter().find(holds).map_or(address, |(start, _, device)| device + (address - start))
    }
}

/// Registered host memory for the table of a launch.
pub(crate) struct Table {
    buffer: HostBuffer,
    address: u64,
}

impl Kernels {
    /// Loads them, and tries them with a few bytes: the answer is in within 10 s. [`Error::NoKernels`] says why there
    /// are none, and everything else works without.
    pub fn load(device: &Device) -> Result<Self, Error> {
        let none = |why: String| Error::NoKernels { device: device.facts().ordinal, why };
        let refused = |error| match error {
            Error::Cuda { call, source, .. } => none(format!("{call} answers {source}")),
            error => error,
        };
        let driver = device.driver();
        let entries = driver.calls.kernels.as_ref();
        let entries = entries.map_err(|missing| none(format!("the driver lacks {missing}")))?;
        let kernels = Self { inner: Arc::new(Module::load(device, entries).map_err(refused)?) };
        match kernels.do_they_work().map_err(refused)? {
            Some(true) => Ok(kernels),
            Some(false) => Err(none("they ran and left something else than was wanted".into())),
            None => Err(none("they were started and do not end".into())),
        }
    }

    /// Their device.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// Where the device finds these registrations.
    pub(crate) fn reach(&self, registered: &Registrations) -> Result<Reach, Error> {
        if self.inner.device.inner.has_host_addresses {
            return Ok(Reach::default());
        }
        let reach = |(registered, _): &(Arc<Registered>, Option<Device>)| {
            let (start, bytes) = registered.place();
            Ok((start, bytes, self.inner.address_of(start)?))
        };
        registered.iter().map(reach).collect::<Result<_, Error>>().map(Reach)
    }

    /// The device's address of the beginning of this buffer.
    pub(crate) fn address_of(&self, buffer: &HostBuffer) -> Result<u64, Error> {
        let start = buffer.as_ptr().expose_provenance() as u64;
        if self.inner.device.inner.has_host_addresses { Ok(start) } else { self.inner.address_of(start) }
    }

    /// Room for tables, one a launch.
    pub(crate) fn tables(&self, count: usize) -> Result<Vec<Table>, Error> {
        let buffer = self.inner.device.host_buffer(count * TABLE_BYTES)?;
        let start = self.address_of(&buffer)?;
        let table = |(at, buffer)| Table { buffer, address: start + (at * TABLE_BYTES) as u64 };
        Ok(buffer.cut(TABLE_BYTES).into_iter().enumerate().map(table).collect())
    }

    /// How many tables the pieces need.
    pub(crate) fn tables_for(pieces: &[Piece], blocks_max: u32) -> usize {
        let part = part_bytes(pieces, blocks_max);
        pieces.iter().map(|piece| piece.bytes.div_ceil(part)).sum::<usize>().div_ceil(ENTRIES_MAX)
    }

    /// Blocks of a launch this way, at most.
    pub(crate) fn blocks_max(&self, direction: Direction) -> u32 {
        match direction {
            Direction::HostToDevice | Direction::DeviceToHost => HOST_BLOCKS_MAX,
            Direction::OnDevices => self.inner.processors * BLOCKS_PER_PROCESSOR,
        }
    }

    /// Queues copies of the pieces, a launch for each of the tables that it fills. After an error, some may be under
    /// way, with tables.
    ///
    /// Who calls this checked that the pieces lie within memory which, as the tables, is not given up before the
    /// device is done.
    pub(crate) fn queue_pages(
        &self,
        stream: &Stream,
        pieces: &[Piece],
        reach: &Reach,
        blocks_max: u32,
        tables: &mut [Table],
    ) -> Result<(), Error> {
        let part = part_bytes(pieces, blocks_max);
        let mut parts = pieces.iter().flat_map(|piece| {
            let (to, from) = (reach.of(piece.to), reach.of(piece.from));
            let at = (0..piece.bytes).step_by(part);
            at.map(move |at| [to + at as u64, from + at as u64, part.min(piece.bytes - at) as u64])
        });
        for table in tables {
            let entries = table.buffer.chunks_exact_mut(ENTRY_BYTES).zip(&mut parts);
            let count = entries.map(|(entry, part)| put(entry, &part)).count() as u32;
            if count == 0 {
                break;
            }
            let blocks = count.div_ceil(THREADS / LANES).min(blocks_max);
            self.launch("pages", stream, blocks, &[table.address, count.into()])?;
        }
        debug_assert!(parts.next().is_none(), "there are as many tables as `tables_for` said");
        Ok(())
    }

    /// Queues sums of the runs in a table: from and bytes of each; the sums' place.
    pub(crate) fn queue_checksums(
        &self,
        stream: &Stream,
        table: u64,
        count: u32,
        sums: u64,
    ) -> Result<(), Error> {
        let blocks = count.min(self.inner.processors * BLOCKS_PER_PROCESSOR).max(1);
        self.launch("checksums", stream, blocks, &[table, count.into(), sums])
    }

    /// All arguments lie in eight bytes each; of the counts, which have four, the first are the low ones.
    fn launch(
        &self,
        kernel: &'static str,
        stream: &Stream,
        blocks: u32,
        arguments: &[u64],
    ) -> Result<(), Error> {
        const { assert!(cfg!(target_endian = "little"), "CUDA's processors are") };
        let Module { device, entries, pages, checksums, .. } = &*self.inner;
        let function = if kernel == "pages" { *pages } else { *checksums };
        let mut places: Vec<*mut c_void> =
            arguments.iter().map(|argument| (&raw const *argument).cast_mut().cast()).collect();
        let _current = device.inner.enter()?;
        // SAFETY: as many arguments as the kernel has, which the driver copies before it returns. What they lead to
        // is of the caller.
        let code = unsafe {
            (entries.cuLaunchKernel)(
                function,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream.inner.stream,
                places.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        device.inner.check("cuLaunchKernel", code)
    }

    /// Whether both do what they should, in host memory of ours; `None`: they do not end.
    fn do_they_work(&self) -> Result<Option<bool>, Error> {
        // A table of pieces, one of runs, a sum, what is copied, and where to.
        const PIECES: usize = 0;
        const RUNS: usize = 64;
        const SUM: usize = 128;
        const FROM: usize = 1025;
        const TO: usize = 2051;
        const BYTES: usize = 777;
        let device = &self.inner.device;
        let stream = device.stream(Priority::Low)?;
        let mut buffer = device.host_buffer(4096)?;
        let start = self.address_of(&buffer)?;
        let address = |at: usize| start + at as u64;
        put(&mut buffer[PIECES..], &[address(TO), address(FROM), BYTES as u64]);
        put(&mut buffer[RUNS..], &[address(FROM), BYTES as u64]);
        buffer[FROM..].iter_mut().zip(0..BYTES).for_each(|(byte, at)| *byte = (at * at + at / 7) as u8);
        let used = InUse { devices: Vec::new(), registered: Vec::new(), hosts: vec![buffer] };
        let started = stream.start_with(Some(self.clone()), used, || {
            self.launch("pages", &stream, 1, &[address(PIECES), 1])?;
            self.queue_checksums(&stream, address(RUNS), 1, address(SUM))
        });
        let mut copying = started.map_err(|refused| refused.error)?;
        let Some(buffers) = copying.wait(SETTLE)? else { return Ok(None) };
        let copied = buffers[0][FROM..FROM + BYTES] == buffers[0][TO..TO + BYTES];
        let around = buffers[0][TO - 1] == 0 && buffers[0][TO + BYTES] == 0;
        let sum = buffers[0][SUM..SUM + 8] == sums::of(&buffers[0][FROM..FROM + BYTES]).to_le_bytes();
        Ok(Some(copied && around && sum))
    }
}

impl Module {
    fn load(device: &Device, entries: &'static KernelEntries) -> Result<Self, Error> {
        use CUdevice_attribute as Attribute;
        let inner = &device.inner;
        let has = |which| inner.attribute(which).map(|value| value != 0);
        let can_map = has(Attribute::CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY)?
            && has(Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING)?;
        if !can_map {
            let why = "it does not reach host memory by itself".into();
            return Err(Error::NoKernels { device: inner.ordinal(), why });
        }
        let processors = inner.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1);
        let _current = inner.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a place to write to, and a text that ends with a zero.
        let code = unsafe { (entries.cuModuleLoadData)(&mut module, PTX.as_ptr().cast()) };
        inner.check("cuModuleLoadData", code)?;
        // From here on it is unloaded whatever happens.
        let none = std::ptr::null_mut();
        let mut loaded = Self {
            device: device.clone(),
            entries,
            module,
            pages: none,
            checksums: none,
            processors: processors as u32,
        };
        loaded.pages = loaded.function(c"pages")?;
        loaded.checksums = loaded.function(c"checksums")?;
        Ok(loaded)
    }

    fn function(&self, name: &CStr) -> Result<CUfunction, Error> {
        let mut function = std::ptr::null_mut();
        // SAFETY: a place to write to, the module, and a name that ends with a zero.
        let code = unsafe { (self.entries.cuModuleGetFunction)(&mut function, self.module, name.as_ptr()) };
        self.device.inner.check("cuModuleGetFunction", code)?;
        Ok(function)
    }

    /// The device's address of registered host memory.
    fn address_of(&self, host: u64) -> Result<CUdeviceptr, Error> {
        const NO_FLAGS: c_uint = 0;
        let _current = self.device.inner.enter()?;
        let mut address = 0;
        let host = std::ptr::with_exposed_provenance_mut::<c_void>(host as usize);
        // SAFETY: a place to write to; the driver looks the address up.
        let code = unsafe { (self.entries.cuMemHostGetDevicePointer_v2)(&mut address, host, NO_FLAGS) };
        self.device.inner.check("cuMemHostGetDevicePointer", code)?;
        Ok(address)
    }
}

/// Into how long parts the pieces are cut: so that every warp of a launch has one, if that is not too short.
fn part_bytes(pieces: &[Piece], blocks_max: u32) -> usize {
    let bytes: usize = pieces.iter().map(|piece| piece.bytes).sum();
    let warps = (blocks_max * (THREADS / LANES)) as usize;
    (bytes / warps).next_multiple_of(PART_BYTES_MIN).clamp(PART_BYTES_MIN, PART_BYTES_MAX)
}

/// Words at the beginning of some bytes, as the device reads them.
pub(crate) fn put(to: &mut [u8], words: &[u64]) {
    to.chunks_exact_mut(8).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(count: usize, bytes: usize) -> Vec<Piece> {
        vec![Piece { to: 0, from: 0, bytes }; count]
    }

    #[test]
    fn few_long_pieces_and_many_short_ones_both_give_every_warp_something() {
        let table = [
            // Pieces, bytes of each, blocks: part, tables.
            (1, 1, 32, 4096, 1),
            (1, 1 << 20, 32, 4096, 1),
            (1, 16 << 20, 32, 64 << 10, 1),
            (1, 1 << 30, 32, 64 << 10, 25),
            (4, 1 << 20, 32, 16384, 1),
            (500, 256, 32, 4096, 1),
            (ENTRIES_MAX, 256, 32, 4096, 1),
            (ENTRIES_MAX + 1, 256, 32, 4096, 2),
            (0, 0, 32, 4096, 0),
        ];
        for (count, bytes, blocks, part, tables) in table {
            let pieces = pieces(count, bytes);
            assert_eq!(part_bytes(&pieces, blocks), part, "{count} of {bytes}");
            assert_eq!(Kernels::tables_for(&pieces, blocks), tables, "{count} of {bytes}");
        }
    }

    #[test]
    fn host_memory_is_called_by_the_device_s_address() {
        let reach = Reach(vec![(100, 50, 1000), (200, 10, 5)]);
        let table = [(99, 99), (100, 1000), (149, 1049), (150, 150), (200, 5), (209, 14), (210, 210)];
        for (host, device) in table {
            assert_eq!(reach.of(host), device, "{host}");
        }
    }
}
