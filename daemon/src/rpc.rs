//! The gRPC services: parse, ask the node, answer. A wrong message stops before it reaches the node, a caller
//! without the right before it reaches the service (`guard.rs`).

mod admin;
mod blocks;
mod events;
mod guard;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::fault::to_status;
use kv_block::Fault;
use tonic::{Request, Status};

pub use admin::AdminService;
pub use blocks::BlocksService;
pub use events::EventsService;
pub use guard::{Guard, METHODS, Needs};
pub use worker::WorkerService;

use crate::config::Config;
use crate::node::Node;
use crate::peercred::Caller;

/// How long a call may take when the caller does not say.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(10);
/// Longest time that a caller may ask for.
const DEADLINE_MAX: Duration = Duration::from_secs(600);

/// What every service needs.
#[derive(Clone)]
pub struct Shared {
    /// The node.
    pub node: Arc<Node>,
    /// The configuration it runs with.
    pub config: Arc<Config>,
}

/// Who sent this request, as the guard found out.
fn caller<T>(request: &Request<T>) -> Caller {
    request.extensions().get().copied().unwrap_or(Caller::Unknown)
}

/// By when a call must end: what the caller's `grpc-timeout` says, within bounds.
fn deadline<T>(request: &Request<T>) -> Instant {
    let header = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok());
    let timeout = header.and_then(parse_timeout).unwrap_or(DEADLINE_DEFAULT);
    Instant::now() + timeout.min(DEADLINE_MAX)
}

/// A `grpc-timeout`: at most eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// `wait_ms` of a request, never beyond its deadline. The second value says whether to wait at all.
fn wait_until(deadline: Instant, wait_ms: u32) -> (Instant, bool) {
    if wait_ms == 0 {
        return (deadline, false);
    }
    (deadline.min(Instant::now() + Duration::from_millis(wait_ms.into())), true)
}

/// For `map_err`.
#[allow(clippy::needless_pass_by_value, reason = "map_err gives the fault away")]
fn status(fault: Fault) -> Status {
    to_status(&fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "12", "123456789S", "1x", "-1S", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }
}
