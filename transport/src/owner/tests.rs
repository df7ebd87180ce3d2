use std::time::Duration;

use kv_arena::{Geometry, HazardSet, ShardMemory};
use kv_block::{BindingTag, Checksum, Epoch, Priority, Record};
use kv_wire::message::{Credits, Hello, Probe, Refusal, Refused, Sight, Want};

use super::*;
use crate::{OFFERS_MAX, Owner, PROBES_MAX};

const RDMA: PathId = PathId(1);
const OTHER: PathId = PathId(2);
const BYTES: u32 = 4096;

struct Rig {
    owner: Owner,
    now: Micros,
    memory: ShardMemory,
    /// What devices have.
    shown: Vec<(PathId, WantId, Held)>,
    grants: Vec<(u64, Option<Window>, u32)>,
}

fn config() -> OwnerConfig {
    OwnerConfig {
        node: "b".into(),
        epoch: Epoch(9),
        readers: vec!["a".into()],
        session: 5,
        credits: Credits { wants_max: 4, bytes_max: u64::from(3 * BYTES) },
        paths: vec![OwnerPath { path: RDMA, rank: 0 }, OwnerPath { path: OTHER, rank: 0 }],
        unix_zero_s: 1000,
        ..OwnerConfig::default()
    }
}

fn hello() -> Hello {
    Hello { versions: (1, 1), node: "a".into(), epoch: Epoch(1), principals: vec!["p".into()], facts: vec![] }
}

fn want(id: u64) -> Want {
    Want { id: WantId(id), principal: 0, wait_ms: 100, key: BlockKey::from_halves([id, id]) }
}

fn window(path: PathId) -> Window {
    Window { path: path.0, address: 1, key: 2 }
}

fn cannot() -> LinkError {
    LinkError::Unsupported { what: "length".into() }
}

