//! What a shard says to its exchange crosses what the exchange says to the shard.

use kv_arena::{Geometry, ShardMemory};
use kv_block::{BindingTag, BlockKey, Checksum, Epoch, Priority, ShardId, Tier};
use kv_node::{
    Exchange, ExchangeCommand, ExchangeConfig, ExchangeEvent, FetchDone, FetchOp, FetchToken, OfferToken,
    PeerId,
};
use kv_transport::Micros;
use kv_transport::reader::{PathId, ReaderCommand, ReaderConfig, ReaderEvent};
use kv_wire::message::{Answer, Ask, Credits, Found, Grant, Sight, Welcome};

const BYTES: u32 = 4096;
const NOW: Micros = Micros(1_000_000);
const FAR: Micros = Micros(9_000_000);

/// An exchange with two peers that have every block.
struct Pair {
    exchange: Exchange,
    dead: Option<PeerId>,
    /// What the shard was told.
    told: Vec<FetchDone>,
    /// Reads so far, by peer.
    reads: Vec<PeerId>,
}

impl Pair {
    fn new() -> Self {
        let reader = |n| ReaderConfig {
            node: "me".into(),
            principals: vec!["default".into()],
            peer: format!("n{n}"),
            block_bytes_max: BYTES,
            ..ReaderConfig::default()
        };
        let config = ExchangeConfig { principals: vec![0], probe_peers_max: 8, probe_limit: 500_000 };
        let exchange = Exchange::new(config, vec![reader(0), reader(1)]);
        Self { exchange, dead: None, told: Vec::new(), reads: Vec::new() }
    }

    fn ask(&mut self, op: FetchOp) {
        self.handle(vec![ExchangeEvent::Fetch { shard: ShardId(0), op, deadline: FAR }]);
    }

    /// Peers answer at once, but for one that is dead.
    fn handle(&mut self, mut events: Vec<ExchangeEvent>) {
        let mut out = Vec::new();
        loop {
            for event in std::mem::take(&mut events) {
                self.exchange.handle(NOW, event, &mut out);
            }
            self.exchange.flush(NOW, &mut out);
            if out.is_empty() {
                return;
            }
            for command in std::mem::take(&mut out) {
                match command {
                    ExchangeCommand::Shard { done, .. } => self.told.push(done),
                    ExchangeCommand::Peer { peer, command } => {
                        let answers = self.answers(peer, command);
                        events.extend(answers.into_iter().map(|event| ExchangeEvent::Peer { peer, event }));
                    }
                    ExchangeCommand::Located { .. } | ExchangeCommand::Offered { .. } => {}
                }
            }
        }
    }

    fn answers(&mut self, peer: PeerId, command: ReaderCommand) -> Vec<ReaderEvent> {
        let heard = |answer| vec![ReaderEvent::Heard(answer)];
        match command {
            ReaderCommand::Connect if self.dead == Some(peer) => {
                vec![ReaderEvent::Disconnected { why: "dead".into() }]
            }
            ReaderCommand::Connect => vec![ReaderEvent::Connected],
            ReaderCommand::Say(Ask::Hello(_)) => heard(Answer::Welcome(Welcome {
                version: 1,
                node: format!("n{}", peer.0),
                epoch: Epoch(1),
                session: 1,
                credits: Credits { wants_max: 64, bytes_max: 1 << 30 },
                leaving: false,
                facts: Vec::new(),
            })),
            ReaderCommand::Open { .. } => vec![ReaderEvent::Path { path: PathId::TCP, up: Ok(()) }],
            ReaderCommand::Say(Ask::Want(wants)) => heard(Answer::Granted(
                wants
                    .iter()
                    .map(|want| Grant {
                        id: want.id,
                        checksum: Checksum(1),
                        bytes: BYTES,
                        tag: BindingTag(1),
                        priority: Priority::Normal,
                        ttl_s: 0,
                        tier: Tier::Host,
                        window: None,
                    })
                    .collect(),
            )),
            ReaderCommand::Say(Ask::Probe(probe)) => {
                let sights = probe.keys.iter().map(|_| Sight::In(Tier::Host)).collect();
                heard(Answer::Found(Found { id: probe.id, sights }))
            }
            ReaderCommand::Say(Ask::Ping(number)) => heard(Answer::Pong(number)),
            ReaderCommand::Read { read, into, .. } => {
                self.reads.push(peer);
                vec![ReaderEvent::Read { read, into, result: Ok(()) }]
            }
            _ => Vec::new(),
        }
    }

    fn offered(&mut self) -> OfferToken {
        match self.told.pop() {
            Some(FetchDone::Offered { offer, .. }) => offer,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_slot_for_an_offer_that_is_over_is_not_used_for_the_next_one() {
    let geometry = Geometry { regions: 1, region_bytes: 2 << 20, table_entries_max: 8 };
    let memory = ShardMemory::anonymous(geometry).unwrap();
    let used = || memory.slab().usage().classes.iter().map(|class| class.slots - class.free).sum::<u32>();
    let mut pair = Pair::new();
    let fetch = FetchToken(7);
    pair.ask(FetchOp::Find { fetch, key: BlockKey([1; 16]), hint: None, deadline: kv_node::Micros(0) });
    let first = pair.offered();
    // The shard answers; before that is heard, the peer dies, and the other one offers.
    pair.dead = Some(PeerId(0));
    let gone = ReaderEvent::Disconnected { why: "dead".into() };
    pair.handle(vec![ExchangeEvent::Peer { peer: PeerId(0), event: gone }]);
    let second = pair.offered();
    assert_ne!(first, second);
    let into = memory.slab().take(BYTES).unwrap();
    pair.ask(FetchOp::Into { fetch, offer: first, into });
    assert!(pair.reads.is_empty() && pair.told.is_empty(), "nothing is read for an offer that is over");
    assert_eq!(used(), 0, "and the slot is free");
    let reason = kv_block::MissReason::ScopeDiffers;
    pair.ask(FetchOp::Decline { fetch, offer: first, reason });
    assert!(pair.told.is_empty(), "nor is the next one declined with it");
    let into = memory.slab().take(BYTES).unwrap();
    pair.ask(FetchOp::Into { fetch, offer: second, into });
    assert_eq!(pair.reads, [PeerId(1)]);
    assert!(matches!(pair.told.pop(), Some(FetchDone::Landed { .. })));
    assert!(pair.exchange.is_idle());
}
