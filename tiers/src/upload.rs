//! Which blocks are worth a place in the object store. A plain function of plain values; whoever knows them asks.
//!
//! What was never read is not worth the requests: most blocks are not. What comes back is what somebody waits for, and
//! what follows it in its prefix.

use std::time::Duration;

use kv_block::Priority;

/// What is known of a block that could be uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UploadCandidate {
    /// Its retention class.
    pub priority: Priority,
    /// Somebody pinned it.
    pub pinned: bool,
    /// Times it was read since it was stored.
    pub reads: u32,
    /// How long ago it was stored.
    pub age: Duration,
    /// How long it will still count; `None`: for ever.
    pub life: Option<Duration>,
    /// It is about to leave the last tier of this node that has it.
    pub leaving: bool,
}

/// What is uploaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UploadLimits {
    /// Reads that a normal block needs.
    pub reads_min: u32,
    /// Age that it needs as well: what is young is read by those who made it.
    pub age_min: Duration,
    /// What counts for less than this is not worth a pack.
    pub life_min: Duration,
}

impl Default for UploadLimits {
    /// 1 read, 30 s, 10 minutes.
    fn default() -> Self {
        Self { reads_min: 1, age_min: Duration::from_secs(30), life_min: Duration::from_secs(600) }
    }
}

/// Whether a block is uploaded, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Upload {
    /// Somebody pinned it or gave it high priority: it goes at once.
    Asked,
    /// It was read, and not only when it was young.
    Proven,
    /// It was read, and would be gone otherwise.
    Leaving,
    /// Not yet; ask again.
    TooYoung,
    /// Nobody reads it.
    Unread,
    /// It has low priority.
    Low,
    /// It will not count for long.
    ShortLived,
}

impl Upload {
    /// Whether it goes.
    pub fn goes(self) -> bool {
        matches!(self, Self::Asked | Self::Proven | Self::Leaving)
    }
}

/// Whether a block is uploaded. What was asked for goes whatever else is said, unless it will not count for long.
pub fn upload(candidate: &UploadCandidate, limits: &UploadLimits) -> Upload {
    let UploadCandidate { priority, pinned, reads, age, life, leaving } = *candidate;
    let read = reads >= limits.reads_min;
    match priority {
        _ if life.is_some_and(|life| life < limits.life_min) => Upload::ShortLived,
        _ if pinned => Upload::Asked,
        Priority::High => Upload::Asked,
        Priority::Low => Upload::Low,
        Priority::Normal if !read => Upload::Unread,
        Priority::Normal if leaving => Upload::Leaving,
        Priority::Normal if age < limits.age_min => Upload::TooYoung,
        Priority::Normal => Upload::Proven,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_is_read_is_uploaded_and_what_is_asked_for_at_once() {
        let plain = UploadCandidate {
            priority: Priority::Normal,
            pinned: false,
            reads: 1,
            age: seconds(30),
            life: None,
            leaving: false,
        };
        let table = [
            (plain, Upload::Proven),
            (UploadCandidate { reads: 0, ..plain }, Upload::Unread),
            (UploadCandidate { reads: 0, leaving: true, ..plain }, Upload::Unread),
            (UploadCandidate { age: seconds(29), ..plain }, Upload::TooYoung),
            (UploadCandidate { age: seconds(29), leaving: true, ..plain }, Upload::Leaving),
            (UploadCandidate { priority: Priority::Low, ..plain }, Upload::Low),
            (UploadCandidate { priority: Priority::Low, pinned: true, ..plain }, Upload::Asked),
            (UploadCandidate { priority: Priority::High, reads: 0, age: seconds(0), ..plain }, Upload::Asked),
            (UploadCandidate { pinned: true, life: Some(seconds(599)), ..plain }, Upload::ShortLived),
            (UploadCandidate { life: Some(seconds(600)), ..plain }, Upload::Proven),
        ];
        for (candidate, wanted) in table {
            assert_eq!(upload(&candidate, &UploadLimits::default()), wanted, "{candidate:?}");
        }
        let goes = [Upload::Asked, Upload::Proven, Upload::Leaving];
        assert!(table.iter().all(|(_, ascent)| ascent.goes() == goes.contains(ascent)));
    }
}
