//! Blocks that go up: copied out of host memory, packed, written.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use kv_block::{BindingId, Record};
use kv_node::UploadDone;
use kv_object::Offer;
use kv_object::pack::{ABOUT_BYTES_MAX, Binding};
use tokio::sync::mpsc;

use super::keeper::tell_lost;
use super::{Objects, UploadOrder, principals_of, unix_now};
use crate::node::Node;

pub(super) struct Uploads {
    node: Arc<Node>,
    objects: Objects,
    /// By shard.
    principals: Vec<usize>,
    bindings: HashMap<BindingId, Arc<Binding>>,
}

impl Uploads {
    pub(super) fn new(node: &Arc<Node>, objects: &Objects) -> Self {
        let principals = principals_of(node);
        Self { node: Arc::clone(node), objects: objects.clone(), principals, bindings: HashMap::new() }
    }

    pub(super) async fn run(mut self, mut orders: mpsc::UnboundedReceiver<UploadOrder>) {
        while let Some(order) = orders.recv().await {
            let shard = order.shard;
            let done = self.take(order);
            if let Some(shard) = self.node.shard(shard) {
                shard.tell_uploaded(done);
            }
            // A copy takes as long as the block is: whoever else has this thread to do gets to it.
            tokio::task::yield_now().await;
        }
    }

    fn take(&mut self, order: UploadOrder) -> UploadDone {
        let UploadOrder { shard, upload, held, binding, expires_at, parent } = order;
        let number = self.principals[usize::from(shard.0)];
        let refused = UploadDone::Refused { upload };
        let key = held.record().key;
        let Some(principal) = self.objects.of(number).cloned() else { return refused };
        let Some(tier) = principal.tier() else {
            tracing::debug!(%key, "the object store is not open; the block stays here");
            return refused;
        };
        let Some(binding) = self.binding(binding) else {
            tracing::debug!(%key, "of the block's scope only a tag is known; it stays here");
            return refused;
        };
        let record = Record { expires_at, ..held.record() };
        let now = unix_now();
        if tier.find(now, &[record.key]).first().is_some_and(Result::is_ok) {
            return UploadDone::Known { upload };
        }
        let bytes = Bytes::copy_from_slice(&held);
        drop(held);
        let offer = Offer { binding, record, parent, bytes };
        let (stored, full) = match tier.take(now, vec![offer]) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(%key, %error, "the object store takes no block; it stays here");
                return refused;
            }
        };
        if full.is_empty() {
            principal.taken.notify_one();
        } else {
            let shards = self.node.of(number).shards().to_vec();
            tokio::spawn(async move { tell_lost(&shards, &tier.write_full(full).await) });
        }
        match (stored.refused.is_empty(), stored.known.is_empty()) {
            (false, _) => refused,
            (true, false) => UploadDone::Known { upload },
            (true, true) => UploadDone::Taken { upload, bytes: record.bytes },
        }
    }

    /// What blocks under this number mean, as a pack says it; `None` when the scope is not known.
    fn binding(&mut self, id: BindingId) -> Option<Arc<Binding>> {
        if let Some(binding) = self.bindings.get(&id) {
            return Some(Arc::clone(binding));
        }
        let bound = self.node.registry.get(id.0.into())?;
        let kept = &bound.kept;
        let about = serde_json::to_string(&kept.scope).unwrap_or_default();
        let about = Some(about).filter(|about| about.len() <= ABOUT_BYTES_MAX).unwrap_or_default();
        let (scope, slice, block_bytes) = (bound.scope_id()?, kept.slice.clone(), kept.block_bytes);
        let binding = Arc::new(Binding { scope, slice, block_bytes, about });
        self.bindings.insert(id, Arc::clone(&binding));
        Some(binding)
    }
}
