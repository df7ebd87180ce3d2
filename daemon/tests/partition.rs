//! Daemons on machines of their own, and a network between them that drops, loses and slows what they say.
//!
//! Needs root, `ip`, `tc` and `iptables`; without, each story says that it is skipped, and why.

mod support;

use std::time::Duration;

use kv_api::v1::MissReason;
use support::among::{get, peer, until, until_nothing_is_left};
use support::net::Net;
use support::{Daemon, Door, Home, scope};

const SMALL: u32 = 64 << 10;
const LARGE: u32 = 8 << 20;
/// As slow as a machine sends in these stories: 10 MB/s, so that there is a middle of a transfer.
const RATE: &str = "80mbit";
/// Large blocks of a story.
const COUNT: u64 = 6;

/// Homes of nodes `a`, `b`, ... on the machines of a network.
fn homes<const N: usize>(story: &str, net: &Net) -> [Home; N] {
    let name = |at: usize| char::from(b'a' + at as u8).to_string();
    let place = |at: usize| format!("{}:9473", net.address(at));
    let members: Vec<String> = (0..N).map(|at| format!("{}={}", name(at), place(at))).collect();
    std::array::from_fn(|at| {
        let mut home = Home::sized(&format!("{story}-{}", name(at)), "128MiB", None)
            .inside(&net.netns(at))
            .set("host.region_bytes=8MiB")
            .set(&format!("node.name={}", name(at)))
            .set(&format!("peers.listen={}", place(at)))
            .set(&format!("peers.members={}", members.join(",")));
        // Nobody but the two is on this network.
        home.args.push("--insecure".into());
        home
    })
}

/// Stores blocks of both lengths at one node, each under a scope of its own.
fn store(door: &Door, small: u64) {
    let binding = door.register(&scope("t"), LARGE);
    for number in 0..COUNT {
        door.put(&scope("t"), binding, number, LARGE, false).expect("put");
    }
    let binding = door.register(&scope("small"), SMALL);
    for number in 0..small {
        door.put(&scope("small"), binding, number, SMALL, false).expect("put");
    }
}

