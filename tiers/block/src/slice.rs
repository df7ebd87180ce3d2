//! Which part of a block's tensor a piece is: a layer range (pipeline parallel) and a KV-head range (tensor
//! parallel). Kept beside the scope, not inside it, so that a reader with another parallel size can name
//! the pieces it needs.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A half-open layer range and a half-open head range of a tensor with `layers` x `heads`.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// Layers of this piece.
    pub layers: Range<u16>,
    /// KV heads of this piece.
    pub heads: Range<u16>,
    /// Layers of the whole tensor.
    pub layers_total: u16,
    /// KV heads of the whole tensor.
    pub heads_total: u16,
}

/// Why a slice was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{what} range {start}..{end} is empty or leaves 0..{total}")]
pub struct SliceError {
    /// `layer` or `head`.
    pub what: &'static str,
    /// First index.
    pub start: u16,
    /// One past the last index.
    pub end: u16,
    /// Size of the whole.
    pub total: u16,
}

impl Slice {
    /// The whole of a tensor with `layers` x `heads`.
    pub fn whole(layers: u16, heads: u16) -> Self {
        Self { layers: 0..layers, heads: 0..heads, layers_total: layers, heads_total: heads }
    }

    /// Refuses empty ranges and ranges that leave the tensor.
    pub fn validate(&self) -> Result<(), SliceError> {
        let check = |what, range: &Range<u16>, total| {
            if range.start < range.end && range.end <= total {
                return Ok(());
            }
            Err(SliceError { what, start: range.start, end: range.end, total })
        };
        check("layer", &self.layers, self.layers_total)?;
        check("head", &self.heads, self.heads_total)
    }

    /// Whether `part`, of the same tensor, has no layer and no head that this one has not.
    pub fn contains(&self, part: &Self) -> bool {
        let holds =
            |range: &Range<u16>, part: &Range<u16>| range.start <= part.start && part.end <= range.end;
        self.is_beside(part) && holds(&self.layers, &part.layers) && holds(&self.heads, &part.heads)
    }

    /// The layers and heads that both have; nothing when there are none, or they are of different tensors.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let both =
            |left: &Range<u16>, right: &Range<u16>| left.start.max(right.start)..left.end.min(right.end);
        let (layers, heads) = (both(&self.layers, &other.layers), both(&self.heads, &other.heads));
        let some = self.is_beside(other) && !layers.is_empty() && !heads.is_empty();
        some.then_some(Self { layers, heads, ..*self })
    }

    /// Whether both are of one tensor.
    fn is_beside(&self, other: &Self) -> bool {
        (self.layers_total, self.heads_total) == (other.layers_total, other.heads_total)
    }

    /// Canonical bytes: six little-endian u16.
    pub fn encode(&self) -> [u8; 12] {
        let numbers = [
            self.layers.start,
            self.layers.end,
            self.heads.start,
            self.heads.end,
            self.layers_total,
            self.heads_total,
        ];
        let mut bytes = [0; 12];
        for (at, number) in numbers.into_iter().enumerate() {
            bytes[at * 2..at * 2 + 2].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layers {}..{}/{} heads {}..{}/{}",
            self.layers.start,
            self.layers.end,
            self.layers_total,
            self.heads.start,
            self.heads.end,
            self.heads_total
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_must_be_inside_and_not_empty() {
        assert_eq!(Slice::whole(2, 8).validate(), Ok(()));
        let empty = Slice { heads: 3..3, ..Slice::whole(2, 8) };
        assert_eq!(empty.validate().unwrap_err().what, "head");
        let outside = Slice { layers: 0..3, ..Slice::whole(2, 8) };
        assert_eq!(outside.validate().unwrap_err().what, "layer");
    }

    #[test]
    fn parts_are_of_one_tensor() {
        let part = |layers, heads| Slice { layers, heads, ..Slice::whole(4, 8) };
        assert!(part(0..2, 0..8).contains(&part(1..2, 4..8)));
        assert!(!part(0..2, 0..8).contains(&part(1..3, 4..8)));
        assert!(!Slice::whole(4, 8).contains(&Slice::whole(4, 4)));
        assert_eq!(part(0..2, 0..5).intersection(&part(1..4, 4..8)), Some(part(1..2, 4..5)));
        assert_eq!(part(0..2, 0..5).intersection(&part(2..4, 4..8)), None);
        assert_eq!(Slice::whole(4, 8).intersection(&Slice::whole(4, 4)), None);
    }
}
