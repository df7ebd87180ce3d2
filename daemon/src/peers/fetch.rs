//! The task that fetches: it joins the exchange to connections, links and shards.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Instant;

use kv_block::ShardId;
use kv_node::{Exchange, ExchangeCommand, ExchangeConfig, ExchangeEvent, FetchDone, FetchOp, PeerId};
use kv_tcp::Dialer;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, Wake};
use kv_transport::plan::{PathPlan, PlannedPath};
use kv_transport::reader::{PathId, ReaderCommand, ReaderConfig, ReaderEvent};
use kv_verbs::{Endpoint, VerbsLink};
use kv_wire::message::{PathEnd, Taken};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::AbortHandle;

use super::facts;
use super::line::{self, FromLine, Word};
use super::mending::Mending;
use super::rdma::Rails;
use super::{Clock, Order, Place, principals};
use crate::config::Config;
use crate::config::units::Member;
use crate::node::Node;
use crate::shard::ShardHandle;

/// Words of peers that wait to be heard; whoever says more waits.
const WORDS_MAX: usize = 64;
/// Of one kind, what is taken in one turn.
const TURN_MAX: usize = 4096;

pub(super) struct Fetching {
    exchange: Exchange,
    clock: Clock,
    dialer: Dialer,
    rails: Rails,
    lines: Vec<Line>,
    shards: Vec<ShardHandle>,
    words: mpsc::Sender<FromLine>,
    heard: mpsc::Receiver<FromLine>,
    wake: Arc<Notify>,
    commands: Vec<ExchangeCommand>,
    /// What shards are told at the end of a turn.
    fetched: BTreeMap<ShardId, Vec<FetchDone>>,
    /// Links whose connection is over while their device has memory of ours.
    closing: Vec<(PeerId, PathId, Box<dyn Link>)>,
    locating: HashMap<u64, oneshot::Sender<Vec<Place>>>,
    offering: HashMap<(PeerId, u64), oneshot::Sender<Option<Taken>>>,
    next_number: u64,
}

/// What there is of one peer.
struct Line {
    member: Member,
    connection: u64,
    task: Option<AbortHandle>,
    say: Option<mpsc::Sender<kv_wire::message::Ask>>,
    address: Option<std::net::SocketAddr>,
    links: BTreeMap<PathId, Box<dyn Link>>,
    /// Our ends of paths whose other end is not known yet.
    ends: BTreeMap<PathId, Endpoint>,
    /// Paths with both ends, whose other end was not heard yet: no read goes by them.
    trying: BTreeMap<PathId, VerbsLink>,
    /// Planned paths that are down, and when each is asked for again.
    mending: Mending,
    /// Of this connection, or the last one.
    plan: PathPlan,
}

impl Fetching {
    pub(super) fn new(
        node: &Arc<Node>,
        config: &Config,
        members: &[Member],
        dialer: Dialer,
        rails: Rails,
        clock: Clock,
    ) -> Self {
        let principals = principals(node);
        let peers = members.iter().enumerate().map(|(at, member)| ReaderConfig {
            node: node.name.clone(),
            epoch: node.epoch,
            principals: principals.clone(),
            peer: member.name.clone(),
            paths: rails.paths(),
            facts: facts::tell(&rails.facts),
            block_bytes_max: u32::try_from(node.block_bytes_max).unwrap_or(u32::MAX),
            wants_max: config.peers.wants_max as usize,
            // Two nodes that lost each other do not come back at the same moment.
            seed: node.epoch.0 ^ (at as u64) << 32 ^ u64::from(std::process::id()),
            ..ReaderConfig::default()
        });
        let of_shard = |shard: usize| {
            let principal = node.principals.iter().position(|principal| principal.shards.contains(&shard));
            principal.unwrap_or(0) as u8
        };
        let exchange = ExchangeConfig {
            principals: (0..node.shards.len()).map(of_shard).collect(),
            probe_peers_max: config.peers.probe_peers_max as usize,
            probe_limit: config.peers.probe_limit.0.as_micros() as u64,
        };
        let line = |member: &Member| Line {
            member: member.clone(),
            connection: 0,
            task: None,
            say: None,
            address: None,
            links: BTreeMap::new(),
            ends: BTreeMap::new(),
            trying: BTreeMap::new(),
            mending: Mending::default(),
            plan: PathPlan::default(),
        };
        let (words, heard) = mpsc::channel(WORDS_MAX);
        Self {
            exchange: Exchange::new(exchange, peers.collect()),
            clock,
            dialer,
            rails,
            lines: members.iter().map(line).collect(),
            shards: node.shards.clone(),
            words,
            heard,
            wake: Arc::new(Notify::new()),
            commands: Vec::new(),
            fetched: BTreeMap::new(),
            closing: Vec::new(),
            locating: HashMap::new(),
            offering: HashMap::new(),
            next_number: 0,
        }
    }

