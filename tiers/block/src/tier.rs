//! Where a block may live, and how much its owner cares.

use serde::{Deserialize, Serialize};

/// The four tiers, fastest first (G1 to G4 in Dynamo's texts).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// GPU memory.
    Device,
    /// Host memory.
    Host,
    /// Local SSD.
    Disk,
    /// Object store.
    Object,
}

impl Tier {
    /// Every tier, fastest first.
    pub const ALL: [Self; 4] = [Self::Device, Self::Host, Self::Disk, Self::Object];

    /// Name in text, metrics and protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
            Self::Object => "object",
        }
    }
}

/// Retention class of a block: eviction takes the lowest class first.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// First to go.
    Low,
    /// What nobody asked for specially.
    #[default]
    Normal,
    /// Last to go.
    High,
}

impl Priority {
    /// Every class, first to go first.
    pub const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    /// Name in text and protocol.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }

    /// The class with this number; anything unknown is `Normal`.
    pub fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Low,
            2 => Self::High,
            _ => Self::Normal,
        }
    }
}
