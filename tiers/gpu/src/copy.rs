//! Copies of many pages at once, and who owns the memory meanwhile.
//!
//! ```text
//!  hosts ---> Stream::onboard, offload ---> Copying ---> poll, wait ---> hosts     the device is done
//!                     |                        |
//!                  Refused: hosts, error       dropped: waits; then, or when the device is lost, hosts are kept
//! ```
//! A copy takes its host memory and holds its device memory, its stream and the registrations. They come back when an
//! event behind the last page has passed, and no other way: neither an error of a call nor a lost device proves that
//! the device has stopped. What did not come back is kept until the device's context is gone ([`Device::kept`]).
//!
//! How many copies are under way is for those who begin them to bound; the device takes all.
//!
//! See [`Copier`](crate::Copier) for many copies under a bound.

use std::sync::Arc;
use std::time::Duration;

use crate::Error;
use crate::in_use::{InUse, registrations, settles};
use crate::kernel::Kernels;
use crate::memory::{DeviceMemory, Sink, Source};
use crate::pieces::{Direction, Pair, Piece, Place, joined, place_of, place_of_mut};
use crate::stream::{Event, Stream};

/// A page and its two places.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageCopy {
    /// Which of the host memories that are given with it.
    pub host: usize,
    /// Where in that.
    pub host_offset: u64,
    /// Where in the device memory.
    pub device_offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// A copy that was not begun, or not all of it.
#[derive(Debug)]
pub struct Refused<H> {
    /// Why.
    pub error: Error,
    /// What was given; `None`: the device may still be using it, so it is kept.
    pub hosts: Option<Vec<H>>,
}

/// Which pieces the pages are.
fn plan(
    direction: Direction,
    device: &DeviceMemory,
    hosts: &[Place],
    pages: &[PageCopy],
) -> Result<Vec<Piece>, Error> {
    let piece = |page: &PageCopy| {
        let PageCopy { host, host_offset, device_offset, bytes } = *page;
        let pair = Pair { device_offset, other_offset: host_offset, bytes };
        let (on_device, on_host) = pair.addresses(device, hosts.get(host), "host memory")?;
        Ok(match direction {
            Direction::DeviceToHost => Piece { to: on_host, from: on_device, bytes: bytes as usize },
            _ => Piece { to: on_device, from: on_host, bytes: bytes as usize },
        })
    };
    let pieces: Vec<_> = pages.iter().map(piece).collect::<Result<_, _>>()?;
    Ok(joined(pages.iter().map(|page| page.host).zip(pieces)))
}

/// A copy under way. Dropped, it waits for the device, after an error too: 10 s, and then it keeps everything for ever.
/// A thread that must not wait so long asks again or calls [`Copying::forget`].
pub struct Copying<H: Send + 'static> {
    parts: Option<Parts<H>>,
}

struct Parts<H> {
    event: Event,
    stream: Stream,
    kernels: Option<Kernels>,
    used: InUse<Vec<H>>,
}

impl<H: Send + 'static> Copying<H> {
    /// What was given, when the device is done; it comes once. After an error that is not [`Error::Lost`] it may be
    /// asked again.
    pub fn poll(&mut self) -> Result<Option<Vec<H>>, Error> {
        let Some(parts) = &self.parts else { return Ok(None) };
        match parts.event.is_done() {
            Ok(false) => Ok(None),
            Ok(true) => Ok(self.parts.take().map(|parts| parts.used.hosts)),
            Err(error) => {
                if matches!(error, Error::Lost { .. }) {
                    self.parts.take().into_iter().for_each(Parts::keep);
                }
                Err(error)
            }
        }
    }

    /// As [`Copying::poll`], after the device is done or the time is over.
    pub fn wait(&mut self, limit: Duration) -> Result<Option<Vec<H>>, Error> {
        if let Some(parts) = &self.parts {
            // What this finds, `poll` finds again and deals with.
            let _ = parts.event.wait(limit);
        }
        self.poll()
    }

    /// Lets go of it without a wait: what the device is not done with is never used again, or with a lost device, not
    /// before its context is gone. For a thread that must go on, after an error that is not [`Error::Lost`].
    pub fn forget(mut self) {
        let Some(parts) = self.parts.take() else { return };
        if !matches!(parts.event.is_done(), Ok(true)) {
            parts.keep();
        }
    }
}

