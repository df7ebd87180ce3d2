//! The account of promises: blocks that the daemon acknowledged as durable must be found again, whatever
//! happened to it, unless it says that it evicted them. What another node has does not count: each must keep
//! its own promises.
//!
//! What a daemon evicted before a kill it may not remember after it. So the account is settled just before
//! each kill: what it says it evicted leaves the account, the rest must be there afterwards.

use std::time::Duration;

use kv_client::{Binding, Error, Got, MissReason, SequenceHash, Worker};

use crate::check::wrong_bytes;
use crate::replay::Patience;
use crate::tally::Tally;

/// Blocks asked for in one call.
const BATCH: usize = 32;

/// What became of the promises.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Hashes of blocks that are there.
    pub kept: Vec<u64>,
    /// Blocks evicted, as the daemon says.
    pub evicted: u64,
    /// Blocks that are gone without a reason that would do.
    pub lost: u64,
    /// Blocks that could not be read now, for a reason that passes.
    pub undecided: u64,
    /// Of those lost, the first one and what is said of it.
    pub first_lost: Option<(u64, MissReason)>,
}

enum Verdict {
    Evicted,
    Lost,
    Undecided,
}

fn verdict(reason: MissReason) -> Verdict {
    match reason {
        MissReason::EvictedCapacity
        | MissReason::EvictedQuota
        | MissReason::EvictedRequest
        | MissReason::EvictedReclaim
        // Its segment was reclaimed while it was in memory, too. When it left that, it was not written once more.
        | MissReason::AdmissionRejected
        | MissReason::Expired => Verdict::Evicted,
        MissReason::TierDegraded
        | MissReason::NotComplete
        | MissReason::Quota
        | MissReason::TierTimeout
        | MissReason::Overloaded
        | MissReason::PeerDown
        | MissReason::PathFailed
        | MissReason::PeerEvicted => Verdict::Undecided,
        MissReason::NeverStored
        | MissReason::ScopeDiffers
        | MissReason::Corrupt => Verdict::Lost,
    }
}

impl Audit {
    fn enter(&mut self, hash: u64, reason: Option<MissReason>) {
        let Some(reason) = reason else { return self.kept.push(hash) };
        match verdict(reason) {
            Verdict::Evicted => self.evicted += 1,
            Verdict::Lost => {
                self.lost += 1;
                self.first_lost.get_or_insert((hash, reason));
            }
            Verdict::Undecided => {
                self.undecided += 1;
                self.kept.push(hash);
            }
        }
    }

    /// Looks the blocks up, reading none.
    pub fn look(worker: &Worker, binding: &Binding, hashes: &[u64]) -> Result<Self, Error> {
        let mut audit = Self::default();
        for hash in hashes {
            let found = worker.lookup(binding, &[SequenceHash::from(*hash)])?;
            audit.enter(*hash, found.first_miss.map(|(_, miss)| miss.reason));
        }
        Ok(audit)
    }

    /// Reads every byte of the blocks; what is wrong goes into `tally`.
    pub fn read(
        worker: &Worker,
        binding: &Binding,
        hashes: &[u64],
        patience: &Patience,
        tally: &mut Tally,
    ) -> Result<Self, Error> {
        let mut audit = Self::default();
        for batch in hashes.chunks(BATCH) {
            // What is not here is not waited for: it would come from whichever node has it.
            let look = || Self::look(worker, binding, batch);
            let here = patience.insist(worker, &mut tally.retries, look)?;
            audit.evicted += here.evicted;
            audit.lost += here.lost;
            audit.first_lost = audit.first_lost.or(here.first_lost);
            let names: Vec<SequenceHash> = here.kept.iter().copied().map(SequenceHash::from).collect();
            let ask = || worker.acquire_many(binding, &names, Duration::from_secs(5));
            let answers = patience.insist(worker, &mut tally.retries, ask)?;
            for (hash, got) in here.kept.iter().zip(answers) {
                match got {
                    Got::Miss(miss) => audit.enter(*hash, Some(miss.reason)),
                    Got::Block(block) => {
                        let wrong = wrong_bytes(&block.key(), &block, binding.block_bytes() as usize);
                        let right_key = block.key() == binding.key(&SequenceHash::from(*hash));
                        let wrong = if right_key { wrong } else { block.len() as u64 };
                        tally.checked(block.len(), wrong, || format!("durable block {}", block.key()));
                        audit.enter(*hash, None);
                    }
                }
            }
        }
        Ok(audit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_eviction_excuses_a_missing_durable_block() {
        let mut audit = Audit::default();
        audit.enter(0, None);
        for (hash, reason) in MissReason::ALL.into_iter().enumerate() {
            audit.enter(hash as u64 + 1, Some(reason));
        }
        assert_eq!((audit.evicted, audit.lost, audit.undecided, audit.kept.len()), (6, 3, 8, 9));
        assert_eq!(audit.first_lost, Some((1, MissReason::NeverStored)));
    }
}
