use std::time::Duration;

use kv_arena::{Geometry, ShardMemory, Slot};
use kv_block::{BindingTag, BlockKey, Checksum, Epoch, MissReason, Priority, Tier};
use kv_wire::message::{
    Answer, Ask, Credits, Found, Grant, Offer, PathEnd, ReadId, Refusal, Refused, Sight, Taken, WantId,
    Welcome, Window,
};

use super::machine::{Session, Stage};
use super::*;
use crate::health::Circuit;
use crate::{OFFERS_MAX, PROBES_MAX, Reader};

const RDMA: PathId = PathId(1);
const BYTES: u32 = 4096;

struct Rig {
    reader: Reader,
    now: Micros,
    memory: ShardMemory,
    /// Reads that the reader asked for.
    reads: Vec<(PathId, ReadId, Slot)>,
    last_ping: u64,
}

fn config() -> ReaderConfig {
    ReaderConfig {
        node: "a".into(),
        epoch: Epoch(1),
        principals: vec!["p".into()],
        peer: "b".into(),
        paths: vec![RDMA],
        block_bytes_max: 2 * BYTES,
        wants_max: 20_000,
        ..ReaderConfig::default()
    }
}

fn welcome() -> Welcome {
    let credits = Credits { wants_max: 4096, bytes_max: 1 << 30 };
    Welcome {
        version: 1,
        node: "b".into(),
        epoch: Epoch(9),
        session: 5,
        credits,
        leaving: false,
        facts: vec![],
    }
}

fn grant(id: u64) -> Grant {
    let (tag, priority) = (BindingTag(1), Priority::Normal);
    let (id, checksum) = (WantId(id), Checksum(id));
    Grant { id, checksum, bytes: BYTES, tag, priority, ttl_s: 0, tier: Tier::Host, window: None }
}

fn windowed(id: u64) -> Grant {
    Grant { window: Some(Window { path: RDMA.0, address: 1, key: 2 }), ..grant(id) }
}

fn path_error() -> LinkError {
    LinkError::Path { what: "pulled".into() }
}

