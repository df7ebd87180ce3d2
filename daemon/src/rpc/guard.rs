//! Who may call what: one table, and the layer in front of every service that goes by it. On the way out, it
//! gives the refusals of the gRPC library a fault of ours.
//!
//! A method that is not in the table is not there: a new one is out of reach until somebody has said who may
//! call it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::http::{Request, Response};
use kv_api::fault::to_status;
use kv_block::Fault;
use kv_block::code::Code;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::{DEADLINE_DEFAULT, Intake, until};
use crate::config::Config;
use crate::peercred::{Caller, Rights, Who};

/// The right that a method needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Needs {
    /// To use blocks: bytes go in or come out, or something is held in a session.
    Blocks,
    /// To administer.
    Admin,
    /// One of the two: it tells about blocks, or says what becomes of them, and moves no bytes to the caller.
    Either,
}

/// Every method of our own services.
pub const METHODS: &[(&str, Needs)] = &[
    ("Blocks/Lookup", Needs::Either),
    ("Blocks/Acquire", Needs::Blocks),
    ("Blocks/Release", Needs::Blocks),
    ("Blocks/Get", Needs::Blocks),
    ("Blocks/Put", Needs::Blocks),
    ("Blocks/Reserve", Needs::Blocks),
    ("Blocks/Abort", Needs::Blocks),
    ("Blocks/Pin", Needs::Either),
    ("Blocks/Unpin", Needs::Either),
    ("Blocks/Prefetch", Needs::Either),
    ("Blocks/Evict", Needs::Either),
    ("Blocks/Explain", Needs::Either),
    ("Worker/Open", Needs::Blocks),
    // An administrator registers a scope to have it explained.
    ("Worker/Register", Needs::Either),
    ("Worker/Describe", Needs::Either),
    ("Devices/RegisterCache", Needs::Blocks),
    ("Devices/ForgetCache", Needs::Blocks),
    ("Devices/QuiesceCache", Needs::Blocks),
    ("Devices/Save", Needs::Blocks),
    ("Devices/Load", Needs::Blocks),
    ("Events/Watch", Needs::Either),
    ("Admin/Status", Needs::Admin),
    ("Admin/ListTiers", Needs::Admin),
    ("Admin/ListClients", Needs::Admin),
    ("Admin/ListLeases", Needs::Admin),
    ("Admin/ListTenants", Needs::Admin),
    ("Admin/ListBlocks", Needs::Admin),
    ("Admin/GetConfig", Needs::Admin),
    ("Admin/SetQuota", Needs::Admin),
    ("Admin/Purge", Needs::Admin),
    ("Admin/Verify", Needs::Admin),
    ("Admin/Drain", Needs::Admin),
    ("Admin/Evacuate", Needs::Admin),
    ("Admin/ListPeers", Needs::Admin),
    ("Admin/DescribePeer", Needs::Admin),
    ("Admin/ListTransfers", Needs::Admin),
    ("Admin/Offer", Needs::Admin),
    ("Admin/ListObjectTiers", Needs::Admin),
    ("Admin/ListPacks", Needs::Admin),
    ("Admin/DescribePack", Needs::Admin),
    ("Admin/CollectObjects", Needs::Admin),
    ("Admin/ListGpus", Needs::Admin),
];

/// What stands before the names of our own services.
const OURS: &str = "/kv.v1.";

/// Lets a caller with these rights through to `path`, or says why not. Services of others (health,
/// reflection) are open to whoever can connect.
fn allow(path: &str, rights: Rights) -> Result<(), Status> {
    let Some(method) = path.strip_prefix(OURS) else { return Ok(()) };
    let row = METHODS.iter().find(|(name, _)| *name == method);
    let Some((_, needs)) = row else {
        return Err(Status::unimplemented(format!("there is no method {method}")));
    };
    let (allowed, why) = match needs {
        Needs::Blocks => (rights.blocks, "the caller may not use blocks; add its user id to workers.uids"),
        Needs::Admin => (
            rights.admin,
            "the caller may not administer this daemon; use its Unix socket as its own user, or add the user \
             id to listen.admin_uids",
        ),
        Needs::Either => (
            rights.blocks || rights.admin,
            "the caller may neither use blocks nor administer; add its user id to workers.uids or to \
             listen.admin_uids",
        ),
    };
    if allowed { Ok(()) } else { Err(to_status(&Fault::new(Code::Denied, why))) }
}

/// Stands in front of the whole gRPC server.
#[derive(Clone)]
pub struct Guard {
    /// The configuration in force.
    pub config: Arc<Config>,
    /// User of this process.
    pub own_uid: u32,
    /// What requests may hold before they are whole.
    pub intake: Arc<Intake>,
}