impl Rig {
    fn new(config: OwnerConfig) -> Self {
        let geometry = Geometry { regions: 2, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        let (shown, grants) = (Vec::new(), Vec::new());
        Self { owner: Owner::new(config), now: Micros(1), memory, shown, grants }
    }

    /// An owner that serves, by TCP alone.
    fn up() -> Self {
        let mut rig = Self::new(config());
        assert_eq!(rig.heard(Ask::Hello(hello())), ["welcome 1"]);
        rig
    }

    fn tell(&mut self, event: OwnerEvent) -> Vec<String> {
        let mut out = Vec::new();
        self.owner.handle(self.now, event, &mut out);
        self.owner.flush(self.now, &mut out);
        out.into_iter().map(|command| self.words(command)).collect()
    }

    fn words(&mut self, command: OwnerCommand) -> String {
        match command {
            OwnerCommand::Say(Answer::Welcome(welcome)) => format!("welcome {}", welcome.version),
            OwnerCommand::Say(Answer::Refused(refused)) => format!("refused {:?}", refused.why),
            OwnerCommand::Say(Answer::Granted(grants)) => {
                self.grants.extend(grants.iter().map(|grant| (grant.id.0, grant.window, grant.ttl_s)));
                let ids: Vec<_> = grants.iter().map(|grant| grant.id.0.to_string()).collect();
                format!("granted {}", ids.join(" "))
            }
            OwnerCommand::Say(Answer::Missed(misses)) => {
                let misses: Vec<_> = misses.iter().map(|(id, why)| format!("{} {why}", id.0)).collect();
                format!("missed {}", misses.join(" "))
            }
            OwnerCommand::Say(Answer::Found(found)) => format!("found {}", found.sights.len()),
            OwnerCommand::Say(Answer::Taken(taken)) => format!("taken {}", taken.taken),
            OwnerCommand::Say(Answer::Path(end)) => format!("path {} of {} words", end.path, end.words.len()),
            OwnerCommand::Say(Answer::Pong(number)) => format!("pong {number}"),
            OwnerCommand::Say(Answer::Credits(_)) => "credits".into(),
            OwnerCommand::Say(Answer::Leaving) => "leaving".into(),
            OwnerCommand::Say(Answer::Staying) => "staying".into(),
            OwnerCommand::Hangup { why } => format!("hangup: {why}"),
            OwnerCommand::Hold { want, until, .. } => match until {
                Some(until) => format!("hold {} for {} ms", want.0, until.since(self.now).as_millis()),
                None => format!("hold {}", want.0),
            },
            OwnerCommand::Unhold { want } => format!("unhold {}", want.0),
            OwnerCommand::Look { id, principal, .. } => format!("look {id} of {principal}"),
            OwnerCommand::Offered { principal, .. } => format!("offered by {principal}"),
            OwnerCommand::Expose { path, want, block } => {
                self.shown.push((path, want, block));
                format!("expose {} by {}", want.0, path.0)
            }
            OwnerCommand::Conceal { path, want } => format!("conceal {} by {}", want.0, path.0),
            OwnerCommand::Open { end } => format!("open {}", end.path),
        }
    }

    fn heard(&mut self, ask: Ask) -> Vec<String> {
        self.tell(OwnerEvent::Heard(ask))
    }

    fn block(&self, bytes: u32, expires_at: u32) -> Held {
        let slot = self.memory.slab().take(bytes).unwrap();
        let (key, checksum) = (BlockKey([1; 16]), Checksum(1));
        let (tag, priority) = (BindingTag(1), Priority::Normal);
        slot.seal(&Record { key, checksum, bytes, tag, priority, expires_at })
    }

    fn held_of(&mut self, id: u64, bytes: u32, expires_at: u32) -> Vec<String> {
        let block = self.block(bytes, expires_at);
        self.tell(OwnerEvent::Held { want: WantId(id), block, tier: Tier::Host })
    }

    fn held(&mut self, id: u64) -> Vec<String> {
        self.held_of(id, BYTES, 0)
    }

    fn exposed(&mut self, path: PathId, id: u64, result: Result<(), LinkError>) -> Vec<String> {
        if result.is_err() {
            self.shown.retain(|(by, want, _)| (*by, *want) != (path, WantId(id)));
        }
        let windowed = result.map(|()| (path != PathId::TCP).then(|| window(path)));
        self.tell(OwnerEvent::Exposed { path, want: WantId(id), result: windowed })
    }

    fn concealed(&mut self, path: PathId, id: u64) -> Vec<String> {
        let place = self.shown.iter().position(|(by, want, _)| (*by, *want) == (path, WantId(id)));
        let (path, want, block) = self.shown.remove(place.expect("a device has it"));
        self.tell(OwnerEvent::Concealed { path, want, block })
    }

    /// Wanted, held, exposed by TCP and granted.
    fn grant(&mut self, id: u64) {
        assert_eq!(self.heard(Ask::Want(vec![want(id)])).len(), 1);
        assert_eq!(self.held(id), [format!("expose {id} by 0")]);
        assert_eq!(self.exposed(PathId::TCP, id, Ok(())), [format!("granted {id}")]);
    }

    fn done(&mut self, id: u64) -> Vec<String> {
        self.heard(Ask::Done(vec![WantId(id)]))
    }

    fn later(&mut self, time: Duration) -> Vec<String> {
        self.now = self.now.after(time);
        self.tell(OwnerEvent::Tick)
    }

    /// Blocks that somebody holds.
    fn holds(&self) -> u32 {
        let slab = self.memory.slab();
        let holds = slab.regions().iter().map(|region| region.held).sum();
        slab.sweep(&HazardSet::new());
        holds
    }
}

#[test]
fn a_block_is_held_exposed_granted_done_and_concealed() {
    let mut rig = Rig::up();
    assert_eq!(rig.heard(Ask::Want(vec![want(1)])), ["hold 1 for 100 ms"]);
    assert_eq!(rig.held(1), ["expose 1 by 0"]);
    assert_eq!(rig.exposed(PathId::TCP, 1, Ok(())), ["granted 1"]);
    assert_eq!(rig.done(1), ["conceal 1 by 0"]);
    assert_eq!((rig.holds(), rig.owner.report().fenced), (1, 1));
    assert_eq!(rig.concealed(PathId::TCP, 1), [""; 0]);
    assert_eq!((rig.holds(), rig.owner.report().bytes), (0, 0));
    assert_eq!(rig.tell(OwnerEvent::Disconnected), [""; 0]);
    assert!(rig.owner.is_over());
}

#[test]
fn who_is_served() {
    let with = |change: fn(&mut Hello)| {
        let mut hello = hello();
        change(&mut hello);
        hello
    };
    let table = [
        (with(|hello| hello.versions = (1, 7)), "welcome 1"),
        (with(|hello| hello.versions = (2, 7)), "refused Version"),
        (with(|hello| hello.versions = (0, 0)), "refused Version"),
        (with(|hello| hello.node = "c".into()), "refused Unknown"),
        (
            with(|hello| hello.principals = vec![String::new(); 257]),
            "hangup: more principals than a reader may have",
        ),
    ];
    for (hello, answer) in table {
        assert_eq!(Rig::new(config()).heard(Ask::Hello(hello))[0], answer);
    }
    let full = Refused { why: Refusal::Full, text: "8 readers".into() };
    let mut rig = Rig::new(OwnerConfig { refuse: Some(full), ..config() });
    assert_eq!(rig.heard(Ask::Hello(hello())), ["refused Full", "hangup: 8 readers"]);
    assert!(rig.owner.is_over());
    let first = Rig::new(config()).heard(Ask::Ping(1));
    assert_eq!(first, ["refused Unknown", "hangup: the first words are no Hello"]);
    let mut rig = Rig::new(config());
    assert_eq!(rig.owner.next_tick(), Some(Micros(0)), "it wants to know the time");
    assert_eq!(rig.later(Duration::ZERO), [""; 0]);
    assert_eq!(rig.later(config().hello_max), ["hangup: no Hello in time"]);
}

#[test]
fn what_breaks_the_rules_ends_the_connection() {
    let probe = |id| Ask::Probe(Probe { id, principal: 0, keys: vec![] });
    let offer = |id, principal| Ask::Offer(Offer { id, principal, binding: vec![], keys: vec![] });
    let table = [
        (vec![Ask::Hello(hello())], "a second Hello"),
        (vec![Ask::Want(vec![want(1), want(1)])], "a want that is numbered twice"),
        (vec![Ask::Want((1..6).map(want).collect())], "more wants than the credits allow"),
        (
            vec![Ask::Want(vec![Want { principal: 1, ..want(1) }])],
            "a want for a principal that was not named",
        ),
        (vec![Ask::Want(vec![want(1); 4097])], "more wants than one message takes"),
        (vec![Ask::Done(vec![WantId(1); 4097])], "more wants than one message takes"),
        (vec![probe(1), probe(1)], "a probe that is numbered twice"),
        ((0..=PROBES_MAX as u64).map(probe).collect(), "more probes than a reader may make"),
        (vec![offer(1, 0), offer(1, 0)], "an offer that is numbered twice"),
        (vec![offer(1, 1)], "an offer for a principal that was not named"),
        ((0..=OFFERS_MAX as u64).map(|id| offer(id, 0)).collect(), "more offers than a reader may make"),
        (vec![Ask::Path(PathEnd { path: 0, words: vec![] })], "an end of a path that has none"),
        (vec![Ask::Path(PathEnd { path: 1, words: vec![] }); 2], "a path that is being opened already"),
    ];
    for (asks, rule) in table {
        let mut rig = Rig::up();
        rig.grant(9);
        let said: Vec<_> = asks.into_iter().flat_map(|ask| rig.heard(ask)).collect();
        assert!(said.contains(&format!("hangup: {rule}")), "{said:?} instead of {rule}");
        assert!(said.contains(&"conceal 9 by 0".into()) && !rig.owner.is_over());
        rig.concealed(PathId::TCP, 9);
        assert!(rig.owner.is_over() && rig.holds() == 0, "{rule}");
    }
    let mut rig = Rig::up();
    rig.grant(1);
    let said = rig.tell(OwnerEvent::Nonsense { why: "magic".into() });
    assert_eq!(said, ["hangup: magic", "conceal 1 by 0"]);
}

#[test]
fn a_want_waits_no_longer_than_both_sides_allow() {
    let mut rig = Rig::up();
    let wants = [0, 1, 60_000].map(|wait_ms| Want { wait_ms, ..want(u64::from(wait_ms)) });
    let holds = rig.heard(Ask::Want(wants.to_vec()));
    assert_eq!(holds, ["hold 0", "hold 1 for 1 ms", "hold 60000 for 10000 ms"]);
}

#[test]
fn a_node_that_does_not_answer_is_not_waited_for() {
    let mut rig = Rig::up();
    rig.heard(Ask::Want(vec![want(1)]));
    assert_eq!(rig.later(Duration::from_secs(9)), [""; 0]);
    rig.heard(Ask::Ping(1));
    assert_eq!(rig.later(Duration::from_secs(2)), ["unhold 1", "missed 1 tier_timeout"]);
    assert_eq!(rig.held(1), [""; 0], "too late");
    assert_eq!(rig.holds(), 0);
}

#[test]
fn what_is_done_before_it_is_granted_is_let_go_in_every_stage() {
    let mut rig = Rig::up();
    rig.heard(Ask::Want(vec![want(1)]));
    assert_eq!(rig.done(1), ["unhold 1"]);
    rig.heard(Ask::Want(vec![want(2)]));
    rig.held(2);
    assert_eq!(rig.done(2), [""; 0], "the device has not exposed it yet");
    assert_eq!(rig.exposed(PathId::TCP, 2, Ok(())), ["conceal 2 by 0"]);
    rig.concealed(PathId::TCP, 2);
    rig.heard(Ask::Want(vec![want(3)]));
    rig.held(3);
    rig.done(3);
    assert_eq!(rig.exposed(PathId::TCP, 3, Err(cannot())), [""; 0]);
    assert_eq!(rig.done(77), [""; 0], "what is not known has ended by itself");
    assert_eq!((rig.holds(), rig.owner.leases.is_empty()), (0, true));
}

#[test]
fn no_answer_comes_behind_the_pong_that_ends_it() {
    let mut rig = Rig::up();
    rig.heard(Ask::Want(vec![want(1), want(2)]));
    let mut out = Vec::new();
    let reason = MissReason::NeverStored;
    rig.owner.handle(rig.now, OwnerEvent::NotHeld { want: WantId(1), reason }, &mut out);
    rig.owner.handle(rig.now, OwnerEvent::Heard(Ask::Done(vec![WantId(1), WantId(2)])), &mut out);
    rig.owner.handle(rig.now, OwnerEvent::Heard(Ask::Ping(7)), &mut out);
    rig.owner.flush(rig.now, &mut out);
    let words: Vec<_> = out.into_iter().map(|command| rig.words(command)).collect();
    assert_eq!(words, ["unhold 2", "missed 1 never_stored", "pong 7"]);
}

#[test]
fn bytes_of_credit_hold_blocks_back_until_they_are_concealed() {
    let mut rig = Rig::up();
    (1..=3).for_each(|id| rig.grant(id));
    rig.heard(Ask::Want(vec![want(4)]));
    assert_eq!(rig.held(4), [""; 0]);
    assert_eq!(rig.done(1), ["conceal 1 by 0"]);
    assert_eq!(rig.concealed(PathId::TCP, 1), ["expose 4 by 0"]);
    rig.done(4);
    rig.exposed(PathId::TCP, 4, Ok(()));
    rig.heard(Ask::Want(vec![want(5)]));
    assert_eq!(rig.held(5), [""; 0]);
    assert_eq!(rig.later(config().wait_max - Duration::from_secs(1)), [""; 0]);
    rig.heard(Ask::Ping(1));
    assert_eq!(rig.later(Duration::from_secs(1)), ["missed 5 overloaded"]);
    rig.heard(Ask::Want(vec![want(6)]));
    assert_eq!(rig.held_of(6, 4 * BYTES, 0), ["missed 6 overloaded"], "it never fits");
}

#[test]
fn the_best_path_gets_the_window_and_equal_ones_take_turns() {
    let mut rig = Rig::up();
    for path in [RDMA, OTHER] {
        rig.tell(OwnerEvent::Path { path, up: Ok(()) });
    }
    for id in 1..=3 {
        rig.heard(Ask::Want(vec![want(id)]));
        let exposed = rig.held(id);
        assert_eq!(exposed, [1, 2, 0].map(|path| format!("expose {id} by {path}")));
        assert_eq!(rig.exposed(PathId::TCP, id, Ok(())), [""; 0]);
        let other = if id == 3 { Err(cannot()) } else { Ok(()) };
        assert_eq!(rig.exposed(OTHER, id, other), [""; 0]);
        assert_eq!(rig.exposed(RDMA, id, Ok(())), [format!("granted {id}")]);
    }
    let windows: Vec<_> = rig.grants.iter().map(|(_, window, _)| window.unwrap().path).collect();
    assert_eq!(windows, [1, 2, 1]);
    assert_eq!(rig.done(1), ["conceal 1 by 1", "conceal 1 by 2", "conceal 1 by 0"]);
    assert_eq!(rig.done(3), ["conceal 3 by 1", "conceal 3 by 0"]);
    for (path, id) in [(OTHER, 1), (PathId::TCP, 1), (RDMA, 1), (RDMA, 3), (PathId::TCP, 3)] {
        rig.concealed(path, id);
    }
    assert_eq!(rig.owner.report().bytes, u64::from(BYTES));
}

#[test]
fn without_tcp_there_is_no_grant() {
    let mut rig = Rig::up();
    rig.tell(OwnerEvent::Path { path: RDMA, up: Ok(()) });
    rig.heard(Ask::Want(vec![want(1)]));
    rig.held(1);
    rig.exposed(RDMA, 1, Ok(()));
    let failed = rig.exposed(PathId::TCP, 1, Err(cannot()));
    assert_eq!(failed, ["conceal 1 by 1", "missed 1 path_failed"]);
    rig.concealed(RDMA, 1);
    assert_eq!(rig.holds(), 0);
    rig.tell(OwnerEvent::Path { path: RDMA, up: Err("pulled".into()) });
    rig.heard(Ask::Want(vec![want(2)]));
    assert_eq!(rig.held(2), ["expose 2 by 0"]);
}

#[test]
fn a_device_that_breaks_gives_its_blocks_back_by_itself() {
    let mut rig = Rig::up();
    rig.grant(1);
    assert_eq!(rig.concealed(PathId::TCP, 1), [""; 0]);
    assert_eq!(rig.owner.report().granted, 1);
    assert_eq!(rig.done(1), [""; 0], "there is nothing to conceal");
    assert!(rig.owner.leases.is_empty());
}

#[test]
fn a_lease_that_is_not_done_in_time_is_concealed() {
    let mut rig = Rig::up();
    rig.grant(1);
    for number in 0..3 {
        rig.later(config().lease_max / 4);
        rig.heard(Ask::Ping(number));
    }
    assert_eq!(rig.later(config().lease_max / 4), ["conceal 1 by 0"]);
    assert_eq!(rig.owner.report().expired, 1);
    assert_eq!(rig.done(1), [""; 0]);
    rig.concealed(PathId::TCP, 1);
    assert!(rig.owner.leases.is_empty());
}

#[test]
fn a_reader_that_says_nothing_is_let_go_while_something_is_held_for_it() {
    let mut rig = Rig::up();
    assert_eq!(rig.later(Duration::from_secs(1000)), [""; 0]);
    rig.grant(1);
    assert_eq!(rig.later(config().silence_max), ["hangup: it said nothing for 10s", "conceal 1 by 0"]);
}

#[test]
fn a_lost_connection_ends_everything_and_is_over_when_all_is_concealed() {
    let mut rig = Rig::up();
    rig.grant(1);
    rig.heard(Ask::Want(vec![want(2), want(3)]));
    rig.held(3);
    assert_eq!(rig.tell(OwnerEvent::Disconnected), ["conceal 1 by 0", "unhold 2"]);
    assert_eq!(rig.held(2), [""; 0]);
    assert_eq!(rig.exposed(PathId::TCP, 3, Ok(())), ["conceal 3 by 0"]);
    rig.concealed(PathId::TCP, 1);
    assert!(!rig.owner.is_over(), "a device may read the other one");
    rig.concealed(PathId::TCP, 3);
    assert!(rig.owner.is_over());
    assert_eq!(rig.holds(), 0);
}

#[test]
fn how_long_a_block_has_to_live_is_said_without_a_clock() {
    let mut rig = Rig::up();
    rig.now = Micros(5_000_000);
    for (id, expires_at) in [(1, 0), (2, 1065)] {
        rig.heard(Ask::Want(vec![want(id)]));
        rig.held_of(id, BYTES, expires_at);
        rig.exposed(PathId::TCP, id, Ok(()));
    }
    assert_eq!(rig.grants, [(1, None, 0), (2, None, 60)]);
    rig.heard(Ask::Want(vec![want(3)]));
    assert_eq!(rig.held_of(3, BYTES, 1005), ["missed 3 expired"]);
}

#[test]
fn questions_are_passed_on_and_answered() {
    let mut rig = Rig::up();
    let keys = vec![BlockKey([1; 16]); 2];
    let asked = rig.heard(Ask::Probe(Probe { id: 4, principal: 0, keys: keys.clone() }));
    assert_eq!(asked, ["look 4 of p"]);
    let found = Found { id: 4, sights: vec![Sight::Absent, Sight::In(Tier::Disk)] };
    assert_eq!(rig.tell(OwnerEvent::Looked(found.clone())), ["found 2"]);
    assert_eq!(rig.tell(OwnerEvent::Looked(found)), [""; 0]);
    let offered = rig.heard(Ask::Offer(Offer { id: 8, principal: 0, binding: vec![], keys }));
    assert_eq!(offered, ["offered by p"]);
    assert_eq!(rig.tell(OwnerEvent::Took(Taken { id: 8, taken: 1, left: 1 })), ["taken 1"]);
    let end = |path, count| PathEnd { path, words: vec![1; count] };
    assert_eq!(rig.heard(Ask::Path(end(9, 3))), ["path 9 of 0 words"], "there is no such path");
    assert_eq!(rig.heard(Ask::Path(end(1, 3))), ["open 1"]);
    assert_eq!(rig.tell(OwnerEvent::Opened(end(1, 5))), ["path 1 of 5 words"]);
    let leaving = |leaving| OwnerEvent::Leaving { leaving };
    assert_eq!(rig.tell(leaving(true)), ["leaving"]);
    assert_eq!(rig.tell(leaving(true)), [""; 0], "it is said once");
    assert_eq!(rig.tell(leaving(false)), ["staying"]);
}
