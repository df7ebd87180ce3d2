//! Which bytes to ask for: blocks that lie close together in one request, and what is likely to be wanted next.

use std::ops::Range;

/// How far one request reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReachLimits {
    /// Bytes that nobody wants between two blocks of one request, at most.
    pub gap_bytes_max: u64,
    /// Of all bytes of a request so many in a hundred are wanted by nobody, at most.
    pub waste_percent_max: u64,
    /// Bytes of one request, at most; a longer block is a request of its own.
    pub span_bytes_max: u64,
    /// Blocks that are fetched although nobody asked yet, at most, after one that was read.
    pub ahead_blocks_max: usize,
    /// The same in bytes.
    pub ahead_bytes_max: u64,
}

impl Default for ReachLimits {
    /// Gaps up to 1 MiB and 20 % in requests up to 32 MiB; 16 blocks or 32 MiB ahead.
    fn default() -> Self {
        Self {
            gap_bytes_max: 1 << 20,
            waste_percent_max: 20,
            span_bytes_max: 32 << 20,
            ahead_blocks_max: 16,
            ahead_bytes_max: 32 << 20,
        }
    }
}

/// One request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Span {
    /// What to read of the pack, in bytes from its start.
    pub range: Range<u64>,
    /// Which of the wanted ranges lie in it, by their place in the list, in order of where they lie.
    pub wanted: Vec<usize>,
}

/// The requests that bring every wanted range of one pack. A range that overlaps another gets a request of its own.
pub fn spans(wanted: &[Range<u64>], limits: &ReachLimits) -> Vec<Span> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by_key(|index| (wanted[*index].start, *index));
    let mut spans: Vec<Span> = Vec::new();
    // Bytes that nobody wants in the last one.
    let mut waste = 0;
    for index in order {
        let range = &wanted[index];
        let joined = spans.last_mut().and_then(|span| {
            let gap = range.start.checked_sub(span.range.end)?;
            let bytes = range.end - span.range.start;
            let sparse = (waste + gap) * 100 > bytes * limits.waste_percent_max;
            let apart = gap > limits.gap_bytes_max || bytes > limits.span_bytes_max || sparse;
            (!apart).then_some((span, gap))
        });
        if let Some((span, gap)) = joined {
            waste += gap;
            span.range.end = range.end;
            span.wanted.push(index);
        } else {
            waste = 0;
            spans.push(Span { range: range.clone(), wanted: vec![index] });
        }
    }
    spans
}

/// A block of a pack, as far as its order matters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Its length in bytes.
    pub bytes: u32,
    /// It continues the prefix of the block before it.
    pub follows: bool,
}

/// How many of `behind`, the blocks that lie behind one that was read, to fetch as well: those that continue its
/// prefix. Whoever reads the head of a prefix reads the rest of it next.
pub fn ahead(behind: impl Iterator<Item = Step>, limits: &ReachLimits) -> usize {
    let mut bytes = 0;
    behind
        .take(limits.ahead_blocks_max)
        .take_while(|step| {
            bytes += u64::from(step.bytes);
            step.follows && bytes <= limits.ahead_bytes_max
        })
        .count()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: ReachLimits = ReachLimits {
        gap_bytes_max: 50,
        waste_percent_max: 20,
        span_bytes_max: 1000,
        ahead_blocks_max: 4,
        ahead_bytes_max: 350,
    };

    #[test]
    fn neighbours_share_a_request_and_strangers_do_not() {
        let found = |wanted: &[Range<u64>]| {
            spans(wanted, &LIMITS).into_iter().map(|span| (span.range, span.wanted)).collect::<Vec<_>>()
        };
        assert_eq!(found(&[]), []);
        assert_eq!(found(&[100..200, 0..100]), [(0..200, vec![1, 0])], "back to back, in any order");
        assert_eq!(found(&[0..400, 450..500]), [(0..500, vec![0, 1])], "a small gap");
        assert_eq!(found(&[0..400, 451..900]), [(0..400, vec![0]), (451..900, vec![1])], "a gap too long");
        assert_eq!(found(&[0..50, 90..140]), [(0..50, vec![0]), (90..140, vec![1])], "mostly gap");
        assert_eq!(found(&[0..600, 600..1001]), [(0..600, vec![0]), (600..1001, vec![1])], "too long");
        let long = std::slice::from_ref(&(0..5000));
        assert_eq!(found(long), [(0..5000, vec![0])], "a long block is one request all the same");
        assert_eq!(found(&[0..100, 0..100]), [(0..100, vec![0]), (0..100, vec![1])], "twice the same");
    }

    #[test]
    fn the_rest_of_a_prefix_is_fetched_and_no_more() {
        let step = |bytes, follows| Step { bytes, follows };
        let count = |steps: &[Step]| ahead(steps.iter().copied(), &LIMITS);
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[step(100, false), step(100, true)]), 0, "another prefix begins");
        assert_eq!(count(&[step(100, true), step(100, true), step(100, false)]), 2);
        assert_eq!(count(&[step(10, true); 9]), 4, "so many blocks");
        assert_eq!(count(&[step(100, true); 9]), 3, "so many bytes");
    }

    proptest! {
        #[test]
        fn every_range_is_read_once_and_little_else(
            lengths in proptest::collection::vec((0u64..200, 1u64..300), 0..60)
        ) {
            let mut at = 0;
            let wanted: Vec<_> = lengths.iter().map(|(gap, bytes)| {
                let from = at + gap;
                at = from + bytes;
                from..at
            }).collect();
            let spans = spans(&wanted, &LIMITS);
            let mut seen = vec![0; wanted.len()];
            for span in &spans {
                let mut used = 0;
                for index in &span.wanted {
                    seen[*index] += 1;
                    used += wanted[*index].end - wanted[*index].start;
                    prop_assert!(span.range.start <= wanted[*index].start && wanted[*index].end <= span.range.end);
                }
                let bytes = span.range.end - span.range.start;
                prop_assert!(span.wanted.len() == 1 || bytes <= LIMITS.span_bytes_max);
                prop_assert!((bytes - used) * 100 <= bytes * LIMITS.waste_percent_max);
            }
            prop_assert!(seen.iter().all(|count| *count == 1));
            prop_assert!(spans.windows(2).all(|pair| pair[0].range.end <= pair[1].range.start));
        }
    }
}