impl Rig {
    fn new(config: ReaderConfig) -> Self {
        let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 8 };
        let memory = ShardMemory::anonymous(geometry).unwrap();
        Self { reader: Reader::new(config), now: Micros(1), memory, reads: Vec::new(), last_ping: 0 }
    }

    /// A reader that is connected, with both paths up.
    fn up() -> Self {
        Self::up_with(config(), welcome())
    }

    fn up_with(config: ReaderConfig, welcome: Welcome) -> Self {
        let mut rig = Self::new(config);
        rig.connect(welcome);
        rig
    }

    fn connect(&mut self, welcome: Welcome) {
        assert_eq!(self.probe(0, 1), ["connect"]);
        assert_eq!(self.tell(ReaderEvent::Connected), ["hello"]);
        assert_eq!(self.heard(Answer::Welcome(welcome)), ["open", "ask probe 1 of 1"]);
        let asked = self.reader.questions.keys().next().copied().unwrap();
        self.heard(Answer::Found(Found { id: asked, sights: vec![Sight::Absent] }));
        for path in [RDMA, PathId::TCP] {
            assert_eq!(self.tell(ReaderEvent::Path { path, up: Ok(()) }), [""; 0]);
        }
    }

    fn tell(&mut self, event: ReaderEvent) -> Vec<String> {
        let mut out = Vec::new();
        self.reader.handle(self.now, event, &mut out);
        self.reader.flush(self.now, &mut out);
        out.into_iter().filter_map(|command| self.words(command)).collect()
    }

    fn words(&mut self, command: ReaderCommand) -> Option<String> {
        let list = |ids: &[WantId]| ids.iter().map(|id| id.0.to_string()).collect::<Vec<_>>().join(" ");
        Some(match command {
            ReaderCommand::Connect => "connect".into(),
            ReaderCommand::Hangup { why } => format!("hangup: {why}"),
            ReaderCommand::Say(Ask::Hello(_)) => "hello".into(),
            ReaderCommand::Say(Ask::Want(wants)) if wants.len() > 4 => format!("want {} blocks", wants.len()),
            ReaderCommand::Say(Ask::Want(wants)) => {
                format!("want {}", list(&wants.iter().map(|want| want.id).collect::<Vec<_>>()))
            }
            ReaderCommand::Say(Ask::Done(wants)) if wants.len() > 4 => format!("done {}", wants.len()),
            ReaderCommand::Say(Ask::Done(wants)) => format!("done {}", list(&wants)),
            ReaderCommand::Say(Ask::Probe(probe)) => {
                let place = self.reader.questions.keys().position(|number| *number == probe.id);
                format!("ask probe {} of {}", place.unwrap() + 1, self.reader.questions.len())
            }
            ReaderCommand::Say(Ask::Offer(_)) => "ask offer".into(),
            ReaderCommand::Say(Ask::Path(_)) => "say path".into(),
            ReaderCommand::Say(Ask::Ping(number)) => {
                self.last_ping = number;
                return None;
            }
            ReaderCommand::Open { .. } => "open".into(),
            ReaderCommand::Join(_) => "join".into(),
            ReaderCommand::Read { path, read, want, into, .. } => {
                self.reads.push((path, read, into));
                format!("read {} by {}", want.0, path.0)
            }
            ReaderCommand::Cancel { path, .. } => format!("cancel by {}", path.0),
            ReaderCommand::Granted { want, .. } => format!("granted {}", want.0),
            ReaderCommand::Missed { want, reason } => format!("missed {} {reason}", want.0),
            ReaderCommand::Landed { want, path, .. } => format!("landed {} by {}", want.0, path.0),
            ReaderCommand::Probed { probe, found } => {
                format!("probed {probe} {}", if found.is_some() { "found" } else { "none" })
            }
            ReaderCommand::Taken { offer, taken } => {
                format!("taken {offer} {}", taken.map_or("none".into(), |taken| taken.taken.to_string()))
            }
        })
    }

    fn heard(&mut self, answer: Answer) -> Vec<String> {
        self.tell(ReaderEvent::Heard(answer))
    }

    fn want_by(&mut self, id: u64, deadline: Micros) -> Vec<String> {
        let key = BlockKey::from_halves([id, id]);
        self.tell(ReaderEvent::Want { want: WantId(id), principal: 0, key, deadline, wait: true })
    }

    fn want(&mut self, id: u64) -> Vec<String> {
        self.want_by(id, self.now.after(Duration::from_secs(1)))
    }

    fn probe(&mut self, probe: u64, keys: usize) -> Vec<String> {
        let keys = vec![BlockKey([1; 16]); keys];
        let deadline = self.now.after(Duration::from_secs(1));
        self.tell(ReaderEvent::Probe { probe, principal: 0, keys, deadline })
    }

    fn take(&mut self, id: u64) -> Vec<String> {
        let into = self.memory.slab().take(BYTES).unwrap();
        self.tell(ReaderEvent::Take { want: WantId(id), into })
    }

    /// The oldest read ends.
    fn read(&mut self, result: Result<(), LinkError>) -> Vec<String> {
        let (_, read, into) = self.reads.remove(0);
        self.tell(ReaderEvent::Read { read, into, result })
    }

    /// Wants, is granted and takes.
    fn reading(&mut self, grant: Grant) -> Vec<String> {
        let id = grant.id.0;
        assert_eq!(self.want(id), [format!("want {id}")]);
        assert_eq!(self.heard(Answer::Granted(vec![grant])), [format!("granted {id}")]);
        self.take(id)
    }

    fn later(&mut self, time: Duration) -> Vec<String> {
        self.now = self.now.after(time);
        self.tell(ReaderEvent::Tick)
    }

    fn pong(&mut self) -> Vec<String> {
        self.heard(Answer::Pong(self.last_ping))
    }

    fn used(&self) -> u32 {
        self.memory.slab().usage().classes.iter().map(|class| class.slots - class.free).sum()
    }
}

#[test]
fn a_block_is_wanted_granted_read_and_landed() {
    let mut rig = Rig::up();
    assert_eq!(rig.reading(grant(1)), ["read 1 by 0"]);
    assert_eq!(rig.read(Ok(())), ["landed 1 by 0", "done 1"]);
    let report = rig.reader.report();
    assert_eq!((report.landed, report.paths[&PathId::TCP].bytes), (1, BYTES.into()));
    assert_eq!((report.node.as_deref(), report.epoch, report.version), (Some("b"), Some(Epoch(9)), Some(1)));
    rig.pong();
    assert!(rig.reader.is_idle());
    assert_eq!(rig.reader.next_tick(), None, "nothing to watch for");
    assert_eq!(rig.used(), 0);
}

#[test]
fn nothing_goes_out_before_the_welcome() {
    let mut rig = Rig::new(config());
    assert_eq!(rig.want(1), ["connect"]);
    assert_eq!(rig.want(2), [""; 0]);
    assert_eq!(rig.tell(ReaderEvent::Connected), ["hello"]);
    assert_eq!(rig.want(3), [""; 0]);
    assert_eq!(rig.heard(Answer::Welcome(welcome())), ["open", "want 1 2 3"]);
}

