//! The circuit of a disk: a device that errs or dawdles is taken out of service, so that requests miss at
//! once instead of waiting for it, and put back when it has proven itself.
//!
//! ```text
//!            errors_max errors in a row, or slow_max operations over the time limit
//!   Healthy ------------------------------------------------------------------------> Degraded
//!      ^                                                                                  |
//!      +---------- probes_to_heal probes in a row went well, one every probe_every -------+
//! ```
//! A data directory that is gone opens it as well, and no probe closes it before the directory is back.
//!
//! A pure state machine: it is told what happened and when.

use std::time::Duration;

use kv_tiers::store::StoreError;

/// When the circuit opens and closes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CircuitLimits {
    /// Device errors in a row that open it.
    pub errors_max: u32,
    /// Operations over the time limit, without one in time between them, that open it.
    pub slow_max: u32,
    /// Time between probes while it is open.
    pub probe_every: Duration,
    /// Probes in a row that must go well to close it.
    pub probes_to_heal: u32,
}

impl Default for CircuitLimits {
    fn default() -> Self {
        Self { errors_max: 4, slow_max: 4, probe_every: Duration::from_secs(1), probes_to_heal: 2 }
    }
}

/// Whether a device is in service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum HealthState {
    /// In service.
    #[default]
    Healthy,
    /// Out of service; operations are refused with the reason.
    Degraded {
        /// Since when, on the store's clock.
        since: Duration,
        /// What took it out.
        reason: StoreError,
    },
}

/// A device's health, for people and metrics.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Health {
    /// In service or not.
    pub state: HealthState,
    /// The newest device error, also when it is in service.
    pub last_error: Option<StoreError>,
    /// Device errors since it was opened.
    pub errors: u64,
    /// Operations over the time limit since it was opened.
    pub slow: u64,
    /// Operations that are over the time limit and still with the device.
    pub overdue: u32,
    /// Blocks that failed their check since it was opened.
    pub corrupt: u64,
    /// How often the circuit opened.
    pub opened: u64,
    /// Now, on the store's clock, when this was written.
    pub at: Duration,
}

/// The state machine.
pub(crate) struct Circuit {
    limits: CircuitLimits,
    pub(crate) health: Health,
    errors_in_row: u32,
    slow_in_row: u32,
    probes_in_row: u32,
    probe_at: Duration,
    probing: bool,
    gone: bool,
}

impl Circuit {
    pub(crate) fn new(limits: CircuitLimits) -> Self {
        Self {
            limits,
            health: Health::default(),
            errors_in_row: 0,
            slow_in_row: 0,
            probes_in_row: 0,
            probe_at: Duration::ZERO,
            probing: false,
            gone: false,
        }
    }

    /// Why operations are refused now, if they are.
    pub(crate) fn refusal(&self) -> Option<&StoreError> {
        match &self.health.state {
            HealthState::Healthy => None,
            HealthState::Degraded { reason, .. } => Some(reason),
        }
    }

    /// The device did something right; `in_time` when it was within the limit.
    pub(crate) fn worked(&mut self, in_time: bool) {
        self.errors_in_row = 0;
        if in_time {
            self.slow_in_row = 0;
        }
    }

    /// The device erred.
    pub(crate) fn erred(&mut self, now: Duration, error: &StoreError) {
        self.health.errors += 1;
        self.health.last_error = Some(error.clone());
        self.errors_in_row += 1;
        self.probes_in_row = 0;
        if self.errors_in_row >= self.limits.errors_max {
            self.open(now, error.clone());
        }
    }

    /// An operation passed the time limit.
    pub(crate) fn slow(&mut self, now: Duration, limit: Duration) {
        self.health.slow += 1;
        self.slow_in_row += 1;
        self.probes_in_row = 0;
        if self.slow_in_row >= self.limits.slow_max {
            self.open(now, StoreError::Slow { limit });
        }
    }

    /// Somebody looked whether the data directory is still there.
    pub(crate) fn looked(&mut self, now: Duration, there: bool) {
        self.gone = !there;
        if self.gone {
            self.open(now, StoreError::Gone);
        }
    }

