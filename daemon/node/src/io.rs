//! What goes into the brain and what comes out of it. Nothing here touches a device.
//!
//! ```text
//!   workers, gRPC ---- Event::Request ---->  +-------+  ---- Command::Reply ----> whoever asked
//!   memory copied ---- Event::Filled ----->  | Brain |  ---- Command::Fill -----> copy a worker's bytes into a slot
//!   disk is done  ---- Event::Store ------>  |       |  ---- Command::Store ----> disk operation
//!   others answer ---- Event::Fetch ------>  |       |  ---- Command::Fetch ----> search in what lies beyond: the peers,
//!                                            |       |                           the object tier; transfer
//!   it is packed  ---- Event::Upload ----->  |       |  ---- Command::Upload ---> copy of a block for the object tier
//!   time passes   ---- Event::Tick ------->  +-------+  ---- Command::Sweep ----> read hazards, free slots
//! ```
//! Every request ends in exactly one `Reply` other than [`Reply::Progress`], at its deadline at the latest.

use kv_arena::{Backed, Held, Slot};
use kv_block::{
    BindingId, BindingTag, BlockKey, Checksum, Fault, Generation, LeaseId, MissReason, Priority, Record,
    SessionId, SlotId, Tier,
};
use kv_tiers::store::{StoreDone, StoreOp};

/// Monotonic time in microseconds since the daemon started. The caller's clock, never ours.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Micros(pub u64);

impl Micros {
    /// No deadline.
    pub const NEVER: Self = Self(u64::MAX);

    /// This moment plus some milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms.saturating_mul(1000)))
    }
}

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    /// Monotonic.
    pub micros: Micros,
    /// Unix time in seconds, for expiry that outlives the process.
    pub unix: u32,
}

/// Names a request to whoever asked; opaque to the brain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RequestId(pub u64);

/// Who asked, and under which id the answer is expected.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Origin {
    /// The session; [`SessionId`] 0 is the daemon itself and administrators.
    pub session: SessionId,
    /// The request.
    pub request: RequestId,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A worker or a client connected.
    Opened {
        /// Its number.
        session: SessionId,
    },
    /// It is gone, for whatever reason: all it held comes back.
    Closed {
        /// Its number.
        session: SessionId,
    },
    /// A scope, slice and block length became known, or known again.
    Bound(Binding),
    /// Somebody wants something.
    Request {
        /// Who.
        from: Origin,
        /// By when it must end.
        deadline: Micros,
        /// What.
        op: Op,
    },
    /// Whoever asked is gone. Long work is not done for nobody: it stops where it is.
    Unheard {
        /// Who asked what.
        from: Origin,
    },
    /// The bytes of a put are in their slot, or will not be.
    Filled {
        /// Given in the command.
        fill: FillToken,
        /// The slot, back, and the checksum of what landed in it; or why nothing did. Then the slot is free again, or
        /// will be when the device lets go of it.
        filled: Result<(Slot, Checksum), Fault>,
    },
    /// The disk tier says something.
    Store(StoreDone),
    /// Whoever speaks with the peers, or with the object store, says something.
    Fetch(FetchDone),
    /// Whoever packs blocks for the object store says something.
    Upload(UploadDone),
    /// The disk tier's health changed.
    StoreHealth {
        /// Whether it serves.
        serving: bool,
    },
    /// Hazards were read; this many slots became free.
    Swept {
        /// How many.
        freed: usize,
    },
    /// Regions of host memory got their pages and may be handed out.
    Grown {
        /// Which.
        regions: Backed,
    },
    /// Host memory will not grow any more, whether it has all its regions or not.
    GrowthEnded,
    /// Workers read these slots by themselves since the last report.
    Touched(Vec<SlotId>),
    /// A client read this block by itself, over gRPC.
    Read {
        /// Whose session.
        session: SessionId,
        /// Where the block lies.
        slot: SlotId,
    },
    /// A client found blocks in host memory by itself, over gRPC.
    Looked {
        /// Under this binding.
        binding: BindingId,
        /// So many.
        count: u32,
    },
    /// A tenant's quota changed.
    Quota {
        /// Which tenant.
        tenant: String,
        /// Host bytes it may hold; `None` for as many as there are, 0 for nothing at all.
        bytes_max: Option<u64>,
    },
    /// Nothing; time passed.
    Tick,
}

/// A registered scope, slice and block length, as the shards know it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Binding {
    /// Its number in this epoch.
    pub id: BindingId,
    /// Its name across restarts.
    pub tag: BindingTag,
    /// Length of its blocks in bytes.
    pub block_bytes: u32,
    /// Who pays.
    pub tenant: String,
}