#[test]
fn a_welcome_of_somebody_else_or_another_version_is_not_taken() {
    for (welcome, why) in [
        (Welcome { node: "c".into(), ..welcome() }, "it is called c, not b"),
        (Welcome { version: 2, ..welcome() }, "it speaks version 2, which we did not offer"),
    ] {
        let mut rig = Rig::new(config());
        rig.want(1);
        rig.tell(ReaderEvent::Connected);
        let wanted = [format!("hangup: {why}"), "missed 1 peer_down".into()];
        assert_eq!(rig.heard(Answer::Welcome(welcome)), wanted);
        assert_eq!(rig.reader.report().last_error, Some(("refused", why.into())));
    }
}

#[test]
fn whatever_fails_before_the_welcome_is_a_strike_and_ends_what_waits() {
    let refused = Refused { why: Refusal::Unknown, text: "who?".into() };
    let gone = || ReaderEvent::Disconnected { why: "no route".into() };
    let stories: [(&str, bool, ReaderEvent); 5] = [
        ("unreachable", false, gone()),
        ("unreachable", true, gone()),
        ("refused", true, ReaderEvent::Heard(Answer::Refused(refused))),
        ("rules", true, ReaderEvent::Heard(Answer::Pong(1))),
        ("rules", true, ReaderEvent::Nonsense { why: "magic".into() }),
    ];
    for (strike, connected, event) in stories {
        let mut rig = Rig::new(config());
        rig.want(1);
        if connected {
            rig.tell(ReaderEvent::Connected);
        }
        assert_eq!(rig.tell(event).last().unwrap(), "missed 1 peer_down");
        assert_eq!(rig.reader.report().last_error.unwrap().0, strike);
        assert!(rig.reader.is_idle());
    }
    for connected in [false, true] {
        let mut rig = Rig::new(config());
        rig.want_by(1, Micros(u64::MAX));
        if connected {
            rig.tell(ReaderEvent::Connected);
        }
        let late = rig.later(config().connect_max);
        assert!(late[0].starts_with("hangup") && late[1] == "missed 1 peer_down", "{late:?}");
    }
}

#[test]
fn ten_thousand_wants_are_three_messages() {
    let credits = Credits { wants_max: 20_000, bytes_max: 1 << 40 };
    let mut rig = Rig::up_with(config(), Welcome { credits, ..welcome() });
    let (mut out, deadline) = (Vec::new(), rig.now.after(Duration::from_secs(9)));
    for id in 0..10_000 {
        let (want, key) = (WantId(id), BlockKey([1; 16]));
        let want = ReaderEvent::Want { want, principal: 0, key, deadline, wait: false };
        rig.reader.handle(rig.now, want, &mut out);
    }
    rig.reader.flush(rig.now, &mut out);
    let said: Vec<_> = out.drain(..).filter_map(|command| rig.words(command)).collect();
    assert_eq!(said, ["want 4096 blocks", "want 4096 blocks", "want 1808 blocks"]);
    for id in 0..10_000 {
        rig.reader.handle(rig.now, ReaderEvent::Leave { want: WantId(id) }, &mut out);
    }
    rig.reader.flush(rig.now, &mut out);
    let said: Vec<_> = out.drain(..).filter_map(|command| rig.words(command)).collect();
    assert_eq!(said, ["done 4096", "done 4096", "done 1808"]);
}

#[test]
fn credits_hold_wants_back() {
    let credits = Credits { wants_max: 2, bytes_max: 1 << 30 };
    let mut rig = Rig::up_with(config(), Welcome { credits, ..welcome() });
    assert_eq!((rig.want(1), rig.want(2)), (vec!["want 1".into()], vec!["want 2".into()]));
    assert_eq!((rig.want(3), rig.want(4)), (vec![], vec![]));
    let miss = |id| Answer::Missed(vec![(WantId(id), MissReason::NeverStored)]);
    assert_eq!(rig.heard(miss(1)), ["missed 1 never_stored", "want 3"]);
    rig.heard(Answer::Granted(vec![grant(2)]));
    rig.take(2);
    assert_eq!(rig.read(Ok(())), ["landed 2 by 0", "done 2", "want 4"], "done first");
    let more = Credits { wants_max: 9, bytes_max: u64::from(2 * BYTES) };
    assert_eq!(rig.heard(Answer::Credits(more)), [""; 0]);
    rig.heard(Answer::Granted(vec![grant(3), grant(4)]));
    assert_eq!(rig.want(5), [""; 0], "two blocks are all the bytes");
    assert_eq!(rig.tell(ReaderEvent::Leave { want: WantId(3) }), ["done 3", "want 5"]);
}