    fn open(&mut self, now: Duration, reason: StoreError) {
        if self.health.state == HealthState::Healthy {
            self.health.last_error = Some(reason.clone());
            self.health.state = HealthState::Degraded { since: now, reason };
            self.health.opened += 1;
            self.probes_in_row = 0;
            self.probe_at = now + self.limits.probe_every;
        }
    }

    /// Whether it is time for a probe; then one is under way until [`Self::probed`].
    pub(crate) fn probe_due(&mut self, now: Duration) -> bool {
        let due = self.refusal().is_some() && !self.probing && now >= self.probe_at;
        self.probing |= due;
        due
    }

    /// When to look again, while it is open.
    pub(crate) fn next_probe(&self) -> Option<Duration> {
        (self.refusal().is_some() && !self.probing).then_some(self.probe_at)
    }

    /// A probe ended.
    pub(crate) fn probed(&mut self, now: Duration, went_well: bool) {
        self.probing = false;
        self.probe_at = now + self.limits.probe_every;
        self.probes_in_row = if went_well && !self.gone { self.probes_in_row + 1 } else { 0 };
        if self.probes_in_row >= self.limits.probes_to_heal {
            self.health.state = HealthState::Healthy;
            self.errors_in_row = 0;
            self.slow_in_row = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const EIO: StoreError = StoreError::Io { operation: "read", segment: 1, errno: 5 };

    #[test]
    fn errors_in_a_row_open_it_and_good_probes_close_it() {
        let mut circuit = Circuit::new(CircuitLimits::default());
        for _ in 0..3 {
            circuit.erred(SECOND, &EIO);
        }
        circuit.worked(true);
        for _ in 0..3 {
            circuit.erred(SECOND, &EIO);
        }
        assert_eq!(circuit.refusal(), None, "a success in between counts");
        circuit.erred(SECOND, &EIO);
        assert_eq!(circuit.refusal(), Some(&EIO));
        assert!(!circuit.probe_due(SECOND * 3 / 2));
        assert!(circuit.probe_due(SECOND * 2));
        assert!(!circuit.probe_due(SECOND * 2), "one probe at a time");
        circuit.probed(SECOND * 2, true);
        assert!(circuit.refusal().is_some(), "one is not enough");
        assert!(circuit.probe_due(SECOND * 3));
        circuit.probed(SECOND * 3, true);
        assert_eq!(circuit.refusal(), None);
        assert_eq!((circuit.health.errors, circuit.health.opened), (7, 1));
        assert_eq!(circuit.health.last_error, Some(EIO), "the last error is remembered");
    }

    #[test]
    fn good_probes_do_not_close_it_while_the_directory_is_gone() {
        let mut circuit = Circuit::new(CircuitLimits::default());
        circuit.looked(SECOND, true);
        assert_eq!(circuit.refusal(), None);
        circuit.looked(SECOND, false);
        for at in 2..6 {
            circuit.probed(SECOND * at, true);
        }
        assert_eq!(circuit.refusal(), Some(&StoreError::Gone));
        circuit.looked(SECOND * 6, true);
        circuit.probed(SECOND * 7, true);
        circuit.probed(SECOND * 8, true);
        assert_eq!(circuit.refusal(), None);
    }

    #[test]
    fn slowness_opens_it_with_its_own_reason() {
        let mut circuit = Circuit::new(CircuitLimits::default());
        for _ in 0..3 {
            circuit.slow(SECOND, SECOND);
            circuit.worked(false);
        }
        assert_eq!(circuit.refusal(), None);
        circuit.slow(SECOND, SECOND);
        assert_eq!(circuit.refusal(), Some(&StoreError::Slow { limit: SECOND }));
        assert!(circuit.probe_due(SECOND * 2));
        circuit.probed(SECOND * 2, false);
        assert!(circuit.probe_due(SECOND * 3));
        circuit.probed(SECOND * 3, true);
        assert!(circuit.refusal().is_some(), "a failed probe starts the count again");
    }
}
