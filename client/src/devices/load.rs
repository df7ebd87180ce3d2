//! Bringing blocks into pages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kv_api::{convert, v1};
use kv_block::code::Code;
use kv_block::{Fault, Tier};
use tokio::sync::watch;
use tokio::time::timeout_at;
use tonic::Streaming;

use super::{Cached, DeviceCache, PagedBlock, batches, left};
use crate::binding::Binding;
use crate::client::Client;
use crate::error::{Error, Miss, bug, of_status, timed_out, unreachable};
use crate::runtime::Call;
use crate::worker::miss;

/// What a load waits for, and what it says when.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// How long to wait for blocks that are announced, on disk, with a peer of the node, or in the object store.
    pub wait: Duration,
    /// The peer to ask first for what is not here. Empty: nobody in particular.
    pub node: String,
    /// Copy layer by layer, each behind the one before.
    pub by_layer: bool,
    /// Which of the cache's events the copies wait for, on the device: recorded by the worker before the call, behind what
    /// still uses the pages. None: nothing does.
    pub event: Option<u32>,
    /// Which of the cache's events are recorded: with `by_layer` one for each layer, else one behind all. Empty: none.
    pub events: Vec<u32>,
}

impl DeviceCache {
    /// Brings blocks into pages. Answers as soon as the device has the copies in its queue and their events are
    /// recorded; a worker that has streams wait for the events needs to wait for nothing else.
    ///
    /// More blocks than one request takes go in several. Where events are to be recorded, all but the last are then
    /// loaded before this answers, since an event stands for the copies of one request.
    pub fn load(&self, binding: &Binding, blocks: &[PagedBlock], options: &LoadOptions) -> Call<Load> {
        let cached = Arc::clone(&self.cached);
        let client = self.client().with_deadline(self.deadline.max(options.wait));
        let (binding, options) = (binding.clone(), options.clone());
        let layers = binding.slice().layers.len() as u32;
        let batches = batches(&client, blocks, None);
        self.client().call(async move {
            let begun = Instant::now();
            let until = begun + client.deadline();
            let named = cached.named(&client, &binding).await?;
            let (said, news) = watch::channel(News { arrived: vec![0; batches.len()], over: None });
            let said = Arc::new(said);
            let (mut found, mut coming) = (Vec::new(), Vec::new());
            let last = batches.len().saturating_sub(1);
            for (at, batch) in batches.into_iter().enumerate() {
                let goes_ahead = at < last && !options.events.is_empty();
                let count = batch.blocks.len();
                let wait = options.wait.saturating_sub(begun.elapsed());
                let message = v1::LoadRequest {
                    session: named.session,
                    cache: named.cache,
                    binding: named.binding,
                    blocks: batch.blocks,
                    wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
                    node: options.node.clone(),
                    by_layer: options.by_layer && !goes_ahead,
                    events: if at < last { Vec::new() } else { options.events.clone() },
                    event: options.event,
                };
                let client = left(&client, until)?;
                let stream = client.within(client.devices().load(client.request(message))).await?;
                let mut answers = Answers { stream, until };
                found.extend(answers.found(count).await?);
                let said = Arc::clone(&said);
                let rest = async move {
                    answers
                        .rest(|arrived| said.send_modify(|news| news.arrived[at] = arrived.unwrap_or(layers)))
                        .await
                };
                match goes_ahead {
                    true => rest.await?,
                    // It goes on whether or not anybody waits for it.
                    false => coming.push(client.runtime().task(rest)),
                }
            }
            let of_load = Arc::clone(&cached);
            client.runtime().spawn(async move {
                let mut all = Ok(());
                for one in coming {
                    let one = one.await.unwrap_or_else(|_| Err(unreachable("the client was closed")));
                    all = all.and(one);
                }
                said.send_modify(|news| news.over = Some(all));
                drop(of_load);
            });
            Ok(Load { found, layers, news, client, _cached: cached })
        })
    }
}

