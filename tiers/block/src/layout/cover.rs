//! Unequal parallel sizes: which stored slices give a wanted one.
//!
//! A block is stored in slices, one for each worker of the engine that wrote it. A reader with another tensor- or
//! pipeline-parallel size wants others:
//! ```text
//! stored by 2     | heads 0..4    | heads 4..8    |
//! wanted by 4             | 2..4  |                   a part of the first
//! wanted by 1     | 0..8                          |   all of both
//! ```
//! [`cover`] says which part of which; the bytes of a part within the stored block are
//! [`BlockLayout::ranges`](super::BlockLayout::ranges), and the copies from there to pages are those of
//! [`plan()`](super::plan()).

use std::ops::Range;

use crate::{Slice, SliceError};

/// A part of a wanted slice, and who has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Which of the stored slices, by its place among those given.
    pub stored: usize,
    /// What to take of it.
    pub part: Slice,
}

/// Why stored slices do not give the wanted one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CoverError {
    /// One of them is no slice.
    #[error(transparent)]
    Slice(#[from] SliceError),
    /// A stored slice is of another tensor.
    #[error("the stored {stored} are of another tensor than {wanted}")]
    Tensor {
        /// The first such.
        stored: Slice,
        /// What was wanted.
        wanted: Slice,
    },
    /// Nobody has this part of what is wanted, and perhaps not others.
    #[error("{missing} are not stored")]
    Gap {
        /// The first such.
        missing: Slice,
    },
}

/// Parts of `stored` that together are `wanted`, each layer and head once, in the order of `stored`.
///
/// Slices that were stored earlier are preferred; but one that has all is taken alone, since each piece is another
/// block to read.
pub fn cover(wanted: &Slice, stored: &[Slice]) -> Result<Vec<Piece>, CoverError> {
    wanted.validate()?;
    for slice in stored {
        slice.validate()?;
        if (slice.layers_total, slice.heads_total) != (wanted.layers_total, wanted.heads_total) {
            return Err(CoverError::Tensor { stored: slice.clone(), wanted: wanted.clone() });
        }
    }
    if let Some(stored) = stored.iter().position(|slice| slice.contains(wanted)) {
        return Ok(vec![Piece { stored, part: wanted.clone() }]);
    }
    let mut pieces = Vec::new();
    let mut left = vec![wanted.clone()];
    for (at, slice) in stored.iter().enumerate() {
        let mut still = Vec::new();
        for wanted in left {
            match wanted.intersection(slice) {
                Some(part) => {
                    still.extend(around(&wanted, &part));
                    pieces.push(Piece { stored: at, part });
                }
                None => still.push(wanted),
            }
        }
        left = still;
        if left.is_empty() {
            return Ok(pieces);
        }
    }
    let first = left.into_iter().min_by_key(|slice| (slice.layers.start, slice.heads.start));
    Err(CoverError::Gap { missing: first.expect("else it had ended") })
}

/// What of `slice` is not in `part`, which is within it: layers before and after, and the heads beside.
fn around<'a>(slice: &'a Slice, part: &'a Slice) -> impl Iterator<Item = Slice> + 'a {
    let (layers, heads) = (&slice.layers, &slice.heads);
    let rest = [
        (layers.start..part.layers.start, heads.clone()),
        (part.layers.end..layers.end, heads.clone()),
        (part.layers.clone(), heads.start..part.heads.start),
        (part.layers.clone(), part.heads.end..heads.end),
    ];
    rest.into_iter().filter(|(layers, heads)| !layers.is_empty() && !heads.is_empty()).map(
        |(layers, heads)| Slice {
            layers,
            heads,
            layers_total: slice.layers_total,
            heads_total: slice.heads_total,
        },
    )
}

/// Why heads cannot be split over ranks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SplitError {
    /// There is no such rank.
    #[error("rank {rank} of {ranks}")]
    Rank {
        /// Which.
        rank: u16,
        /// How many there are.
        ranks: u16,
    },
    /// Neither does the number of ranks divide that of heads, nor the other way round.
    #[error("{heads_total} heads over {ranks} ranks")]
    Uneven {
        /// Heads.
        heads_total: u16,
        /// Ranks.
        ranks: u16,
    },
}

