//! A real daemon among peers that break the rules: what it is sent, and what it is asked.

#[path = "support/fake_owner.rs"]
mod fake_owner;
mod support;

use std::time::{Duration, Instant};

use fake_owner::Manner::*;
use fake_owner::{FakeOwner, Manner};
use kv_api::v1::MissReason::{self, *};
use support::among::{get, peer, room_for_blocks, until, until_nothing_is_left};
use support::{Door, Home, scope, slice};

const BLOCK: u32 = 64 << 10;
/// More than the daemon has room for.
const PUT: u64 = 300;

/// What becomes of a peer that behaves so.
struct Row {
    manner: Manner,
    /// What callers are told, beside that it is down or that their time is over.
    missed: &'static [MissReason],
    fate: Fate,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is struck until nobody is let wait for it.
    Down,
    /// It broke no rule: it just has nothing for us.
    Up,
    /// Blocks come nevertheless.
    Served,
}

const fn down(manner: Manner, missed: &'static [MissReason]) -> Row {
    Row { manner, missed, fate: Fate::Down }
}

const fn up(manner: Manner, missed: &'static [MissReason]) -> Row {
    Row { manner, missed, fate: Fate::Up }
}

/// So many fakes, and the home of a daemon that fetches from them.
fn among_fakes(story: &str, count: usize) -> (Vec<FakeOwner>, Home) {
    let tag = scope("t").id().binding_tag(&slice(), BLOCK);
    let fakes: Vec<_> = (0..count).map(|at| FakeOwner::start(&format!("fake-{at}"), tag, BLOCK)).collect();
    let member = |(at, fake): (usize, &FakeOwner)| format!("fake-{at}={}", fake.address);
    let members: Vec<String> = fakes.iter().enumerate().map(member).collect();
    let home = Home::sized(story, "16MiB", None)
        .set("node.name=reader")
        .set("peers.fetch_limit=3s")
        .set(&format!("peers.members={}", members.join(",")));
    (fakes, home)
}