    /// Runs until the daemon ends.
    pub(super) async fn run(
        mut self,
        mut fetches: mpsc::UnboundedReceiver<(ShardId, FetchOp, Instant)>,
        mut orders: mpsc::UnboundedReceiver<Order>,
    ) {
        let mut wanted = Vec::new();
        let wake = Arc::clone(&self.wake);
        loop {
            let mending = self.lines.iter().filter_map(|line| line.mending.next_due());
            let due =
                self.exchange.next_tick().map(|at| self.clock.moment(at)).into_iter().chain(mending).min();
            let tick = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                count = fetches.recv_many(&mut wanted, TURN_MAX) => {
                    if count == 0 {
                        return;
                    }
                }
                Some(word) = self.heard.recv() => self.hear(word),
                Some(order) = orders.recv() => self.take(order),
                () = wake.notified() => {}
                () = tick => {
                    let now = self.clock.now();
                    self.exchange.handle(now, ExchangeEvent::Tick, &mut self.commands);
                    self.mend();
                }
            }
            // What else is there belongs to the same turn: many wants become few messages.
            for _ in 0..WORDS_MAX {
                let Ok(word) = self.heard.try_recv() else { break };
                self.hear(word);
            }
            while wanted.len() < TURN_MAX
                && let Ok(more) = fetches.try_recv()
            {
                wanted.push(more);
            }
            for (shard, op, deadline) in wanted.drain(..) {
                let (now, deadline) = (self.clock.now(), self.clock.at(deadline));
                self.exchange.handle(now, ExchangeEvent::Fetch { shard, op, deadline }, &mut self.commands);
            }
            self.settle();
        }
    }

    /// Does what the exchange commands, and what follows from that, until nothing is left.
    fn settle(&mut self) {
        loop {
            self.poll_trying();
            self.poll_links();
            self.exchange.flush(self.clock.now(), &mut self.commands);
            if self.commands.is_empty() {
                break;
            }
            for command in std::mem::take(&mut self.commands) {
                self.obey(command);
            }
            for line in &mut self.lines {
                line.links.values_mut().for_each(|link| link.kick());
            }
        }
        for (shard, done) in std::mem::take(&mut self.fetched) {
            if let Some(shard) = self.shards.get(usize::from(shard.0)) {
                shard.tell_fetched(done);
            }
        }
    }

    fn obey(&mut self, command: ExchangeCommand) {
        match command {
            ExchangeCommand::Shard { shard, done } => self.fetched.entry(shard).or_default().push(done),
            ExchangeCommand::Located { id, places } => {
                if let Some(reply) = self.locating.remove(&id) {
                    let _ = reply.send(places);
                }
            }
            ExchangeCommand::Offered { peer, offer, taken } => {
                if let Some(reply) = self.offering.remove(&(peer, offer)) {
                    let _ = reply.send(taken);
                }
            }
            ExchangeCommand::Peer { peer, command } => self.obey_reader(peer, command),
        }
    }

    fn obey_reader(&mut self, peer: PeerId, command: ReaderCommand) {
        let line = &mut self.lines[usize::from(peer.0)];
        match command {
            ReaderCommand::Connect => {
                line.connection += 1;
                let (dialer, member, words) = (self.dialer.clone(), line.member.clone(), self.words.clone());
                let task = tokio::spawn(line::run(dialer, member, peer, line.connection, words));
                line.task = Some(task.abort_handle());
            }
            ReaderCommand::Hangup { why } => {
                tracing::info!(peer = line.member.name, why, "connection to a peer ended");
                self.hang_up(peer);
            }
            ReaderCommand::Say(ask) => {
                let said = line.say.as_ref().map(|say| say.try_send(ask));
                if let Some(Err(_)) = said {
                    self.gone(peer, "it takes no more of what it is told".into());
                }
            }
            ReaderCommand::Open { session, facts, .. } => {
                line.plan = self.rails.plan_to(&facts::hear(&facts));
                self.open_tcp(peer, session);
                self.ask_for_rails(peer);
            }
            ReaderCommand::Join(end) => self.join_rail(peer, &end),
            ReaderCommand::Read { path, read, want, window, record, into } => {
                let op = LinkOp::Read { read, want, window, record, into };
                let refused = match line.links.get_mut(&path) {
                    Some(link) => link.submit(op).err(),
                    None => Some(op),
                };
                if let Some(LinkOp::Read { read, into, .. }) = refused {
                    let result = Err(LinkError::Path { what: "the path takes no more reads".into() });
                    self.tell(peer, ReaderEvent::Read { read, into, result });
                }
            }
            ReaderCommand::Cancel { path, read } => {
                let closing = self.closing.iter_mut().filter(|(of, by, _)| (*of, *by) == (peer, path));
                let links = closing.map(|(.., link)| link).chain(line.links.get_mut(&path));
                for link in links {
                    // Always taken; whoever does not know the read has given it back already.
                    let _ = link.submit(LinkOp::Cancel { read });
                    link.kick();
                }
            }
            // Settled by the exchange.
            ReaderCommand::Granted { .. }
            | ReaderCommand::Missed { .. }
            | ReaderCommand::Landed { .. }
            | ReaderCommand::Probed { .. }
            | ReaderCommand::Taken { .. } => {}
        }
    }

    fn tell(&mut self, peer: PeerId, event: ReaderEvent) {
        let now = self.clock.now();
        self.exchange.handle(now, ExchangeEvent::Peer { peer, event }, &mut self.commands);
    }

    fn hear(&mut self, FromLine { peer, connection, what }: FromLine) {
        let line = &mut self.lines[usize::from(peer.0)];
        if line.connection != connection || line.task.is_none() {
            return;
        }
        match what {
            Word::Open { say, address } => {
                (line.say, line.address) = (Some(say), Some(address));
                self.tell(peer, ReaderEvent::Connected);
            }
            Word::Heard(answer) => self.tell(peer, ReaderEvent::Heard(answer)),
            Word::Nonsense(why) => self.tell(peer, ReaderEvent::Nonsense { why }),
            Word::Gone(why) => self.gone(peer, why),
        }
    }

    /// The path that every peer has.
    fn open_tcp(&mut self, peer: PeerId, session: u128) {
        let wake = Arc::clone(&self.wake);
        let wake: Wake = Arc::new(move || wake.notify_one());
        let line = &mut self.lines[usize::from(peer.0)];
        let Some(address) = line.address else { return };
        let up = match self.dialer.link(address, &line.member.name, session, wake) {
            Ok(link) => {
                line.links.insert(PathId::TCP, Box::new(link));
                Ok(())
            }
            Err(error) => Err(line::chain(&error)),
        };
        self.tell(peer, ReaderEvent::Path { path: PathId::TCP, up });
    }

    /// The paths besides: this side's ends, of which the peer is told.
    fn ask_for_rails(&mut self, peer: PeerId) {
        let planned = self.lines[usize::from(peer.0)].plan.paths.clone();
        for planned in planned.iter().filter(|planned| planned.path != PathId::TCP) {
            self.ask_for_rail(peer, planned);
        }
    }

    fn ask_for_rail(&mut self, peer: PeerId, planned: &PlannedPath) {
        let path = planned.path;
        match self.rails.ask(planned) {
            Ok((endpoint, end)) => {
                let line = &mut self.lines[usize::from(peer.0)];
                line.ends.insert(path, endpoint);
                line.mending.asked(path, Instant::now());
                self.tell(peer, ReaderEvent::Reach(end));
            }
            Err(why) => self.path_down(peer, path, why),
        }
    }

    /// A path besides TCP is down: it is asked for again later, each time after twice as long.
    fn path_down(&mut self, peer: PeerId, path: PathId, why: String) {
        let line = &mut self.lines[usize::from(peer.0)];
        let after = line.mending.down(path, Instant::now());
        tracing::info!(
            peer = line.member.name,
            path = path.0,
            why,
            ?after,
            "a path is down; it is tried again"
        );
        self.tell(peer, ReaderEvent::Path { path, up: Err(why) });
    }

    /// Asks again for the paths that were down for long enough.
    fn mend(&mut self) {
        let now = Instant::now();
        for at in 0..self.lines.len() {
            for path in self.lines[at].mending.take_due(now) {
                let line = &self.lines[at];
                let planned = line.plan.paths.iter().find(|planned| planned.path == path).cloned();
                if let Some(planned) = planned.filter(|_| line.say.is_some()) {
                    self.ask_for_rail(PeerId(at as u16), &planned);
                }
            }
        }
    }

    /// The peer's end of a path is known.
    fn join_rail(&mut self, peer: PeerId, end: &PathEnd) {
        let path = PathId(end.path);
        let wake = Arc::clone(&self.wake);
        let wake: Wake = Arc::new(move || wake.notify_one());
        let line = &mut self.lines[usize::from(peer.0)];
        // What was not asked for is not answered.
        let Some(endpoint) = line.ends.remove(&path) else { return };
        if end.words.is_empty() {
            return self.path_down(peer, path, "the peer does not open its end".into());
        }
        match endpoint.connect(&end.words, wake) {
            Ok(link) => {
                line.trying.insert(path, link);
                line.mending.joined(path);
            }
            Err(error) => self.path_down(peer, path, line::chain(&error)),
        }
    }

    /// Paths come up whose other end has answered.
    fn poll_trying(&mut self) {
        let (mut done, mut ended) = (Vec::new(), Vec::new());
        for (at, line) in self.lines.iter_mut().enumerate() {
            for (path, mut link) in std::mem::take(&mut line.trying) {
                link.poll(&mut done);
                // It was given nothing, so only its own end can come back.
                let broken = done.drain(..).find_map(|done| match done {
                    LinkDone::Broken { why } => Some(why.to_string()),
                    _ => None,
                });
                let up = match broken {
                    Some(why) => Err(why),
                    None if link.has_answered() => {
                        line.links.insert(path, Box::new(link));
                        Ok(())
                    }
                    None => {
                        line.trying.insert(path, link);
                        continue;
                    }
                };
                ended.push((PeerId(at as u16), path, up));
            }
        }
        for (peer, path, up) in ended {
            match up {
                Ok(()) => self.tell(peer, ReaderEvent::Path { path, up: Ok(()) }),
                Err(why) => self.path_down(peer, path, why),
            }
        }
    }

    /// A connection is over, and not because we said so.
    fn gone(&mut self, peer: PeerId, why: String) {
        tracing::info!(
            peer = self.lines[usize::from(peer.0)].member.name,
            why,
            "connection to a peer is gone"
        );
        self.hang_up(peer);
        self.tell(peer, ReaderEvent::Disconnected { why });
    }

    fn hang_up(&mut self, peer: PeerId) {
        let line = &mut self.lines[usize::from(peer.0)];
        if let Some(task) = line.task.take() {
            task.abort();
        }
        (line.say, line.address) = (None, None);
        line.ends.clear();
        line.trying.clear();
        line.mending.clear();
        let links = std::mem::take(&mut line.links);
        self.closing.extend(links.into_iter().map(|(path, link)| (peer, path, link)));
    }

    /// Hears what links have done.
    fn poll_links(&mut self) {
        let mut done = Vec::new();
        let mut events = Vec::new();
        let mut broken = Vec::new();
        for (at, line) in self.lines.iter_mut().enumerate() {
            let peer = PeerId(at as u16);
            for (path, link) in &mut line.links {
                link.poll(&mut done);
                for done in done.drain(..) {
                    match done {
                        LinkDone::Read { read, into, result } => {
                            if result.is_ok() {
                                line.mending.carried(*path);
                            }
                            events.push((peer, ReaderEvent::Read { read, into, result }));
                        }
                        LinkDone::Broken { why } => broken.push((peer, *path, why.to_string())),
                        // The owner's words; this end has none of them.
                        LinkDone::Exposed { .. } | LinkDone::Concealed { .. } => {}
                    }
                }
            }
        }
        self.closing.retain_mut(|(peer, _, link)| {
            link.poll(&mut done);
            let mut over = false;
            for done in done.drain(..) {
                match done {
                    LinkDone::Read { read, into, result } => {
                        events.push((*peer, ReaderEvent::Read { read, into, result }));
                    }
                    LinkDone::Broken { .. } => over = true,
                    LinkDone::Exposed { .. } | LinkDone::Concealed { .. } => {}
                }
            }
            !over && link.usage().in_flight > 0
        });
        for (peer, event) in events {
            self.tell(peer, event);
        }
        for (peer, path, why) in broken {
            self.lines[usize::from(peer.0)].links.remove(&path);
            if path == PathId::TCP {
                self.tell(peer, ReaderEvent::Path { path, up: Err(why) });
            } else {
                self.path_down(peer, path, why);
            }
        }
    }

    fn take(&mut self, order: Order) {
        let now = self.clock.now();
        // Whoever asked may be gone; then nobody misses the answer.
        match order {
            Order::Peers(reply) => {
                let plans = self.lines.iter().map(|line| line.plan.clone());
                drop(reply.send((now, self.exchange.reports().into_iter().zip(plans).collect())));
            }
            Order::Transfers(reply) => drop(reply.send((now, self.exchange.transfers()))),
            Order::Locate { principal, keys, hint, deadline, reply } => {
                let id = self.number();
                self.locating.insert(id, reply);
                let deadline = self.clock.at(deadline);
                let event = ExchangeEvent::Locate { id, principal, keys, hint, deadline };
                self.exchange.handle(now, event, &mut self.commands);
            }
            Order::Offer { peer, mut offer, deadline, reply } => {
                offer.id = self.number();
                self.offering.insert((peer, offer.id), reply);
                let deadline = self.clock.at(deadline);
                let event = ExchangeEvent::Offer { peer, offer, deadline };
                self.exchange.handle(now, event, &mut self.commands);
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}