impl<H: Send + 'static> Parts<H> {
    /// The device may be using it until its context is gone.
    fn keep(self) {
        let Self { event, stream, kernels, used } = self;
        let device = stream.device().clone();
        used.keep(&device, (event, stream, kernels));
    }
}

impl<H: Send + 'static> Drop for Copying<H> {
    fn drop(&mut self) {
        let Some(parts) = self.parts.take() else { return };
        if !settles(|| parts.event.is_done()) {
            parts.keep();
        }
    }
}

impl Stream {
    /// Copies pages up, to the device.
    pub fn onboard<H: Source>(
        &self,
        to: &DeviceMemory,
        from: Vec<H>,
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let places: Vec<_> = from.iter().map(|host| place_of(host.source())).collect();
        self.copy_pages(Direction::HostToDevice, to, from, &places, pages)
    }

    /// Copies pages down, from the device.
    pub fn offload<H: Sink>(
        &self,
        from: &DeviceMemory,
        mut to: Vec<H>,
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let places: Vec<_> = to.iter_mut().map(|host| place_of_mut(host.sink())).collect();
        self.copy_pages(Direction::DeviceToHost, from, to, &places, pages)
    }

    /// Copies from one device memory to another, of this device or of two.
    pub fn copy(
        &self,
        (to, to_offset): (&DeviceMemory, u64),
        (from, from_offset): (&DeviceMemory, u64),
        bytes: u64,
    ) -> Result<Copying<()>, Error> {
        let (to_at, from_at) = (to.address_of(to_offset, bytes)?, from.address_of(from_offset, bytes)?);
        let pieces = joined([((), Piece { to: to_at, from: from_at, bytes: bytes as usize })].into_iter());
        let used =
            InUse { devices: vec![to.clone(), from.clone()], registered: Vec::new(), hosts: Vec::new() };
        self.start(Direction::OnDevices, &pieces, used).map_err(|refused| refused.error)
    }

    fn copy_pages<H: Send + 'static>(
        &self,
        direction: Direction,
        device: &DeviceMemory,
        hosts: Vec<H>,
        places: &[Place],
        pages: &[PageCopy],
    ) -> Result<Copying<H>, Refused<H>> {
        let same = Arc::ptr_eq(&device.device().inner, &self.device().inner);
        let other = || Error::OtherDevice {
            device: self.device().facts().ordinal,
            wanted: device.device().facts().uuid,
        };
        let planned = if same { plan(direction, device, places, pages) } else { Err(other()) };
        let planned = planned.and_then(|pieces| Ok((pieces, registrations(self.device(), places)?)));
        match planned {
            Ok((pieces, registered)) => {
                let used = InUse { devices: vec![device.clone()], registered, hosts };
                self.start(direction, &pieces, used)
            }
            Err(error) => Err(Refused { error, hosts: Some(hosts) }),
        }
    }

    fn start<H: Send + 'static>(
        &self,
        direction: Direction,
        pieces: &[Piece],
        used: InUse<Vec<H>>,
    ) -> Result<Copying<H>, Refused<H>> {
        self.start_with(None, used, || self.queue(direction, pieces))
    }

    /// Starts what `queue` queues on this stream, of what `used` holds, with kernels or without.
    pub(crate) fn start_with<H: Send + 'static>(
        &self,
        kernels: Option<Kernels>,
        used: InUse<Vec<H>>,
        queue: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Copying<H>, Refused<H>> {
        let event = match self.device().event(false) {
            Ok(event) => event,
            Err(error) => return Err(Refused { error, hosts: Some(used.hosts) }),
        };
        let queued = queue();
        // Whatever failed, part of it may be under way: from here on only the device gives the memory back.
        let recorded = event.record(self);
        let parts = Parts { event, stream: self.clone(), kernels, used };
        let (error, is_done) = match (queued, recorded) {
            (Ok(()), Ok(())) => return Ok(Copying { parts: Some(parts) }),
            (Err(error), Ok(())) => (error, settles(|| parts.event.is_done())),
            (Ok(()) | Err(_), Err(error)) => (error, settles(|| self.is_idle())),
        };
        if is_done {
            return Err(Refused { error, hosts: Some(parts.used.hosts) });
        }
        parts.keep();
        Err(Refused { error, hosts: None })
    }
}
