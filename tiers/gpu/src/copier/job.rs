//! A job in the copier: what it was asked for, as addresses, and how far it is.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Hosts, Job, PagePiece, Step};
use crate::Error;
use crate::device::Device;
use crate::in_use::{InUse, Registrations, registrations};
use crate::kernel::{Kernels, Reach};
use crate::memory::{DeviceMemory, Registered};
use crate::pieces::{Direction, Pair, Piece, Place, joined, place_of, place_of_mut};
use crate::stream::{Event, Stream};

/// Where a job's bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Up,
    Down,
    /// From device to device: whether the job's own memories are written.
    Across {
        inward: bool,
    },
}

/// A step as the driver is asked for it.
pub(super) struct Pending {
    /// `None` also when it has passed.
    pub(super) after: Option<Arc<Event>>,
    pub(super) pieces: Vec<Piece>,
    pub(super) bytes: u64,
    pub(super) then: Option<Arc<Event>>,
}

impl Pending {
    pub(super) fn of(step: Step, pieces: Vec<Piece>) -> Self {
        let bytes = bytes(&pieces);
        Self { after: step.after, pieces, bytes, then: step.then }
    }
}

fn bytes(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.bytes as u64).fold(0, u64::saturating_add)
}

/// Where the other side of a job is.
pub(super) struct Others {
    way: Way,
    places: Vec<Place>,
    /// In which memory of the driver each of them lies: slots of one registration are in one.
    within: Vec<u32>,
}

/// What was found out of a job before it is taken.
pub(super) struct Planned {
    others: Others,
    registered: Registrations,
    reach: Option<Reach>,
    /// Of each step.
    pieces: Vec<Vec<Piece>>,
}

pub(super) struct Work {
    pub(super) used: InUse<Hosts>,
    /// How many of the devices' memories are the job's own, which come first.
    memories: usize,
    others: Others,
    /// Where the kernel finds the hosts; `None`: it does not.
    pub(super) reach: Option<Reach>,
    pub(super) urgent: bool,
    pub(super) open: bool,
    pub(super) pending: VecDeque<Pending>,
    /// Pending steps for which there was room when the job began: none waits for an event.
    pub(super) admitted: usize,
    /// Whether it was said that all it began with is queued.
    pub(super) told: bool,
    /// `None`: not begun.
    pub(super) lane: Option<usize>,
    /// Marks that the device has not passed.
    pub(super) on_device: usize,
    /// Steps that are done.
    pub(super) done: usize,
    /// Why it gets no further.
    pub(super) stopped: Option<Error>,
}

impl Others {
    fn of(hosts: &mut Hosts) -> Self {
        let on_device = |memory: &DeviceMemory| memory.address_of(0, 0).map(|start| (start, memory.bytes()));
        let (way, places): (_, Vec<Place>) = match hosts {
            Hosts::From(held) => (Way::Up, held.iter().map(|held| place_of(held)).collect()),
            Hosts::To(slots) => (Way::Down, slots.iter_mut().map(|slot| place_of_mut(slot)).collect()),
            Hosts::FromDevice(memories) => {
                (Way::Across { inward: true }, memories.iter().flat_map(on_device).collect())
            }
            Hosts::ToDevice(memories) => {
                (Way::Across { inward: false }, memories.iter().flat_map(on_device).collect())
            }
        };
        let within = (0..places.len() as u32).collect();
        Self { way, places, within }
    }

    /// Tells which of the places lie in one registration.
    fn registered(&mut self, registered: &Registrations) {
        for ((address, bytes), within) in self.places.iter().zip(&mut self.within) {
            let covers = |(registered, _): &(Arc<Registered>, Option<Device>)| {
                registered.covers(*address as usize, *bytes as usize)
            };
            *within = registered.iter().position(covers).map_or(*within, |at| at as u32);
        }
    }

    fn plan(&self, device: &Device, memories: &[DeviceMemory], step: &Step) -> Result<Vec<Piece>, Error> {
        step.then.iter().try_for_each(|then| device.is_same(&then.device))?;
        let piece = |piece: &PagePiece| {
            let PagePiece { memory, device_offset, other, other_offset, bytes } = *piece;
            let (of, given) = (memory, memories.len() as u64);
            let none = || Error::Range {
                what: "the job's memories",
                offset: memory.into(),
                bytes: 1,
                within: given,
            };
            let memory = memories.get(memory as usize).ok_or_else(none)?;
            let pair = Pair { device_offset, other_offset, bytes };
            let (on_device, on_other) =
                pair.addresses(memory, self.places.get(other as usize), "the job's other side")?;
            let bytes = bytes as usize;
            let piece = match self.way {
                Way::Up | Way::Across { inward: true } => Piece { to: on_device, from: on_other, bytes },
                Way::Down | Way::Across { inward: false } => Piece { to: on_other, from: on_device, bytes },
            };
            Ok(((of, self.within.get(other as usize)), piece))
        };
        let pieces: Vec<_> = step.pieces.iter().map(piece).collect::<Result<_, Error>>()?;
        Ok(joined(pieces.into_iter()))
    }
}