/// What somebody wants.
#[derive(Clone, Debug)]
pub enum Op {
    /// Store a block whose bytes are where `source` says.
    Put {
        /// Name.
        key: BlockKey,
        /// What it is stored under.
        binding: BindingId,
        /// Where its bytes are; opaque, goes into [`Command::Fill`].
        source: u64,
        /// Their length.
        bytes: u32,
        /// How it is to be kept.
        keep: Keep,
        /// Answer only when it would survive a crash of the machine.
        durable: bool,
        /// The block before it in its prefix, where that is known: a hint.
        after: Option<BlockKey>,
    },
    /// Announce a block.
    Reserve {
        /// Name.
        key: BlockKey,
        /// What it will be stored under.
        binding: BindingId,
        /// How it is to be kept.
        keep: Keep,
        /// Give a slot to fill in place (trusted workers only; the door decides).
        in_place: bool,
        /// The block before it in its prefix, where that is known: a hint.
        after: Option<BlockKey>,
    },
    /// Store an announced block whose bytes are where `source` says.
    Commit {
        /// Name.
        key: BlockKey,
        /// Where its bytes are.
        source: u64,
        /// Their length.
        bytes: u32,
        /// Answer only when it would survive a crash of the machine.
        durable: bool,
    },
    /// Store an announced block that was filled in place.
    CommitInPlace {
        /// Name.
        key: BlockKey,
        /// The slot that was given.
        slot: SlotId,
        /// Its generation.
        generation: Generation,
        /// Checksum computed by the trusted worker.
        checksum: Checksum,
        /// Answer only when it would survive a crash of the machine.
        durable: bool,
    },
    /// Take an announcement back.
    Abort {
        /// Name.
        key: BlockKey,
    },
    /// A lease on a block in host memory; from disk or when it arrives, if there is time.
    Acquire {
        /// Name.
        key: BlockKey,
        /// Wait until the deadline, or answer with what is there now.
        wait: bool,
        /// Where to look for it, when there is time to wait.
        reach: Reach,
        /// The block before it in its prefix, where that is known: a hint.
        after: Option<BlockKey>,
    },
    /// Give leases back.
    Release {
        /// Which.
        leases: Vec<LeaseId>,
    },
    /// Where these blocks are, until the first absent one or all.
    Lookup {
        /// Names.
        keys: Vec<BlockKey>,
        /// Go on after the first absent one.
        all: bool,
    },
    /// Bring these up, answer at once.
    Prefetch {
        /// Which.
        steps: Vec<Step>,
        /// Where to look for them.
        reach: Reach,
    },
    /// Keep these until a moment.
    Pin {
        /// Names.
        keys: Vec<BlockKey>,
        /// When the pins end.
        until: Micros,
    },
    /// End pins.
    Unpin {
        /// Names.
        keys: Vec<BlockKey>,
    },
    /// Remove blocks from a tier, or from all.
    Evict {
        /// Names.
        keys: Vec<BlockKey>,
        /// `None`: everywhere.
        tier: Option<Tier>,
        /// Only count.
        dry_run: bool,
    },
    /// All that is known of one block.
    Inspect {
        /// Name.
        key: BlockKey,
    },
    /// A page of the catalog.
    List {
        /// Where to go on; 0 at first.
        cursor: u64,
        /// At most so many.
        count: usize,
        /// Filter.
        filter: Filter,
    },
    /// Remove everything that the filter names, a part at a time.
    Purge {
        /// Filter.
        filter: Filter,
        /// `None`: everywhere.
        tier: Option<Tier>,
        /// Only count.
        dry_run: bool,
    },
    /// Check every block of a tier, a part at a time.
    Verify {
        /// Host or disk.
        tier: Tier,
    },
    /// Everything that can be counted.
    Report,
    /// Events after a number, at most so many.
    Events {
        /// Last number the subscriber has.
        after: u64,
        /// At most so many.
        count: usize,
    },
    /// The leases of one session, or of all.
    Leases {
        /// Which session.
        session: Option<SessionId>,
    },
}

/// A block on the way along a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Name.
    pub key: BlockKey,
    /// The block before it in its prefix, where that is known: a hint.
    pub after: Option<BlockKey>,
}

impl Step {
    /// Blocks in the order of their prefix, each after the one before it.
    pub fn along(keys: &[BlockKey]) -> impl Iterator<Item = Self> {
        let before = std::iter::once(None).chain(keys.iter().copied().map(Some));
        keys.iter().zip(before).map(|(key, after)| Self { key: *key, after })
    }
}

