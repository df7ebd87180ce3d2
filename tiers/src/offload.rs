//! Down a tier: what to do with blocks that leave the host, and with blocks whose disk segment is taken back.
//! Pure decisions over a batch; the caller does what they say.
//!
//! ```text
//!   victim --- on disk already, expired, not admitted, disk out of service ---> go     retire its slot now
//!          --- admitted, disk has room in its queue ----------------------> write  then retire its slot
//!          --- admitted, disk has none ------------------------------------> over   wait, or go unwritten
//!
//!   entry of a segment --- nobody's any more, expired --------> (nothing)  the space comes back by itself
//!          --- alive, also in host memory, or never read -----> drop   it is still up there, or not worth it
//!          --- alive, read since it was written, or High -----> move   hottest first, half a segment at most
//! ```

use kv_block::{DiskLocation, Generation, Priority, Record, SlotId};

/// A block that should leave the host tier.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Victim {
    /// Its slot.
    pub slot: SlotId,
    /// Its slot's life.
    pub generation: Generation,
    /// What it is.
    pub record: Record,
}

/// What is known about a victim beside its record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// It is on disk already.
    pub on_disk: bool,
    /// Its time to live is over.
    pub expired: bool,
    /// Admission wants it on disk. Only asked for what is neither of the above.
    pub admitted: bool,
}

/// How much the disk takes now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DiskRoom {
    /// Bytes that may still be queued.
    pub bytes: u64,
    /// Writes that may still be queued; 0 when the disk tier is absent.
    pub ops: u64,
    /// False when the tier is absent or out of service: then nobody waits for it.
    pub serving: bool,
}

/// What to do with a batch of victims.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OffloadPlan {
    /// Retire now; the second says why nothing is written.
    pub go: Vec<(Victim, Unwritten)>,
    /// Write to disk, then retire.
    pub write: Vec<Victim>,
    /// Worth a write, but the disk's queue is full. Let them stay if the need can wait; else retire.
    pub over: Vec<Victim>,
}

/// Why a victim leaves without a write.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unwritten {
    /// Its bytes are on disk.
    OnDisk,
    /// Its time to live is over.
    Expired,
    /// Admission did not find it worth a write.
    NotAdmitted,
    /// There is no disk tier that serves.
    NoDisk,
}

/// Decides for each victim, in order.
pub fn plan_offload(
    victims: impl IntoIterator<Item = Victim>,
    mut room: DiskRoom,
    mut look: impl FnMut(&Victim) -> Standing,
) -> OffloadPlan {
    let mut plan = OffloadPlan::default();
    for victim in victims {
        let standing = look(&victim);
        let unwritten = match standing {
            Standing { on_disk: true, .. } => Some(Unwritten::OnDisk),
            Standing { expired: true, .. } => Some(Unwritten::Expired),
            _ if !room.serving => Some(Unwritten::NoDisk),
            Standing { admitted: false, .. } => Some(Unwritten::NotAdmitted),
            _ => None,
        };
        let bytes = u64::from(victim.record.bytes);
        match unwritten {
            Some(why) => plan.go.push((victim, why)),
            None if room.ops > 0 && bytes <= room.bytes => {
                room.ops -= 1;
                room.bytes -= bytes;
                plan.write.push(victim);
            }
            None => plan.over.push(victim),
        }
    }
    plan
}

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

/// Decides what of a segment is worth writing again. `look` gives `None` for what the catalog does not have
/// at that place. `move_bytes_max` bounds the moves, so that reclaim always frees more than it takes: half a
/// segment is right. Only pinned blocks may exceed it.
pub fn plan_reclaim(
    entries: &[(Record, DiskLocation)],
    move_bytes_max: u64,
    mut look: impl FnMut(&Record, DiskLocation) -> Option<OnSegment>,
) -> ReclaimPlan {
    let mut alive: Vec<(u8, usize)> = Vec::new();
    let mut plan = ReclaimPlan::default();
    for (index, &(record, at)) in entries.iter().enumerate() {
        let Some(known) = look(&record, at) else { continue };
        let heat = match known {
            OnSegment { pinned: true, .. } => 5,
            OnSegment { expired: true, .. } | OnSegment { in_host: true, .. } => 0,
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
    let mut room = move_bytes_max;
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

    fn victim(n: u8) -> Victim {
        Victim { slot: SlotId(n.into()), generation: Generation(1), record: record(n, 100) }
    }

    fn at(n: u8) -> DiskLocation {
        DiskLocation::new(1, 1, n.into()).unwrap()
    }

    const ROOM: DiskRoom = DiskRoom { bytes: 1000, ops: 10, serving: true };

    #[test]
    fn each_standing_has_its_way_out() {
        let base = Standing { on_disk: false, expired: false, admitted: false };
        let closed = DiskRoom { serving: false, ..ROOM };
        let full = DiskRoom { ops: 0, ..ROOM };
        let go = |why| OffloadPlan { go: vec![(victim(1), why)], ..OffloadPlan::default() };
        let write = OffloadPlan { write: vec![victim(1)], ..OffloadPlan::default() };
        let over = OffloadPlan { over: vec![victim(1)], ..OffloadPlan::default() };
        let wanted = Standing { admitted: true, ..base };
        for (standing, room, plan) in [
            (base, ROOM, go(Unwritten::NotAdmitted)),
            (base, closed, go(Unwritten::NoDisk)),
            (base, full, go(Unwritten::NotAdmitted)),
            (wanted, ROOM, write),
            (wanted, closed, go(Unwritten::NoDisk)),
            (wanted, full, over.clone()),
            (wanted, DiskRoom { bytes: 99, ..ROOM }, over),
            (Standing { on_disk: true, ..wanted }, ROOM, go(Unwritten::OnDisk)),
            (Standing { on_disk: true, ..wanted }, full, go(Unwritten::OnDisk)),
            (Standing { expired: true, ..wanted }, ROOM, go(Unwritten::Expired)),
        ] {
            assert_eq!(plan_offload([victim(1)], room, |_| standing), plan, "{standing:?} {room:?}");
        }
    }

    #[test]
    fn writes_stop_where_the_disk_has_no_room_left() {
        let wanted = Standing { on_disk: false, expired: false, admitted: true };
        let room = DiskRoom { bytes: 250, ..ROOM };
        let plan = plan_offload((0..5).map(victim), room, |_| wanted);
        assert_eq!(plan.write, [victim(0), victim(1)]);
        assert_eq!(plan.over, [victim(2), victim(3), victim(4)]);
    }

    #[test]
    fn a_segment_gives_up_what_nobody_reads() {
        let entries: Vec<_> = (0..8).map(|n| (record(n, 100), at(n))).collect();
        let cold = OnSegment { in_host: false, expired: false, frequency: 0, pinned: false };
        let plan = plan_reclaim(&entries, 1000, |record, _| match record.key.0[0] {
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
        let plan = plan_reclaim(&entries, 250, |record, _| {
            let frequency = [1, 1, 3, 1, 1, 0][usize::from(record.key.0[0])];
            Some(OnSegment { in_host: false, expired: false, frequency, pinned: false })
        });
        assert_eq!(plan.moves, [entries[2], entries[5]]);
        assert_eq!(plan.drops, [entries[0], entries[1], entries[3], entries[4]]);
        let pinned = OnSegment { in_host: false, expired: false, frequency: 0, pinned: true };
        assert_eq!(plan_reclaim(&entries, 0, |_, _| Some(pinned)).moves, entries, "pins are not bounded");
    }
}
