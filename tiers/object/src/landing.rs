//! Where the bytes of one read go: straight into the slots of several callers, past what lies between them.

use std::fmt;

/// Takes the bytes of one range in order and puts each where it belongs.
#[derive(Default)]
pub struct Landing<'a> {
    parts: Vec<Part<'a>>,
    /// Length of all parts in bytes.
    bytes: u64,
    /// Bytes taken so far.
    taken: u64,
    /// The part that the next byte belongs to, and how much of it is there.
    at: usize,
    within: usize,
}

enum Part<'a> {
    Into(&'a mut [u8]),
    Skip(usize),
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Into(slot) => slot.len(),
            Self::Skip(bytes) => *bytes,
        }
    }
}

/// More bytes came than were asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("more bytes came than were asked for")]
pub struct Overrun;

impl<'a> Landing<'a> {
    /// Takes nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Everything into one slot.
    pub fn of(slot: &'a mut [u8]) -> Self {
        let mut landing = Self::new();
        landing.fill(slot);
        landing
    }

    /// The next bytes go into `slot`.
    pub fn fill(&mut self, slot: &'a mut [u8]) {
        self.bytes += slot.len() as u64;
        self.parts.push(Part::Into(slot));
    }

    /// The next `bytes` bytes are nobody's.
    pub fn skip(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.parts.push(Part::Skip(bytes));
    }

    /// Length of the range in bytes.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Bytes taken so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether every byte is there.
    pub fn is_full(&self) -> bool {
        self.taken == self.bytes
    }

    /// Forgets what was taken, so that the range can be read again from its beginning.
    pub fn rewind(&mut self) {
        (self.taken, self.at, self.within) = (0, 0, 0);
    }

    /// Takes the next bytes of the range.
    pub fn push(&mut self, mut chunk: &[u8]) -> Result<(), Overrun> {
        if chunk.len() as u64 > self.bytes - self.taken {
            return Err(Overrun);
        }
        self.taken += chunk.len() as u64;
        while !chunk.is_empty() {
            let part = &mut self.parts[self.at];
            let count = chunk.len().min(part.len() - self.within);
            let (now, later) = chunk.split_at(count);
            if let Part::Into(slot) = part {
                slot[self.within..self.within + count].copy_from_slice(now);
            }
            self.within += count;
            if self.within == part.len() {
                (self.at, self.within) = (self.at + 1, 0);
            }
            chunk = later;
        }
        Ok(())
    }
}

impl fmt::Debug for Landing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landing({} of {} bytes in {} parts)", self.taken, self.bytes, self.parts.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_any_size_land_where_they_belong() {
        let range: Vec<u8> = (0..=99).collect();
        for size in 1..=100 {
            let (mut one, mut none, mut two) = ([0; 10], [0; 0], [0; 50]);
            let mut landing = Landing::new();
            landing.skip(5);
            landing.fill(&mut one);
            landing.fill(&mut none);
            landing.skip(0);
            landing.skip(35);
            landing.fill(&mut two);
            assert_eq!(landing.len(), 100);
            for round in 0..2 {
                assert!(!landing.is_full());
                range.chunks(size).for_each(|chunk| landing.push(chunk).unwrap());
                assert!(landing.is_full());
                assert_eq!(landing.push(&[1]), Err(Overrun));
                if round == 0 {
                    landing.rewind();
                }
            }
            assert!(one.iter().copied().eq(5..15) && two.iter().copied().eq(50..100), "chunks of {size}");
        }
    }
}