/// Blocks on their way into pages. It runs on when dropped.
#[derive(Debug)]
pub struct Load {
    /// For each block the tier that its bytes come from, or why it does not come: its pages are left as they are.
    pub found: Vec<Result<Tier, Miss>>,
    layers: u32,
    news: watch::Receiver<News>,
    client: Client,
    _cached: Arc<Cached>,
}

/// What is known of the copies.
#[derive(Clone, Debug)]
struct News {
    /// Layers that have arrived, of each request.
    arrived: Vec<u32>,
    over: Option<Result<(), Error>>,
}

impl News {
    fn layers(&self) -> u32 {
        self.arrived.iter().copied().min().unwrap_or(0)
    }
}

impl Load {
    /// How many layers have arrived by now, from the first on; all at once when it is not by layer.
    pub fn layers_arrived(&self) -> u32 {
        self.news.borrow().layers()
    }

    /// Answers when the first `layers` have arrived.
    pub fn wait_for_layers(&self, layers: u32) -> Call<()> {
        if layers > self.layers {
            let text = format!("{layers} layers are waited for, there are {}", self.layers);
            return Call::failed(Fault::new(Code::BadRequest, text).into());
        }
        let mut news = self.news.clone();
        self.client.call(async move {
            let news = news.wait_for(|news| news.layers() >= layers || news.over.is_some()).await;
            let news = news.map_err(|_| unreachable("the client was closed"))?;
            if news.layers() >= layers { Ok(()) } else { news.over.clone().unwrap_or(Ok(())) }
        })
    }

    /// Answers when the device is done with all copies, or why it failed.
    pub fn finish(self) -> Call<()> {
        let mut news = self.news;
        self.client.call(async move {
            let news = news.wait_for(|news| news.over.is_some()).await;
            let news = news.map_err(|_| unreachable("the client was closed"))?;
            news.over.clone().unwrap_or(Ok(()))
        })
    }
}

/// What the daemon says to one request.
struct Answers {
    stream: Streaming<v1::LoadResponse>,
    until: Instant,
}

impl Answers {
    async fn next(&mut self) -> Result<v1::load_response::What, Error> {
        // A little more than the daemon has, so that its own word arrives.
        let until = self.until + Duration::from_millis(100);
        let message = timeout_at(until.into(), self.stream.message()).await;
        let message = message.map_err(|_| timed_out("the load"))?.map_err(|status| of_status(&status))?;
        message.and_then(|message| message.what).ok_or_else(|| bug("a load ended without a word"))
    }

    async fn found(&mut self, count: usize) -> Result<Vec<Result<Tier, Miss>>, Error> {
        let v1::load_response::What::Queued(queued) = self.next().await? else {
            return Err(bug("a load does not begin with what is found"));
        };
        if queued.loaded.len() != count {
            return Err(bug(format!("{count} blocks asked for, {} answered", queued.loaded.len())));
        }
        let one = |loaded: v1::Loaded| match loaded.what {
            Some(v1::loaded::What::Tier(tier)) => {
                convert::tier(tier)?.map(Ok).ok_or_else(|| bug("a hit without a tier"))
            }
            Some(v1::loaded::What::Miss(found)) => Ok(Err(miss(found))),
            None => Err(bug("a block without an answer")),
        };
        queued.loaded.into_iter().map(one).collect()
    }

    /// Until its end; tells of layers that arrived, and `None` when all have.
    async fn rest(&mut self, mut tell: impl FnMut(Option<u32>)) -> Result<(), Error> {
        loop {
            match self.next().await? {
                v1::load_response::What::Layers(layers) => tell(Some(layers)),
                v1::load_response::What::Done(_) => {
                    tell(None);
                    return Ok(());
                }
                v1::load_response::What::Queued(_) => return Err(bug("a load said twice what is found")),
            }
        }
    }
}
