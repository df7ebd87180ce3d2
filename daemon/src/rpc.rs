//! The gRPC services: parse, ask the node, answer. A wrong message stops before it reaches the node, a caller
//! without the right before it reaches the service (`guard.rs`).

mod admin;
mod blocks;
mod devices;
mod events;
mod gpus;
mod guard;
mod intake;
mod objects;
mod peers;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::fault::to_status;
use kv_block::Fault;
use kv_block::code::Code;
use kv_node::PeerId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Status};

pub use admin::AdminService;
pub use blocks::BlocksService;
pub use devices::DevicesService;
pub use events::EventsService;
pub use guard::{Guard, METHODS, Needs};
pub use intake::Intake;
pub use worker::WorkerService;

use crate::config::Config;
use crate::gpu::Gpus;
use crate::node::{Node, View};
use crate::object::Objects;
use crate::peercred::Who;
use crate::peers::Peers;

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
    /// The node's peers, where it has any.
    pub peers: Option<Peers>,
    /// Its object tiers, where it has any.
    pub objects: Option<Objects>,
    /// Its GPUs, or why it has none.
    pub gpus: Gpus,
    /// Room for the bodies of puts while they arrive and are copied, in units of [`ROOM_BYTES`].
    bodies: Arc<Semaphore>,
    /// Puts that wait for such room.
    waiting: Arc<Semaphore>,
}

/// Unit in which room for bodies is counted.
const ROOM_BYTES: u64 = 1024;
/// Puts that may wait for room. A waiting put does not read, so its bytes stand in the window of its connection;
/// what all that may wait can hold there must leave enough for those that have room, or nobody gets on.
const WAITING_MAX: usize = 32;
/// Bytes that a stream may have sent and nobody read.
pub const STREAM_WINDOW_BYTES: u32 = 256 << 10;
/// Longest frame that a caller may send: a block of 64 KiB fits one, and no allocator maps it by itself.
pub const FRAME_BYTES: u32 = 96 << 10;
/// Bytes that a connection may have sent and nobody read: twice of what may wait.
pub const CONNECTION_WINDOW_BYTES: u32 = STREAM_WINDOW_BYTES * WAITING_MAX as u32 * 2;

impl Shared {
    /// What somebody sees who asks in no session: an administrator everything, others what their principal has.
    fn view(&self, who: Who) -> View<'_> {
        if who.rights.admin { self.node.everything() } else { self.node.of(who.principal) }
    }

    /// The peer of that name; none where nobody in particular is named, or this node.
    fn hint(&self, node: &str) -> Result<Option<PeerId>, Status> {
        if node.is_empty() || node == self.node.name {
            return Ok(None);
        }
        let hint = self.config.peers().position(|member| member.name == node);
        let hint = hint.map(|at| PeerId(at as u16)).ok_or_else(|| {
            let text = format!("node {node} is not among peers.members of node {}", self.node.name);
            status(Fault::new(Code::BadRequest, text))
        })?;
        Ok(Some(hint))
    }

    /// What the services of `node` share.
    pub fn new(
        node: Arc<Node>,
        config: Arc<Config>,
        (peers, objects): (Option<Peers>, Option<Objects>),
        gpus: Gpus,
    ) -> Self {
        let room = config.limits.in_flight_bytes_max.0 / ROOM_BYTES;
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let waiting = Arc::new(Semaphore::new(WAITING_MAX));
        Self { node, config, peers, objects, gpus, bodies: Arc::new(Semaphore::new(room)), waiting }
    }

    /// Room for a body of so many bytes, waiting for it if need be. A block longer than all the room there is
    /// takes all of it, and so goes alone.
    async fn room_for(&self, bytes: u32, until: Instant) -> Result<OwnedSemaphorePermit, Status> {
        let room = self.config.limits.in_flight_bytes_max.0 / ROOM_BYTES;
        let wanted = u64::from(bytes).div_ceil(ROOM_BYTES).min(room) as u32;
        if let Ok(permit) = Arc::clone(&self.bodies).try_acquire_many_owned(wanted) {
            return Ok(permit);
        }
        let Ok(_waiting) = self.waiting.try_acquire() else {
            let text = format!(
                "{WAITING_MAX} blocks wait to come in over gRPC already; raise limits.in_flight_bytes_max"
            );
            let fault = Fault::new(Code::QueueFull, text).retry_after(Duration::from_millis(5));
            return Err(status(fault));
        };
        let taken = Arc::clone(&self.bodies).acquire_many_owned(wanted);
        match tokio::time::timeout_at(until.into(), taken).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_)) => Err(status(Fault::new(Code::Draining, "the daemon takes no more blocks"))),
            Err(_) => Err(too_late("waiting for room for the block (limits.in_flight_bytes_max)")),
        }
    }
}

/// Who sent this request, as the guard found out.
fn who<T>(request: &Request<T>) -> Who {
    request.extensions().get().copied().unwrap_or_else(Who::nobody)
}

/// By when a call must end: what the caller's `grpc-timeout` says, within bounds.
fn deadline<T>(request: &Request<T>) -> Instant {
    deadline_asked(request).unwrap_or_else(|| Instant::now() + DEADLINE_DEFAULT)
}

/// The same for a call that may go on for ever when the caller sets no deadline.
fn deadline_asked<T>(request: &Request<T>) -> Option<Instant> {
    until(request.metadata().get("grpc-timeout")?.to_str().ok()?)
}

/// By when a call with this `grpc-timeout` must end.
fn until(timeout: &str) -> Option<Instant> {
    Some(Instant::now() + own_part(parse_timeout(timeout)?).min(DEADLINE_MAX))
}

/// What we take of the caller's time. At the end of it the server drops the call whole, and our own word, a
/// miss with its reason or a typed fault, would not arrive any more.
fn own_part(timeout: Duration) -> Duration {
    timeout - (timeout / 16).min(Duration::from_millis(50))
}

/// What a stream says that outlived its deadline.
fn too_late(what: &str) -> Status {
    status(Fault::new(Code::DeadlinePassed, format!("{what} did not end in time")))
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
pub(crate) fn status(fault: Fault) -> Status {
    to_status(&fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_part_of_a_deadline_leaves_time_for_the_answer() {
        for ms in [0, 1, 100, 1_000, 600_000] {
            let (whole, ours) = (Duration::from_millis(ms), own_part(Duration::from_millis(ms)));
            assert!(ours <= whole && whole - ours <= Duration::from_millis(50), "{ms}");
            assert!(ms == 0 || ours < whole, "{ms}");
        }
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "12", "123456789S", "1x", "-1S", "1é"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }
}
