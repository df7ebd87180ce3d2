//! Checksums of device memory, by a kernel: the CRC-64/NVME that blocks carry, before the name is mixed in
//! (`kv_block::Checksum::from_content` does that), with no copy to the host.
//!
//! ```text
//!  runs --cut--> parts --a block of threads each--> CRC of each part --joined here--> CRC of each run
//! ```
//! A block of the cache is many runs: [`joined`] makes its checksum of theirs.

use std::ops::Range;
use std::time::Duration;

use crate::Error;
use crate::copy::{Copying, Refused};
use crate::in_use::{InUse, Registrations, registrations};
use crate::kernel::{Kernels, put};
use crate::memory::{DeviceMemory, HostBuffer};
use crate::pieces::place_of_mut;
use crate::stream::Stream;

/// A longer run is cut, so that one does not keep the others waiting. To be measured.
const PART_BYTES: u64 = 256 << 10;
/// From and bytes in the table, and the sum behind it.
const RUN_BYTES: usize = 16;
const SUM_BYTES: usize = 8;

/// x^64 modulo the polynomial of CRC-64/NVME. The lowest bit is the highest power, here and below.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

fn times_x(value: u64) -> u64 {
    (value >> 1) ^ (if value & 1 == 1 { POLYNOMIAL } else { 0 })
}

fn times(left: u64, right: u64) -> u64 {
    let (mut sum, mut right) = (0, right);
    for bit in (0..64).rev() {
        sum ^= if left >> bit & 1 == 1 { right } else { 0 };
        right = times_x(right);
    }
    sum
}

/// The checksum of what comes before `bytes` bytes with a checksum of their own, and of those.
fn with(before: u64, after: u64, bytes: u64) -> u64 {
    // By x to the power of the bits that follow.
    let (mut power, mut square, mut left) = (1 << 63, times_x(1 << 63), u128::from(bytes) * 8);
    while left > 0 {
        power = if left & 1 == 1 { times(power, square) } else { power };
        square = times(square, square);
        left >>= 1;
    }
    times(before, power) ^ after
}

/// CRC-64/NVME of bytes here, slowly.
pub(crate) fn of(bytes: &[u8]) -> u64 {
    !bytes.iter().fold(!0, |sum, byte| (0..8).fold(sum ^ u64::from(*byte), |sum, _| times_x(sum)))
}

/// The checksum of parts that follow each other, of the checksum and the length of each.
pub fn joined(parts: impl IntoIterator<Item = (u64, u64)>) -> u64 {
    parts.into_iter().fold(0, |before, (after, bytes)| with(before, after, bytes))
}

/// Checksums under way. Dropped, it is as a [`Copying`] that is: whoever drops it waits for the device, for 10 s at
/// most, after an error that is not [`Error::Lost`] too. A thread that must not wait calls [`Summing::forget`].
pub struct Summing {
    copying: Copying<HostBuffer>,
    /// For each run, the lengths of its parts.
    parts: Vec<Vec<u64>>,
}

fn bytes_of(run: &Range<u64>) -> u64 {
    run.end.saturating_sub(run.start)
}

/// An empty run has one part too.
fn count_of(run: &Range<u64>) -> u64 {
    bytes_of(run).div_ceil(PART_BYTES).max(1)
}

/// Of a run that lies within some memory.
fn parts_of(run: &Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let (start, end) = (run.start, run.start + bytes_of(run));
    let starts = (0..count_of(run)).map(move |part| start + part * PART_BYTES);
    starts.map(move |start| start..end.min(start + PART_BYTES))
}

impl Kernels {
    /// How many bytes of host memory [`Kernels::checksums`] wants for these runs.
    pub fn checksum_room_bytes(runs: &[Range<u64>]) -> usize {
        let parts = runs.iter().map(count_of).fold(0, u64::saturating_add).max(1);
        parts.saturating_mul((RUN_BYTES + SUM_BYTES) as u64) as usize
    }

