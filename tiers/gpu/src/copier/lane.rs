//! A stream of the copier: what is on it, in order, each with a mark behind it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::JobToken;
use crate::Error;
use crate::device::Device;
use crate::in_use::SETTLE;
use crate::kernel::Table;
use crate::pieces::Direction;
use crate::stream::{Event, Priority, Stream, now};

/// What lies behind a step on a stream.
pub(super) struct Mark {
    pub(super) token: JobToken,
    /// `None`: a call failed, and it is tried again.
    pub(super) event: Option<Event>,
    pub(super) bytes: u64,
    /// Whether all of a step lies before it, and not only what there is of one that failed.
    pub(super) is_step: bool,
    /// What its launches read.
    pub(super) tables: Vec<Table>,
    /// What the step recorded, which stays until the device has passed it.
    pub(super) _then: Option<Arc<Event>>,
}

pub(super) struct Lane {
    pub(super) direction: Direction,
    pub(super) urgent: bool,
    pub(super) stream: Stream,
    pub(super) bytes: u64,
    pub(super) marks: VecDeque<Mark>,
    /// Since when the driver does not say how far the stream is.
    silent_since: Option<Instant>,
}

/// The first mark of a lane, when it is asked about.
pub(super) enum Passed {
    Mark(Mark),
    None,
    /// Nothing but errors for a long time.
    NoAnswer(Error),
}

/// The lanes of a copier: up and down so many, across one, and for each of the three an urgent one.
pub(super) fn open(device: &Device, each_way: usize) -> Result<Vec<Lane>, Error> {
    let ways =
        [(Direction::HostToDevice, each_way), (Direction::DeviceToHost, each_way), (Direction::OnDevices, 1)];
    let mut lanes = Vec::new();
    for (direction, count) in ways {
        for urgent in std::iter::repeat_n(false, count).chain([true]) {
            let stream = device.stream(if urgent { Priority::High } else { Priority::Low })?;
            let marks = VecDeque::new();
            lanes.push(Lane { direction, urgent, stream, bytes: 0, marks, silent_since: None });
        }
    }
    Ok(lanes)
}

impl Lane {
    /// By this the lanes are compared.
    pub(super) fn load(&self) -> (u64, usize) {
        (self.bytes, self.marks.len())
    }

    /// Takes all of its marks, as if nothing were on it.
    pub(super) fn clear(&mut self) -> VecDeque<Mark> {
        (self.bytes, self.silent_since) = (0, None);
        std::mem::take(&mut self.marks)
    }

    /// The first mark, if the device has passed it.
    pub(super) fn passed(&mut self, made: impl FnMut() -> Result<Event, Error>) -> Passed {
        match self.is_passed(made) {
            Ok(is_passed) => {
                self.silent_since = None;
                let mark = if is_passed { self.marks.pop_front() } else { None };
                mark.map_or(Passed::None, Passed::Mark)
            }
            // All lanes are seen to then.
            Err(Error::Lost { .. }) => Passed::None,
            Err(error) => {
                let now = now();
                let silent_since = *self.silent_since.get_or_insert(now);
                if now - silent_since < SETTLE { Passed::None } else { Passed::NoAnswer(error) }
            }
        }
    }

    fn is_passed(&mut self, mut made: impl FnMut() -> Result<Event, Error>) -> Result<bool, Error> {
        let Some(mark) = self.marks.front_mut() else { return Ok(false) };
        if let Some(event) = &mark.event {
            return event.is_done();
        }
        if self.stream.is_idle()? {
            return Ok(true);
        }
        // Anywhere behind it will do.
        let event = made()?;
        event.record(&self.stream)?;
        mark.event = Some(event);
        Ok(false)
    }
}
