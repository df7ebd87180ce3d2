//! Who is let in while how many are inside: plain values.
//!
//! A connection is *unproven* until its first frame says what it is. Unproven ones have few places, and a newcomer
//! always gets one: the oldest of the source that has the most goes. A flood therefore pushes itself out, while an
//! honest connection needs its place only for a round trip or two.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::task::AbortHandle;

use crate::limits::Limits;

/// Where a connection comes from, as far as it is counted. A host has a whole /64 of IPv6 to itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
struct Source(IpAddr);

impl Source {
    fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
            address => address,
        })
    }
}

/// What becomes of a newcomer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    In,
    /// In, and this one must go.
    Instead(u64),
    Out,
}

/// The books.
#[derive(Debug, Default)]
struct Books {
    next: u64,
    inside: HashMap<u64, Source>,
    /// Those of them that are unproven, oldest first.
    unproven: BTreeMap<u64, (Source, Option<AbortHandle>)>,
    by_source: HashMap<Source, usize>,
}

impl Books {
    fn verdict(&self, source: Source, limits: &Limits) -> Verdict {
        let oldest_of = |wanted: Source| {
            self.unproven.iter().find(|(_, (source, _))| *source == wanted).map(|(id, _)| *id)
        };
        let victim = if self.by_source.get(&source).is_some_and(|&inside| inside >= limits.per_source_max) {
            oldest_of(source)
        } else if self.inside.len() >= limits.connections_max || self.unproven.len() >= limits.unproven_max {
            self.busiest().and_then(oldest_of)
        } else {
            return Verdict::In;
        };
        victim.map_or(Verdict::Out, Verdict::Instead)
    }

    /// The source with the most unproven connections.
    fn busiest(&self) -> Option<Source> {
        let mut counts = BTreeMap::<Source, usize>::new();
        for (source, _) in self.unproven.values() {
            *counts.entry(*source).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, count)| *count).map(|(source, _)| source)
    }

    fn enter(&mut self, source: Source) -> u64 {
        self.next += 1;
        self.inside.insert(self.next, source);
        self.unproven.insert(self.next, (source, None));
        *self.by_source.entry(source).or_default() += 1;
        self.next
    }

    fn leave(&mut self, id: u64) {
        self.unproven.remove(&id);
        let Some(source) = self.inside.remove(&id) else { return };
        if let Some(count) = self.by_source.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

/// The door of one listener.
#[derive(Debug)]
pub(crate) struct Door {
    limits: Arc<Limits>,
    books: Mutex<Books>,
}

impl Door {
    pub(crate) fn new(limits: Arc<Limits>) -> Arc<Self> {
        Arc::new(Self { limits, books: Mutex::default() })
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a newcomer, or none.
    pub(crate) fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Seat> {
        let source = Source::of(from);
        let mut books = self.books();
        match books.verdict(source, &self.limits) {
            Verdict::Out => return None,
            Verdict::In => {}
            Verdict::Instead(other) => {
                let task = books.unproven.get(&other).and_then(|(_, task)| task.clone());
                books.leave(other);
                if let Some(task) = task {
                    task.abort();
                }
            }
        }
        Some(Seat { id: books.enter(source), door: Arc::clone(self) })
    }

    /// By this task a connection that is still unproven can be ended.
    pub(crate) fn watch(&self, id: u64, task: AbortHandle) {
        if let Some((_, place)) = self.books().unproven.get_mut(&id) {
            *place = Some(task);
        }
    }

    /// Ends every unproven connection.
    pub(crate) fn clear(&self) {
        let books = self.books();
        books.unproven.values().filter_map(|(_, task)| task.as_ref()).for_each(AbortHandle::abort);
    }
}

/// A connection's place inside. Dropped, it is free.
#[derive(Debug)]
pub(crate) struct Seat {
    id: u64,
    door: Arc<Door>,
}

impl Seat {
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The connection has said what it is. False: it was sent out in that moment.
    pub(crate) fn prove(&self) -> bool {
        self.door.books().unproven.remove(&self.id).is_some()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.door.books().leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(connections_max: usize, unproven_max: usize, per_source_max: usize) -> Arc<Door> {
        Door::new(Arc::new(Limits { connections_max, unproven_max, per_source_max, ..Limits::default() }))
    }

    fn from(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn a_flood_pushes_itself_out() {
        let door = door(100, 4, 100);
        let honest = door.enter(from(1)).unwrap();
        let flood: Vec<Seat> = (0..50).map(|_| door.enter(from(2)).unwrap()).collect();
        assert!(honest.prove(), "the honest one kept its place");
        assert_eq!(flood.iter().filter(|seat| seat.prove()).count(), 3);
    }

    #[test]
    fn the_proven_are_never_sent_out() {
        let door = door(3, 3, 3);
        let inside: Vec<Seat> = (0..3).map(|at| door.enter(from(at)).unwrap()).collect();
        assert!(inside.iter().all(Seat::prove));
        assert!(door.enter(from(9)).is_none());
        drop(inside);
        assert!(door.enter(from(9)).is_some());
        assert!(door.books().inside.is_empty(), "a dropped seat is free");
    }

    #[test]
    fn one_source_gets_its_share_and_no_more() {
        let door = door(100, 100, 2);
        let first = door.enter(from(1)).unwrap();
        let second = door.enter(from(1)).unwrap();
        assert!(first.prove());
        let third = door.enter(from(1)).unwrap();
        assert!(!second.prove(), "the oldest unproven one of the source went");
        assert!(third.prove());
        assert!(door.enter(from(1)).is_none());
        assert!(door.enter(from(2)).is_some());
    }

    #[test]
    fn a_host_cannot_multiply_itself_by_its_addresses() {
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(Source::of(mapped), Source::of(from(1)));
        let [one, two, other] = ["2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"]
            .map(|address| Source::of(address.parse().unwrap()));
        assert_eq!(one, two);
        assert_ne!(one, other);
    }
}
