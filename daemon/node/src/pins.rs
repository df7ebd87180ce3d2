//! Pins: blocks that eviction must leave alone until a moment. Every pin has an end.

use std::collections::{BTreeSet, HashMap};

use kv_block::BlockKey;

use crate::io::Micros;

/// What is pinned until when.
#[derive(Default)]
pub(crate) struct Pins {
    by_key: HashMap<BlockKey, Pin>,
    by_end: BTreeSet<(Micros, BlockKey)>,
    bytes: u64,
}

/// One pin.
#[derive(Clone, Copy)]
pub(crate) struct Pin {
    pub(crate) until: Micros,
    pub(crate) bytes: u32,
    pub(crate) tenant: usize,
}

impl Pins {
    /// Pins `key` until the later of `pin.until` and what it was pinned until before. Says whether it is new.
    pub(crate) fn pin(&mut self, key: BlockKey, pin: Pin) -> bool {
        let old = self.by_key.get(&key).copied();
        if let Some(old) = old {
            if old.until >= pin.until {
                return false;
            }
            self.by_end.remove(&(old.until, key));
        } else {
            self.bytes += u64::from(pin.bytes);
        }
        // What was counted when it was pinned is what comes off at its end.
        let pin = old.map_or(pin, |old| Pin { until: pin.until, ..old });
        self.by_key.insert(key, pin);
        self.by_end.insert((pin.until, key));
        old.is_none()
    }

    pub(crate) fn unpin(&mut self, key: &BlockKey) -> Option<Pin> {
        let pin = self.by_key.remove(key)?;
        self.by_end.remove(&(pin.until, *key));
        self.bytes -= u64::from(pin.bytes);
        Some(pin)
    }

    /// Ends the next pin that is over at `now`.
    pub(crate) fn pop_ended(&mut self, now: Micros) -> Option<(BlockKey, Pin)> {
        let (until, key) = *self.by_end.first()?;
        if until > now {
            return None;
        }
        self.unpin(&key).map(|pin| (key, pin))
    }

    pub(crate) fn get(&self, key: &BlockKey) -> Option<&Pin> {
        self.by_key.get(key)
    }

    pub(crate) fn holds(&self, key: &BlockKey) -> bool {
        !self.by_key.is_empty() && self.by_key.contains_key(key)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_pin_wins_and_every_pin_ends() {
        let key = BlockKey([1; 16]);
        let pin = |until| Pin { until: Micros(until), bytes: 8, tenant: 0 };
        let mut pins = Pins::default();
        assert!(pins.pin(key, pin(10)));
        assert!(!pins.pin(key, pin(5)), "a shorter pin changes nothing");
        assert!(!pins.pin(key, pin(20)));
        assert_eq!(pins.bytes(), 8);
        assert!(pins.pop_ended(Micros(19)).is_none());
        assert_eq!(pins.pop_ended(Micros(20)).map(|ended| ended.0), Some(key));
        assert!(!pins.holds(&key));
        assert_eq!(pins.bytes(), 0);
    }
}
