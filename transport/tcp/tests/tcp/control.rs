//! Control connections.

use kv_block::BlockKey;
use kv_tcp::{Accepted, End};
use kv_wire::frame::ITEMS_MAX;
use kv_wire::message::{Answer, Ask, Want, WantId};
use tokio::sync::mpsc;

use crate::support::{Authority, Bare, Nodes, block_on, hello, patient};

fn wants(first: u64, count: usize) -> Ask {
    let want = |at| Want {
        id: WantId(first + at),
        principal: 0,
        wait_ms: 5,
        key: BlockKey::from_halves([first, at]),
    };
    Ask::Want((0..count as u64).map(want).collect())
}

#[test]
fn both_sides_are_heard_in_order() {
    Nodes::each(&patient(), |mut nodes| {
        let (mut says, mut hears, Accepted { hello: said, control }) = nodes.control();
        assert_eq!(said, hello());
        assert!(control.identity().carries("reader"));
        let (mut answers, mut asks) = control.split();
        let all: Vec<Ask> = (0..40).flat_map(|at| [wants(at << 20, ITEMS_MAX), Ask::Ping(at)]).collect();
        let (sent, told) = (all.clone(), (0..100).map(Answer::Pong).collect::<Vec<_>>());
        let answered = told.clone();
        block_on(&nodes.runtime, async move {
            // Both directions at once: 5 MiB of wants are more than the sockets take.
            let saying = tokio::spawn(async move { (says.say(&sent).await, says) });
            let answering = tokio::spawn(async move { (answers.say(&answered).await, answers) });
            for ask in &all {
                assert_eq!(asks.hear().await.unwrap(), *ask);
            }
            for answer in &told {
                assert_eq!(hears.hear().await.unwrap(), *answer);
            }
            assert!(asks.hear_more().unwrap().is_none());
            let (said, says) = saying.await.unwrap();
            said.unwrap();
            let (said, answers) = answering.await.unwrap();
            said.unwrap();
            drop((says, hears));
            assert!(matches!(asks.hear().await, Err(End::Closed | End::Io(_))));
            drop(answers);
        });
    });
}

#[test]
fn a_queue_is_drained_and_then_closed() {
    Nodes::each(&patient(), |mut nodes| {
        let (says, _hears, Accepted { control, .. }) = nodes.control();
        let (_answers, mut asks) = control.split();
        block_on(&nodes.runtime, async move {
            let (queue, queued) = mpsc::channel(1000);
            for at in 0..1000 {
                queue.try_send(Ask::Ping(at)).unwrap();
            }
            drop(queue);
            says.drain(queued).await.unwrap();
            for at in 0..1000 {
                assert_eq!(asks.hear().await.unwrap(), Ask::Ping(at));
            }
            assert!(matches!(asks.hear().await, Err(End::Closed)));
        });
    });
}

#[test]
fn nonsense_and_half_a_message_are_told_apart() {
    let mut nodes = Nodes::plain(patient());
    for (bytes, nonsense) in [(&b"GET / HTTP/1.1\r\n\r\n"[..], true), (b"kv", false)] {
        let mut bare = Bare::dial(nodes.address());
        bare.say(&Ask::Hello(hello()));
        bare.send(bytes);
        drop(bare);
        let end = block_on(&nodes.runtime, async {
            let (_answers, mut asks) = nodes.accepted.recv().await.unwrap().control.split();
            asks.hear().await.unwrap_err()
        });
        assert_eq!(matches!(end, End::Nonsense(_)), nonsense, "{end:?}");
        assert_eq!(matches!(end, End::Io(_)), !nonsense, "{end:?}");
    }
}

#[test]
fn what_a_reader_says_is_not_what_an_owner_says() {
    let mut nodes = Nodes::plain(patient());
    let mut bare = Bare::dial(nodes.address());
    bare.say(&Ask::Hello(hello()));
    bare.say(&Answer::Pong(1));
    let end = block_on(&nodes.runtime, async {
        let (_answers, mut asks) = nodes.accepted.recv().await.unwrap().control.split();
        asks.hear().await.unwrap_err()
    });
    assert!(matches!(end, End::Nonsense(_)), "{end:?}");
}

#[test]
fn a_node_that_is_not_there_is_named() {
    let authority = Authority::new("ours");
    let nodes = Nodes::new(authority.node("owner"), authority.node("reader"), patient());
    let address = nodes.address().to_string();
    let dialer = nodes.dialer.clone();
    let Nodes { runtime, listener, .. } = nodes;
    drop(listener);
    block_on(&runtime, async {
        let refused = dialer.control(&address, "owner").await.unwrap_err();
        assert!(refused.to_string().contains(&address), "{refused}");
        let unnamed = dialer.control(&address, "no name at all").await.unwrap_err();
        assert!(unnamed.to_string().contains("no name at all"), "{unnamed}");
    });
}
