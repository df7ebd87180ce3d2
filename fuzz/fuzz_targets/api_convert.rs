//! Every request that carries names, scopes or slices: from wire bytes to the types behind the services.
#![no_main]

use kv_api::{convert, fault, v1};
use libfuzzer_sys::fuzz_target;

const KEYS_MAX: usize = 64;

fuzz_target!(|data: &[u8]| {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 15 {
        0 => names(decoded::<v1::LookupRequest>(bytes).and_then(|request| request.names)),
        1 => names(decoded::<v1::AcquireRequest>(bytes).and_then(|request| request.names)),
        2 => names(decoded::<v1::GetRequest>(bytes).and_then(|request| request.names)),
        3 => names(decoded::<v1::PinRequest>(bytes).and_then(|request| request.names)),
        4 => names(decoded::<v1::UnpinRequest>(bytes).and_then(|request| request.names)),
        5 => names(decoded::<v1::PrefetchRequest>(bytes).and_then(|request| request.names)),
        6 => names(decoded::<v1::AbortRequest>(bytes).and_then(|request| request.names)),
        7 => names(decoded::<v1::ExplainRequest>(bytes).and_then(|request| request.names)),
        8 => {
            let Some(request) = decoded::<v1::ReserveRequest>(bytes) else { return };
            let _ = convert::priority(request.priority);
            names(request.names);
        }
        9 => {
            let Some(request) = decoded::<v1::EvictRequest>(bytes) else { return };
            let _ = convert::tier(request.tier);
            names(request.names);
        }
        10 => {
            let Some(header) = decoded::<v1::PutRequest>(bytes).and_then(|request| request.header) else {
                return;
            };
            let _ = convert::priority(header.priority);
            let _ = convert::sequence_hash(&header.sequence_hash);
        }
        11 => {
            let Some(request) = decoded::<v1::RegisterRequest>(bytes) else { return };
            if let Ok(scope) = convert::scope(request.scope) {
                let again = convert::scope(Some(convert::scope_message(&scope))).expect("it was good before");
                assert_eq!((again.id(), &again), (scope.id(), &scope));
            }
            if let Ok(slice) = convert::slice(request.slice) {
                assert_eq!(convert::slice(Some(convert::slice_message(&slice))), Ok(slice));
            }
        }
        12 => {
            // What a daemon answers reaches the client as a fault, whatever it is.
            let status = tonic::Status::with_details(tonic::Code::Internal, "", bytes.to_vec().into());
            let found = fault::from_status(&status);
            let again = fault::from_status(&fault::to_status(&found));
            assert_eq!((again.kind, again.code, again.message), (found.kind, found.code, found.message));
        }
        13 => {
            let Some(request) = decoded::<v1::RegisterCacheRequest>(bytes) else { return };
            if let Ok(layout) = convert::cache_layout(request.layout) {
                let again = convert::cache_layout(Some(convert::cache_layout_message(&layout)));
                assert_eq!(again, Ok(layout));
            }
        }
        _ => {
            if let Some(miss) = decoded::<v1::Miss>(bytes) {
                let _ = convert::miss_reason(&miss);
            }
        }
    }
});

/// A request that decodes also does when it is encoded again.
fn decoded<M: prost::Message + Default + PartialEq + std::fmt::Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert_eq!(M::decode(&*message.encode_to_vec()).ok().as_ref(), Some(&message));
    Some(message)
}

fn names(message: Option<v1::Names>) {
    if let Ok(names) = convert::names(message.as_ref(), KEYS_MAX) {
        assert!((1..=KEYS_MAX).contains(&names.len()));
    }
}
