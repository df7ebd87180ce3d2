//! What a call can end with, other than its answer.

use std::time::Duration;

use kv_block::code::Code;
use kv_block::{Fault, FaultKind, MissReason};

/// Why a call did not do what was asked. A miss is not among it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The daemon said so, or nobody answered. [`Fault::kind`] says what to do.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The options name nothing that could be connected to.
    #[error("option `{option}`: {why}")]
    Option {
        /// Which option.
        option: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// What the caller should do.
    pub fn kind(&self) -> FaultKind {
        match self {
            Self::Fault(fault) => fault.kind,
            Self::Option { .. } => FaultKind::Invalid,
        }
    }

    /// The stable code, where there is one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Fault(fault) => Some(fault.code),
            Self::Option { .. } => None,
        }
    }

    /// When to try again, if somebody said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Fault(fault) => fault.retry_after,
            Self::Option { .. } => None,
        }
    }
}

/// Why a block is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The reason.
    pub reason: MissReason,
    /// For [`MissReason::ScopeDiffers`]: names of the fields in which the nearest stored scope differs.
    pub fields: Vec<String>,
}

impl From<MissReason> for Miss {
    fn from(reason: MissReason) -> Self {
        Self { reason, fields: Vec::new() }
    }
}

impl std::fmt::Display for Miss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.reason)?;
        if !self.fields.is_empty() {
            write!(f, " ({})", self.fields.join(", "))?;
        }
        Ok(())
    }
}

/// What a failed gRPC call means. A connection that broke is nobody's defect: the daemon is away.
pub(crate) fn of_status(status: &tonic::Status) -> Error {
    use std::error::Error as _;
    let mut source = status.source();
    if source.is_some() && status.details().is_empty() && status.code() != tonic::Code::DeadlineExceeded {
        while let Some(error) = source {
            if error.is::<tonic::TimeoutExpired>() {
                return timed_out("the call");
            }
            source = error.source();
        }
        return unreachable(format!("the connection broke: {}", status.message()));
    }
    kv_api::fault::from_status(status).into()
}

pub(crate) fn timed_out(what: &str) -> Error {
    Fault::new(Code::DeadlinePassed, format!("{what} did not end in time")).into()
}

pub(crate) fn unreachable(why: impl std::fmt::Display) -> Error {
    Fault::new(Code::Unreachable, why.to_string()).into()
}

/// An answer that the protocol does not know for this question.
pub(crate) fn bug(what: impl Into<String>) -> Error {
    Fault::new(Code::Bug, what).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_connection_is_unavailable_and_a_daemons_word_stays() {
        let broken = tonic::Status::from_error(Box::new(std::io::Error::other("broken pipe")));
        assert_eq!(of_status(&broken).kind(), FaultKind::Unavailable);
        let expired = tonic::Status::from_error(Box::new(tonic::TimeoutExpired(())));
        assert_eq!(of_status(&expired).kind(), FaultKind::Timeout);
        let fault = Fault::new(Code::HostFull, "all slots are pinned");
        assert_eq!(of_status(&kv_api::fault::to_status(&fault)), Error::Fault(fault));
    }
}
