//! Serving peers: one task for each reader. It joins an owner to the reader's connection, the link that its data
//! connections come by, and the shards.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kv_arena::Held;
use kv_block::{BlockKey, MissReason, Tier};
use kv_node::{Reach, Step};
use kv_tcp::{Accepted, End, Sessions};
use kv_transport::Owner;
use kv_transport::link::{Link, LinkDone, LinkError, LinkOp, Wake};
use kv_transport::owner::{LeaseReport, OwnerCommand, OwnerConfig, OwnerEvent};
use kv_transport::plan::PathPlan;
use kv_transport::reader::PathId;
use kv_wire::message::{Answer, Ask, Credits, Found, PathEnd, Refusal, Refused, Sight, WantId};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::line::chain;
use super::rdma::Rails;
use super::{Clock, Connection, Served, ServedPeer, facts, offer, unguessable};
use crate::config::Config;
use crate::config::units::Member;
use crate::node::Node;

/// Words to a reader that wait to be sent. More means that it does not read.
const SAY_MAX: usize = 1024;
/// Messages of a reader that are heard before what follows from them is done.
const TURN_MAX: usize = 64;
/// Connections of one reader: the one that it has, and some of before that nobody has ended yet.
pub(crate) const CONNECTIONS_MAX: usize = 4;
/// Questions that wait to be answered; whoever asks more waits.
const ASKS_MAX: usize = 4;
/// How often what a reader has is told to whoever asks.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// What all readers are served from.
pub(super) struct Serving {
    pub(super) node: Arc<Node>,
    pub(super) config: Arc<Config>,
    pub(super) members: Arc<[Member]>,
    pub(super) sessions: Sessions,
    pub(super) served: Served,
    pub(super) rails: Rails,
    pub(super) clock: Clock,
}

/// What came of looking for a block.
type Looked = (WantId, Result<(Held, Tier), MissReason>);

/// One reader.
struct Reader {
    serving: Arc<Serving>,
    owner: Owner,
    name: String,
    session: u128,
    /// It is nobody who counts.
    refused: bool,
    /// The ways to it; TCP is always among them while it is connected.
    links: BTreeMap<PathId, Box<dyn Link>>,
    wake: Wake,
    plan: PathPlan,
    say: mpsc::Sender<Answer>,
    commands: Vec<OwnerCommand>,
    events: Vec<OwnerEvent>,
    /// Looking for blocks that are not in memory, by the want.
    looking: HashMap<WantId, AbortHandle>,
    tasks: JoinSet<Event>,
    hung_up: Option<String>,
    /// Where others ask what is held for it.
    asks: mpsc::Sender<oneshot::Sender<Vec<LeaseReport>>>,
}

/// What a task of a reader has to say.
enum Event {
    Looked(Looked),
    Took(kv_wire::message::Taken),
}

impl Serving {
    /// Takes readers until the daemon ends.
    pub(super) async fn accept(self: Arc<Self>, mut arrivals: mpsc::Receiver<Accepted>) {
        while let Some(accepted) = arrivals.recv().await {
            tokio::spawn(serve(Arc::clone(&self), accepted));
        }
    }

    /// Why a reader is not served.
    fn refusal(&self, accepted: &Accepted) -> Option<Refused> {
        let name = &accepted.hello.node;
        let text = if !self.members.iter().any(|member| member.name == *name) {
            format!("node {name} is not among peers.members of node {}", self.node.name)
        } else if !accepted.control.identity().carries(name) {
            format!("the certificate shown does not carry the name {name}")
        } else if self.served().get(name).is_some_and(|served| served.now.len() >= CONNECTIONS_MAX) {
            let text = format!("node {name} has {CONNECTIONS_MAX} connections here already");
            return Some(Refused { why: Refusal::Full, text });
        } else {
            return None;
        };
        Some(Refused { why: Refusal::Unknown, text })
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<String, ServedPeer>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self, name: &str, session: u128, refuse: Option<Refused>, plan: &PathPlan) -> OwnerConfig {
        let peers = &self.config.peers;
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        OwnerConfig {
            node: self.node.name.clone(),
            epoch: self.node.epoch,
            readers: vec![name.to_owned()],
            refuse,
            session,
            credits: Credits { wants_max: peers.wants_max, bytes_max: peers.held_bytes_max.0 },
            leaving: self.node.is_draining(),
            wait_max: peers.fetch_limit.0,
            lease_max: peers.lease_ttl.0,
            facts: facts::tell(&self.rails.facts),
            paths: plan.owner_paths(),
            unix_zero_s: unix.saturating_sub(self.clock.now().0 / 1_000_000),
            ..OwnerConfig::default()
        }
    }
}

