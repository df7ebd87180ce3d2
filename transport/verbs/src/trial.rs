//! Two queue pairs of one device that talk to each other, to see whether its keys hold what they promise.
//!
//! Drivers differ: rxe of Linux 6.1 holds a window against the whole region beneath it, and not against its own
//! bounds. So a device is tried when it is opened, before anybody's block is exposed: what it lets through here it would
//! let through to a peer.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_arena::{Geometry, ShardMemory, Slot};

use crate::handles::{Batch, Context, Cq, Mw, Pd, Qp, Request, Route};
use crate::memory::{Memory, Place};
use crate::probe::Rail;
use crate::sys;
use crate::words::{LinkLayer, Role, Words};

/// Length of what is exposed here.
pub(crate) const BLOCK: usize = 4096;
/// Longest that one request may take; the device gives up after about 1 s.
const LIMIT: Duration = Duration::from_secs(3);
const TIMEOUT: u8 = 15;

/// Both ends, without threads. In this order: queue pairs end before their memory.
pub(crate) struct Trial {
    pub(crate) owner: Qp,
    pub(crate) reader: Qp,
    pub(crate) cq: Arc<Cq>,
    pub(crate) pd: Arc<Pd>,
    pub(crate) memory: Arc<Memory>,
    arena: ShardMemory,
    batch: Batch,
    rail: Rail,
}

/// Whether windows hold.
pub(crate) fn windows_hold(context: &Arc<Context>, rail: &Rail) -> Result<(), String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: io::Error| format!("{what}: {error}")
    };
    let mut trial = Trial::new(context, rail).map_err(failed("no pair to try them with"))?;
    let (slot, into) = (trial.slot(3 * BLOCK), trial.slot(3 * BLOCK));
    let (Some(to), Some(middle)) = (trial.memory.place(&into), trial.memory.place(&slot[BLOCK..2 * BLOCK]))
    else {
        return Err("no memory to try them with".to_owned());
    };
    let mut window = Mw::new(&trial.pd).map_err(failed("none can be made"))?;
    trial.connect().map_err(failed("the device cannot be connected with itself"))?;
    let told = |what: &str, status: io::Result<i32>, good: bool| match status {
        Err(error) => Err(format!("{what}: {error}")),
        Ok(status) if (status == sys::WC_SUCCESS) != good => {
            let status = context.status_text(status);
            Err(format!("{what} ended with {status:?}"))
        }
        Ok(_) => Ok(()),
    };
    let (key, bound) = trial.bind(&mut window, middle, BLOCK as u64);
    told("binding one", bound, true)?;
    told("a read through one", trial.read(middle.at, key, to, BLOCK), true)?;
    told("a read beyond one", trial.read(middle.at + 1, key, to, BLOCK), false)?;
    trial.connect().map_err(failed("the device cannot be connected with itself again"))?;
    told("ending one", trial.perform(true, Request::Invalidate { key }), true)?;
    told("a read through one that is over", trial.read(middle.at, key, to, BLOCK), false)
}

impl Trial {
    pub(crate) fn new(context: &Arc<Context>, rail: &Rail) -> io::Result<Self> {
        let (pd, cq) = (Pd::new(context)?, Cq::new(context, 64)?);
        let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 8 };
        let arena = ShardMemory::anonymous(geometry).map_err(io::Error::other)?;
        let memory = Memory::new(&pd, &[arena.slab().clone()])?;
        let (owner, reader) = (Qp::new(&pd, &cq, 16, 1)?, Qp::new(&pd, &cq, 16, 1)?);
        let (rail, batch) = (rail.clone(), Batch::default());
        Ok(Self { owner, reader, cq, pd, memory, arena, batch, rail })
    }

    /// A slot of its arena.
    ///
    /// # Panics
    /// When it has no more: it has 2 MiB.
    pub(crate) fn slot(&self, bytes: usize) -> Slot {
        self.arena.slab().take(bytes as u32).expect("the trial's arena has room for its few slots")
    }

    /// (Re)connects both ends.
    pub(crate) fn connect(&self) -> io::Result<()> {
        let gone = || io::Error::from_raw_os_error(libc::ENODEV);
        let (able, gid) = (self.rail.capabilities.ok_or_else(gone)?, self.rail.gid.ok_or_else(gone)?);
        let link_layer = self.rail.link_layer.ok_or_else(gone)?;
        let words = |qp: &Qp, role| Words {
            role,
            link_layer,
            queue_pair: qp.number(),
            first_packet: 1,
            gid: gid.address,
            lid: if link_layer == LinkLayer::Ethernet { 0 } else { able.lid },
            mtu: able.mtu,
            reads_answered: able.reads_answered,
            reads_asked: able.reads_asked,
        };
        let ends = [words(&self.owner, Role::Owner), words(&self.reader, Role::Reader)];
        for (qp, ours, theirs) in [(&self.owner, 0, 1), (&self.reader, 1, 0)] {
            qp.reset()?;
            qp.init(self.rail.port, ours == 0)?;
            qp.connect(&Route {
                port: self.rail.port,
                gid_index: gid.index,
                traffic_class: 0,
                service_level: 0,
                timeout: TIMEOUT,
                ours: ends[ours],
                theirs: ends[theirs],
            })?;
        }
        Ok(())
    }

    /// Does one request at one end, and gives how it ended.
    pub(crate) fn perform(&mut self, owner: bool, request: Request<'_>) -> io::Result<i32> {
        self.batch.clear();
        self.batch.push(7, request);
        let qp = if owner { &self.owner } else { &self.reader };
        // SAFETY: requests name this trial's arena and the caller's windows, which live until it is over; nobody
        // looks at the memory before the completion below, or at all after a failure.
        unsafe { qp.post(&mut self.batch) }.map_err(|(_, error)| error)?;
        let mut wc = [sys::Wc::zeroed()];
        let end = Instant::now() + LIMIT;
        while self.cq.poll(&mut wc)? == 0 {
            if Instant::now() > end {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
        }
        Ok(wc[0].status)
    }

    /// Gives a window its next key, and a piece to open; gives that key, and how the bind ended.
    pub(crate) fn bind(&mut self, window: &mut Mw, from: Place, bytes: u64) -> (u32, io::Result<i32>) {
        let key = (window.key() & !0xff) | (window.key().wrapping_add(1) & 0xff);
        let request = Request::Bind { window, key, region: from.region, from: from.at, bytes };
        let status = self.perform(true, request);
        window.set_key(key);
        (key, status)
    }

    /// Reads from the owner to the reader.
    pub(crate) fn read(&mut self, from: u64, remote_key: u32, to: Place, bytes: usize) -> io::Result<i32> {
        let (to, local_key, bytes) = (to.at, to.local_key, bytes as u32);
        self.perform(false, Request::Read { from, remote_key, to, local_key, bytes })
    }
}
