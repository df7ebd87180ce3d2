//! What to do with the blocks of a disk segment that is taken back. A pure decision over its index; the caller
//! does what it says.
//!
//! ```text
//!   entry of a segment --- nobody's any more, expired --------> (nothing)  the space comes back by itself
//!          --- alive, and the disk is less than half alive ---> move   what is dead elsewhere makes the room
//!          --- alive, read since it was written, or High -----> move   hottest first, half a segment at most
//!          --- alive, also in host memory, or never read -----> drop   it is still up there, or not worth it
//! ```

use kv_block::{DiskLocation, Priority, Record};

/// What the catalog knows about an entry of a segment that is taken back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OnSegment {
    /// It is in host memory too.
    pub in_host: bool,
    /// Its time to live is over.
    pub expired: bool,
    /// How often it was read lately, 0 to 3.
    pub frequency: u8,
    /// Somebody wants it kept whatever its use, as by a pin.
    pub pinned: bool,
}

/// What to do before a segment is released.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ReclaimPlan {
    /// Move to the end of the log, in log order.
    pub moves: Vec<(Record, DiskLocation)>,
    /// Take off the disk tier.
    pub drops: Vec<(Record, DiskLocation)>,
}

/// How much of a segment may be written again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MoveLimit {
    /// Everything that is alive: at least half of the disk is dead, so nothing need leave for room.
    All,
    /// So many bytes, so that reclaim always frees more than it takes: half a segment is right. Only pinned
    /// blocks may exceed it.
    Bytes(u64),
}

/// Decides what of a segment is worth writing again. `look` gives `None` for what the catalog does not have
/// at that place.
pub fn plan_reclaim(
    entries: &[(Record, DiskLocation)],
    limit: MoveLimit,
    mut look: impl FnMut(&Record, DiskLocation) -> Option<OnSegment>,
) -> ReclaimPlan {
    let mut alive: Vec<(u8, usize)> = Vec::new();
    let mut plan = ReclaimPlan::default();
    for (index, &(record, at)) in entries.iter().enumerate() {
        let Some(known) = look(&record, at) else { continue };
        let heat = match known {
            OnSegment { pinned: true, .. } => 5,
            OnSegment { expired: true, .. } => 0,
            _ if limit == MoveLimit::All => 1,
            OnSegment { in_host: true, .. } => 0,
            _ if record.priority == Priority::High => 4,
            _ => known.frequency.min(3),
        };
        match heat {
            0 => plan.drops.push((record, at)),
            _ => alive.push((heat, index)),
        }
    }
    // Hottest first, then in log order.
    alive.sort_by_key(|(heat, index)| (std::cmp::Reverse(*heat), *index));
    let mut room = match limit {
        MoveLimit::All => u64::MAX,
        MoveLimit::Bytes(bytes) => bytes,
    };
    let mut moves = Vec::new();
    for (heat, index) in alive {
        let bytes = u64::from(entries[index].0.bytes);
        if heat == 5 || bytes <= room {
            room = room.saturating_sub(bytes);
            moves.push(index);
        } else {
            plan.drops.push(entries[index]);
        }
    }
    moves.sort_unstable();
    plan.moves = moves.into_iter().map(|index| entries[index]).collect();
    plan
}

#[cfg(test)]
mod tests {
    use kv_block::{BindingTag, BlockKey, Checksum};

    use super::*;

    fn record(n: u8, bytes: u32) -> Record {
        Record {
            key: BlockKey([n; 16]),
            checksum: Checksum(n.into()),
            bytes,
            tag: BindingTag(1),
            priority: Priority::Normal,
            expires_at: 0,
        }
    }

    fn at(n: u8) -> DiskLocation {
        DiskLocation::new(1, 1, n.into()).unwrap()
    }

    #[test]
    fn a_segment_gives_up_what_nobody_reads() {
        let entries: Vec<_> = (0..8).map(|n| (record(n, 100), at(n))).collect();
        let cold = OnSegment { in_host: false, expired: false, frequency: 0, pinned: false };
        let plan = plan_reclaim(&entries, MoveLimit::Bytes(1000), |record, _| match record.key.0[0] {
            0 => None,
            1 => Some(cold),
            2 => Some(OnSegment { frequency: 1, ..cold }),
            3 => Some(OnSegment { frequency: 3, in_host: true, ..cold }),
            4 => Some(OnSegment { frequency: 3, expired: true, ..cold }),
            5 => Some(OnSegment { pinned: true, expired: true, in_host: true, ..cold }),
            6 => Some(OnSegment { frequency: 3, ..cold }),
            _ => None,
        });
        assert_eq!(plan.moves, [entries[2], entries[5], entries[6]]);
        assert_eq!(plan.drops, [entries[1], entries[3], entries[4]]);
    }

    #[test]
    fn moves_are_bounded_and_the_hottest_come_first() {
        let mut entries: Vec<_> = (0..6).map(|n| (record(n, 100), at(n))).collect();
        entries[5].0.priority = Priority::High;
        let plan = plan_reclaim(&entries, MoveLimit::Bytes(250), |record, _| {
            let frequency = [1, 1, 3, 1, 1, 0][usize::from(record.key.0[0])];
            Some(OnSegment { in_host: false, expired: false, frequency, pinned: false })
        });
        assert_eq!(plan.moves, [entries[2], entries[5]]);
        assert_eq!(plan.drops, [entries[0], entries[1], entries[3], entries[4]]);
        let pinned = OnSegment { in_host: false, expired: false, frequency: 0, pinned: true };
        assert_eq!(
            plan_reclaim(&entries, MoveLimit::Bytes(0), |_, _| Some(pinned)).moves,
            entries,
            "pins are not bounded"
        );
    }

    #[test]
    fn nothing_alive_leaves_while_half_of_the_disk_is_dead() {
        let entries: Vec<_> = (0..4).map(|n| (record(n, 100), at(n))).collect();
        let plan = plan_reclaim(&entries, MoveLimit::All, |record, _| match record.key.0[0] {
            0 => None,
            1 => Some(OnSegment { in_host: false, expired: true, frequency: 3, pinned: false }),
            2 => Some(OnSegment { in_host: true, expired: false, frequency: 0, pinned: false }),
            _ => Some(OnSegment { in_host: false, expired: false, frequency: 0, pinned: false }),
        });
        assert_eq!(plan, ReclaimPlan { moves: vec![entries[2], entries[3]], drops: vec![entries[1]] });
    }
}