    /// Sums runs of a memory of this device, when it is the stream's turn. `room` is for what goes to the device and
    /// comes from it, and comes back in the end.
    pub fn checksums(
        &self,
        stream: &Stream,
        memory: &DeviceMemory,
        runs: &[Range<u64>],
        mut room: HostBuffer,
    ) -> Result<Summing, Refused<HostBuffer>> {
        let (table, registered) = match self.put_runs(stream, memory, runs, &mut room) {
            Ok(put) => put,
            Err(error) => return Err(Refused { error, hosts: Some(vec![room]) }),
        };
        let lengths = |run| parts_of(run).map(|part| bytes_of(&part)).collect();
        let parts: Vec<Vec<u64>> = runs.iter().map(lengths).collect();
        let count: usize = parts.iter().map(Vec::len).sum();
        let used = InUse { devices: vec![memory.clone()], registered, hosts: vec![room] };
        let copying = stream.start_with(Some(self.clone()), used, || match count {
            0 => Ok(()),
            _ => self.queue_checksums(stream, table, count as u32, table + (count * RUN_BYTES) as u64),
        })?;
        Ok(Summing { copying, parts })
    }

    /// Fills the table and says where the device finds it, and what keeps it so.
    fn put_runs(
        &self,
        stream: &Stream,
        memory: &DeviceMemory,
        runs: &[Range<u64>],
        room: &mut HostBuffer,
    ) -> Result<(u64, Registrations), Error> {
        let device = self.device();
        for other in [memory.device(), stream.device()] {
            device.is_same(other)?;
        }
        runs.iter().try_for_each(|run| memory.address_of(run.start, bytes_of(run)).map(drop))?;
        let (bytes, within) = (Self::checksum_room_bytes(runs), room.len());
        if bytes > within {
            let (bytes, within) = (bytes as u64, within as u64);
            return Err(Error::Range { what: "the room for checksums", offset: 0, bytes, within });
        }
        let registered = registrations(device, &[place_of_mut(room)])?;
        let table = self.address_of(room)?;
        let entries = room.chunks_exact_mut(RUN_BYTES);
        for (part, entry) in runs.iter().flat_map(parts_of).zip(entries) {
            put(entry, &[memory.address_of(part.start, bytes_of(&part))?, bytes_of(&part)]);
        }
        Ok((table, registered))
    }
}

impl Summing {
    /// The checksum of each run and the room, when the device is done; they come once. As [`Copying::poll`].
    pub fn poll(&mut self) -> Result<Option<(Vec<u64>, HostBuffer)>, Error> {
        let done = self.copying.poll()?;
        Ok(self.read(done))
    }

    /// As [`Copying::wait`].
    pub fn wait(&mut self, limit: Duration) -> Result<Option<(Vec<u64>, HostBuffer)>, Error> {
        let done = self.copying.wait(limit)?;
        Ok(self.read(done))
    }

    /// As [`Copying::forget`].
    pub fn forget(self) {
        self.copying.forget();
    }

    fn read(&self, done: Option<Vec<HostBuffer>>) -> Option<(Vec<u64>, HostBuffer)> {
        let room = done?.pop()?;
        let count: usize = self.parts.iter().map(Vec::len).sum();
        let sums = room[count * RUN_BYTES..].as_chunks::<SUM_BYTES>().0;
        let mut sums = sums.iter().map(|sum| u64::from_le_bytes(*sum));
        let of_run = |parts: &Vec<u64>| joined(sums.by_ref().zip(parts.iter().copied()));
        Some((self.parts.iter().map(of_run).collect(), room))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc_64_nvme() {
        // Check value of CRC-64/NVME in the catalogue of parametrised CRC algorithms.
        assert_eq!(of(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn parts_and_whole_agree() {
        let bytes: Vec<u8> = (0..5000_u32).map(|at| (at * at / 3) as u8).collect();
        for cuts in [vec![], vec![0], vec![1], vec![5000], vec![17, 17, 2048], vec![1, 2, 3, 4999]] {
            let ends = cuts.iter().copied().chain([bytes.len()]);
            let starts = [0].into_iter().chain(cuts.iter().copied());
            let parts = starts.zip(ends).map(|(start, end)| (of(&bytes[start..end]), (end - start) as u64));
            assert_eq!(joined(parts), of(&bytes), "{cuts:?}");
        }
    }

    #[test]
    fn runs_are_cut_without_a_byte_between() {
        for (run, count) in [(5..5, 1), (5..6, 1), (0..PART_BYTES, 1), (1..PART_BYTES + 2, 2)] {
            let parts: Vec<_> = parts_of(&run).collect();
            assert_eq!(parts.len(), count, "{run:?}");
            assert!(parts[0].start == run.start && parts[count - 1].end == run.end);
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
