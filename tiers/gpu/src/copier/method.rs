//! How pages are copied: what was asked for, what there is, and what comes of the two.
//!
//! Without MPS the kernels of two processes are never on a device at once: they take turns. A kernel that waits for
//! the bus then takes its time from the engine, while the device's copy engines run beside it. So to and from host
//! memory a kernel is the choice only with MPS, or where the driver would want a call for each of many short pieces.
//! Between memories of the device it waits for no bus and is soon done.

use cudarc::driver::sys::CUdevice_attribute;

use super::Method;
use crate::Error;
use crate::device::Device;
use crate::kernel::{Kernels, Reach, Table};
use crate::pieces::{Direction, Piece};
use crate::stream::Stream;

// Where one way becomes better than another. These are guesses from how buses and launches are known to behave; they
// are to be measured on each kind of device with `tiers/gpu/check`, which prints where the lines cross.

/// A step whose pieces are longer than this on average goes by the driver's batched copy, which leaves the processors
/// to compute; the kernel takes the shorter ones, of which the driver makes an entry each.
pub(super) const KERNEL_PIECE_BYTES_MAX: u64 = 64 << 10;
/// As above where the driver has no batched copy, and so makes a call of each; not where the kernel takes turns.
const KERNEL_PIECE_BYTES_MAX_OF_CALLS: u64 = 1 << 20;
/// A step of fewer pieces is not worth a launch.
const KERNEL_PIECES_MIN: usize = 4;
/// Tables for launches, of 16 KiB. A step takes one at least while it is on the device.
const TABLES_MAX: usize = 128;

/// What a copier copies with.
pub(super) struct Chosen {
    pub(super) method: Method,
    pub(super) why: String,
    /// To and from host memory, and between memories of the device.
    has_batch: [bool; 2],
    /// Whether kernels run beside those of other processes.
    has_mps: bool,
    /// Whether it goes by the length of pieces.
    by_size: bool,
    pub(super) kernels: Option<Kernels>,
    /// Tables that are not on the device, and how many there are in all.
    idle: Vec<Table>,
    tables: usize,
    /// In place of the guesses above.
    pub(super) kernel_piece_bytes_max: Option<u64>,
}

/// How a step is copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum By {
    Kernel {
        blocks_max: u32,
        tables: usize,
    },
    /// Batched where the driver can.
    Driver,
    Calls,
    /// By the kernel, when there are tables again.
    Wait,
}

/// What a driver and a device have.
#[derive(Clone, Copy)]
struct There<'why> {
    version: &'why str,
    has_batch: bool,
    has_mps: bool,
    /// Or why not.
    kernels: Result<(), &'why str>,
}

/// What to copy with, by what there is and what was asked for, and why.
fn choose(asked: Method, there: There<'_>) -> (Method, String) {
    let There { version, has_batch, has_mps, kernels } = there;
    let batch = if has_batch {
        "the driver has batched copies".to_owned()
    } else {
        format!("the driver, for CUDA {version}, has no batched copies")
    };
    let auto = match (has_batch, has_mps) {
        (_, true) => "by kernel where pieces are short, beside those of others (MPS)",
        (true, false) => {
            "host memory batched, for without MPS kernels of others would wait; by kernel on the device"
        }
        (false, false) => "by kernel where pieces are short",
    };
    let rest = if has_batch { Method::Batch } else { Method::Loop };
    match (asked, kernels) {
        (Method::Loop, _) => (Method::Loop, "asked for".into()),
        (Method::Batch, _) if has_batch => (Method::Batch, "asked for".into()),
        (Method::Batch, _) => (Method::Loop, batch),
        (Method::Kernel, Ok(())) if has_mps => (Method::Kernel, "asked for".into()),
        (Method::Kernel, Ok(())) => {
            (Method::Kernel, "asked for; without MPS kernels of others wait meanwhile".into())
        }
        (Method::Auto, Ok(())) => (Method::Auto, format!("{auto}; {batch}")),
        (Method::Auto | Method::Kernel, Err(why)) => (rest, format!("{why}; {batch}")),
    }
}

impl Chosen {
    pub(super) fn of(device: &Device, asked: Method) -> Result<Self, Error> {
        let driver = device.driver();
        let driver_has_batch = driver.has_batched_copies();
        let has_batch = [Direction::HostToDevice, Direction::OnDevices]
            .map(|direction| driver_has_batch && device.inner.can_batch(direction));
        let has_mps = has_mps(device);
        let load = || {
            let kernels = Kernels::load(device)?;
            Ok((kernels.tables(TABLES_MAX)?, kernels))
        };
        let loaded = match asked {
            Method::Auto | Method::Kernel => load(),
            Method::Batch | Method::Loop => {
                Err(Error::NoKernels { device: device.facts().ordinal, why: "nobody asked for them".into() })
            }
        };
        let no_kernels = match &loaded {
            Ok(_) => None,
            Err(lost @ Error::Lost { .. }) => return Err(lost.clone()),
            Err(error) => Some(error.to_string()),
        };
        let kernels = no_kernels.as_deref().map_or(Ok(()), Err);
        let version = driver.version().to_string();
        let there = There { version: &version, has_batch: driver_has_batch, has_mps, kernels };
        let (method, mut why) = choose(asked, there);
        if driver_has_batch && !has_batch[0] && method != Method::Loop {
            why += "; host memory never batched, for the device has other addresses for it";
        }
        let (idle, kernels) = loaded.map_or((Vec::new(), None), |(idle, kernels)| (idle, Some(kernels)));
        let (by_size, tables) = (asked == Method::Auto, idle.len());
        Ok(Self {
            method,
            why,
            has_batch,
            has_mps,
            by_size,
            kernels,
            idle,
            tables,
            kernel_piece_bytes_max: None,
        })
    }