/// A daemon that fetches from a fake for each row, and the fakes. Each row is told at once.
fn against(story: &str, rows: &[Row], hinted: bool) {
    let (fakes, home) = among_fakes(story, rows.len());
    let home = home.set(&format!("peers.probe_peers_max={}", if hinted { 0 } else { 16 }));
    let mut daemon = home.start();
    let door = Door::of(&home);
    let room = room_for_blocks(&door, BLOCK, PUT);
    std::thread::scope(|threads| {
        for (at, (row, fake)) in rows.iter().zip(&fakes).enumerate() {
            let home = &home;
            threads.spawn(move || {
                let told = std::panic::AssertUnwindSafe(|| tell(&Door::of(home), at, row, fake, hinted));
                if let Err(panic) = std::panic::catch_unwind(told) {
                    eprintln!("in the story of {:?}", row.manner);
                    std::panic::resume_unwind(panic);
                }
            });
        }
    });
    let names: Vec<String> = (0..rows.len()).map(|at| format!("fake-{at}")).collect();
    until_nothing_is_left(&door, &names.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(room_for_blocks(&door, BLOCK, PUT), room, "memory stays with somebody");
    assert!(daemon.is_alive());
}

/// One peer: it can serve, it does not, it does again.
fn tell(door: &Door, at: usize, row: &Row, fake: &FakeOwner, hinted: bool) {
    let binding = door.register(&scope("t"), BLOCK);
    let name = format!("fake-{at}");
    let hint = if hinted { name.as_str() } else { "" };
    let mut number = 10_000 * at as u64;
    let mut next = |wait_ms| {
        number += 1;
        get(door, binding, number, wait_ms, hint)
    };
    until("it can serve", || next(2_000).0.ok());
    let before = peer(door, &name).strikes;
    assert_eq!(before, 0);

    fake.behave(row.manner);
    fake.hang_up();
    let limit = Instant::now() + Duration::from_secs(20);
    let mut tried = 0;
    loop {
        tried += 1;
        let (got, _) = next([150, 400, 1_000][tried % 3]);
        match got {
            Ok(()) => assert!(row.fate == Fate::Served, "a block came"),
            Err(PeerDown | TierTimeout) => {}
            Err(reason) => assert!(row.missed.contains(&reason), "missed for {reason:?}, try {tried}"),
        }
        let state = peer(door, &name);
        if row.fate == Fate::Down {
            assert!(Instant::now() < limit, "still {state:?} after {tried} tries");
            if state.state == "down" && state.retry_ms > 250 {
                assert!(state.strikes >= 3, "{state:?}");
                let (got, took) = next(3_000);
                assert!(got == Err(PeerDown) && took < Duration::from_secs(2), "{got:?} after {took:?}");
                break;
            }
        } else if tried == 8 {
            assert_ne!(state.state, "down", "{state:?}");
            break;
        }
    }

    fake.behave(Honest);
    until("it is found again", || next(1_000).0.ok());
    assert_eq!(peer(door, &name).state, "up");
}

#[test]
fn a_peer_that_greets_badly_is_left_alone_until_it_greets_well() {
    const LOST: &[MissReason] = &[];
    against(
        "greets",
        &[
            down(HangsUpAtOnce, LOST),
            down(SilentAfterHello, LOST),
            down(HangsUpAfterHello, LOST),
            down(Refuses, LOST),
            down(AnotherName, LOST),
            down(AnotherVersion, LOST),
            down(Garbage, LOST),
            down(EndlessHeader, LOST),
            down(WrongFrameChecksum, LOST),
            down(GrantsBeforeWelcome, LOST),
        ],
        true,
    );
}

#[test]
fn a_peer_that_grants_badly_is_left_alone_until_it_grants_well() {
    const LOST: &[MissReason] = &[];
    against(
        "grants",
        &[
            down(SilentAfterWant, LOST),
            down(HangsUpOnWant, LOST),
            down(HalfAGrant, LOST),
            down(NeverGrants, LOST),
            down(GrantsUnasked, LOST),
            down(GrantsTwice, LOST),
            down(GrantsNothing, LOST),
            down(GrantsTooMuch, LOST),
            up(GrantsHalf, &[ScopeDiffers]),
            up(GrantsAnotherTag, &[ScopeDiffers]),
            down(GrantsAnotherBlock, &[Corrupt]),
            down(GrantsFromDevice, LOST),
            down(GrantsByWindow, LOST),
            down(MissesUnasked, LOST),
            down(WelcomesTwice, LOST),
            down(PongsUnasked, LOST),
            Row { manner: NeverPongs, missed: LOST, fate: Fate::Served },
            down(NoCredits, LOST),
        ],
        true,
    );
}

#[test]
fn a_peer_that_sends_badly_is_left_alone_until_it_sends_well() {
    const LOST: &[MissReason] = &[PathFailed];
    against(
        "sends",
        &[
            down(HangsUpOnJoin, LOST),
            down(RefusesJoin, LOST),
            down(SilentOnJoin, LOST),
            down(HangsUpAfterJoin, LOST),
            down(SilentAfterRead, LOST),
            down(HangsUpOnRead, LOST),
            down(WrongBytes, &[Corrupt]),
            down(TooShort, &[Corrupt]),
            // Its connections go, and another may not stand yet.
            down(TooLong, &[Corrupt, PathFailed]),
            down(AnotherRead, LOST),
            down(GarbageForData, LOST),
            down(SilentInBlock, LOST),
            down(HangsUpInBlock, LOST),
            down(Trickles, LOST),
            Row { manner: GoesOnBehindBlock, missed: LOST, fate: Fate::Served },
            up(SaysGone, &[PeerEvicted]),
        ],
        true,
    );
}

#[test]
fn a_peer_that_finds_badly_is_left_alone_until_it_finds_well() {
    for manner in [FindsTooFew, FindsTooMany, FindsUnasked, NeverFinds] {
        against("finds", &[down(manner, &[NeverStored])], false);
    }
}

#[test]
fn a_liar_among_honest_peers_costs_no_block() {
    let (fakes, home) = among_fakes("honest", 2);
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("t"), BLOCK);
    let mut number = 0;
    for manner in [
        GrantsAnotherTag,
        GrantsHalf,
        GrantsUnasked,
        GrantsAnotherBlock,
        WrongBytes,
        TooShort,
        HangsUpInBlock,
        SaysGone,
        FindsTooFew,
        HangsUpOnWant,
    ] {
        fakes[0].behave(manner);
        for _ in 0..10 {
            number += 1;
            assert_eq!(get(&door, binding, number, 3_000, "").0, Ok(()), "{manner:?}");
        }
    }
    assert!(peer(&door, "fake-0").strikes > 0);
    assert_eq!(peer(&door, "fake-1").strikes, 0);
}

#[test]
fn a_peer_that_talks_for_ever_holds_up_nobody() {
    let (fakes, home) = among_fakes("talks", 3);
    // Only who is named is asked.
    let home = home.set("peers.probe_peers_max=0");
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("t"), BLOCK);
    fakes[0].behave(SaysLeavingForEver);
    fakes[1].behave(GrantsUnaskedForEver);
    let mut number = 0;
    until("both are left alone", || {
        number += 10;
        // Makes them begin, and again when they were hung up on.
        for (at, talker) in ["fake-0", "fake-1"].into_iter().enumerate() {
            let (got, _) = get(&door, binding, number + at as u64, 300, talker);
            assert!(got.is_err(), "{got:?}");
        }
        assert_eq!(get(&door, binding, number + 2, 2_000, "fake-2").0, Ok(()));
        let strikes = ["fake-0", "fake-1"].map(|node| peer(&door, node).strikes);
        (strikes[0] >= 3 && strikes[1] >= 3).then_some(())
    });
    assert_eq!(peer(&door, "fake-2").blocks_in, number / 10);
    until_nothing_is_left(&door, &["fake-0", "fake-1", "fake-2"]);
}

#[test]
fn data_connections_that_are_closed_again_are_made_again_with_pauses() {
    let (fakes, home) = among_fakes("pauses", 1);
    let _daemon = home.start();
    let door = Door::of(&home);
    let binding = door.register(&scope("t"), BLOCK);
    assert_eq!(get(&door, binding, 1, 2_000, "fake-0").0, Ok(()));
    fakes[0].behave(HangsUpAfterJoin);
    fakes[0].hang_up();
    let _ = get(&door, binding, 2, 500, "fake-0");
    let before = fakes[0].joins();
    std::thread::sleep(Duration::from_secs(2));
    let joins = fakes[0].joins() - before;
    assert!(joins < 60, "{joins} data connections in two seconds in which nothing was wanted");
}