async fn serve(serving: Arc<Serving>, accepted: Accepted) {
    let refuse = serving.refusal(&accepted);
    let Accepted { hello, control } = accepted;
    let (name, address) = (hello.node.clone(), control.peer());
    match &refuse {
        Some(refused) => {
            let why = &refused.text;
            tracing::warn!(reader = name, %address, why, "a reader is refused");
        }
        None => tracing::info!(reader = name, %address, "a peer reads here"),
    }
    let session = match unguessable() {
        Ok(session) => session,
        Err(error) => {
            return tracing::error!(%error, "the kernel gives no random number; a reader is not served");
        }
    };
    let wake = Arc::new(Notify::new());
    let ring: Wake = {
        let wake = Arc::clone(&wake);
        Arc::new(move || wake.notify_one())
    };
    let refused = refuse.is_some();
    let link: Box<dyn Link> = Box::new(serving.sessions.link(session, &name, Arc::clone(&ring)));
    let plan = serving.rails.plan_from(&facts::hear(&hello.facts));
    let owner = Owner::new(serving.config(&name, session, refuse, &plan));
    let (writer, mut hear) = control.split();
    let (say, queue) = mpsc::channel(SAY_MAX);
    let mut writing = tokio::spawn(writer.drain(queue));
    let clock = serving.clock;
    let mut leaving = serving.node.drain.watch();
    let (asks, mut asked) = mpsc::channel(ASKS_MAX);
    let mut reader = Reader {
        serving,
        owner,
        name,
        session,
        refused,
        links: BTreeMap::from([(PathId::TCP, link)]),
        wake: ring,
        plan,
        say,
        commands: Vec::new(),
        events: Vec::new(),
        looking: HashMap::new(),
        tasks: JoinSet::new(),
        hung_up: None,
        asks,
    };
    reader.tell();
    reader.events.push(OwnerEvent::Heard(Ask::Hello(hello)));
    reader.turn();
    let mut telling = tokio::time::interval(TELL_EVERY);
    telling.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut connected = true;
    while !reader.owner.is_over() {
        let due = reader.owner.next_tick().map(|at| clock.moment(at));
        let tick = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        let mut gone = None;
        tokio::select! {
            heard = hear.hear(), if connected => match heard {
                Ok(ask) => {
                    reader.events.push(OwnerEvent::Heard(ask));
                    // What has come already belongs to the same turn; an end shows at the next.
                    while reader.events.len() < TURN_MAX
                        && let Ok(Some(ask)) = hear.hear_more()
                    {
                        reader.events.push(OwnerEvent::Heard(ask));
                    }
                }
                Err(End::Nonsense(error)) => {
                    reader.events.push(OwnerEvent::Nonsense { why: chain(&error) });
                    connected = false;
                }
                Err(end) => gone = Some(chain(&end)),
            },
            ended = &mut writing, if connected => {
                let why = ended.map_or_else(|error| error.to_string(), |ended| {
                    ended.err().map_or_else(|| "closed".to_owned(), |end| chain(&end))
                });
                gone = Some(why);
            }
            () = wake.notified() => {}
            Some(done) = reader.tasks.join_next(), if !reader.tasks.is_empty() => reader.task_ended(done),
            _ = telling.tick() => reader.tell(),
            // Whoever asked may be gone; then nobody misses the answer.
            Some(reply) = asked.recv() => drop(reply.send(reader.owner.leases())),
            changed = leaving.changed() => {
                let leaving = changed.is_ok() && *leaving.borrow_and_update();
                reader.events.push(OwnerEvent::Leaving { leaving });
            }
            () = tick => reader.events.push(OwnerEvent::Tick),
        }
        if let Some(why) = gone {
            tracing::info!(reader = reader.name, why, "a reader is gone");
            connected = false;
            reader.events.push(OwnerEvent::Disconnected);
        }
        reader.turn();
        connected &= reader.hung_up.is_none();
        if !connected {
            // Nothing of a reader outlives its control connection, least of all what it does not take.
            reader.serving.sessions.hang_up(session);
        }
    }
    reader.end();
    if let Some(why) = &reader.hung_up {
        tracing::info!(reader = reader.name, why, "a reader was let go");
    }
    // What was said last, a refusal most of all, still goes out.
    let Reader { say, .. } = reader;
    drop(say);
    let _ = tokio::time::timeout(Duration::from_secs(1), writing).await;
}