#[test]
fn a_want_that_was_left_keeps_its_credit_until_the_owner_can_have_nothing_to_say() {
    let credits = Credits { wants_max: 1, bytes_max: 1 << 30 };
    let mut rig = Rig::up_with(config(), Welcome { credits, ..welcome() });
    rig.pong();
    rig.want(1);
    assert_eq!(rig.want(2), [""; 0]);
    assert_eq!(rig.tell(ReaderEvent::Leave { want: WantId(1) }), ["done 1"]);
    assert_eq!(rig.heard(Answer::Granted(vec![grant(1)])), ["want 2"], "it crossed the end of its want");
    let lie = rig.heard(Answer::Granted(vec![grant(1)]));
    assert_eq!(lie, ["hangup: a grant that nobody asked for", "missed 2 peer_down"]);
    rig.connect(Welcome { credits, ..welcome() });
    rig.pong();
    rig.want(3);
    rig.want(4);
    rig.tell(ReaderEvent::Leave { want: WantId(3) });
    assert_eq!(rig.pong(), ["want 4"]);
    assert_eq!(rig.heard(Answer::Granted(vec![grant(3)]))[0], "hangup: a grant that nobody asked for");
}

#[test]
fn grants_are_not_believed_before_they_are_checked() {
    let table = [
        (vec![grant(7)], "a grant that nobody asked for"),
        (vec![grant(1), grant(1)], "a want granted twice"),
        (vec![Grant { bytes: 0, ..grant(1) }], "a grant of more bytes than a block has, or of none"),
        (
            vec![Grant { bytes: 2 * BYTES + 1, ..grant(1) }],
            "a grant of more bytes than a block has, or of none",
        ),
        (vec![Grant { tier: Tier::Device, ..grant(1) }], "a grant from a tier that serves no peer"),
        (
            vec![Grant { window: Some(Window { path: 9, address: 0, key: 0 }), ..grant(1) }],
            "a window of a path that nobody knows",
        ),
        (
            vec![Grant { window: Some(Window { path: 0, address: 0, key: 0 }), ..grant(1) }],
            "a window of a path that nobody knows",
        ),
        (vec![grant(1), grant(2), grant(3)], "more bytes granted than its credits allow"),
    ];
    for (grants, rule) in table {
        let credits = Credits { wants_max: 9, bytes_max: u64::from(2 * BYTES) };
        let mut rig = Rig::up_with(config(), Welcome { credits, ..welcome() });
        (1..4).for_each(|id| drop(rig.want(id)));
        let words = rig.heard(Answer::Granted(grants));
        let hangup = format!("hangup: {rule}");
        assert!(words.contains(&hangup), "{words:?} instead of {hangup}");
        let missed = words.iter().filter(|word| word.starts_with("missed")).count();
        assert_eq!((missed, rig.reader.report().strikes), (3, 1));
    }
}

#[test]
fn answers_to_what_nobody_asked_break_the_rules() {
    for answer in [
        Answer::Missed(vec![(WantId(7), MissReason::NeverStored)]),
        Answer::Found(Found { id: 77, sights: vec![] }),
        Answer::Taken(Taken { id: 77, taken: 0, left: 0 }),
        Answer::Pong(77),
        Answer::Welcome(welcome()),
        Answer::Refused(Refused { why: Refusal::Full, text: String::new() }),
        Answer::Path(PathEnd { path: 9, words: vec![] }),
    ] {
        let mut rig = Rig::up();
        rig.want(1);
        let words = rig.heard(answer.clone());
        assert!(words[0].starts_with("hangup") && words[1] == "missed 1 peer_down", "{answer:?}: {words:?}");
    }
}

#[test]
fn the_window_is_tried_first_and_tcp_last() {
    let mut rig = Rig::up();
    assert_eq!(rig.reading(windowed(1)), ["read 1 by 1"]);
    assert_eq!(rig.read(Err(path_error())), ["read 1 by 0"]);
    assert_eq!(rig.read(Err(path_error())), ["missed 1 path_failed", "done 1"]);
    assert_eq!(rig.used(), 0);
    rig.tell(ReaderEvent::Path { path: RDMA, up: Err("pulled".into()) });
    assert_eq!(rig.reading(windowed(2)), ["read 2 by 0"]);
}