/// Looks at all of a job.
pub(super) fn plan(device: &Device, kernels: Option<&Kernels>, job: &mut Job) -> Result<Planned, Error> {
    job.memories.iter().try_for_each(|memory| device.is_same(memory.device()))?;
    let mut others = Others::of(&mut job.hosts);
    let (registered, is_near) = match &job.hosts {
        Hosts::From(_) | Hosts::To(_) => {
            let registered = registrations(device, &others.places)?;
            others.registered(&registered);
            (registered, true)
        }
        Hosts::FromDevice(memories) | Hosts::ToDevice(memories) => {
            let is_near = memories.iter().all(|memory| device.is_same(memory.device()).is_ok());
            (Registrations::new(), is_near)
        }
    };
    // The driver has ways to another device that a kernel has not, and host memory that a kernel does not find is
    // copied by the driver.
    let reach = kernels.filter(|_| is_near).and_then(|kernels| kernels.reach(&registered).ok());
    let plan = |step: &Step| others.plan(device, &job.memories, step);
    let pieces = job.steps.iter().map(plan).collect::<Result<_, _>>()?;
    Ok(Planned { others, registered, reach, pieces })
}

/// Whether what a step waits for has passed, if it waits for anything.
pub(super) fn is_passed(after: Option<&Arc<Event>>) -> Result<bool, Error> {
    after.map_or(Ok(true), |after| after.is_done())
}

impl Planned {
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|pieces| bytes(pieces)).fold(0, u64::saturating_add)
    }

    pub(super) fn of(self, job: Job) -> Work {
        let Self { others, registered, reach, pieces } = self;
        let pending =
            job.steps.into_iter().zip(pieces).map(|(step, pieces)| Pending::of(step, pieces)).collect();
        let mut devices = job.memories;
        let memories = devices.len();
        if let Hosts::FromDevice(others) | Hosts::ToDevice(others) = &job.hosts {
            devices.extend(others.iter().cloned());
        }
        Work {
            used: InUse { devices, registered, hosts: job.hosts },
            memories,
            others,
            reach,
            urgent: job.urgent,
            open: job.open,
            pending,
            admitted: 0,
            told: false,
            lane: None,
            on_device: 0,
            done: 0,
            stopped: None,
        }
    }
}

impl Work {
    pub(super) fn plan(&self, device: &Device, step: &Step) -> Result<Vec<Piece>, Error> {
        self.others.plan(device, &self.used.devices[..self.memories], step)
    }

    pub(super) fn direction(&self) -> Direction {
        match self.others.way {
            Way::Up => Direction::HostToDevice,
            Way::Down => Direction::DeviceToHost,
            Way::Across { .. } => Direction::OnDevices,
        }
    }

    /// Whether what its next step waits for has passed.
    pub(super) fn is_passed(&self) -> Result<bool, Error> {
        is_passed(self.pending.front().and_then(|step| step.after.as_ref()))
    }

    /// What its next step waited for has passed, and is not asked again. The steps behind it are asked as far as they
    /// may go too; one that does not answer is asked again when it is the next.
    pub(super) fn goes_on(&mut self) {
        for (at, step) in self.pending.iter_mut().enumerate() {
            if at > 0 && !is_passed(step.after.as_ref()).unwrap_or_default() {
                break;
            }
            step.after = None;
        }
    }

    /// The pending steps that wait for nothing.
    pub(super) fn to_admit(&self) -> impl Iterator<Item = &Pending> {
        self.pending.iter().take_while(|step| step.after.is_none())
    }

    pub(super) fn bytes_to_admit(&self) -> u64 {
        self.to_admit().map(|step| step.bytes).fold(0, u64::saturating_add)
    }

    /// It gets no further than it is; the first reason counts.
    pub(super) fn stop(&mut self, error: Error) {
        self.pending.clear();
        self.open = false;
        self.stopped.get_or_insert(error);
    }

    /// Nothing of it is under way or to come.
    pub(super) fn is_over(&self) -> bool {
        let more = self.open || !self.pending.is_empty() || (self.lane.is_none() && self.stopped.is_none());
        self.on_device == 0 && !more
    }
}

/// What the device may be using is kept; device memory, by those of its holders that it needs.
pub(super) fn keep(used: InUse<Hosts>, device: &Device, stream: Option<Stream>) {
    let InUse { devices, registered, hosts } = used;
    let hosts = match hosts {
        // The devices have them too.
        Hosts::FromDevice(_) | Hosts::ToDevice(_) => None,
        hosts => Some(hosts),
    };
    InUse { devices, registered, hosts }.keep(device, stream);
}
