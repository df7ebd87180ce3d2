//! Worlds in which everything goes wrong, by the thousand. `KVD_SEED=n` replays one and prints what happens in it,
//! `KVD_SEEDS=n` runs so many.

use kv_transport::sim::{Tally, Weather, run, run_in};

const SEEDS: u64 = 2000;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

#[test]
fn nothing_is_lost_whatever_goes_wrong() {
    if let Some(seed) = number("KVD_SEED") {
        eprintln!("{:?}", Weather::of(seed));
        eprintln!("{:#?}", run(seed, true).counts);
        return;
    }
    let seeds = number("KVD_SEEDS").unwrap_or(SEEDS);
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let run_every = |first: u64| {
        let mut tally = Tally::default();
        (first..seeds).step_by(workers as usize).for_each(|seed| tally.add(&run(seed, false)));
        tally
    };
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|first| scope.spawn(move || run_every(first))).collect();
        for thread in threads {
            tally.add(&thread.join().expect("a world failed; its seed is above"));
        }
    });
    println!("{seeds} worlds: {:#?}", tally.counts);
    if seeds < SEEDS {
        return;
    }
    for what in [
        "granted",
        "landed by tcp",
        "landed by window",
        "left",
        "found",
        "not found",
        "taken",
        "not taken",
        "cut",
        "crashed",
        "damaged",
        "stuck",
        "owner lied",
        "reader lied",
        "owner hung up",
        "never_stored",
        "tier_timeout",
        "overloaded",
        "corrupt",
        "peer_down",
        "path_failed",
        "peer_evicted",
        "unreachable",
        "refused",
        "silent",
        "unread",
        "rules",
    ] {
        assert!(tally.counts.get(what).is_some_and(|count| *count > 10), "{what} was hardly seen");
    }
}

#[test]
fn a_seed_replays_its_world() {
    for seed in [3, 4, 5] {
        assert_eq!(run(seed, false), run(seed, false));
    }
}

#[test]
fn in_calm_weather_blocks_land() {
    for seed in 0..50 {
        let calm = Weather { nodes: 3, wants: 100, windows: seed % 2 == 0, ..Weather::default() };
        let tally = run_in(seed, calm, false);
        let count = |what: &str| tally.counts.get(what).copied().unwrap_or(0);
        let landed = count("landed by tcp") + count("landed by window");
        assert!(landed > 15, "seed {seed}: {:?}", tally.counts);
        assert_eq!(
            count("peer_down") + count("corrupt") + count("path_failed"),
            0,
            "seed {seed}: {:?}",
            tally.counts
        );
    }
}
