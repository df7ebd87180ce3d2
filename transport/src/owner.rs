//! The end that has blocks: what it holds for one reader, and for how long.
//!
//! ```text
//!   Want --> Hold --Held--> room for its bytes? --> Expose on each path --each Exposed--> granted
//!              |                    |                        |                               |
//!              +--------------------+------------------------+--> missed         Done, time over, connection gone
//!                                                                                            v
//!                                                   forgotten <--each Concealed-- Conceal on each path
//! ```
//! Memory that a device may read stays held, and counts against the reader's credits, until every device said that
//! it does not. Here stands what an owner is told and what it says; the machine is in three files:
//! ```text
//!   machine.rs   the connection: Hello, questions, silence; one match over every event
//!   leases.rs    a want from hold to concealment
//!   report.rs    what an owner knows, and what it says about itself
//! ```

use kv_arena::Held;
use kv_block::{BlockKey, MissReason, Tier};
use kv_wire::message::{Answer, Ask, Found, Offer, PathEnd, Taken, WantId, Window};

use crate::Micros;
use crate::link::LinkError;
use crate::reader::PathId;

mod leases;
pub(crate) mod machine;
mod report;
#[cfg(test)]
mod tests;

pub use report::{LeaseReport, OwnerConfig, OwnerPath, OwnerReport, OwnerState};

/// Something that happened to an owner.
#[derive(Debug)]
pub enum OwnerEvent {
    /// The reader said something.
    Heard(Ask),
    /// The reader said something that is no message.
    Nonsense {
        /// What.
        why: String,
    },
    /// The control connection is gone.
    Disconnected,
    /// A block that was asked for is here.
    Held {
        /// Which want.
        want: WantId,
        /// The block.
        block: Held,
        /// Where it was.
        tier: Tier,
    },
    /// A block that was asked for cannot be had.
    NotHeld {
        /// Which want.
        want: WantId,
        /// Why.
        reason: MissReason,
    },
    /// The answer to [`OwnerCommand::Look`].
    Looked(Found),
    /// The answer to [`OwnerCommand::Offered`].
    Took(Taken),
    /// The reader may read a block by a path, or that path cannot do it.
    Exposed {
        /// By which path.
        path: PathId,
        /// Which.
        want: WantId,
        /// Where.
        result: Result<Option<Window>, LinkError>,
    },
    /// A path is done with a block.
    Concealed {
        /// By which path.
        path: PathId,
        /// Which.
        want: WantId,
        /// The block, back.
        block: Held,
    },
    /// A path can be used, or no longer.
    Path {
        /// Which.
        path: PathId,
        /// Whether.
        up: Result<(), String>,
    },
    /// The answer to [`OwnerCommand::Open`]: how this side's end is reached; without words, there is none.
    Opened(PathEnd),
    /// This node is about to leave, or stays after all.
    Leaving {
        /// Whether.
        leaving: bool,
    },
    /// Nothing; time passed.
    Tick,
}

/// Something to do.
#[derive(Debug)]
pub enum OwnerCommand {
    /// Say this on the control connection.
    Say(Answer),
    /// Close it, with all data paths; no `Disconnected` follows.
    Hangup {
        /// Why, for the log.
        why: String,
    },
    /// Get a hold on a block: answer with `Held` or `NotHeld`.
    Hold {
        /// For which want.
        want: WantId,
        /// Name of the principal whose block it is.
        principal: String,
        /// Name.
        key: BlockKey,
        /// Until when it may be brought up or waited for; `None`: only if it is in memory now.
        until: Option<Micros>,
    },
    /// Nobody waits for it any more; an answer may still come.
    Unhold {
        /// For which want.
        want: WantId,
    },
    /// See which of these are here: answer with `Looked`.
    Look {
        /// Given back.
        id: u64,
        /// Name of the principal.
        principal: String,
        /// Names.
        keys: Vec<BlockKey>,
    },
    /// The reader leaves and offers blocks: answer with `Took` when all that are wanted were fetched.
    Offered {
        /// Name of the principal.
        principal: String,
        /// Blocks.
        offer: Offer,
    },
    /// Let the reader read a block.
    Expose {
        /// By this path.
        path: PathId,
        /// Under this number.
        want: WantId,
        /// The block.
        block: Held,
    },
    /// End that: `Concealed` follows.
    Conceal {
        /// By this path.
        path: PathId,
        /// Which.
        want: WantId,
    },
    /// The reader wants a path: open this side's end and answer with `Opened` how it is reached, or that there is
    /// none.
    Open {
        /// Its end.
        end: PathEnd,
    },
}
