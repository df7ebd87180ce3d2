//! What may be in flight, and what the node may use in all.
//!
//! A [`Budget`] bounds bytes and operations under way on one device. [`Budget::reserve`] gives a [`Permit`]
//! that gives itself back when it is dropped, wherever the operation ends; over the limit it gives a typed
//! refusal with a hint when to try again. Nobody waits here.
//!
//! A [`Plan`] is the other half: every bound of the node as one line with its owner, added up at start and
//! printed by `kvd --check`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Which bound was reached.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Limit {
    /// Bytes under way.
    Bytes,
    /// Operations under way.
    Ops,
}

impl Limit {
    /// Name in text and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Ops => "operations",
        }
    }
}

/// Too much is under way. Try again after the hint.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{used} of {max} {} are under way, {wanted} more were wanted", limit.name())]
pub struct Rejected {
    /// Which bound.
    pub limit: Limit,
    /// How much of it was wanted.
    pub wanted: u64,
    /// How much of it is under way.
    pub used: u64,
    /// The bound.
    pub max: u64,
    /// When to try again.
    pub retry_hint: Duration,
}

#[derive(Debug, Default)]
struct Used {
    bytes: AtomicU64,
    ops: AtomicU64,
}

/// A bound on bytes and operations under way. Clones share it.
#[derive(Clone, Debug)]
pub struct Budget {
    used: Arc<Used>,
    bytes_max: u64,
    ops_max: u64,
    retry_hint: Duration,
}

impl Budget {
    /// A budget of `bytes_max` bytes in `ops_max` operations. `retry_hint` is about the time in which the
    /// device works off a full budget.
    pub fn new(bytes_max: u64, ops_max: u64, retry_hint: Duration) -> Self {
        Self { used: Arc::default(), bytes_max, ops_max, retry_hint }
    }

    /// Takes a part of the budget for one operation of `bytes`. An operation that is larger than the whole
    /// budget is let through when it is alone, so that no size can starve.
    pub fn reserve(&self, bytes: u64) -> Result<Permit, Rejected> {
        let rejected =
            |limit, wanted, used, max| Rejected { limit, wanted, used, max, retry_hint: self.retry_hint };
        let one_more = |used: u64| (used < self.ops_max).then_some(used + 1);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        if let Err(used) = self.used.ops.fetch_update(set, fetch, one_more) {
            return Err(rejected(Limit::Ops, 1, used, self.ops_max));
        }
        let fits = |used: u64| {
            let sum = used.checked_add(bytes)?;
            (used == 0 || sum <= self.bytes_max).then_some(sum)
        };
        if let Err(used) = self.used.bytes.fetch_update(set, fetch, fits) {
            self.used.ops.fetch_sub(1, Ordering::AcqRel);
            return Err(rejected(Limit::Bytes, bytes, used, self.bytes_max));
        }
        Ok(Permit { used: Arc::clone(&self.used), bytes })
    }

    /// Bytes under way.
    pub fn bytes_used(&self) -> u64 {
        self.used.bytes.load(Ordering::Acquire)
    }

    /// Operations under way.
    pub fn ops_used(&self) -> u64 {
        self.used.ops.load(Ordering::Acquire)
    }

    /// Most bytes under way.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// Most operations under way.
    pub fn ops_max(&self) -> u64 {
        self.ops_max
    }

    /// About the time in which a full budget is worked off.
    pub fn retry_hint(&self) -> Duration {
        self.retry_hint
    }
}

/// A part of a budget, given back on drop.
#[derive(Debug)]
#[must_use = "a permit that is dropped at once bounds nothing"]
pub struct Permit {
    used: Arc<Used>,
    bytes: u64,
}

impl Permit {
    /// Bytes it stands for.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.used.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.used.ops.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How much, and of what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Amount {
    /// Bytes of memory or disk.
    Bytes(u64),
    /// A number of things.
    Count(u64),
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = match *self {
            Self::Count(count) => return f.pad(&count.to_string()),
            Self::Bytes(bytes) => bytes,
        };
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let unit = (bytes.max(1).ilog2() as usize / 10).min(UNITS.len() - 1);
        let whole = bytes >> (10 * unit);
        let text = match unit {
            0 => format!("{whole} B"),
            _ if bytes == whole << (10 * unit) => format!("{whole} {}", UNITS[unit]),
            _ => format!("{:.1} {}", bytes as f64 / (1u64 << (10 * unit)) as f64, UNITS[unit]),
        };
        f.pad(&text)
    }
}

/// One bound.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BudgetLine {
    /// Who uses it up.
    pub owner: String,
    /// What it bounds.
    pub what: String,
    /// The bound.
    pub amount: Amount,
}