/// Something goes wrong in the middle of large transfers from `a` to `b`, and is well again later. Whoever waits is
/// told by its deadline, whatever came is right, and nothing is left on either side.
fn in_mid_transfer<'a>(
    (a, b): (&'a Home, &Home),
    net: &Net,
    owner: Daemon<'a>,
    harm: impl FnOnce(Daemon<'a>) -> Option<Daemon<'a>>,
    mend: impl FnOnce(Option<Daemon<'a>>) -> Daemon<'a>,
) {
    let (at_a, at_b) = (Door::of(a), Door::of(b));
    store(&at_a, 0);
    net.slow(0, RATE);
    let binding = at_b.register(&scope("t"), LARGE);
    let owner = std::thread::scope(|threads| {
        for number in 0..COUNT {
            threads.spawn(move || get(&Door::of(b), binding, number, 2_500, "a"));
        }
        until("bytes are on their way", || (peer(&at_b, "a").reading > 0).then_some(()));
        std::thread::sleep(Duration::from_millis(200));
        harm(owner)
    });
    assert!(at_b.status().fetched_blocks < COUNT, "it was the middle");
    // Nothing comes now, and nobody waits longer than he said.
    for wait_ms in [100, 1_000, 300, 2_000, 500] {
        let missing = (0..COUNT).rev().find(|number| {
            let (got, _) = get(&at_b, binding, *number, 0, "");
            got.is_err()
        });
        let (got, _) = get(&at_b, binding, missing.expect("some are missing"), wait_ms, "a");
        assert!(matches!(got, Err(MissReason::TierTimeout | MissReason::PeerDown)), "{got:?}");
    }
    let _owner = mend(owner);
    for number in 0..COUNT {
        until("it comes after all", || get(&at_b, binding, number, 5_000, "a").0.ok());
    }
    // The door of a daemon that was killed leads nowhere.
    let at_a = Door::of(a);
    until_nothing_is_left(&at_b, &["a"]);
    until_nothing_is_left(&at_a, &["b"]);
    assert_eq!(peer(&at_b, "a").state, "up");
    for (door, home) in [(&at_a, a), (&at_b, b)] {
        let binding = door.register(&scope("t"), LARGE);
        for number in 0..COUNT {
            until("nobody holds it", || (door.evict(binding, number) == Some(1)).then_some(()));
        }
        assert_eq!(door.status().blocks, 0, "{}", home.log());
    }
}

/// Nothing gets through in these directions.
fn cut_in_mid_transfer(story: &str, directions: &[(usize, usize)]) {
    let Some(net) = Net::make(2) else { return };
    let [a, b] = homes(story, &net);
    let (owner, _b) = (a.start(), b.start());
    let cut = |owner| {
        directions.iter().for_each(|(from, to)| net.cut(*from, *to));
        Some(owner)
    };
    in_mid_transfer((&a, &b), &net, owner, cut, |owner| {
        net.heal();
        owner.unwrap()
    });
}

#[test]
fn a_partition_in_mid_transfer_ends_by_the_deadline_and_heals() {
    cut_in_mid_transfer("cut", &[(0, 1), (1, 0)]);
}

#[test]
fn when_nothing_comes_from_the_owner_any_more_it_ends_by_the_deadline_and_heals() {
    cut_in_mid_transfer("deaf", &[(0, 1)]);
}

#[test]
fn when_nothing_reaches_the_owner_any_more_it_ends_by_the_deadline_and_heals() {
    cut_in_mid_transfer("mute", &[(1, 0)]);
}

fn signal(daemon: &Daemon<'_>, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(daemon.pid() as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[test]
fn an_owner_that_stops_in_mid_transfer_costs_no_more_than_the_deadline() {
    let Some(net) = Net::make(2) else { return };
    let [a, b] = homes("stops", &net);
    let (owner, _b) = (a.start(), b.start());
    let stop = |owner| {
        signal(&owner, rustix::process::Signal::STOP);
        Some(owner)
    };
    in_mid_transfer((&a, &b), &net, owner, stop, |owner| {
        let owner = owner.unwrap();
        signal(&owner, rustix::process::Signal::CONT);
        owner
    });
}

#[test]
fn an_owner_that_is_killed_in_mid_transfer_costs_no_more_than_the_deadline() {
    let Some(net) = Net::make(2) else { return };
    let [a, b] = homes("killed", &net);
    let (owner, _b) = (a.start(), b.start());
    let kill = |owner: Daemon<'_>| {
        owner.kill();
        None
    };
    // Host memory survives.
    in_mid_transfer((&a, &b), &net, owner, kill, |_| a.start());
}

#[test]
fn a_reader_that_is_killed_in_mid_transfer_leaves_nothing_with_the_owner() {
    let Some(net) = Net::make(2) else { return };
    let [a, b] = homes("reader", &net);
    let (_a, reader) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 0);
    net.slow(0, RATE);
    let binding = at_b.register(&scope("t"), LARGE);
    for number in 0..COUNT {
        let names = kv_api::v1::Names {
            binding,
            sequence_hashes: vec![kv_block::SequenceHash::from(number).as_bytes().to_vec().into()],
            ..kv_api::v1::Names::default()
        };
        let request = kv_api::v1::PrefetchRequest { names: Some(names), session: 0, node: "a".into() };
        at_b.runtime.block_on(async { at_b.blocks().prefetch(request).await }).expect("prefetch");
    }
    until("bytes are on their way", || {
        (peer(&at_b, "a").reading > 0 && peer(&at_a, "b").held > 0).then_some(())
    });
    // Its machine vanishes, and says nothing about it.
    net.cut(0, 1);
    net.cut(1, 0);
    reader.kill();
    until_nothing_is_left(&at_a, &["b"]);
    net.heal();
    let _reader = b.start();
    let at_b = Door::of(&b);
    let binding = at_b.register(&scope("t"), LARGE);
    for number in 0..COUNT {
        until("it comes after all", || get(&at_b, binding, number, 5_000, "").0.ok());
    }
}

#[test]
fn blocks_are_right_on_a_network_that_loses_a_fifth_of_everything() {
    let Some(net) = Net::make(3) else { return };
    let [a, b, c] = homes("loses", &net);
    let (_a, _b, _c) = (a.start(), b.start(), c.start());
    let at_b = Door::of(&b);
    for home in [&a, &c] {
        store(&Door::of(home), 40);
    }
    net.lose("0.2");
    let binding = at_b.register(&scope("small"), SMALL);
    // Each wait ends in time and what comes is right, which `get_of` looks at. A connection that stalls for long is
    // given up, so not everything comes.
    let came = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|threads| {
        for first in 0..4 {
            let (b, came) = (&b, &came);
            threads.spawn(move || {
                let door = Door::of(b);
                for number in (first..40).step_by(4) {
                    let got = support::among::get_of("small", &door, binding, number, 2_000, "").0;
                    came.fetch_add(u64::from(got.is_ok()), std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
    });
    assert!(came.into_inner() > 0, "nothing came at all");
    // How much each of them says is up to the losses.
    let dropped = [0, 1, 2].map(|host| net.dropped(host));
    assert!(dropped.iter().sum::<u64>() > 15, "{dropped:?}");
    net.heal();
    for number in 0..40 {
        until("it comes after all", || {
            support::among::get_of("small", &at_b, binding, number, 5_000, "").0.ok()
        });
    }
    until_nothing_is_left(&at_b, &["a", "c"]);
    for home in [&a, &c] {
        until_nothing_is_left(&Door::of(home), &["b"]);
    }
}

#[test]
fn many_small_reads_and_large_ones_share_a_slow_network() {
    let Some(net) = Net::make(2) else { return };
    let [a, b] = homes("slow", &net);
    let (_a, _b) = (a.start(), b.start());
    let (at_a, at_b) = (Door::of(&a), Door::of(&b));
    store(&at_a, 200);
    net.slow(0, RATE);
    let (large, small) = (at_b.register(&scope("t"), LARGE), at_b.register(&scope("small"), SMALL));
    std::thread::scope(|threads| {
        for first in 0..8 {
            let b = &b;
            threads.spawn(move || {
                let door = Door::of(b);
                for number in (first..200).step_by(8) {
                    let got = support::among::get_of("small", &door, small, number, 10_000, "").0;
                    assert_eq!(got, Ok(()), "small block {number}");
                }
            });
        }
        for number in 0..2 {
            let b = &b;
            threads.spawn(move || {
                let got = get(&Door::of(b), large, number, 10_000, "").0;
                assert_eq!(got, Ok(()), "large block {number}");
            });
        }
    });
    assert_eq!(peer(&at_b, "a").strikes, 0);
    until_nothing_is_left(&at_b, &["a"]);
    until_nothing_is_left(&at_a, &["b"]);
}