/// A service whose callers are looked at first.
#[derive(Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;
    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let caller = Caller::of(request.extensions());
        let who = Who::new(caller, &self.guard.config, self.guard.own_uid);
        match allow(request.uri().path(), who.rights) {
            Ok(()) => {
                let ours = request.uri().path().starts_with(OURS);
                let asked = request.headers().get("grpc-timeout").and_then(|value| value.to_str().ok());
                let until = asked.and_then(until).unwrap_or_else(|| Instant::now() + DEADLINE_DEFAULT);
                let mut request = request.map(|body| self.guard.intake.watch(body, until));
                request.extensions_mut().insert(who);
                let call = self.inner.call(request);
                Box::pin(async move {
                    let response = call.await?;
                    Ok(if ours { faulty(response) } else { response })
                })
            }
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}

/// The response, with a fault in the details where the gRPC library refused the message by itself: one that is
/// too long (out of range) or none of the protocol's (internal). Our own refusals all carry theirs.
fn faulty(response: Response<Body>) -> Response<Body> {
    let status = Status::from_header_map(response.headers());
    let Some(status) = status.filter(|status| status.details().is_empty()) else { return response };
    let text = match status.code() {
        tonic::Code::OutOfRange => format!("{} (limits.message_bytes_max)", status.message()),
        tonic::Code::Internal => status.message().to_owned(),
        _ => return response,
    };
    to_status(&Fault::new(Code::BadRequest, text)).into_http()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_grpc_library_refuses_has_a_fault_too_and_nothing_else_changes() {
        let after = |status: Status| Status::from_header_map(faulty(status.into_http()).headers()).unwrap();
        for foreign in [Status::out_of_range("too long"), Status::internal("not protobuf")] {
            let words = foreign.message().to_owned();
            let fault = kv_api::fault::from_status(&after(foreign));
            assert!(fault.code == Code::BadRequest && fault.message.starts_with(&words), "{fault:?}");
        }
        for same in [Status::unimplemented("x"), to_status(&Fault::new(Code::Bug, "y"))] {
            let then = after(same.clone());
            assert_eq!((then.code(), then.message()), (same.code(), same.message()));
            assert_eq!(then.details(), same.details());
        }
        assert_eq!(faulty(Response::new(Body::empty())).status(), 200);
    }

    /// The methods that the protocol declares, read from its text.
    fn declared() -> Vec<String> {
        let texts = [
            include_str!("../../../client/api/proto/kv/v1/admin.proto"),
            include_str!("../../../client/api/proto/kv/v1/blocks.proto"),
            include_str!("../../../client/api/proto/kv/v1/devices.proto"),
            include_str!("../../../client/api/proto/kv/v1/events.proto"),
            include_str!("../../../client/api/proto/kv/v1/worker.proto"),
        ];
        let word = |line: &str| line.split([' ', '(']).next().unwrap_or_default().to_owned();
        let mut all = Vec::new();
        for text in texts {
            let mut service = String::new();
            for line in text.lines().map(str::trim) {
                if let Some(rest) = line.strip_prefix("service ") {
                    service = word(rest);
                } else if let Some(rest) = line.strip_prefix("rpc ") {
                    all.push(format!("{service}/{}", word(rest)));
                }
            }
        }
        all.sort();
        all
    }

    #[test]
    fn every_method_of_the_protocol_has_one_row() {
        let mut rows: Vec<String> = METHODS.iter().map(|(name, _)| (*name).to_owned()).collect();
        rows.sort();
        assert_eq!(rows, declared());
    }

    #[test]
    fn each_method_is_open_to_those_who_need_it_and_to_nobody_else() {
        let nobody = Rights::default();
        let worker = Rights { blocks: true, ..nobody };
        let admin = Rights { admin: true, ..nobody };
        for (method, needs) in METHODS {
            let path = format!("/kv.v1.{method}");
            let open = |rights| allow(&path, rights).is_ok();
            let wanted = match needs {
                Needs::Blocks => [true, false],
                Needs::Admin => [false, true],
                Needs::Either => [true, true],
            };
            assert_eq!([open(worker), open(admin)], wanted, "{method}");
            let refused = allow(&path, nobody).unwrap_err();
            assert_eq!(kv_api::fault::from_status(&refused).code, Code::Denied, "{method}");
        }
        // What kvctl offers an administrator who is no worker.
        for method in [
            "Worker/Describe",
            "Worker/Register",
            "Blocks/Explain",
            "Blocks/Pin",
            "Blocks/Unpin",
            "Blocks/Evict",
            "Admin/Purge",
            "Admin/Verify",
        ] {
            assert!(allow(&format!("/kv.v1.{method}"), admin).is_ok(), "{method}");
        }
        assert!(allow("/kv.v1.Blocks/Get", admin).is_err(), "bytes are for workers");
    }

    #[test]
    fn what_is_not_in_the_table_is_not_there_and_other_services_are_open() {
        let all = Rights { blocks: true, in_place: true, admin: true };
        assert_eq!(allow("/kv.v1.Blocks/Steal", all).unwrap_err().code(), tonic::Code::Unimplemented);
        assert!(allow("/grpc.health.v1.Health/Check", Rights::default()).is_ok());
    }
}