/// All bounds of a node. `Display` gives a table of lines, then the sum of the bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Plan {
    /// In the order in which they are printed.
    pub lines: Vec<BudgetLine>,
}

impl Plan {
    /// Adds a line of bytes.
    pub fn bytes(&mut self, owner: impl Into<String>, what: impl Into<String>, bytes: u64) {
        self.push(owner, what, Amount::Bytes(bytes));
    }

    /// Adds a line of a count.
    pub fn count(&mut self, owner: impl Into<String>, what: impl Into<String>, count: u64) {
        self.push(owner, what, Amount::Count(count));
    }

    fn push(&mut self, owner: impl Into<String>, what: impl Into<String>, amount: Amount) {
        self.lines.push(BudgetLine { owner: owner.into(), what: what.into(), amount });
    }

    /// Appends the lines of another plan.
    pub fn append(&mut self, other: Self) {
        self.lines.extend(other.lines);
    }

    /// Sum of all byte lines.
    pub fn bytes_total(&self) -> u64 {
        let bytes = |line: &BudgetLine| if let Amount::Bytes(bytes) = line.amount { bytes } else { 0 };
        self.lines.iter().map(bytes).fold(0, u64::saturating_add)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = Amount::Bytes(self.bytes_total()).to_string();
        let width = |column: fn(&BudgetLine) -> usize, least: usize| {
            self.lines.iter().map(column).max().unwrap_or(0).max(least)
        };
        let owner = width(|line| line.owner.chars().count(), "total".len());
        let what = width(|line| line.what.chars().count(), 0);
        let amount = width(|line| line.amount.to_string().len(), total.len());
        for line in &self.lines {
            writeln!(f, "{:owner$}  {:what$}  {:>amount$}", line.owner, line.what, line.amount)?;
        }
        writeln!(f, "{:owner$}  {:what$}  {total:>amount$}", "total", "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(bytes_max: u64, ops_max: u64) -> Budget {
        Budget::new(bytes_max, ops_max, Duration::from_millis(5))
    }

    #[test]
    fn a_full_budget_refuses_with_the_limit_and_a_hint() {
        let budget = budget(100, 2);
        let first = budget.reserve(60).unwrap();
        let refused = budget.reserve(50).unwrap_err();
        let hint = Duration::from_millis(5);
        let bytes = Rejected { limit: Limit::Bytes, wanted: 50, used: 60, max: 100, retry_hint: hint };
        assert_eq!(refused, bytes);
        assert_eq!(refused.to_string(), "60 of 100 bytes are under way, 50 more were wanted");
        let second = budget.reserve(40).unwrap();
        let refused = budget.reserve(0).unwrap_err();
        assert_eq!(refused, Rejected { limit: Limit::Ops, wanted: 1, used: 2, max: 2, retry_hint: hint });
        drop((first, second));
        assert_eq!((budget.bytes_used(), budget.ops_used()), (0, 0));
    }

    #[test]
    fn a_refusal_takes_nothing() {
        let budget = budget(100, 10);
        let _first = budget.reserve(100).unwrap();
        for _ in 0..100 {
            budget.reserve(1).unwrap_err();
        }
        assert_eq!((budget.bytes_used(), budget.ops_used()), (100, 1));
    }

    #[test]
    fn an_operation_larger_than_the_budget_goes_alone() {
        let budget = budget(100, 10);
        let large = budget.reserve(1000).unwrap();
        assert!(budget.reserve(1).is_err());
        drop(large);
        let _small = budget.reserve(1).unwrap();
        assert!(budget.reserve(1000).is_err());
        assert!(budget.reserve(u64::MAX).is_err(), "sums must not wrap");
    }

    #[test]
    fn threads_never_exceed_a_shared_budget() {
        let budget = budget(64, 1000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        let permit = budget.reserve(16);
                        assert!(budget.bytes_used() <= 64);
                        drop(permit);
                    }
                });
            }
        });
        assert_eq!((budget.bytes_used(), budget.ops_used()), (0, 0));
    }

    #[test]
    fn amounts_are_written_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4 KiB"),
            (1536 << 10, "1.5 MiB"),
            (64 << 30, "64 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(Amount::Bytes(bytes).to_string(), text);
        }
        assert_eq!(Amount::Count(12).to_string(), "12");
    }

    #[test]
    fn a_plan_is_a_table_with_a_sum() {
        let mut plan = Plan::default();
        plan.bytes("shard 0", "host arena", 1 << 30);
        plan.count("shard 0", "sessions", 64);
        plan.bytes("disk", "operations in flight", 512 << 20);
        assert_eq!(
            plan.to_string(),
            "shard 0  host arena              1 GiB\n\
             shard 0  sessions                   64\n\
             disk     operations in flight  512 MiB\n\
             total                          1.5 GiB\n"
        );
    }
}
