//! Time: operations over the limit, and probes of a device that is out of service.

use std::time::Duration;

use kv_tiers::store::{StoreDone, StoreError};

use super::{AppendKind, Log, What};
use crate::io::{IoKind, PROBE_FILE, Pages};
use crate::segment::PAGE_BYTES;

/// Where a probe goes in its file.
const PROBE_OFFSET: u64 = PAGE_BYTES as u64;

impl Log {
    /// Looks for operations over the time limit.
    pub(super) fn watch(&mut self) {
        let (now, limit) = (self.now, self.config.slow_limit);
        let was_open = self.circuit.refusal().is_some();
        for io in self.ios.values_mut() {
            if !io.overdue && now.saturating_sub(io.began) > limit && !matches!(io.what, What::Probe { .. }) {
                io.overdue = true;
                self.circuit.health.overdue += 1;
                self.circuit.slow(now, limit);
            }
        }
        for one in self.appends.values_mut() {
            if one.answered || now.saturating_sub(one.taken) <= limit {
                continue;
            }
            let result = || Err(StoreError::Slow { limit });
            let token = one.token;
            // Its memory stays with us until the device gives it back; the node gets another hold on it.
            let done = match &one.kind {
                AppendKind::Write { bytes } => {
                    StoreDone::Written { token, bytes: bytes.clone(), result: result() }
                }
                AppendKind::Move { .. } => StoreDone::Moved { token, result: result() },
                AppendKind::Remove { .. } => {
                    StoreDone::Removed { token, result: Err(StoreError::Slow { limit }) }
                }
                AppendKind::Carry { .. } => continue,
            };
            one.answered = true;
            self.done.push(done);
        }
        if !was_open {
            self.refuse_waiting();
        }
    }

    /// How long nothing needs to be looked at, if nothing happens.
    pub(crate) fn quiet_for(&self, now: Duration) -> Duration {
        let mut wait = Duration::MAX;
        if self.ios.len() + self.appends.len() > 0 {
            wait = (self.config.slow_limit / 4).clamp(Duration::from_millis(1), Duration::from_secs(1));
        }
        if let Some(probe) = self.circuit.next_probe() {
            wait = wait.min(probe.saturating_sub(now).max(Duration::from_millis(1)));
        }
        wait
    }

    pub(super) fn probe(&mut self) {
        if !self.probe_file {
            self.circuit.probed(self.now, true);
            return;
        }
        self.probes += 1;
        let wanted = self.probes ^ self.now.as_nanos() as u64;
        let mut buffer = Pages::new(PAGE_BYTES);
        buffer[..8].copy_from_slice(&wanted.to_le_bytes());
        self.probe_step(buffer, 0, wanted, self.now);
    }

    /// Write, sync, read, compare.
    pub(super) fn probe_step(&mut self, mut buffer: Pages, step: u8, wanted: u64, began: Duration) {
        let memory = buffer.memory(PAGE_BYTES);
        let kind = match step {
            0 => IoKind::Write { offset: PROBE_OFFSET, memory },
            1 => IoKind::Sync,
            _ => IoKind::Read { offset: PROBE_OFFSET, memory },
        };
        self.start(PROBE_FILE, kind, What::Probe { buffer, step, wanted, began });
    }

    pub(super) fn probe_advanced(
        &mut self,
        mut buffer: Pages,
        step: u8,
        wanted: u64,
        began: Duration,
        whole: bool,
    ) {
        if whole && step < 2 {
            if step == 1 {
                buffer.fill(0);
            }
            self.probe_step(buffer, step + 1, wanted, began);
        } else {
            self.circuit.probed(self.now, whole && buffer[..8] == wanted.to_le_bytes());
        }
    }
}