#[test]
fn a_path_that_keeps_failing_is_left_alone() {
    let mut rig = Rig::up();
    for id in 1..=3 {
        assert_eq!(rig.reading(windowed(id)), [format!("read {id} by 1")]);
        rig.read(Err(path_error()));
        rig.read(Ok(()));
    }
    assert_eq!(rig.reading(windowed(4)), ["read 4 by 0"]);
    let PathState::Down { why } = &rig.reader.report().paths[&RDMA].state else { panic!("it is used") };
    assert!(why.contains("3 failed reads"), "{why}");
}

#[test]
fn what_a_failed_read_means() {
    type Story = (&'static str, fn() -> LinkError, &'static [&'static str], u64);
    let table: [Story; 4] = [
        ("gone", || LinkError::Gone, &["missed 1 peer_evicted", "done 1"], 0),
        ("corrupt", || LinkError::Corrupt, &["read 1 by 0"], 1),
        ("rules", || LinkError::Protocol { what: "order" }, &["read 1 by 0"], 1),
        ("cannot", || LinkError::Unsupported { what: "length".into() }, &["read 1 by 0"], 0),
    ];
    for (name, error, wanted, strikes) in table {
        let mut rig = Rig::up();
        rig.reading(windowed(1));
        assert_eq!(rig.read(Err(error())), wanted, "{name}");
        assert_eq!(rig.reader.report().strikes, strikes, "{name}");
    }
    let mut rig = Rig::up();
    rig.reading(windowed(1));
    rig.read(Err(LinkError::Corrupt));
    assert_eq!(rig.read(Err(LinkError::Corrupt)), ["missed 1 corrupt", "done 1"]);
    rig.reading(grant(2));
    assert_eq!(rig.read(Err(LinkError::Corrupt)), ["missed 2 corrupt", "done 2"]);
}

#[test]
fn a_slot_that_is_too_short_is_no_use() {
    let mut rig = Rig::up();
    rig.want(1);
    rig.heard(Answer::Granted(vec![Grant { bytes: BYTES + 1, ..grant(1) }]));
    assert_eq!(rig.take(1), ["missed 1 overloaded", "done 1"]);
}

#[test]
fn a_taken_block_waits_for_tcp_to_come_up() {
    let mut rig = Rig::new(config());
    rig.want(1);
    rig.tell(ReaderEvent::Connected);
    rig.heard(Answer::Welcome(welcome()));
    rig.heard(Answer::Granted(vec![grant(1)]));
    assert_eq!(rig.take(1), [""; 0]);
    assert_eq!(rig.tell(ReaderEvent::Path { path: PathId::TCP, up: Ok(()) }), ["read 1 by 0"]);
}

#[test]
fn without_tcp_a_connection_is_no_use() {
    let lost = || ReaderEvent::Path { path: PathId::TCP, up: Err("refused".into()) };
    let mut rig = Rig::up();
    assert_eq!(rig.tell(lost()), ["hangup: no path carries anything: refused"]);
    assert_eq!(rig.reader.report().strikes, 0, "nothing was wanted of it");
    rig.connect(welcome());
    rig.reading(grant(1));
    let ended = ["hangup: no path carries anything: refused", "cancel by 0", "missed 1 peer_down"];
    assert_eq!(rig.tell(lost()), ended);
    assert_eq!(rig.reader.report().strikes, 1);
}

#[test]
fn reads_that_bring_nothing_are_strikes_in_the_end() {
    let soon = config().ping_every;
    // They fail: those of one moment count once.
    let mut rig = Rig::up();
    for (strikes, pause) in [(1, soon), (2, Duration::ZERO), (2, soon)] {
        rig.reading(grant(1));
        assert_eq!(rig.read(Err(path_error())), ["missed 1 path_failed", "done 1"]);
        assert_eq!(rig.reader.report().strikes, strikes);
        rig.later(pause);
    }
    rig.reading(grant(1));
    let third = rig.read(Err(path_error()));
    assert_eq!(third, ["missed 1 path_failed", "hangup: pulled"], "paths like these are not kept");
    // They do not end: only when nothing else comes either.
    let mut rig = Rig::up();
    for (id, lands) in [(1, true), (3, false)] {
        rig.want_by(id, rig.now.after(Duration::from_secs(3)));
        rig.heard(Answer::Granted(vec![grant(id)]));
        rig.take(id);
        if lands {
            rig.reading(grant(2));
            rig.reads.swap(0, 1);
            assert_eq!(rig.read(Ok(())), ["landed 2 by 0", "done 2"]);
        }
        for _ in 0..3 {
            rig.later(Duration::from_secs(1));
            rig.pong();
        }
        rig.read(Err(LinkError::Cancelled));
        assert_eq!(rig.reader.report().strikes, u64::from(!lands));
    }
}

#[test]
fn a_deadline_ends_a_want_in_every_stage() {
    let second = Duration::from_secs(1);
    let mut rig = Rig::new(config());
    rig.want(1);
    assert_eq!(rig.later(second), ["missed 1 tier_timeout"], "while connecting");
    let mut rig = Rig::up();
    rig.want(1);
    assert_eq!(rig.later(second), ["missed 1 tier_timeout", "done 1"]);
    rig.pong();
    rig.want(2);
    rig.heard(Answer::Granted(vec![grant(2)]));
    assert_eq!(rig.later(second), ["missed 2 tier_timeout", "done 2"]);
    assert_eq!(rig.take(2), [""; 0], "the slot came too late");
    rig.pong();
    assert_eq!(rig.reading(grant(3)), ["read 3 by 0"]);
    assert_eq!(rig.later(second), ["cancel by 0", "missed 3 tier_timeout"]);
    assert_eq!(rig.used(), 1);
    assert_eq!(rig.read(Ok(())), ["done 3"], "nobody waits for it, and now the owner may have it back");
    assert_eq!(rig.used(), 0);
    assert_eq!(rig.want_by(4, rig.now), ["missed 4 tier_timeout"]);
}

#[test]
fn who_leaves_hears_no_more_even_at_the_deadline() {
    let mut rig = Rig::up();
    rig.want(1);
    rig.now = rig.now.after(Duration::from_secs(1));
    assert_eq!(rig.tell(ReaderEvent::Leave { want: WantId(1) }), ["done 1"]);
}

#[test]
fn a_device_that_keeps_a_cancelled_read_costs_the_connection() {
    let mut rig = Rig::up();
    rig.reading(grant(1));
    rig.later(Duration::from_secs(1));
    rig.pong();
    let stuck = rig.later(config().cancel_max);
    assert_eq!(stuck, ["hangup: path 0 keeps a read that was cancelled"]);
    rig.read(Err(LinkError::Cancelled));
    assert!(rig.reader.is_idle());
}

#[test]
fn a_lost_connection_ends_everything_but_bytes_on_their_way_by_tcp() {
    let mut rig = Rig::up();
    rig.reading(grant(1));
    rig.reading(windowed(2));
    rig.want(3);
    rig.heard(Answer::Granted(vec![grant(3)]));
    rig.want(4);
    rig.probe(5, 1);
    let lost = rig.tell(ReaderEvent::Disconnected { why: "reset".into() });
    let wanted =
        ["cancel by 1", "missed 2 peer_down", "missed 3 peer_down", "missed 4 peer_down", "probed 5 none"];
    assert_eq!(lost, wanted);
    assert_eq!(rig.read(Ok(())), ["landed 1 by 0"]);
    assert_eq!(rig.read(Err(LinkError::Cancelled)), [""; 0]);
    assert!(rig.reader.is_idle());
    assert_eq!(rig.used(), 0);
}

#[test]
fn a_new_life_of_the_owner_ends_what_the_last_one_granted() {
    for (epoch, wanted) in [(9, vec!["open"]), (10, vec!["cancel by 0", "missed 1 peer_down", "open"])] {
        let mut rig = Rig::up();
        rig.reading(grant(1));
        rig.tell(ReaderEvent::Disconnected { why: "reset".into() });
        rig.probe(1, 1);
        rig.tell(ReaderEvent::Connected);
        let words = rig.heard(Answer::Welcome(Welcome { epoch: Epoch(epoch), ..welcome() }));
        assert_eq!(words[..words.len() - 1], wanted, "{words:?}");
    }
}

#[test]
fn silence_is_noticed_while_something_is_owed() {
    let mut rig = Rig::up();
    rig.pong();
    assert_eq!(rig.later(Duration::from_secs(100)), [""; 0], "nothing is owed");
    rig.want_by(1, Micros(u64::MAX));
    let ping = rig.last_ping;
    for _ in 0..10 {
        assert_eq!(rig.later(Duration::from_secs(1)), [""; 0]);
        assert_eq!(rig.pong(), [""; 0]);
    }
    assert!(rig.last_ping > ping);
    assert_eq!(rig.reader.report().rtt, Some(Duration::from_secs(1)));
    rig.later(Duration::from_secs(1));
    assert_eq!(rig.later(Duration::from_secs(1)), ["hangup: it said nothing for 2s", "missed 1 peer_down"]);
}

#[test]
fn words_are_no_answer_to_a_ping() {
    let mut rig = Rig::up();
    rig.want_by(1, rig.now.after(Duration::from_secs(9)));
    let credits = || Answer::Credits(welcome().credits);
    for _ in 0..3 {
        rig.later(Duration::from_secs(1));
        assert_eq!(rig.heard(credits()), [""; 0]);
    }
    let silent = rig.later(Duration::from_secs(1));
    assert_eq!(silent, ["hangup: it talked, and answered no ping for 4s", "missed 1 peer_down"]);
}

#[test]
fn a_peer_that_answers_pings_and_no_want_is_left_alone_until_it_answers_one() {
    let mut rig = Rig::up();
    let mut id = 0;
    // A second in which what was wanted runs out, and every ping is answered.
    let second = |rig: &mut Rig| {
        let said = rig.later(Duration::from_secs(1));
        if let Stage::Up(Session { ping: Some(_), .. }) = rig.reader.stage {
            rig.pong();
        }
        said
    };
    while rig.reader.report().circuit == Circuit::Closed {
        id += 1;
        rig.want(id);
        assert_eq!(second(&mut rig), [format!("missed {id} tier_timeout"), format!("done {id}")]);
        assert!(id < 20, "{:?}", rig.reader.report());
    }
    assert_eq!((id, rig.reader.report().strikes), (7, 3), "one for each two seconds without an answer");
    second(&mut rig);
    assert_eq!(rig.want(30), ["want 30"], "one is let through");
    assert_eq!(rig.want(31), ["missed 31 peer_down"]);
    second(&mut rig);
    assert!(matches!(rig.reader.report().circuit, Circuit::Open { .. }), "a pong proves nothing");
    second(&mut rig);
    second(&mut rig);
    assert_eq!(rig.want(32), ["want 32"]);
    rig.heard(Answer::Missed(vec![(WantId(32), MissReason::NeverStored)]));
    assert_eq!(rig.reader.report().circuit, Circuit::Closed);
}

#[test]
fn a_want_that_is_answered_in_time_makes_up_for_those_that_were_not() {
    let mut rig = Rig::up();
    for id in (0..40).step_by(2) {
        rig.want_by(id, rig.now.after(Duration::from_secs(1)));
        rig.pong();
        rig.later(Duration::from_secs(1));
        rig.want(id + 1);
        rig.heard(Answer::Missed(vec![(WantId(id + 1), MissReason::NotComplete)]));
    }
    assert_eq!(rig.reader.report().strikes, 0);
}

#[test]
fn an_open_circuit_misses_at_once_and_lets_one_through_later() {
    let mut rig = Rig::new(config());
    for id in 0..3 {
        assert_eq!(rig.want(id), ["connect"]);
        rig.tell(ReaderEvent::Disconnected { why: "no route".into() });
    }
    let Circuit::Open { until } = rig.reader.report().circuit else { panic!("it is closed") };
    assert_eq!(rig.want(3), ["missed 3 peer_down"]);
    assert_eq!(rig.probe(4, 1), ["probed 4 none"]);
    rig.now = until;
    assert_eq!(rig.want(5), ["connect"]);
    assert_eq!(rig.want(6), ["missed 6 peer_down"], "one at a time");
    rig.tell(ReaderEvent::Connected);
    rig.heard(Answer::Welcome(welcome()));
    assert_eq!(rig.reader.report().circuit, Circuit::Closed);
    assert_eq!(rig.want(7), ["want 7"]);
}

#[test]
fn an_open_circuit_is_tried_though_nothing_is_wanted() {
    let mut rig = Rig::new(config());
    for id in 0..3 {
        assert_eq!(rig.want(id), ["connect"]);
        rig.tell(ReaderEvent::Disconnected { why: "no route".into() });
    }
    let Circuit::Open { until } = rig.reader.report().circuit else { panic!("it is closed") };
    assert_eq!(rig.reader.next_tick(), Some(until));
    rig.now = until;
    assert_eq!(rig.tell(ReaderEvent::Tick), ["connect"]);
    rig.tell(ReaderEvent::Disconnected { why: "no route".into() });
    let Circuit::Open { until: later } = rig.reader.report().circuit else { panic!("it is closed") };
    assert!(later > until && rig.reader.next_tick() == Some(later));
    rig.now = later;
    assert_eq!(rig.tell(ReaderEvent::Tick), ["connect"]);
    rig.tell(ReaderEvent::Connected);
    rig.heard(Answer::Welcome(welcome()));
    assert_eq!(rig.reader.report().circuit, Circuit::Closed);
    rig.pong();
    assert!(rig.reader.is_idle());
}

#[test]
fn a_circuit_that_damage_opened_is_closed_by_good_bytes_alone() {
    let mut rig = Rig::up();
    for id in 1..=3 {
        rig.reading(grant(id));
        rig.read(Err(LinkError::Corrupt));
    }
    let Circuit::Open { until } = rig.reader.report().circuit else { panic!("it is closed") };
    rig.now = until;
    assert_eq!(rig.want(4), ["want 4"]);
    assert_eq!(rig.want(5), ["missed 5 peer_down"]);
    rig.heard(Answer::Missed(vec![(WantId(4), MissReason::NeverStored)]));
    assert_eq!(rig.reader.report().circuit, Circuit::Trying, "that proved nothing");
    rig.reading(grant(6));
    rig.read(Ok(()));
    assert_eq!(rig.reader.report().circuit, Circuit::Closed);
}

#[test]
fn probes_and_offers_are_answered_once() {
    let mut rig = Rig::up();
    rig.probe(40, 2);
    let asked = *rig.reader.questions.keys().next().unwrap();
    let found = |id, count| Answer::Found(Found { id, sights: vec![Sight::Absent; count] });
    assert_eq!(rig.heard(found(asked, 2)), ["probed 40 found"]);
    rig.probe(41, 2);
    let asked = *rig.reader.questions.keys().next().unwrap();
    assert_eq!(rig.later(Duration::from_secs(1)), ["probed 41 none"]);
    assert_eq!(rig.heard(found(asked, 2)), [""; 0], "too late");
    rig.probe(42, 2);
    let asked = *rig.reader.questions.keys().next().unwrap();
    let lie = rig.heard(found(asked, 3));
    assert_eq!(lie, ["hangup: a probe answered with another number of blocks", "probed 42 none"]);
    rig.connect(welcome());
    let deadline = rig.now.after(Duration::from_secs(1));
    let offer = Offer { id: 50, principal: 0, binding: vec![], keys: vec![BlockKey([1; 16]); 3] };
    assert_eq!(rig.tell(ReaderEvent::Offer { offer, deadline }), ["ask offer"]);
    let id = *rig.reader.questions.keys().next().unwrap();
    assert_eq!(rig.heard(Answer::Taken(Taken { id, taken: 2, left: 1 })), ["taken 50 2"]);
}

#[test]
fn a_question_that_is_never_answered_ends_the_connection() {
    let mut rig = Rig::up();
    rig.probe(40, 1);
    assert_eq!(rig.later(Duration::from_secs(1)), ["probed 40 none"]);
    rig.pong();
    rig.later(Duration::from_secs(1));
    rig.pong();
    let silent = rig.later(Duration::from_secs(1));
    assert_eq!(silent, ["hangup: it left a question unanswered for 2s"]);
    let report = rig.reader.report();
    assert_eq!((report.strikes, report.questions), (1, 0));
}

#[test]
fn questions_are_bounded() {
    let mut rig = Rig::up();
    for probe in 0..PROBES_MAX as u64 {
        assert_eq!(rig.probe(probe, 1).len(), 1);
    }
    assert_eq!(rig.probe(99, 1), ["probed 99 none"]);
    let deadline = rig.now.after(Duration::from_secs(1));
    let offer = |id| Offer { id, principal: 0, binding: vec![], keys: vec![] };
    for id in 0..OFFERS_MAX as u64 {
        assert_eq!(rig.tell(ReaderEvent::Offer { offer: offer(id), deadline }), ["ask offer"]);
    }
    assert_eq!(rig.tell(ReaderEvent::Offer { offer: offer(99), deadline }), ["taken 99 none"]);
    assert_eq!(Rig::up().probe(1, 4097), ["probed 1 none"]);
}

#[test]
fn an_owner_that_leaves_is_noted_and_still_asked() {
    let mut rig = Rig::up();
    rig.heard(Answer::Leaving);
    assert!(rig.reader.report().leaving && rig.reader.is_leaving());
    assert_eq!(rig.want(1), ["want 1"]);
    rig.heard(Answer::Staying);
    assert!(!rig.reader.is_leaving());
}

#[test]
fn ends_of_paths_are_passed_on() {
    let mut rig = Rig::up();
    let end = PathEnd { path: 1, words: vec![1, 2] };
    assert_eq!(rig.tell(ReaderEvent::Reach(end.clone())), ["say path"]);
    assert_eq!(rig.heard(Answer::Path(end)), ["join"]);
}