/// The KV heads of one rank, as engines split them: evenly, or, where ranks are more than heads, each head for as
/// many consecutive ranks as there are to it.
pub fn heads_of_rank(heads_total: u16, ranks: u16, rank: u16) -> Result<Range<u16>, SplitError> {
    if rank >= ranks {
        return Err(SplitError::Rank { rank, ranks });
    }
    if heads_total >= ranks && heads_total.is_multiple_of(ranks) {
        let each = heads_total / ranks;
        return Ok(rank * each..(rank + 1) * each);
    }
    if heads_total > 0 && ranks.is_multiple_of(heads_total) {
        let head = rank / (ranks / heads_total);
        return Ok(head..head + 1);
    }
    Err(SplitError::Uneven { heads_total, ranks })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn heads(heads: Range<u16>) -> Slice {
        Slice { heads, ..Slice::whole(2, 8) }
    }

    fn by(ranks: u16) -> Vec<Slice> {
        (0..ranks).map(|rank| heads(heads_of_rank(8, ranks, rank).unwrap())).collect()
    }

    #[test]
    fn a_reader_of_another_parallel_size_finds_its_heads() {
        // Of 2 workers, by 4: half a slice each.
        for (rank, wanted) in by(4).iter().enumerate() {
            assert_eq!(cover(wanted, &by(2)), Ok(vec![Piece { stored: rank / 2, part: wanted.clone() }]));
        }
        // Of 4 workers, by 1 and by 2: whole slices.
        let whole = |stored| Piece { stored, part: by(4)[stored].clone() };
        assert_eq!(cover(&heads(0..8), &by(4)), Ok((0..4).map(whole).collect()));
        assert_eq!(cover(&heads(4..8), &by(4)), Ok(vec![whole(2), whole(3)]));
        // Of 16 workers, two to a head.
        let twice = cover(&heads(2..4), &by(16)).unwrap();
        assert_eq!(twice.iter().map(|piece| piece.stored).collect::<Vec<_>>(), [4, 6]);
    }

    #[test]
    fn layers_of_another_pipeline_are_cut_too() {
        let stage = |layers, heads| Slice { layers, heads, ..Slice::whole(4, 4) };
        let stored = [stage(0..3, 0..2), stage(0..3, 2..4), stage(3..4, 0..2), stage(3..4, 2..4)];
        let wanted = stage(2..4, 1..3);
        let parts = [stage(2..3, 1..2), stage(2..3, 2..3), stage(3..4, 1..2), stage(3..4, 2..3)];
        let pieces = parts.into_iter().enumerate().map(|(stored, part)| Piece { stored, part }).collect();
        assert_eq!(cover(&wanted, &stored), Ok(pieces));
    }

    #[test]
    fn one_that_has_all_is_taken_alone() {
        let stored = [heads(0..4), heads(0..8), heads(4..8)];
        assert_eq!(cover(&heads(2..6), &stored), Ok(vec![Piece { stored: 1, part: heads(2..6) }]));
    }

    #[test]
    fn a_gap_is_named() {
        assert_eq!(cover(&heads(0..8), &[]), Err(CoverError::Gap { missing: heads(0..8) }));
        let stored = [heads(0..2), heads(3..8)];
        assert_eq!(cover(&heads(0..8), &stored), Err(CoverError::Gap { missing: heads(2..3) }));
    }

    #[test]
    fn what_is_no_slice_of_this_tensor_is_refused() {
        let other = Slice::whole(2, 16);
        let refused = CoverError::Tensor { stored: other.clone(), wanted: heads(0..8) };
        assert_eq!(cover(&heads(0..8), &[heads(0..4), other]), Err(refused));
        assert!(matches!(cover(&heads(3..3), &by(1)), Err(CoverError::Slice(_))));
        assert!(matches!(cover(&heads(0..8), &[heads(7..9)]), Err(CoverError::Slice(_))));
    }

    #[test]
    fn heads_are_split_evenly_or_not_at_all() {
        assert_eq!(heads_of_rank(8, 4, 3), Ok(6..8));
        assert_eq!(heads_of_rank(2, 8, 3), Ok(0..1));
        assert_eq!(heads_of_rank(2, 8, 4), Ok(1..2));
        assert_eq!(heads_of_rank(8, 4, 4), Err(SplitError::Rank { rank: 4, ranks: 4 }));
        assert_eq!(heads_of_rank(8, 0, 0), Err(SplitError::Rank { rank: 0, ranks: 0 }));
        assert_eq!(heads_of_rank(6, 4, 0), Err(SplitError::Uneven { heads_total: 6, ranks: 4 }));
        assert_eq!(heads_of_rank(0, 1, 0), Err(SplitError::Uneven { heads_total: 0, ranks: 1 }));
        assert_eq!(heads_of_rank(u16::MAX, 1, 0), Ok(0..u16::MAX));
    }

    fn slices() -> impl Strategy<Value = Slice> {
        let range = |total: u16| {
            (0..total).prop_flat_map(move |start| (start + 1..=total).prop_map(move |end| start..end))
        };
        (range(4), range(6)).prop_map(|(layers, heads)| Slice { layers, heads, ..Slice::whole(4, 6) })
    }

    fn cells(slice: &Slice) -> impl Iterator<Item = (u16, u16)> {
        slice.layers.clone().flat_map(|layer| slice.heads.clone().map(move |head| (layer, head)))
    }

    proptest! {
        #[test]
        fn pieces_are_disjoint_complete_and_stored(
            wanted in slices(), stored in prop::collection::vec(slices(), 0..8)
        ) {
            let has = |cell: &(u16, u16)| stored.iter().any(|slice| cells(slice).any(|other| other == *cell));
            match cover(&wanted, &stored) {
                Ok(pieces) => {
                    let mut taken: Vec<_> = pieces.iter().flat_map(|piece| cells(&piece.part)).collect();
                    taken.sort_unstable();
                    prop_assert_eq!(taken, cells(&wanted).collect::<Vec<_>>());
                    prop_assert!(pieces.iter().all(|piece| stored[piece.stored].contains(&piece.part)));
                    prop_assert!(pieces.is_sorted_by_key(|piece| piece.stored));
                }
                Err(CoverError::Gap { missing }) => {
                    prop_assert!(wanted.contains(&missing));
                    prop_assert!(!cells(&missing).any(|cell| has(&cell)));
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}
