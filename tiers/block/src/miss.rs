//! Why a lookup did not find a block. A miss is a result, not an error, and it always says why.

use serde::{Deserialize, Serialize};

/// What drove a block out.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Eviction {
    /// The eviction policy, for room.
    Capacity,
    /// The tenant's own quota.
    Quota,
    /// A caller asked for it (`evict`, `purge`).
    Request,
    /// Its disk segment was taken back and the block was not worth moving.
    Reclaim,
}

/// Why a block is not there. The discriminants stand in shared memory and on the wire: never reorder.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum MissReason {
    /// This node has no memory of the key.
    NeverStored = 1,
    /// Pushed out by the eviction policy.
    EvictedCapacity = 2,
    /// Pushed out because the tenant was over its quota.
    EvictedQuota = 3,
    /// Removed because a caller asked.
    EvictedRequest = 4,
    /// Its segment was reclaimed and the block was not hot enough to move.
    EvictedReclaim = 5,
    /// Its time to live ended.
    Expired = 6,
    /// The same tokens are stored under another scope; the answer names the fields that differ.
    ScopeDiffers = 7,
    /// The bytes failed their checksum and were set aside.
    Corrupt = 8,
    /// It is on a tier that is out of service for now.
    TierDegraded = 9,
    /// Announced, its bytes have not all arrived.
    NotComplete = 10,
    /// The tenant's quota left no room to bring it in.
    Quota = 11,
    /// The tier did not answer before the caller's deadline.
    TierTimeout = 12,
    /// The admission policy did not find it worth keeping.
    AdmissionRejected = 13,
    /// The node had no free slot or I/O budget to bring it up in time.
    Overloaded = 14,
    /// The peer that has it cannot be reached.
    PeerDown = 15,
    /// Every path to the peer that has it failed.
    PathFailed = 16,
    /// A peer had it and does not any more.
    PeerEvicted = 17,
}

impl MissReason {
    /// Every reason, in wire order.
    pub const ALL: [Self; 17] = [
        Self::NeverStored,
        Self::EvictedCapacity,
        Self::EvictedQuota,
        Self::EvictedRequest,
        Self::EvictedReclaim,
        Self::Expired,
        Self::ScopeDiffers,
        Self::Corrupt,
        Self::TierDegraded,
        Self::NotComplete,
        Self::Quota,
        Self::TierTimeout,
        Self::AdmissionRejected,
        Self::Overloaded,
        Self::PeerDown,
        Self::PathFailed,
        Self::PeerEvicted,
    ];

    /// The reason with this wire number.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).wrapping_sub(1)).copied()
    }

    /// Label in metrics, JSON and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NeverStored => "never_stored",
            Self::EvictedCapacity => "evicted_capacity",
            Self::EvictedQuota => "evicted_quota",
            Self::EvictedRequest => "evicted_request",
            Self::EvictedReclaim => "evicted_reclaim",
            Self::Expired => "expired",
            Self::ScopeDiffers => "scope_differs",
            Self::Corrupt => "corrupt",
            Self::TierDegraded => "tier_degraded",
            Self::NotComplete => "not_complete",
            Self::Quota => "quota",
            Self::TierTimeout => "tier_timeout",
            Self::AdmissionRejected => "admission_rejected",
            Self::Overloaded => "overloaded",
            Self::PeerDown => "peer_down",
            Self::PathFailed => "path_failed",
            Self::PeerEvicted => "peer_evicted",
        }
    }
}

impl From<Eviction> for MissReason {
    fn from(by: Eviction) -> Self {
        match by {
            Eviction::Capacity => Self::EvictedCapacity,
            Eviction::Quota => Self::EvictedQuota,
            Eviction::Request => Self::EvictedRequest,
            Eviction::Reclaim => Self::EvictedReclaim,
        }
    }
}

impl std::fmt::Display for MissReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_numbers_go_there_and_back() {
        for reason in MissReason::ALL {
            assert_eq!(MissReason::from_wire(reason as u8), Some(reason));
        }
        assert_eq!(MissReason::from_wire(0), None);
        assert_eq!(MissReason::from_wire(18), None);
    }
}