impl Reader {
    /// Tells the owner what has happened and does what follows from it, until nothing is left.
    fn turn(&mut self) {
        loop {
            self.poll_links();
            let now = self.serving.clock.now();
            for event in std::mem::take(&mut self.events) {
                self.owner.handle(now, event, &mut self.commands);
            }
            self.owner.flush(now, &mut self.commands);
            if self.commands.is_empty() {
                break;
            }
            for command in std::mem::take(&mut self.commands) {
                self.obey(command);
            }
            self.links.values_mut().for_each(|link| link.kick());
        }
    }

    fn obey(&mut self, command: OwnerCommand) {
        match command {
            OwnerCommand::Say(answer) => {
                if self.say.try_send(answer).is_err() && self.hung_up.is_none() {
                    self.hung_up = Some("it takes no more of what it is told".into());
                    self.events.push(OwnerEvent::Disconnected);
                }
            }
            OwnerCommand::Hangup { why } => self.hung_up = Some(why),
            OwnerCommand::Hold { want, principal, key, until } => self.hold(want, &principal, key, until),
            OwnerCommand::Unhold { want } => {
                if let Some(task) = self.looking.remove(&want) {
                    task.abort();
                }
            }
            OwnerCommand::Look { id, principal, keys } => {
                let sights = self.sights(&principal, &keys);
                self.events.push(OwnerEvent::Looked(Found { id, sights }));
            }
            OwnerCommand::Offered { principal, offer } => {
                let (serving, reader) = (Arc::clone(&self.serving), self.name.clone());
                let work = async move {
                    Event::Took(offer::take(&serving.node, &serving.config, &reader, &principal, offer).await)
                };
                self.tasks.spawn(work);
            }
            OwnerCommand::Expose { path, want, block } => {
                let refused = match self.links.get_mut(&path) {
                    Some(link) => link.submit(LinkOp::Expose { want, block }).is_err(),
                    None => true,
                };
                if refused {
                    let what = "the path is gone, or exposes as many blocks as it may".to_owned();
                    let result = Err(LinkError::Path { what });
                    self.events.push(OwnerEvent::Exposed { path, want, result });
                }
            }
            OwnerCommand::Conceal { path, want } => {
                // Always taken. A path that is gone has given everything back before it said so.
                if let Some(link) = self.links.get_mut(&path) {
                    let _ = link.submit(LinkOp::Conceal { want });
                }
            }
            OwnerCommand::Open { end } => self.open(&end),
        }
    }

    /// The reader wants a path besides TCP.
    fn open(&mut self, end: &PathEnd) {
        let path = PathId(end.path);
        let planned = self.plan.paths.iter().find(|planned| planned.path == path);
        let answered = match planned {
            None => Err("it is not planned".to_owned()),
            // A reader that lost its end may come before we have noticed. It comes again.
            Some(_) if self.links.contains_key(&path) => Err("its last end is still open here".to_owned()),
            Some(planned) => self.serving.rails.answer(planned, &end.words, Arc::clone(&self.wake)),
        };
        match answered {
            Ok((link, answer)) => {
                self.links.insert(path, link);
                self.events.push(OwnerEvent::Opened(answer));
                self.events.push(OwnerEvent::Path { path, up: Ok(()) });
            }
            Err(why) => {
                tracing::info!(reader = self.name, path = path.0, why, "a path to a reader is not opened");
                self.events.push(OwnerEvent::Opened(PathEnd { path: end.path, words: Vec::new() }));
            }
        }
    }

