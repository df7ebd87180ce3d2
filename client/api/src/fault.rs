//! [`Fault`] <-> gRPC status, both ways. The only place that knows which fault is which status code.

use std::time::Duration;

use kv_block::code::Code as FaultCode;
use kv_block::{Fault, FaultKind};
use prost::Message as _;
use tonic::{Code, Status};

use crate::v1;

/// The status code that a kind of fault travels under.
pub fn status_code(kind: FaultKind) -> Code {
    match kind {
        FaultKind::NotFound => Code::NotFound,
        FaultKind::Busy | FaultKind::Full => Code::ResourceExhausted,
        FaultKind::Moved => Code::Aborted,
        FaultKind::Fenced | FaultKind::LeaseExpired => Code::FailedPrecondition,
        FaultKind::Corrupt => Code::DataLoss,
        FaultKind::Invalid => Code::InvalidArgument,
        FaultKind::Unsupported => Code::Unimplemented,
        FaultKind::Timeout => Code::DeadlineExceeded,
        FaultKind::Unavailable => Code::Unavailable,
        FaultKind::Denied => Code::PermissionDenied,
        FaultKind::Internal => Code::Internal,
    }
}

/// The status that carries `fault`, whole, in its details.
pub fn to_status(fault: &Fault) -> Status {
    Status::with_details(status_code(fault.kind), fault.to_string(), message(fault).encode_to_vec().into())
}

/// `fault` as a message, for an answer in which only part of what was asked failed.
pub fn message(fault: &Fault) -> v1::Fault {
    v1::Fault {
        kind: u32::from(fault.kind.wire()),
        code: u32::from(fault.code as u16),
        message: fault.message.clone(),
        retry_after_ms: fault
            .retry_after
            .map_or(0, |wait| wait.as_millis().clamp(1, u128::from(u32::MAX)) as u32),
    }
}

/// The fault in a message; `None` when it is of a kind or code that this version does not know.
pub fn from_message(fault: v1::Fault) -> Option<Fault> {
    let kind = FaultKind::from_wire(u8::try_from(fault.kind).ok()?)?;
    let code = FaultCode::from_number(u16::try_from(fault.code).ok()?)?;
    let retry_after = (fault.retry_after_ms > 0).then(|| Duration::from_millis(fault.retry_after_ms.into()));
    Some(Fault { kind, code, message: fault.message, retry_after })
}

/// The fault in `status`. A status that we did not make becomes the nearest fault of its own.
pub fn from_status(status: &Status) -> Fault {
    carried(status).unwrap_or_else(|| foreign(status))
}

fn carried(status: &Status) -> Option<Fault> {
    if status.details().is_empty() {
        return None;
    }
    from_message(v1::Fault::decode(status.details()).ok()?)
}

fn foreign(status: &Status) -> Fault {
    let code = match status.code() {
        Code::DeadlineExceeded | Code::Cancelled => FaultCode::DeadlinePassed,
        Code::Unavailable | Code::Unknown => FaultCode::Unreachable,
        Code::PermissionDenied | Code::Unauthenticated => FaultCode::Denied,
        Code::Unimplemented => FaultCode::Version,
        Code::ResourceExhausted => FaultCode::QueueFull,
        Code::InvalidArgument | Code::OutOfRange => FaultCode::BadRequest,
        _ => FaultCode::Bug,
    };
    Fault::new(code, status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_goes_there_and_back() {
        for code in FaultCode::ALL {
            for retry_after in [None, Some(Duration::from_millis(250))] {
                let fault = Fault { retry_after, ..Fault::new(*code, "block 7 of 9") };
                let status = to_status(&fault);
                assert_eq!(status.code(), status_code(fault.kind));
                assert_eq!(from_status(&status), fault);
            }
        }
    }

    #[test]
    fn foreign_statuses_become_faults_and_garbage_does_not_crash() {
        assert_eq!(from_status(&Status::unavailable("gone")).kind, FaultKind::Unavailable);
        let garbage = Status::with_details(Code::NotFound, "x", vec![0xff; 9].into());
        assert_eq!(from_status(&garbage).kind, FaultKind::Internal);
    }
}
