//! Words that a broken peer says. Each is something that an honest one never would.

use kv_block::{Checksum, MissReason, Tier};
use kv_wire::message::{Answer, Ask, Found, Sight, Taken, WantId, Window};

use crate::random::Random;

/// What becomes of an owner's answer.
pub(super) fn answer(random: &mut Random, mut answer: Answer) -> Vec<Answer> {
    match (&mut answer, random.below(6)) {
        (Answer::Granted(grants), 0) => grants[0].id = WantId(random.bits()),
        (Answer::Granted(grants), 1) => grants[0].checksum = Checksum(random.bits()),
        (Answer::Granted(grants), 2) => grants[0].bytes = [0, 1, u32::MAX][random.below(3) as usize],
        (Answer::Granted(grants), 3) => grants[0].tier = Tier::Device,
        (Answer::Granted(grants), 4) => grants[0].window = Some(Window { path: 7, address: 0, key: 0 }),
        (Answer::Granted(_), _) => return vec![answer; 20],
        (Answer::Missed(misses), 0) => misses.push((WantId(random.bits()), MissReason::Expired)),
        (Answer::Missed(_), _) => return vec![answer.clone(), answer],
        (Answer::Found(Found { sights, .. }), 0..3) => sights.push(Sight::Pending),
        (Answer::Found(Found { sights, .. }), 3..5) => drop(sights.pop()),
        (Answer::Found(found), _) => found.id = random.bits(),
        (Answer::Taken(Taken { taken, .. }), 0..3) => *taken += 1000,
        (Answer::Taken(taken), _) => taken.id = random.bits(),
        (Answer::Welcome(welcome), 0..2) => welcome.version = 9,
        (Answer::Welcome(welcome), 2..4) => welcome.node = "somebody".into(),
        (Answer::Welcome(_), _) => return vec![answer.clone(), answer],
        (Answer::Pong(number), _) => *number += 1,
        _ => return vec![Answer::Missed(vec![(WantId(random.bits()), MissReason::Expired)]), answer],
    }
    vec![answer]
}

/// What becomes of a reader's words.
pub(super) fn ask(random: &mut Random, mut ask: Ask) -> Vec<Ask> {
    match (&mut ask, random.below(3)) {
        (Ask::Hello(hello), 0) => hello.versions = (7, 9),
        (Ask::Hello(hello), 1) => hello.node = "somebody".into(),
        (Ask::Hello(_), _) => return vec![Ask::Ping(1), ask],
        (Ask::Want(wants), 0) => wants[0].principal = 200,
        (Ask::Want(wants), 1) => {
            let first = wants[0];
            wants.resize(200, first);
            wants.iter_mut().for_each(|want| want.id = WantId(random.bits()));
        }
        (Ask::Want(_), _) => return vec![ask.clone(), ask],
        (Ask::Done(wants), _) => wants.push(WantId(random.bits())),
        (Ask::Probe(_) | Ask::Offer(_), _) => return vec![ask.clone(), ask],
        (Ask::Path(end), _) => end.path = 0,
        (Ask::Ping(number), _) => *number = random.bits(),
    }
    vec![ask]
}
