//! What libibverbs gives out, each closed when its last user lets go, in the order that the library wants.
//!
//! ```text
//!   Context <- Pd <- Mr, Mw, Qp          a handle holds what it stands on
//!      ^------ Channel <- Cq <- Qp
//! ```
//! The library's functions may be called from any thread at any time; only the two of one object that say
//! otherwise (see [`Qp::post`]) are kept to one.

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::{self, Library};
use crate::words::{LinkLayer, Words};

/// The result of a function that gives an error number, or -1 and leaves the number elsewhere.
fn check(code: c_int) -> io::Result<()> {
    match code {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The result of a function that gives an object.
fn object<T>(raw: *mut T) -> io::Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(io::Error::last_os_error)
}

/// A close that failed leaks, in the kernel too, until the process ends.
fn closed(what: &str, code: c_int) {
    if let Err(error) = check(code) {
        tracing::warn!(what, %error, "an RDMA object could not be closed");
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// An open device.
pub(crate) struct Context {
    raw: NonNull<sys::Context>,
    pub(crate) calls: &'static Library,
}

// SAFETY: the library locks what it shares between threads.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Opens the device of that name; `None` when there is none.
    pub(crate) fn open(library: &'static Library, name: &str) -> io::Result<Option<Self>> {
        let mut count = 0;
        // SAFETY: plain calls; the list is read up to its count and freed once.
        unsafe {
            let list = object((library.ibv_get_device_list)(&raw mut count))?;
            let devices = std::slice::from_raw_parts(list.as_ptr(), count.max(0) as usize);
            let named = devices.iter().find(|device| {
                let found = (library.ibv_get_device_name)(**device);
                !found.is_null() && CStr::from_ptr(found).to_bytes() == name.as_bytes()
            });
            let opened = named.map(|device| object((library.ibv_open_device)(*device)));
            (library.ibv_free_device_list)(list.as_ptr());
            let Some(raw) = opened.transpose()? else { return Ok(None) };
            let context = Self { raw, calls: library };
            set_nonblocking(context.events())?;
            Ok(Some(context))
        }
    }

    /// Whether it speaks InfiniBand's transport, which has reliable connections; EFA and iWARP do not.
    pub(crate) fn has_reliable_connections(&self) -> bool {
        // SAFETY: the context and its device are open.
        let device = unsafe { &*(*self.raw.as_ptr()).device };
        device.node_type == sys::NODE_CA && device.transport_type == sys::TRANSPORT_IB
    }

    pub(crate) fn device_attr(&self) -> io::Result<sys::DeviceAttr> {
        let mut attr = sys::DeviceAttr::zeroed();
        // SAFETY: writes one structure of that type.
        check(unsafe { (self.calls.ibv_query_device)(self.raw.as_ptr(), &raw mut attr) })?;
        Ok(attr)
    }

    pub(crate) fn port_attr(&self, port: u8) -> io::Result<sys::PortAttr> {
        let mut attr = sys::PortAttr::zeroed();
        // SAFETY: writes the beginning of one structure of that type.
        check(unsafe { (self.calls.ibv_query_port)(self.raw.as_ptr(), port, &raw mut attr) })?;
        Ok(attr)
    }

    /// Readable when [`Self::next_event`] has something.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the context is.
        unsafe { BorrowedFd::borrow_raw((*self.raw.as_ptr()).async_fd) }
    }

    /// The next thing that happened to the device by itself: its number and its name.
    pub(crate) fn next_event(&self) -> Option<(c_int, String)> {
        let mut event = sys::AsyncEvent::zeroed();
        // SAFETY: writes one event, which is acknowledged at once and whose object is not looked at.
        unsafe {
            if (self.calls.ibv_get_async_event)(self.raw.as_ptr(), &raw mut event) != 0 {
                return None;
            }
            (self.calls.ibv_ack_async_event)(&raw mut event);
            let text = CStr::from_ptr((self.calls.ibv_event_type_str)(event.event_type));
            Some((event.event_type, text.to_string_lossy().into_owned()))
        }
    }

    /// What a failed completion is called.
    pub(crate) fn status_text(&self, status: c_int) -> String {
        // SAFETY: gives a constant string for any number.
        let text = unsafe { CStr::from_ptr((self.calls.ibv_wc_status_str)(status)) };
        text.to_string_lossy().into_owned()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened once, and everything on it is closed: each held it.
        closed("device", unsafe { (self.calls.ibv_close_device)(self.raw.as_ptr()) });
    }
}

/// A protection domain: queue pairs reach memory of their own domain alone.
pub(crate) struct Pd {
    raw: NonNull<sys::Pd>,
    pub(crate) context: Arc<Context>,
}

// SAFETY: as for the context.
unsafe impl Send for Pd {}
// SAFETY: as for the context.
unsafe impl Sync for Pd {}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: a plain call.
        let raw = object(unsafe { (context.calls.ibv_alloc_pd)(context.raw.as_ptr()) })?;
        Ok(Arc::new(Self { raw, context: Arc::clone(context) }))
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: made once; what stood on it held it.
        closed("protection domain", unsafe { (self.context.calls.ibv_dealloc_pd)(self.raw.as_ptr()) });
    }
}