/// Number of a peer of this node, as its configuration counts them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct PeerId(pub u16);

/// How far a search for a block goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reach {
    /// This node. What a peer asks never goes further.
    #[default]
    Here,
    /// The peers as well, then the object tier.
    Further {
        /// Who is asked first.
        hint: Option<PeerId>,
    },
    /// The object tier as well, but no peer.
    Object,
}

/// How a block is to be kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Keep {
    /// Retention class.
    pub priority: Priority,
    /// Unix seconds after which it counts as expired; 0 never.
    pub expires_at: u32,
}

/// Which blocks a list or a purge means.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Filter {
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only on this tier.
    pub tier: Option<Tier>,
    /// Only keys whose hex form begins so.
    pub key_prefix: String,
}

/// Who is asked for a block that is not here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FetchFrom {
    /// The peers.
    Peers,
    /// The object store.
    Object,
}

/// Names the search for a block in one of these, and its transfer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FetchToken(pub u64);

/// Names what one peer offered to a search. An answer names it, too: meanwhile that peer may have failed, and another
/// one have offered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct OfferToken(pub u64);

/// What whoever speaks with the peers, or with the object store, is to do. Each search ends in one `Missed` or `Landed`, unless it is left.
#[derive(Debug)]
pub enum FetchOp {
    /// Find a peer that has a block, or expects it, and have it granted; or find it in the object store.
    Find {
        /// Given back.
        fetch: FetchToken,
        /// Name.
        key: BlockKey,
        /// Who is asked first.
        hint: Option<PeerId>,
        /// When the search and the transfer end.
        deadline: Micros,
    },
    /// Read a block that was offered. When that offer is over, the slot is free again.
    Into {
        /// Which search.
        fetch: FetchToken,
        /// Which offer.
        offer: OfferToken,
        /// Where to; at least as long as the block. Given back.
        into: Slot,
    },
    /// What was offered is of no use: another peer may have better. Another offer or a miss follows.
    Decline {
        /// Which search.
        fetch: FetchToken,
        /// Which offer.
        offer: OfferToken,
        /// What whoever waits is told when nobody has.
        reason: MissReason,
    },
    /// It is not wanted any more.
    Leave {
        /// Which search.
        fetch: FetchToken,
    },
}

/// What whoever speaks with the peers, or with the object store, has done.
#[derive(Debug)]
pub enum FetchDone {
    /// It can be read. The answer is `Into`, `Decline` or `Leave`.
    Offered {
        /// Which search.
        fetch: FetchToken,
        /// Named by the answer. The one before it is over.
        offer: OfferToken,
        /// What they say it is; expiry aside.
        record: Record,
        /// Seconds it has to live; 0: for ever.
        ttl_s: u32,
    },
    /// Its bytes are here, compared with the record.
    Landed {
        /// Which search.
        fetch: FetchToken,
        /// The slot, back.
        into: Slot,
    },
    /// It cannot be had. A slot that was given is free again, or will be when the device lets go of it.
    Missed {
        /// Which search.
        fetch: FetchToken,
        /// Why; [`MissReason::NeverStored`] when nobody there knows it.
        reason: MissReason,
    },
}

/// Names the copy of a block for the object tier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct UploadToken(pub u64);

/// What became of blocks for the object tier. Each [`Command::Upload`] ends in one of the first three.
#[derive(Debug)]
pub enum UploadDone {
    /// It was copied, and waits to be packed.
    Taken {
        /// Which.
        upload: UploadToken,
        /// Its length.
        bytes: u32,
    },
    /// It is there, or waits already.
    Known {
        /// Which.
        upload: UploadToken,
    },
    /// Too much waits already, or the store is out of service.
    Refused {
        /// Which.
        upload: UploadToken,
    },
    /// The store did not take a pack: these were taken and are not there.
    Lost {
        /// Which blocks.
        keys: Vec<BlockKey>,
    },
}

/// Names a copy in flight.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FillToken(pub u64);

