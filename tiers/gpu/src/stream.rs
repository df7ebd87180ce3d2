//! Streams, which do in order what is queued on them, and events, which say how far one got.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUevent, CUresult, CUstream};

use crate::Error;
use crate::device::Device;

/// `CU_STREAM_NON_BLOCKING`: not in step with the legacy default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;
/// `CU_EVENT_INTERPROCESS`.
const INTERPROCESS: u32 = 4;

/// How often something under way is looked at: more and more seldom.
const LOOK_MIN: Duration = Duration::from_micros(10);
const LOOK_MAX: Duration = Duration::from_millis(1);

/// Which of several streams the device serves first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Priority {
    /// What somebody waits for.
    High,
    /// The rest.
    Low,
}

/// A queue of a device. Cheap to clone; it ends with its last clone.
#[derive(Clone, Debug)]
pub struct Stream {
    pub(crate) inner: Arc<Queue>,
}

#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) device: Device,
    pub(crate) stream: CUstream,
}

// SAFETY: a name for the driver, which takes it from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above.
unsafe impl Sync for Queue {}

impl Drop for Queue {
    fn drop(&mut self) {
        let inner = &self.device.inner;
        // That of a lost device goes with its context.
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: made once, destroyed once. What is still queued is done all the same.
        let code = unsafe { (inner.entries().cuStreamDestroy_v2)(self.stream) };
        let _ = inner.check("cuStreamDestroy", code);
    }
}

impl Device {
    /// A new stream.
    pub fn stream(&self, priority: Priority) -> Result<Stream, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: places to write to.
        let code = unsafe { (inner.entries().cuCtxGetStreamPriorityRange)(&mut least, &mut greatest) };
        inner.check("cuCtxGetStreamPriorityRange", code)?;
        let priority = match priority {
            Priority::High => greatest,
            Priority::Low => least,
        };
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place to write to.
        let code =
            unsafe { (inner.entries().cuStreamCreateWithPriority)(&mut stream, NON_BLOCKING, priority) };
        inner.check("cuStreamCreateWithPriority", code)?;
        Ok(Stream { inner: Arc::new(Queue { device: self.clone(), stream }) })
    }

    /// A new event. A shared one can be handed to other processes.
    pub fn event(&self, shared: bool) -> Result<Event, Error> {
        let inner = &self.inner;
        let _current = inner.enter()?;
        let mut event = std::ptr::null_mut();
        let flags = DISABLE_TIMING | if shared { INTERPROCESS } else { 0 };
        // SAFETY: a place to write to.
        let code = unsafe { (inner.entries().cuEventCreate)(&mut event, flags) };
        inner.check("cuEventCreate", code)?;
        Ok(Event { device: self.clone(), event })
    }
}

impl Stream {
    /// Whose it is.
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// Whether all that was queued is done.
    pub fn is_idle(&self) -> Result<bool, Error> {
        let inner = &self.inner.device.inner;
        let _current = inner.enter()?;
        // SAFETY: the stream lives as long as `self`.
        let code = unsafe { (inner.entries().cuStreamQuery)(self.inner.stream) };
        if code == CUresult::CUDA_ERROR_NOT_READY as u32 {
            return Ok(false);
        }
        inner.check("cuStreamQuery", code).map(|()| true)
    }

    /// Waits until all that was queued is done; `false` when the time is over before.
    pub fn wait(&self, limit: Duration) -> Result<bool, Error> {
        until(limit, || self.is_idle())
    }

    /// What is queued from now on waits for what the event recorded last, on another stream or in another process. If
    /// that is never reached, what is queued here never ends: of a stream that others use too, ask the event first.
    pub fn wait_for(&self, event: &Event) -> Result<(), Error> {
        let inner = &self.inner.device.inner;
        let _current = inner.enter()?;
        // SAFETY: both live; the driver takes what it needs of the event before it returns.
        let code = unsafe { (inner.entries().cuStreamWaitEvent)(self.inner.stream, event.event, 0) };
        inner.check("cuStreamWaitEvent", code)
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub struct Event {
    pub(crate) device: Device,
    pub(crate) event: CUevent,
}

// SAFETY: a name for the driver, which takes it from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// Marks where the stream is now.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        let inner = &self.device.inner;
        let _current = inner.enter()?;
        // SAFETY: both live.
        let code = unsafe { (inner.entries().cuEventRecord)(self.event, stream.inner.stream) };
        inner.check("cuEventRecord", code)
    }

    /// Whether the stream has passed the mark. One that was never set is passed.
    pub fn is_done(&self) -> Result<bool, Error> {
        let inner = &self.device.inner;
        let _current = inner.enter()?;
        // SAFETY: the event lives as long as `self`.
        let code = unsafe { (inner.entries().cuEventQuery)(self.event) };
        if code == CUresult::CUDA_ERROR_NOT_READY as u32 {
            return Ok(false);
        }
        inner.check("cuEventQuery", code).map(|()| true)
    }

    /// Waits until the stream has passed the mark; `false` when the time is over before.
    pub fn wait(&self, limit: Duration) -> Result<bool, Error> {
        until(limit, || self.is_done())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let inner = &self.device.inner;
        let Ok(_current) = inner.enter() else { return };
        // SAFETY: made once, destroyed once; the driver keeps what it needs of it.
        let code = unsafe { (inner.entries().cuEventDestroy_v2)(self.event) };
        let _ = inner.check("cuEventDestroy", code);
    }
}

/// Looks again and again, for the driver's own waits know no limit.
pub(crate) fn until(
    limit: Duration,
    mut is_done: impl FnMut() -> Result<bool, Error>,
) -> Result<bool, Error> {
    let started = now();
    let mut pause = LOOK_MIN;
    while !is_done()? {
        let left = limit.saturating_sub(now() - started);
        if left.is_zero() {
            return Ok(false);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(LOOK_MAX);
    }
    Ok(true)
}

#[expect(clippy::disallowed_methods, reason = "a wait for a device; nothing that is replayed")]
pub(crate) fn now() -> Instant {
    Instant::now()
}