/// A memory region: pinned pages that the device may use.
pub(crate) struct Mr {
    raw: NonNull<sys::Mr>,
    pd: Arc<Pd>,
}

// SAFETY: as for the context.
unsafe impl Send for Mr {}
// SAFETY: as for the context.
unsafe impl Sync for Mr {}

/// Names a region that lives as long as whoever gave this says. Never looked into here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MrRef(pub(crate) *mut sys::Mr);

// SAFETY: an address, which only the library follows.
unsafe impl Send for MrRef {}
// SAFETY: as above.
unsafe impl Sync for MrRef {}

impl Mr {
    /// Registers memory, known to the device and to peers by addresses from `iova` on.
    ///
    /// # Safety
    /// The range is mapped, and while this lives it means the same pages. What the device may write of it is
    /// not looked at by anybody while a request for it is under way.
    pub(crate) unsafe fn new(
        pd: &Arc<Pd>,
        address: usize,
        bytes: usize,
        iova: u64,
        access: c_int,
    ) -> io::Result<Self> {
        let register = pd.context.calls.ibv_reg_mr_iova2;
        // SAFETY: by the contract of this function; the kernel pins the pages or refuses.
        let raw = unsafe { register(pd.raw.as_ptr(), address as *mut c_void, bytes, iova, access as u32) };
        Ok(Self { raw: object(raw)?, pd: Arc::clone(pd) })
    }

    /// Registers memory of another device by its descriptor.
    pub(crate) fn dmabuf(
        pd: &Arc<Pd>,
        fd: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
        access: c_int,
    ) -> io::Result<Self> {
        let unsupported = || io::Error::from_raw_os_error(libc::ENOSYS);
        let register = pd.context.calls.ibv_reg_dmabuf_mr.ok_or_else(unsupported)?;
        // SAFETY: the kernel takes its own hold on the buffer behind the descriptor, or refuses.
        let raw = unsafe { register(pd.raw.as_ptr(), offset, bytes, offset, fd.as_raw_fd(), access) };
        Ok(Self { raw: object(raw)?, pd: Arc::clone(pd) })
    }

    pub(crate) fn local_key(&self) -> u32 {
        // SAFETY: registered.
        unsafe { (*self.raw.as_ptr()).lkey }
    }

