//! One path to a peer: what every device that moves bytes promises.
//!
//! A link takes owned operations and gives them back as completions, like a store does: memory under I/O belongs to
//! the operation and returns with it, success or not, and only when the device is done with it. Nothing blocks.
//!
//! ```text
//!   owner's end    submit(Expose{want, block})   ->  Exposed{want, window}    the peer may read it from now on
//!                  submit(Conceal{want})         ->  Concealed{want, block}   no read touches it any more
//!   reader's end   submit(Read{read, want, ...}) ->  Read{read, into, result} checked against the record
//!                  submit(Cancel{read})          ->  its Read, sooner
//!   either end     the other end is gone         ->  everything comes back, then Broken
//! ```
//! Each operation that was taken ends in exactly one completion; a cancel has none of its own. A read of what is not
//! exposed fails, at the owner's device and not by the reader's good manners.

use std::sync::Arc;

use kv_arena::{Held, Slot};
use kv_block::Record;
use kv_wire::message::{ReadId, WantId, Window};

/// One operation. It owns its memory.
#[derive(Debug)]
pub enum LinkOp {
    /// Lets the peer read a block.
    Expose {
        /// Under this number.
        want: WantId,
        /// The block, held until the device is done with it.
        block: Held,
    },
    /// Ends that. A read under way may still end well; none begins.
    Conceal {
        /// Which.
        want: WantId,
    },
    /// Reads a block that the peer exposed.
    Read {
        /// Given back in the completion.
        read: ReadId,
        /// Under which number it is exposed.
        want: WantId,
        /// Where, for a device that reads by itself.
        window: Option<Window>,
        /// What is expected: length and checksum are compared.
        record: Record,
        /// Where to put it; at least as long as the block.
        into: Slot,
    },
    /// Ends a read early. Nothing happens when it has ended already.
    Cancel {
        /// Which.
        read: ReadId,
    },
}

/// A completion.
#[derive(Debug)]
pub enum LinkDone {
    /// The peer may read it, or the device cannot do that and has let go of the block.
    Exposed {
        /// Which.
        want: WantId,
        /// Where; `None` for a path that needs no window.
        result: Result<Option<Window>, LinkError>,
    },
    /// The peer cannot read it any more, and no read under way touches it.
    Concealed {
        /// Which.
        want: WantId,
        /// The block, back.
        block: Held,
    },
    /// A read has ended.
    Read {
        /// Which.
        read: ReadId,
        /// The slot, back: its first bytes are the block when the result says so, and worthless otherwise.
        into: Slot,
        /// How.
        result: Result<(), LinkError>,
    },
    /// The path is gone for good. Comes once, after everything that was under way.
    Broken {
        /// Why.
        why: LinkError,
    },
}

/// Why an operation on a link failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LinkError {
    /// The owner lets this reader read it no more, or never did.
    #[error("the grant is over")]
    Gone,
    /// The bytes that came are not those of the record.
    #[error("the bytes that arrived fail their checksum")]
    Corrupt,
    /// The other end broke the rules of the path.
    #[error("the peer broke the protocol: {what}")]
    Protocol {
        /// Which rule.
        what: &'static str,
    },
    /// The path failed under it.
    #[error("the path failed: {what}")]
    Path {
        /// What the device or kernel said.
        what: String,
    },
    /// It was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The device cannot do that.
    #[error("the device cannot do that: {what}")]
    Unsupported {
        /// What.
        what: String,
    },
}

/// What is under way on a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LinkUsage {
    /// Operations that have not come back.
    pub in_flight: usize,
    /// How many it takes at once.
    pub in_flight_max: usize,
    /// Bytes of reads and exposures under way.
    pub bytes: u64,
}

/// Called, from any thread, when [`Link::poll`] has something.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// One end of one path. Dropped, it lets the device finish with all memory before that is given back.
pub trait Link: Send {
    /// Starts an operation, or gives it back when as many are under way as the link takes, or it is broken.
    /// A conceal and a cancel are always taken.
    #[allow(clippy::result_large_err, reason = "the operation comes back whole")]
    fn submit(&mut self, op: LinkOp) -> Result<(), LinkOp>;
    /// Hands over to the device what was submitted; batches begin to move here at the latest.
    fn kick(&mut self);
    /// Appends what has ended.
    fn poll(&mut self, done: &mut Vec<LinkDone>);
    /// What is under way.
    fn usage(&self) -> LinkUsage;
}
