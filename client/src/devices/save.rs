//! Storing blocks from pages: in one go, or layer by layer as the engine computes them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kv_api::fault::from_message;
use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{Fault, Priority, SequenceHash};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{Batch, Cached, DeviceCache, Named, PagedBlock, batches, left};
use crate::binding::Binding;
use crate::client::Client;
use crate::error::{Error, bug, unreachable};
use crate::options::PutOptions;
use crate::runtime::Call;
use crate::write::Stored;

/// How blocks are kept, and what their copies wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SaveOptions {
    /// Retention class.
    pub priority: Priority,
    /// Time until they expire, in whole seconds, rounded up; none means never.
    pub ttl: Option<Duration>,
    /// Answer only when they are on disk.
    pub durable: bool,
    /// The block before the first in its prefix, where that is known.
    pub after: Option<SequenceHash>,
    /// Which of the cache's events the copies wait for, on the device: recorded by the worker before the call. None:
    /// they wait for nothing, and the pages are complete.
    pub event: Option<u32>,
}

impl SaveOptions {
    fn header(&self, named: &Named, batch: Batch, by_layer: bool) -> v1::SaveRequest {
        let ttl_s = PutOptions { ttl: self.ttl, ..PutOptions::default() }.ttl_s();
        let after = batch.after.map_or_else(Bytes::new, |hash| Bytes::copy_from_slice(hash.as_bytes()));
        let header = v1::SaveHeader {
            session: named.session,
            cache: named.cache,
            binding: named.binding,
            blocks: batch.blocks,
            priority: convert::priority_message(self.priority).into(),
            ttl_s,
            durable: self.durable,
            after,
            event: self.event,
            by_layer,
        };
        v1::SaveRequest { what: Some(v1::save_request::What::Header(header)) }
    }
}

impl DeviceCache {
    /// Stores blocks from pages; one answer for each, in order. The error is for all: some may be stored.
    ///
    /// In the order of their prefix, where they have one: a tier below may keep them together; nothing else depends
    /// on it.
    pub fn save(
        &self,
        binding: &Binding,
        blocks: &[PagedBlock],
        options: &SaveOptions,
    ) -> Call<Vec<Result<Stored, Error>>> {
        let (cached, client) = (Arc::clone(&self.cached), self.client());
        let (binding, options) = (binding.clone(), *options);
        let batches = batches(&client, blocks, options.after);
        self.client().call(async move {
            let until = Instant::now() + client.deadline();
            let named = cached.named(&client, &binding).await?;
            let mut all = Vec::new();
            for batch in batches {
                let (client, count) = (left(&client, until)?, batch.blocks.len());
                let messages = tokio_stream::once(options.header(&named, batch, false));
                let answer = client.within(client.devices().save(client.request(messages))).await?;
                all.extend(stored(answer, count)?);
            }
            Ok(all)
        })
    }

    /// [`DeviceCache::save`] while the pages fill: the daemon copies each layer as soon as it hears that it is ready,
    /// and stores the blocks with the last. `options.event` has no meaning here. The call's deadline counts from now
    /// until all is stored, so allow for the time that the layers take ([`DeviceCache::with_deadline`]).
    pub fn save_by_layer(
        &self,
        binding: &Binding,
        blocks: &[PagedBlock],
        options: &SaveOptions,
    ) -> Call<LayerSave> {
        let (cached, client) = (Arc::clone(&self.cached), self.client());
        let (binding, options) = (binding.clone(), SaveOptions { event: None, ..*options });
        let batches = batches(&client, blocks, options.after);
        self.client().call(async move {
            let until = Instant::now() + client.deadline();
            let named = cached.named(&client, &binding).await?;
            let client = left(&client, until)?;
            let over = Arc::new(OnceLock::new());
            let (mut streams, mut answers) = (Vec::new(), Vec::new());
            for batch in batches {
                let count = batch.blocks.len();
                // No more come than there are layers.
                let (sender, messages) = mpsc::unbounded_channel();
                let _ = sender.send(options.header(&named, batch, true));
                streams.push(sender);
                let (task, over) = (client.clone(), Arc::clone(&over));
                answers.push(client.runtime().task(async move {
                    let request = task.request(UnboundedReceiverStream::new(messages));
                    let answer = task.within(task.devices().save(request)).await;
                    let answer = answer.and_then(|answer| stored(answer, count));
                    if let Err(error) = &answer {
                        let _ = over.set(error.clone());
                    }
                    answer
                }));
            }
            let layers = binding.slice().layers.len() as u32;
            Ok(LayerSave { layers, ready: 0, streams, answers, over, client, cached })
        })
    }
}

/// Blocks that are stored layer by layer. Dropped before [`LayerSave::finish`], it is given up: then call
/// [`DeviceCache::quiesce`] before the pages are used for something else.
#[derive(Debug)]
#[must_use = "without `finish` nothing is stored"]
pub struct LayerSave {
    layers: u32,
    ready: u32,
    streams: Vec<mpsc::UnboundedSender<v1::SaveRequest>>,
    answers: Vec<JoinHandle<Answer>>,
    /// Why it failed, as soon as it has.
    over: Arc<OnceLock<Error>>,
    client: Client,
    cached: Arc<Cached>,
}

type Answer = Result<Vec<Result<Stored, Error>>, Error>;

impl LayerSave {
    /// Says that the first `layers` of those that the binding's slice has are ready; their copies wait for `event` on
    /// the device, recorded behind the last of them, where one is named. Fails when the save has failed already.
    pub fn ready(&mut self, layers: u32, event: Option<u32>) -> Result<(), Error> {
        if let Some(error) = self.over.get() {
            return Err(error.clone());
        }
        if layers <= self.ready || layers > self.layers {
            let text = format!(
                "{layers} layers are said to be ready, of {}; {} were before: each time say more",
                self.layers, self.ready
            );
            return Err(Fault::new(Code::BadRequest, text).into());
        }
        self.ready = layers;
        for stream in &self.streams {
            let what = v1::save_request::What::Ready(v1::LayersReady { layers, event });
            // One that has ended says why at the end.
            let _ = stream.send(v1::SaveRequest { what: Some(what) });
        }
        Ok(())
    }

    /// Answers when all blocks are stored, or why not, as [`DeviceCache::save`] does. All layers must be ready.
    pub fn finish(self) -> Call<Vec<Result<Stored, Error>>> {
        let Self { layers, ready, streams, answers, over, client, cached } = self;
        if ready < layers && over.get().is_none() && !answers.is_empty() {
            let text =
                format!("{ready} of {layers} layers were ready when the save was to end; nothing is stored");
            return Call::failed(Fault::new(Code::BadRequest, text).into());
        }
        drop(streams);
        client.clone().call(async move {
            let mut all = Vec::new();
            for answer in answers {
                all.extend(answer.await.map_err(|_| unreachable("the client was closed"))??);
            }
            drop(cached);
            Ok(all)
        })
    }
}

fn stored(answer: v1::SaveResponse, count: usize) -> Answer {
    if answer.saved.len() != count {
        return Err(bug(format!("{count} blocks offered, {} answered", answer.saved.len())));
    }
    let one = |saved: v1::Saved| match saved.what {
        Some(v1::saved::What::Already(already)) => Ok(Ok(Stored { already })),
        Some(v1::saved::What::Fault(fault)) => {
            let words = fault.message.clone();
            Ok(Err(from_message(fault).unwrap_or_else(|| Fault::new(Code::Bug, words)).into()))
        }
        None => Err(bug("a block without an answer")),
    };
    answer.saved.into_iter().map(one).collect()
}