    fn poll_links(&mut self) {
        let mut done = Vec::new();
        let events = &mut self.events;
        self.links.retain(|path, link| {
            let (path, mut whole) = (*path, true);
            link.poll(&mut done);
            events.extend(done.drain(..).filter_map(|done| match done {
                LinkDone::Exposed { want, result } => Some(OwnerEvent::Exposed { path, want, result }),
                LinkDone::Concealed { want, block } => Some(OwnerEvent::Concealed { path, want, block }),
                LinkDone::Broken { why } => {
                    whole = false;
                    Some(OwnerEvent::Path { path, up: Err(why.to_string()) })
                }
                // The reader's words; this end has none of them.
                LinkDone::Read { .. } => None,
            }));
            whole
        });
    }

    /// Looks for a block: at once in memory, otherwise in a task that waits.
    fn hold(&mut self, want: WantId, principal: &str, key: BlockKey, until: Option<kv_transport::Micros>) {
        let Some(number) = self.principal(principal) else {
            let reason = MissReason::NeverStored;
            return self.events.push(OwnerEvent::NotHeld { want, reason });
        };
        let node = &self.serving.node;
        let view = node.of(number);
        if let Some(block) = view.shards().iter().find_map(|shard| shard.hold_now(node.guest, &key)) {
            return self.events.push(OwnerEvent::Held { want, block, tier: Tier::Host });
        }
        let Some(until) = until else {
            let reason = match view.sights(&[key])[0].0 {
                Sight::In(_) => MissReason::TierTimeout,
                Sight::Pending => MissReason::NotComplete,
                Sight::Absent => MissReason::NeverStored,
            };
            return self.events.push(OwnerEvent::NotHeld { want, reason });
        };
        let (node, until) = (Arc::clone(node), self.serving.clock.moment(until));
        let work = async move {
            let step = Step { key, after: None };
            // What a peer asks for is never looked for among peers: it would go round.
            let read = node.of(number).read(node.guest, step, (true, Reach::Here), until).await;
            let found = read.unwrap_or_else(|fault| {
                tracing::debug!(%key, %fault, "a block wanted by a peer could not be read");
                Err(MissReason::Overloaded)
            });
            Event::Looked((want, found))
        };
        self.looking.insert(want, self.tasks.spawn(work));
    }

    fn task_ended(&mut self, done: Result<Event, tokio::task::JoinError>) {
        match done {
            Ok(Event::Looked((want, found))) => {
                self.looking.remove(&want);
                self.events.push(match found {
                    Ok((block, tier)) => OwnerEvent::Held { want, block, tier },
                    Err(reason) => OwnerEvent::NotHeld { want, reason },
                });
            }
            Ok(Event::Took(taken)) => self.events.push(OwnerEvent::Took(taken)),
            // Aborted: nobody wants it any more.
            Err(_) => {}
        }
    }

    fn sights(&self, principal: &str, keys: &[BlockKey]) -> Vec<Sight> {
        let Some(number) = self.principal(principal) else { return vec![Sight::Absent; keys.len()] };
        self.serving.node.of(number).sights(keys).into_iter().map(|(sight, _)| sight).collect()
    }

    fn principal(&self, name: &str) -> Option<usize> {
        self.serving.node.principals.iter().position(|principal| principal.name == name)
    }

    /// What the reader has, for whoever asks.
    fn tell(&self) {
        if !self.refused {
            let mut served = self.serving.served();
            let now = Connection { report: self.owner.report(), asks: self.asks.clone() };
            served.entry(self.name.clone()).or_default().now.insert(self.session, now);
        }
    }

    /// What it had stays counted.
    fn end(&self) {
        self.tell();
        if let Some(served) = self.serving.served().get_mut(&self.name) {
            served.end(self.session);
        }
    }
}
