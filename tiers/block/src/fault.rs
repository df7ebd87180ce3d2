//! The one small error that crosses a boundary between processes. It tells the caller what to do.

use std::time::Duration;

use crate::code::Code;

/// What kind of failure, and with it what the caller should do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultKind {
    /// What was named does not exist. Register or store it first.
    NotFound,
    /// Too much at once. Try again here after the hint.
    Busy,
    /// No room under the limits. Free something or raise the limit.
    Full,
    /// It is served elsewhere. Ask there.
    Moved,
    /// The caller's epoch is over. Connect and register again.
    Fenced,
    /// The lease ended. Acquire again.
    LeaseExpired,
    /// The bytes are not what was stored. Recompute.
    Corrupt,
    /// The request makes no sense. Mend the caller.
    Invalid,
    /// This daemon does not do that.
    Unsupported,
    /// The deadline passed. The operation has ended.
    Timeout,
    /// The daemon cannot be reached or is draining. Recompute, try again later.
    Unavailable,
    /// The caller may not do that.
    Denied,
    /// A defect of ours. Recompute and report it.
    Internal,
}

impl FaultKind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::NotFound,
        Self::Busy,
        Self::Full,
        Self::Moved,
        Self::Fenced,
        Self::LeaseExpired,
        Self::Corrupt,
        Self::Invalid,
        Self::Unsupported,
        Self::Timeout,
        Self::Unavailable,
        Self::Denied,
        Self::Internal,
    ];

    /// Wire number, stable, from 1.
    pub fn wire(self) -> u8 {
        Self::ALL.iter().position(|kind| *kind == self).expect("ALL names every kind") as u8 + 1
    }

    /// The kind with this wire number.
    pub fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number).wrapping_sub(1)).copied()
    }

    /// What the caller should do, in a few words.
    pub fn advice(self) -> &'static str {
        match self {
            Self::NotFound => "register or store it first",
            Self::Busy => "try again here after the hint",
            Self::Full => "free something or raise the limit",
            Self::Moved => "ask the node that it moved to",
            Self::Fenced => "connect and register again",
            Self::LeaseExpired => "acquire the block again",
            Self::Corrupt => "recompute the block",
            Self::Invalid => "mend the request",
            Self::Unsupported => "use another operation or a newer daemon",
            Self::Timeout => "recompute, or allow more time",
            Self::Unavailable => "recompute, and try again later",
            Self::Denied => "ask the operator for the right",
            Self::Internal => "recompute, and report the code",
        }
    }
}

/// A failure as it crosses gRPC, the ring or a Rust API.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Fault {
    /// What kind.
    pub kind: FaultKind,
    /// Stable code with a page of its own (`kvctl explain`).
    pub code: Code,
    /// What happened, with the values that matter.
    pub message: String,
    /// When to try again, for `Busy`, `Full` and `Unavailable`.
    pub retry_after: Option<Duration>,
}

impl Fault {
    /// A fault of the code's own kind.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { kind: code.kind(), code, message: message.into(), retry_after: None }
    }

    /// The same fault with a hint when to try again.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_go_over_the_wire_and_back() {
        for kind in FaultKind::ALL {
            assert_eq!(FaultKind::from_wire(kind.wire()), Some(kind));
        }
        assert_eq!(FaultKind::from_wire(0), None);
    }
}