    /// What a peer reads it with, if it may.
    pub(crate) fn remote_key(&self) -> u32 {
        // SAFETY: registered.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// Names it; good while it lives.
    pub(crate) fn name(&self) -> MrRef {
        MrRef(self.raw.as_ptr())
    }

    /// Ends it: no device touches its memory after that. A failure leaves it as it is.
    pub(crate) fn close(self) -> Result<(), (Self, io::Error)> {
        // SAFETY: registered once; on success it is not touched again.
        match check(unsafe { (self.pd.context.calls.ibv_dereg_mr)(self.raw.as_ptr()) }) {
            Ok(()) => {
                // SAFETY: `drop` does not run, so the domain's count is moved out exactly once.
                drop(unsafe { ptr::read(&raw const std::mem::ManuallyDrop::new(self).pd) });
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: registered once.
        closed("memory region", unsafe { (self.pd.context.calls.ibv_dereg_mr)(self.raw.as_ptr()) });
    }
}

/// A memory window: a key for a piece of a region, of one queue pair, made and ended by its requests.
pub(crate) struct Mw {
    raw: NonNull<sys::Mw>,
    pd: Arc<Pd>,
}

// SAFETY: as for the context.
unsafe impl Send for Mw {}

impl Mw {
    pub(crate) fn new(pd: &Arc<Pd>) -> io::Result<Self> {
        // SAFETY: the domain is open; the function is the driver's own for it.
        let raw = unsafe {
            let alloc = (*pd.context.raw.as_ptr()).ops.alloc_mw;
            let alloc = alloc.ok_or_else(|| io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
            object(alloc(pd.raw.as_ptr(), sys::MW_TYPE_2))?
        };
        Ok(Self { raw, pd: Arc::clone(pd) })
    }

    /// The key it has now.
    pub(crate) fn key(&self) -> u32 {
        // SAFETY: allocated; written by `set_key` alone.
        unsafe { (*self.raw.as_ptr()).rkey }
    }

    /// Notes the key that a bind gave it.
    pub(crate) fn set_key(&mut self, key: u32) {
        // SAFETY: allocated, and ours alone.
        unsafe { (*self.raw.as_ptr()).rkey = key };
    }

    /// Ends it, bound or not: nobody reads by its key after that. A failure leaves it as it is.
    pub(crate) fn close(self) -> Result<(), (Self, io::Error)> {
        match check(self.dealloc()) {
            Ok(()) => {
                // SAFETY: `drop` does not run, so the domain's count is moved out exactly once.
                drop(unsafe { ptr::read(&raw const std::mem::ManuallyDrop::new(self).pd) });
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }

    fn dealloc(&self) -> c_int {
        // SAFETY: allocated once, by this driver.
        unsafe {
            let dealloc = (*self.pd.context.raw.as_ptr()).ops.dealloc_mw;
            dealloc.map_or(libc::EOPNOTSUPP, |dealloc| dealloc(self.raw.as_ptr()))
        }
    }
}

impl Drop for Mw {
    fn drop(&mut self) {
        closed("memory window", self.dealloc());
    }
}

/// Where a completion queue says that there is something, for a thread that sleeps.
struct Channel {
    raw: NonNull<sys::CompChannel>,
    context: Arc<Context>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: made once; its queue held it.
        closed("completion channel", unsafe {
            (self.context.calls.ibv_destroy_comp_channel)(self.raw.as_ptr())
        });
    }
}

/// A completion queue.
pub(crate) struct Cq {
    raw: NonNull<sys::Cq>,
    channel: Channel,
    /// Events taken and not acknowledged; a queue with such cannot be closed.
    events: AtomicU32,
}

// SAFETY: as for the context.
unsafe impl Send for Cq {}
// SAFETY: as for the context.
unsafe impl Sync for Cq {}

impl Cq {
    pub(crate) fn new(context: &Arc<Context>, entries: u32) -> io::Result<Arc<Self>> {
        let library = context.calls;
        // SAFETY: plain calls on an open context; the channel outlives the queue (field of it, dropped after).
        unsafe {
            let raw = object((library.ibv_create_comp_channel)(context.raw.as_ptr()))?;
            let channel = Channel { raw, context: Arc::clone(context) };
            set_nonblocking(BorrowedFd::borrow_raw((*raw.as_ptr()).fd))?;
            let raw = (library.ibv_create_cq)(
                context.raw.as_ptr(),
                entries as c_int,
                ptr::null_mut(),
                raw.as_ptr(),
                0,
            );
            Ok(Arc::new(Self { raw: object(raw)?, channel, events: AtomicU32::new(0) }))
        }
    }

    /// How many completions it holds.
    pub(crate) fn entries(&self) -> u32 {
        // SAFETY: made.
        unsafe { (*self.raw.as_ptr()).cqe as u32 }
    }

    /// Takes completions into `into`, from its beginning; gives how many.
    pub(crate) fn poll(&self, into: &mut [sys::Wc]) -> io::Result<usize> {
        // SAFETY: writes at most as many as there is room for.
        let found = unsafe {
            let poll = (*(*self.raw.as_ptr()).context).ops.poll_cq;
            let poll = poll.ok_or_else(|| io::Error::from_raw_os_error(libc::EOPNOTSUPP))?;
            poll(self.raw.as_ptr(), into.len() as c_int, into.as_mut_ptr())
        };
        usize::try_from(found).map_err(|_| io::Error::other("the completion queue cannot be read"))
    }

    /// From now on the next completion makes [`Self::channel`] readable.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: a plain call on a queue that is open.
        let code = unsafe {
            let arm = (*(*self.raw.as_ptr()).context).ops.req_notify_cq;
            arm.map_or(libc::EOPNOTSUPP, |arm| arm(self.raw.as_ptr(), 0))
        };
        check(code)
    }

    /// Takes what made the channel readable.
    pub(crate) fn disarm(&self) {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel has this queue alone; its descriptor does not block.
        unsafe {
            let next = self.channel.context.calls.ibv_get_cq_event;
            while next(self.channel.raw.as_ptr(), &raw mut queue, &raw mut context) == 0 {
                if self.events.fetch_add(1, Ordering::Relaxed) >= 1 << 16 {
                    self.acknowledge();
                }
            }
        }
    }

    fn acknowledge(&self) {
        let events = self.events.swap(0, Ordering::Relaxed);
        // SAFETY: exactly those that were taken.
        unsafe { (self.channel.context.calls.ibv_ack_cq_events)(self.raw.as_ptr(), events) };
    }

    pub(crate) fn channel(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the channel is.
        unsafe { BorrowedFd::borrow_raw((*self.channel.raw.as_ptr()).fd) }
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        self.acknowledge();
        // SAFETY: made once; queue pairs held it, and its events are acknowledged.
        closed("completion queue", unsafe { (self.channel.context.calls.ibv_destroy_cq)(self.raw.as_ptr()) });
    }
}

/// How packets of a queue pair find their way, ours and the peer's end together.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    pub(crate) port: u8,
    pub(crate) gid_index: u8,
    pub(crate) traffic_class: u8,
    pub(crate) service_level: u8,
    pub(crate) timeout: u8,
    pub(crate) ours: Words,
    pub(crate) theirs: Words,
}

/// A request for a queue pair.
#[derive(Clone, Copy)]
pub(crate) enum Request<'a> {
    /// Reads a peer's memory into ours.
    Read { from: u64, remote_key: u32, to: u64, local_key: u32, bytes: u32 },
    /// Gives a window a new key, over a piece of a region, for reading.
    Bind { window: &'a Mw, key: u32, region: MrRef, from: u64, bytes: u64 },
    /// Ends a window's key.
    Invalidate { key: u32 },
    /// Tells the peer a number.
    Say { number: u32 },
    /// Writes into a peer's memory, which no key of ours lets anybody do.
    #[cfg(test)]
    Write { to: u64, remote_key: u32, from: u64, local_key: u32, bytes: u32 },
}

/// Requests that go to the device at once. Reused, so that a batch allocates nothing.
#[derive(Default)]
pub(crate) struct Batch {
    requests: Vec<sys::SendWr>,
    pieces: Vec<sys::Sge>,
}

// SAFETY: its pointers lead into itself and are set by `link` right before they are used.
unsafe impl Send for Batch {}

impl Batch {
    pub(crate) fn clear(&mut self) {
        self.requests.clear();
        self.pieces.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    pub(crate) fn push(&mut self, id: u64, request: Request<'_>) {
        let mut wr = sys::SendWr::zeroed();
        wr.wr_id = id;
        wr.send_flags = sys::SEND_SIGNALED;
        match request {
            Request::Read { from, remote_key, to, local_key, bytes } => {
                wr.opcode = sys::WR_RDMA_READ;
                wr.num_sge = 1;
                wr.rdma.remote_addr = from;
                wr.rdma.rkey = remote_key;
                self.pieces.push(sys::Sge { addr: to, length: bytes, lkey: local_key });
            }
            Request::Bind { window, key, region, from, bytes } => {
                wr.opcode = sys::WR_BIND_MW;
                wr.bind_mw.mw = window.raw.as_ptr();
                wr.bind_mw.rkey = key;
                let mw_access_flags = sys::ACCESS_REMOTE_READ as u32;
                wr.bind_mw.bind_info =
                    sys::MwBindInfo { mr: region.0, addr: from, length: bytes, mw_access_flags };
            }
            Request::Invalidate { key } => {
                wr.opcode = sys::WR_LOCAL_INV;
                wr.imm_or_key = key;
            }
            Request::Say { number } => {
                wr.opcode = sys::WR_SEND_WITH_IMM;
                wr.imm_or_key = number.to_be();
            }
            #[cfg(test)]
            Request::Write { to, remote_key, from, local_key, bytes } => {
                wr.opcode = 0;
                wr.num_sge = 1;
                wr.rdma.remote_addr = to;
                wr.rdma.rkey = remote_key;
                self.pieces.push(sys::Sge { addr: from, length: bytes, lkey: local_key });
            }
        }
        self.requests.push(wr);
    }

    /// Chains the requests, and each read with its piece.
    fn link(&mut self) -> *mut sys::SendWr {
        let mut piece = self.pieces.as_mut_ptr();
        let mut next = ptr::null_mut();
        // From the back: a pointer to an element is taken once, after the last write through another.
        for wr in self.requests.iter_mut() {
            if wr.num_sge == 1 {
                wr.sg_list = piece;
                piece = piece.wrapping_add(1);
            }
        }
        let base = self.requests.as_mut_ptr();
        for at in (0..self.requests.len()).rev() {
            let wr = base.wrapping_add(at);
            // SAFETY: an element of the vector.
            unsafe { (*wr).next = next };
            next = wr;
        }
        next
    }
}

/// A queue pair of a reliable connection.
pub(crate) struct Qp {
    raw: NonNull<sys::Qp>,
    cq: Arc<Cq>,
    pd: Arc<Pd>,
}

// SAFETY: as for the context.
unsafe impl Send for Qp {}

impl Qp {
    /// A queue pair that takes `sends` requests and `receives` at once.
    pub(crate) fn new(pd: &Arc<Pd>, cq: &Arc<Cq>, sends: u32, receives: u32) -> io::Result<Self> {
        let cap = sys::QpCap {
            max_send_wr: sends,
            max_recv_wr: receives,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        let mut attr = sys::QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: cq.raw.as_ptr(),
            recv_cq: cq.raw.as_ptr(),
            srq: ptr::null_mut(),
            cap,
            qp_type: sys::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: domain and queue are open and held by what comes of it.
        let raw = object(unsafe { (pd.context.calls.ibv_create_qp)(pd.raw.as_ptr(), &raw mut attr) })?;
        Ok(Self { raw, cq: Arc::clone(cq), pd: Arc::clone(pd) })
    }

    pub(crate) fn number(&self) -> u32 {
        // SAFETY: made.
        unsafe { (*self.raw.as_ptr()).qp_num }
    }

    fn modify(&self, mut attr: sys::QpAttr, mask: c_int) -> io::Result<()> {
        // SAFETY: reads the fields that the mask names.
        check(unsafe { (self.pd.context.calls.ibv_modify_qp)(self.raw.as_ptr(), &raw mut attr, mask) })
    }

    /// Puts it on a port. The peer may read through windows, or nothing at all.
    pub(crate) fn init(&self, port: u8, readable: bool) -> io::Result<()> {
        let mut attr = sys::QpAttr::zeroed();
        attr.qp_state = sys::QPS_INIT;
        attr.port_num = port;
        attr.qp_access_flags = if readable { sys::ACCESS_REMOTE_READ as u32 } else { 0 };
        let mask = sys::QP_STATE | sys::QP_PKEY_INDEX | sys::QP_PORT | sys::QP_ACCESS_FLAGS;
        self.modify(attr, mask)
    }

    /// Connects it: from now on it answers and asks.
    pub(crate) fn connect(&self, route: &Route) -> io::Result<()> {
        let Route { ours, theirs, .. } = route;
        let mut attr = sys::QpAttr::zeroed();
        attr.qp_state = sys::QPS_RTR;
        attr.path_mtu = ours.mtu.min(theirs.mtu).into();
        attr.dest_qp_num = theirs.queue_pair;
        attr.rq_psn = theirs.first_packet;
        attr.max_dest_rd_atomic = ours.reads_answered.min(theirs.reads_asked);
        // 0.64 ms before the peer says something again for which no receive was posted.
        attr.min_rnr_timer = 12;
        attr.ah_attr.port_num = route.port;
        attr.ah_attr.sl = route.service_level;
        attr.ah_attr.dlid = theirs.lid;
        // Within an InfiniBand subnet a LID is enough.
        if ours.link_layer == LinkLayer::Ethernet || ours.gid[..8] != theirs.gid[..8] {
            attr.ah_attr.is_global = 1;
            attr.ah_attr.grh.dgid = sys::Gid(theirs.gid);
            attr.ah_attr.grh.sgid_index = route.gid_index;
            attr.ah_attr.grh.hop_limit = 64;
            attr.ah_attr.grh.traffic_class = route.traffic_class;
        }
        let mask = sys::QP_STATE
            | sys::QP_AV
            | sys::QP_PATH_MTU
            | sys::QP_DEST_QPN
            | sys::QP_RQ_PSN
            | sys::QP_MAX_DEST_RD_ATOMIC
            | sys::QP_MIN_RNR_TIMER;
        self.modify(attr, mask)?;
        let mut attr = sys::QpAttr::zeroed();
        attr.qp_state = sys::QPS_RTS;
        attr.sq_psn = ours.first_packet;
        attr.timeout = route.timeout;
        // The most but one: rxe takes the most for no limit, and a dead peer would never be noticed.
        attr.retry_cnt = 6;
        // For ever: the silence limit of `flow` ends it.
        attr.rnr_retry = 7;
        attr.max_rd_atomic = ours.reads_asked.min(theirs.reads_answered);
        let mask = sys::QP_STATE
            | sys::QP_SQ_PSN
            | sys::QP_TIMEOUT
            | sys::QP_RETRY_CNT
            | sys::QP_RNR_RETRY
            | sys::QP_MAX_QP_RD_ATOMIC;
        self.modify(attr, mask)
    }

    /// Puts it into error: what is under way comes back as flushed.
    pub(crate) fn fail(&self) -> io::Result<()> {
        let mut attr = sys::QpAttr::zeroed();
        attr.qp_state = sys::QPS_ERR;
        self.modify(attr, sys::QP_STATE)
    }

    /// Forgets everything, as if it were new.
    pub(crate) fn reset(&self) -> io::Result<()> {
        self.modify(sys::QpAttr::zeroed(), sys::QP_STATE)
    }

    /// Hands a batch to the device. On an error, that many of its first requests were taken.
    ///
    /// # Safety
    /// The memory and the windows that it names stay as they are, and the caller's hands off what is read into,
    /// until the completions of the requests, or until this queue pair is closed. Called by one thread at a time.
    pub(crate) unsafe fn post(&self, batch: &mut Batch) -> Result<(), (usize, io::Error)> {
        if batch.is_empty() {
            return Ok(());
        }
        let first = batch.link();
        let mut bad = ptr::null_mut();
        // SAFETY: a chain of requests that live in the batch; the driver copies them. The rest is this function's
        // contract.
        let posted = unsafe {
            let post = (*(*self.raw.as_ptr()).context).ops.post_send;
            check(post.map_or(libc::EOPNOTSUPP, |post| post(self.raw.as_ptr(), first, &raw mut bad)))
        };
        posted.map_err(|error| {
            let taken = batch.requests.iter().take_while(|wr| !ptr::eq(*wr, bad)).count();
            (taken, error)
        })
    }

    /// Lets the peer say `count` numbers more.
    pub(crate) fn listen(&self, id: u64, count: u32) -> io::Result<()> {
        for _ in 0..count {
            let mut wr = sys::RecvWr::zeroed();
            wr.wr_id = id;
            let mut bad = ptr::null_mut();
            // SAFETY: one request without memory, copied by the driver.
            let posted = unsafe {
                let post = (*(*self.raw.as_ptr()).context).ops.post_recv;
                post.map_or(libc::EOPNOTSUPP, |post| post(self.raw.as_ptr(), &raw mut wr, &raw mut bad))
            };
            check(posted)?;
        }
        Ok(())
    }

    /// Ends it: after that the device touches no memory on its behalf. A failure leaves it as it is.
    pub(crate) fn close(self) -> Result<(), (Self, io::Error)> {
        // SAFETY: made once; on success it is not touched again.
        match check(unsafe { (self.pd.context.calls.ibv_destroy_qp)(self.raw.as_ptr()) }) {
            Ok(()) => {
                let this = std::mem::ManuallyDrop::new(self);
                // SAFETY: `drop` does not run, so each count is moved out exactly once.
                unsafe {
                    drop(ptr::read(&raw const this.cq));
                    drop(ptr::read(&raw const this.pd));
                }
                Ok(())
            }
            Err(error) => Err((self, error)),
        }
    }
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: made once.
        closed("queue pair", unsafe { (self.pd.context.calls.ibv_destroy_qp)(self.raw.as_ptr()) });
    }
}
