//! KV events: what a node tells the world about its blocks, in order.

use crate::{BindingTag, BlockKey, Epoch, Tier};

/// One entry of a node's event log. `(epoch, number)` orders all events of a node; a gap means loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockEvent {
    /// Daemon epoch the event belongs to.
    pub epoch: Epoch,
    /// Position in the epoch, from 1, without gaps.
    pub number: u64,
    /// What happened.
    pub kind: EventKind,
}

/// What happened to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// It can now be read from this tier.
    Stored {
        /// Which block.
        key: BlockKey,
        /// What it was stored under.
        tag: BindingTag,
        /// Where it is.
        tier: Tier,
    },
    /// It can no longer be read from this tier.
    Removed {
        /// Which block.
        key: BlockKey,
        /// Where it was.
        tier: Tier,
    },
    /// Nothing is left on this tier.
    Cleared {
        /// Which tier.
        tier: Tier,
    },
}