/// Something to do.
#[derive(Debug)]
pub enum Command {
    /// Answer a request.
    Reply {
        /// Whom.
        to: Origin,
        /// What.
        reply: Reply,
    },
    /// Copy a worker's bytes into a slot and sum them, then send [`Event::Filled`]; at once, or when a device is done.
    Fill {
        /// Give back.
        fill: FillToken,
        /// Whose bytes.
        from: Origin,
        /// Where they are.
        source: u64,
        /// How many.
        bytes: u32,
        /// Their name, for the checksum.
        key: BlockKey,
        /// Where to put them. Give back.
        slot: Slot,
    },
    /// Give this to the disk tier.
    Store(StoreOp),
    /// Give this to whoever speaks with the peers, or with the object store.
    Fetch(FetchFrom, FetchOp),
    /// Copy this block for the object tier, let go of it, then send [`Event::Upload`].
    Upload {
        /// Give back.
        upload: UploadToken,
        /// The block, verified.
        held: Held,
        /// What it was stored under.
        binding: BindingId,
        /// Unix seconds after which it counts as expired; 0 never. Its record may say less.
        expires_at: u32,
        /// The block before it in its prefix, as far as that is known.
        parent: Option<BlockKey>,
    },
    /// Read all hazards, free what nobody reads, then send [`Event::Swept`].
    Sweep,
}

/// Where a block is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// It can be read; this is the fastest tier that has it.
    In(Tier),
    /// It cannot.
    Miss(MissReason),
}

/// A block held in host memory for somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Grant {
    /// The lease; 0 for a slot given to be filled.
    pub lease: LeaseId,
    /// Slot.
    pub slot: SlotId,
    /// Its generation.
    pub generation: Generation,
    /// Offset in the arena, in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u32,
    /// Checksum; zero for a slot given to be filled.
    pub checksum: Checksum,
    /// Where the bytes came from; host for those that a peer had, object for those of the object tier.
    pub tier: Tier,
}

/// An answer.
#[derive(Clone, PartialEq, Debug)]
pub enum Reply {
    /// It is stored.
    Stored {
        /// It was there before.
        already: bool,
    },
    /// It is announced; with a slot when it is to be filled in place.
    Reserved {
        /// The slot.
        slot: Option<Grant>,
    },
    /// It is stored or announced already.
    AlreadyThere,
    /// A lease.
    Leased(Grant),
    /// Not there, and why.
    Miss(MissReason),
    /// Where each block is.
    Looked(Vec<Found>),
    /// So many done, so many left alone because in use, so many absent.
    Counted {
        /// Done.
        done: u64,
        /// In use, pinned, or resident already for a prefetch.
        kept: u64,
        /// Not here.
        absent: u64,
    },
    /// All that is known of one block, if anything is.
    Inspected(Option<Box<BlockReport>>),
    /// A page of blocks, and where to go on; `None` at the end.
    Listed {
        /// The page.
        blocks: Vec<BlockReport>,
        /// Where to go on.
        next: Option<u64>,
    },
    /// Part of a purge or a verification is done; more comes.
    Progress(Progress),
    /// A purge or a verification is done.
    Finished(Progress),
    /// Counters.
    Report(Box<crate::report::ShardReport>),
    /// Events in order; `None` when the log no longer reaches back.
    Events(Option<Vec<kv_block::BlockEvent>>),
    /// Leases.
    Leases(Vec<LeaseReport>),
    /// It failed.
    Fault(Fault),
}

/// How far a long job is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Blocks done.
    pub done: u64,
    /// Blocks in all, as far as known.
    pub total: u64,
    /// Purge: left alone because pinned or in use. Verify: failed and quarantined.
    pub failed: u64,
    /// Bytes done.
    pub bytes: u64,
}

/// All that the catalog knows of a block.
#[derive(Clone, PartialEq, Debug)]
pub struct BlockReport {
    /// Name.
    pub key: BlockKey,
    /// `present`, `pending`, or why it is gone.
    pub state: BlockState,
    /// Tiers that have it, fastest first.
    pub tiers: Vec<Tier>,
    /// Length in bytes.
    pub bytes: u32,
    /// Checksum.
    pub checksum: Checksum,
    /// Retention class.
    pub priority: Priority,
    /// Unix seconds; 0 never.
    pub expires_at: u32,
    /// Sessions that hold it.
    pub leases: u32,
    /// When its pin ends.
    pub pinned_until: Option<Micros>,
    /// How often it was read lately, 0 to 3.
    pub frequency: u8,
    /// What it was stored under.
    pub binding: BindingId,
    /// Where on disk.
    pub disk: Option<kv_block::DiskLocation>,
    /// Where in host memory.
    pub host: Option<(SlotId, Generation)>,
}

/// In which state a block is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockState {
    /// It can be read.
    Present,
    /// Announced.
    Pending,
    /// Gone, and why.
    Gone(MissReason),
}

/// One lease, for an administrator.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseReport {
    /// Number.
    pub lease: LeaseId,
    /// Whose.
    pub session: SessionId,
    /// On what.
    pub key: BlockKey,
    /// How long the block is.
    pub bytes: u32,
    /// Since when.
    pub since: Micros,
}