    /// Whether pieces of this length on average are for the kernel, with [`Method::Auto`].
    fn is_for_kernel(&self, direction: Direction, pieces: usize, bytes: u64) -> bool {
        let on_device = direction == Direction::OnDevices;
        let (has_batch, takes_turns) = (self.has_batch[usize::from(on_device)], !on_device && !self.has_mps);
        if takes_turns && has_batch {
            return false;
        }
        let guess =
            if has_batch || takes_turns { KERNEL_PIECE_BYTES_MAX } else { KERNEL_PIECE_BYTES_MAX_OF_CALLS };
        pieces >= KERNEL_PIECES_MIN && bytes / pieces as u64 <= self.kernel_piece_bytes_max.unwrap_or(guess)
    }

    /// How these pieces are copied now. `can_reach`: the kernel finds both of their ends.
    pub(super) fn by(&self, direction: Direction, pieces: &[Piece], can_reach: bool) -> By {
        let driver = if self.method == Method::Loop { By::Calls } else { By::Driver };
        let Some(kernels) = self.kernels.as_ref().filter(|_| can_reach && !pieces.is_empty()) else {
            return driver;
        };
        let bytes: u64 = pieces.iter().map(|piece| piece.bytes as u64).sum();
        if self.by_size && !self.is_for_kernel(direction, pieces.len(), bytes) {
            return driver;
        }
        let blocks_max = kernels.blocks_max(direction);
        match Kernels::tables_for(pieces, blocks_max) {
            tables if tables > self.tables => driver,
            tables if tables > self.idle.len() => By::Wait,
            tables => By::Kernel { blocks_max, tables },
        }
    }

    /// Queues them so, and gives the tables that the device has now. After an error, some may be under way.
    pub(super) fn queue(
        &mut self,
        by: By,
        stream: &Stream,
        direction: Direction,
        pieces: &[Piece],
        reach: &Reach,
    ) -> (Vec<Table>, Result<(), Error>) {
        match (by, &self.kernels) {
            (By::Kernel { blocks_max, tables }, Some(kernels)) => {
                let mut used = self.idle.split_off(self.idle.len() - tables);
                let queued = kernels.queue_pages(stream, pieces, reach, blocks_max, &mut used);
                (used, queued)
            }
            (By::Calls, _) => (Vec::new(), stream.queue_each(direction, pieces)),
            _ => (Vec::new(), stream.queue(direction, pieces)),
        }
    }

    /// Tables that the device is done with.
    pub(super) fn give_back(&mut self, tables: Vec<Table>) {
        self.idle.extend(tables);
    }

    /// Tables that never come back. The kernels they were for stay too.
    pub(super) fn forget(&mut self, tables: usize) {
        self.tables -= tables;
        std::mem::forget(self.kernels.clone());
    }
}

/// Whether kernels of this process run beside those of others. A driver before CUDA 12.3 does not know the question:
/// there the environment is asked, in which NVIDIA's daemon for that (MPS) is named to who is to use it.
fn has_mps(device: &Device) -> bool {
    let told = device.inner.attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED);
    told.map_or_else(|_| std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").is_some(), |told| told != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_taken_if_it_is_there() {
        use Method::{Auto, Batch, Kernel, Loop};
        let table = [
            // Asked for, batched copies, kernels: taken.
            (Auto, true, true, Auto),
            (Auto, true, false, Batch),
            (Auto, false, true, Auto),
            (Auto, false, false, Loop),
            (Kernel, true, true, Kernel),
            (Kernel, true, false, Batch),
            (Kernel, false, true, Kernel),
            (Kernel, false, false, Loop),
            (Batch, true, true, Batch),
            (Batch, true, false, Batch),
            (Batch, false, true, Loop),
            (Batch, false, false, Loop),
            (Loop, true, true, Loop),
            (Loop, false, false, Loop),
        ];
        for (asked, has_batch, has_kernels, taken) in table {
            let kernels = if has_kernels { Ok(()) } else { Err("no kernels") };
            for has_mps in [false, true] {
                let (method, why) = choose(asked, There { version: "12.4", has_batch, has_mps, kernels });
                assert_eq!(method, taken, "{asked:?} {has_batch} {has_kernels}: {why}");
                let wanted_kernels = matches!(asked, Auto | Kernel);
                assert_eq!(why.contains("no kernels"), wanted_kernels && !has_kernels, "{why}");
                assert_eq!(why.contains("(MPS)"), has_mps && method == Auto, "{why}");
            }
        }
    }
}
