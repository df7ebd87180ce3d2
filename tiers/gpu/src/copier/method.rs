//! How pages are copied: what was asked for, what there is, and what comes of the two.

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
/// As above where the driver has no batched copy, and so makes a call of each.
const KERNEL_PIECE_BYTES_MAX_OF_CALLS: u64 = 1 << 20;
/// A step of fewer pieces is not worth a launch.
const KERNEL_PIECES_MIN: usize = 4;
/// Tables for launches, of 16 KiB. A step takes one at least while it is on the device.
const TABLES_MAX: usize = 128;

/// What a copier copies with.
pub(super) struct Chosen {
    pub(super) method: Method,
    pub(super) why: String,
    has_batch: bool,
    /// Whether it goes by the length of pieces.
    by_size: bool,
    pub(super) kernels: Option<Kernels>,
    /// Tables that are not on the device, and how many there are in all.
    idle: Vec<Table>,
    tables: usize,
    pub(super) kernel_piece_bytes_max: u64,
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

/// What to copy with, by what there is and what was asked for, and why.
fn choose(asked: Method, has_batch: bool, kernels: Result<(), &str>, version: &str) -> (Method, String) {
    let batch = if has_batch {
        "the driver has batched copies".to_owned()
    } else {
        format!("the driver, for CUDA {version}, has no batched copies")
    };
    let rest = if has_batch { Method::Batch } else { Method::Loop };
    match (asked, kernels) {
        (Method::Loop, _) => (Method::Loop, "asked for".into()),
        (Method::Batch, _) if has_batch => (Method::Batch, "asked for".into()),
        (Method::Batch, _) => (Method::Loop, batch),
        (Method::Kernel, Ok(())) => (Method::Kernel, "asked for".into()),
        (Method::Auto, Ok(())) if has_batch => {
            (Method::Auto, "by kernel where pieces are short, else batched".into())
        }
        (Method::Auto, Ok(())) => (Method::Kernel, batch),
        (Method::Auto | Method::Kernel, Err(why)) => (rest, format!("{why}; {batch}")),
    }
}

impl Chosen {
    pub(super) fn of(device: &Device, asked: Method) -> Result<Self, Error> {
        let driver = device.driver();
        let has_batch = driver.has_batched_copies();
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
        let there = no_kernels.as_deref().map_or(Ok(()), Err);
        let (method, why) = choose(asked, has_batch, there, &driver.version().to_string());
        let (idle, kernels) = loaded.map_or((Vec::new(), None), |(idle, kernels)| (idle, Some(kernels)));
        let kernel_piece_bytes_max =
            if has_batch { KERNEL_PIECE_BYTES_MAX } else { KERNEL_PIECE_BYTES_MAX_OF_CALLS };
        let (by_size, tables) = (asked == Method::Auto, idle.len());
        Ok(Self { method, why, has_batch, by_size, kernels, idle, tables, kernel_piece_bytes_max })
    }

    /// How these pieces are copied now. `can_reach`: the kernel finds both of their ends.
    pub(super) fn by(&self, direction: Direction, pieces: &[Piece], can_reach: bool) -> By {
        let driver = if self.has_batch && self.method != Method::Loop { By::Driver } else { By::Calls };
        let Some(kernels) = self.kernels.as_ref().filter(|_| can_reach && !pieces.is_empty()) else {
            return driver;
        };
        let bytes: u64 = pieces.iter().map(|piece| piece.bytes as u64).sum();
        let is_short = bytes / pieces.len() as u64 <= self.kernel_piece_bytes_max;
        if self.by_size && !(is_short && pieces.len() >= KERNEL_PIECES_MIN) {
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
            (Auto, false, true, Kernel),
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
            let (method, why) = choose(asked, has_batch, kernels, "12.4");
            assert_eq!(method, taken, "{asked:?} {has_batch} {has_kernels}: {why}");
            let wanted_kernels = matches!(asked, Auto | Kernel);
            assert_eq!(why.contains("no kernels"), wanted_kernels && !has_kernels, "{why}");
        }
    }
}
