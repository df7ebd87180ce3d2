//! What came of a run: a table for people, a JSON object for programs.

use std::collections::BTreeMap;
use std::fmt;

use kvd::config::units::Size;
use serde::Serialize;

use crate::tally::{Tally, Times};

/// The result of a demo. Field names are stable.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Where the trace is from.
    pub trace: String,
    /// Why it ended: `trace`, `duration` or `signal`.
    pub ended: &'static str,
    /// Time from the first request to the last answer, in seconds.
    pub seconds: f64,
    /// Workers, each with a session at every node.
    pub workers: usize,
    /// Length of a block in bytes.
    pub block_bytes: u32,
    /// Size of the host tier of each node in bytes.
    pub host_bytes: u64,
    /// Size of the disk tier of each node in bytes.
    pub disk_bytes: u64,
    /// Which blocks are written to disk when they leave host memory.
    pub admission: String,
    /// Requests replayed to their end.
    pub requests: u64,
    /// Blocks of prefixes that were here and were read.
    pub blocks_read: u64,
    /// Bytes read and compared, one by one; the read-back of durable blocks included.
    pub bytes_read: u64,
    /// Bytes that were not what had been stored.
    pub wrong_bytes: u64,
    /// The first wrong block, in words.
    pub first_wrong: Option<String>,
    /// Blocks read, by the tier that had them; `peer` for those of another node, where there are several; `object`
    /// where there is an object store.
    pub hits: BTreeMap<&'static str, u64>,
    /// Blocks that were not here, by reason.
    pub misses: BTreeMap<&'static str, u64>,
    /// Blocks that were here behind one that was not, and so of no use.
    pub behind_gap: u64,
    /// Blocks stored.
    pub put_blocks: u64,
    /// How often the daemon was killed.
    pub kills: usize,
    /// Each kill and what came after.
    pub restarts: Vec<Restart>,
    /// Entries that restarts brought back, host and disk, over all kills.
    pub recovered_blocks: u64,
    /// Blocks acknowledged as durable.
    pub durable_blocks: u64,
    /// Of those, blocks that the daemon says it evicted.
    pub durable_evicted: u64,
    /// Of those, blocks that could not be read at the time, for a reason that passes.
    pub durable_undecided: u64,
    /// Of those, blocks that are gone without such a reason.
    pub lost_durable_blocks: u64,
    /// The first of them, in words.
    pub first_lost: Option<String>,
    /// Reading a block, wherever it was.
    pub read_us: Quantiles,
    /// Reading a block in host memory.
    pub read_host_us: Quantiles,
    /// Reading a block on disk.
    pub read_disk_us: Quantiles,
    /// Reading a block of another node: from asking for all that a request wants of others until this one was
    /// here and its turn.
    pub read_peer_us: Quantiles,
    /// Reading a block of the object store, measured in the same way.
    pub read_object_us: Quantiles,
    /// Storing a block in host memory.
    pub put_us: Quantiles,
    /// Storing a block durably.
    pub put_durable_us: Quantiles,
    /// Calls made again because the daemon was away, busy or full.
    pub retries: u64,
    /// Bytes written to disk. What was written within milliseconds of a kill is not in it.
    pub disk_bytes_written: u64,
    /// Bytes written to disk for each byte read from either tier.
    pub bytes_written_per_byte_hit: f64,
    /// Blocks that nodes fetched from each other. What came within milliseconds of a kill is not in it.
    pub fetched_blocks: u64,
    /// Their bytes.
    pub fetched_bytes: u64,
    /// Requests that went to another node while their own was away.
    pub rerouted: u64,
    /// The object store, where there is one.
    pub object: Option<ObjectReport>,
    /// The nodes.
    pub nodes: Vec<NodeReport>,
}

/// The object store at the end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ObjectReport {
    /// Where it is.
    pub store: String,
    /// Blocks that can be found in it.
    pub blocks: u64,
    /// Bytes that nodes sent up. What a node sent before it was killed is not in it.
    pub uploaded_bytes: u64,
    /// Bytes that came from it. What came before a kill is not in it.
    pub downloaded_bytes: u64,
    /// What a node says is wrong with it.
    pub trouble: Option<String>,
}

/// One node at the end, and what it had from the others and gave to them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NodeReport {
    /// What it is called.
    pub node: String,
    /// Requests that it did.
    pub requests: u64,
    /// How often it was killed.
    pub kills: usize,
    /// Blocks in its host memory.
    pub host_blocks: u64,
    /// Blocks on its disk.
    pub disk_blocks: u64,
    /// What it fetched from the others, over all its lives.
    pub fetched: Moved,
    /// What the others fetched from it, as they tell.
    pub served: Moved,
}

/// What moved from one node to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Moved {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.bytes += other.bytes;
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}, {}", grouped(self.blocks), Size(self.bytes).about()))
    }
}

/// One kill, and what the daemon brought back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Restart {
    /// Which node.
    pub node: String,
    /// Requests done at that time.
    pub after_requests: u64,
    /// From the kill until the next daemon answered, in milliseconds.
    pub ready_ms: u64,
    /// Blocks in host memory just before.
    pub host_blocks_before: u64,
    /// Blocks found in host memory.
    pub host_blocks: u64,
    /// Blocks on disk just before.
    pub disk_blocks_before: u64,
    /// Blocks found on disk.
    pub disk_blocks: u64,
    /// Durable blocks that had to be there, read back byte by byte.
    pub durable_checked: u64,
}

/// Median and worst but for one in a hundred, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Quantiles {
    /// Half stayed within.
    pub p50: f64,
    /// 99 of 100 stayed within.
    pub p99: f64,
}

impl From<&Times> for Quantiles {
    fn from(times: &Times) -> Self {
        Self { p50: times.quantile_us(0.5), p99: times.quantile_us(0.99) }
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {}, p99 {}", micros(self.p50), micros(self.p99))
    }
}

impl Report {
    /// Takes the counts of all workers in. The nodes must be there.
    pub fn take(&mut self, tally: &Tally) {
        self.fetched_blocks = self.nodes.iter().map(|node| node.fetched.blocks).sum();
        self.fetched_bytes = self.nodes.iter().map(|node| node.fetched.bytes).sum();
        self.rerouted = tally.rerouted;
        for (at, node) in self.nodes.iter_mut().enumerate() {
            node.requests = tally.served.get(&at).copied().unwrap_or(0);
        }
        self.requests = tally.requests;
        self.blocks_read = tally.blocks_read();
        self.bytes_read = tally.bytes_read;
        self.wrong_bytes = tally.wrong_bytes;
        self.first_wrong.clone_from(&tally.first_wrong);
        self.hits = BTreeMap::from([("host", tally.hits_host), ("disk", tally.hits_disk)]);
        if self.is_many() {
            self.hits.insert("peer", tally.hits_peer);
        }
        if self.object.is_some() {
            self.hits.insert("object", tally.hits_object);
        }
        self.misses.clone_from(&tally.misses);
        self.behind_gap = tally.behind_gap;
        self.put_blocks = tally.put_blocks;
        self.durable_blocks = tally.durable_blocks;
        self.retries = tally.retries;
        let mut read = tally.read_host.clone();
        read.merge(&tally.read_disk);
        read.merge(&tally.read_peer);
        read.merge(&tally.read_object);
        self.read_us = (&read).into();
        self.read_host_us = (&tally.read_host).into();
        self.read_disk_us = (&tally.read_disk).into();
        self.read_peer_us = (&tally.read_peer).into();
        self.read_object_us = (&tally.read_object).into();
        self.put_us = (&tally.put).into();
        self.put_durable_us = (&tally.put_durable).into();
        let bytes_hit = self.blocks_read * u64::from(self.block_bytes);
        let ratio = self.disk_bytes_written as f64 / bytes_hit.max(1) as f64;
        self.bytes_written_per_byte_hit = if bytes_hit == 0 { 0.0 } else { ratio };
    }

    fn is_many(&self) -> bool {
        self.nodes.len() > 1
    }

    /// Whether every promise was kept. That several nodes had blocks of each other is one, and that an object store has
    /// some, unless somebody stopped them.
    pub fn is_right(&self) -> bool {
        let fetched = !self.is_many() || self.fetched_blocks > 0 || self.ended == "signal";
        let stopped = self.ended == "signal";
        let sent_up = self.object.as_ref().is_none_or(|object| object.blocks > 0 || stopped);
        self.wrong_bytes == 0 && self.lost_durable_blocks == 0 && fetched && sent_up
    }

    /// One line of JSON.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("numbers, text and maps by name")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |bytes: u64| Size(bytes).about();
        let asked = self.blocks_read + self.behind_gap + self.misses.values().sum::<u64>();
        let share = |count: u64| 100.0 * count as f64 / asked.max(1) as f64;
        writeln!(
            f,
            "requests   {} in {:.1} s, {} workers, {} blocks of {} asked for; ended with the {}",
            grouped(self.requests),
            self.seconds,
            self.workers,
            grouped(asked),
            size(self.block_bytes.into()),
            self.ended,
        )?;
        let counts = |counts: &BTreeMap<&'static str, u64>| {
            let one =
                |(name, count): (&&str, &u64)| format!("{name} {} ({:.1}%)", grouped(*count), share(*count));
            let all: Vec<String> = counts.iter().map(one).collect();
            if all.is_empty() { "none".to_owned() } else { all.join(", ") }
        };
        writeln!(
            f,
            "tiers      host {}, disk {}{}, admission to disk {}",
            size(self.host_bytes),
            size(self.disk_bytes),
            if self.is_many() { " each" } else { "" },
            self.admission
        )?;
        writeln!(f, "hits       {}", counts(&self.hits))?;
        writeln!(f, "misses     {}", counts(&self.misses))?;
        if self.behind_gap > 0 {
            writeln!(f, "           {} were here, but behind one that was not", grouped(self.behind_gap))?;
        }
        write!(f, "read       host {}; disk {}", self.read_host_us, self.read_disk_us)?;
        if self.is_many() {
            write!(f, "; peer {}", self.read_peer_us)?;
        }
        writeln!(f)?;
        if self.object.is_some() {
            writeln!(f, "           object {}", self.read_object_us)?;
        }
        writeln!(
            f,
            "put        {} blocks, {}; durable {}",
            grouped(self.put_blocks),
            self.put_us,
            self.put_durable_us
        )?;
        writeln!(
            f,
            "written    {} to disk, {:.2} bytes for each byte hit",
            size(self.disk_bytes_written),
            self.bytes_written_per_byte_hit
        )?;
        if let Some(ObjectReport { store, blocks, uploaded_bytes, downloaded_bytes, trouble }) = &self.object
        {
            writeln!(
                f,
                "object     {} blocks in {store};\n           {} went up, {} came down",
                grouped(*blocks),
                size(*uploaded_bytes),
                size(*downloaded_bytes),
            )?;
            if let Some(trouble) = trouble {
                writeln!(f, "           {trouble}")?;
            }
        }
        if self.is_many() {
            writeln!(
                f,
                "fetched    {} blocks, {}, from each other; {} requests went to another node than their own",
                grouped(self.fetched_blocks),
                size(self.fetched_bytes),
                grouped(self.rerouted),
            )?;
            writeln!(
                f,
                "           node      requests   in memory     on disk           fetched            served"
            )?;
        }
        for node in self.nodes.iter().filter(|_| self.is_many()) {
            let NodeReport { node, requests, host_blocks, disk_blocks, fetched, served, .. } = node;
            writeln!(
                f,
                "           {node:<8}{:>10}{:>12}{:>12}{fetched:>18}{served:>18}",
                grouped(*requests),
                grouped(*host_blocks),
                grouped(*disk_blocks),
            )?;
        }
        for restart in &self.restarts {
            let (of, then) = match self.is_many() {
                true => (format!("{} ", restart.node), ";\n           "),
                false => (String::new(), "; "),
            };
            writeln!(
                f,
                "kill -9    {of}after {} requests, back in {} ms{then}in memory {} blocks ({} before), on disk {} ({})",
                grouped(restart.after_requests),
                restart.ready_ms,
                grouped(restart.host_blocks),
                grouped(restart.host_blocks_before),
                grouped(restart.disk_blocks),
                grouped(restart.disk_blocks_before),
            )?;
        }
        write!(
            f,
            "durable    {} acknowledged, {} evicted since, {} lost",
            grouped(self.durable_blocks),
            grouped(self.durable_evicted),
            grouped(self.lost_durable_blocks)
        )?;
        if self.durable_undecided > 0 {
            write!(f, ", {} could not be read in time", grouped(self.durable_undecided))?;
        }
        writeln!(
            f,
            "\nchecked    {} byte by byte: {} wrong",
            size(self.bytes_read),
            grouped(self.wrong_bytes)
        )?;
        if let Some(first) = &self.first_lost {
            writeln!(f, "           the first lost: {first}")?;
        }
        if let Some(first) = &self.first_wrong {
            writeln!(f, "           the first: {first}")?;
        }
        Ok(())
    }
}

/// `1,234,567`.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn micros(us: f64) -> String {
    match us {
        us if us >= 10_000.0 => format!("{:.1} ms", us / 1e3),
        us if us >= 100.0 => format!("{us:.0} us"),
        us => format!("{us:.2} us"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kv_client::Tier;

    use super::*;
    use crate::tally::Source;

    fn report() -> Report {
        let mut tally = Tally { requests: 1234, put_blocks: 7, ..Tally::default() };
        tally.hit(Tier::Host.into(), Duration::from_micros(2));
        tally.hit(Tier::Disk.into(), Duration::from_micros(20_000));
        tally.miss("never_stored");
        let mut report = Report {
            ended: "trace",
            kills: 1,
            restarts: vec![Restart::default()],
            block_bytes: 4096,
            disk_bytes_written: 4096,
            ..Report::default()
        };
        report.take(&tally);
        report
    }

    #[test]
    fn the_json_has_the_shape_that_programs_rely_on() {
        let json: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
        for number in [
            "requests",
            "blocks_read",
            "wrong_bytes",
            "kills",
            "recovered_blocks",
            "lost_durable_blocks",
            "bytes_written_per_byte_hit",
        ] {
            assert!(json[number].is_number(), "{number}: {json}");
        }
        for times in ["read_us", "put_us"] {
            assert!(json[times]["p50"].is_number() && json[times]["p99"].is_number(), "{times}: {json}");
        }
        assert_eq!((&json["hits"]["host"], &json["hits"]["disk"]), (&1.into(), &1.into()));
        assert_eq!(json["misses"]["never_stored"], 1);
        assert_eq!(json["bytes_written_per_byte_hit"], 0.5);
        assert!(!report().json().contains('\n'));
    }

    #[test]
    fn the_table_names_what_matters_and_is_not_wide() {
        let table = report().to_string();
        for part in
            ["1,234 in", "host 1 (33.3%)", "never_stored 1", "20.0 ms", "2.00 us", "0 lost", "0 wrong"]
        {
            assert!(table.contains(part), "{part}: {table}");
        }
        assert!(table.lines().all(|line| line.chars().count() <= 110), "{table}");
    }

    /// Of two nodes, the second of which fetched so many blocks.
    fn of_two(blocks: u64) -> Report {
        let fetched = Moved { blocks, bytes: 4096 * blocks };
        let node = |at: usize| NodeReport { node: format!("node-{at}"), ..NodeReport::default() };
        let nodes = vec![node(1), NodeReport { fetched, ..node(2) }];
        let restarts = vec![Restart { node: "node-2".into(), ..Restart::default() }];
        let mut report = Report { nodes, restarts, ..report() };
        let mut tally = Tally { rerouted: 5, ..Tally::default() };
        tally.served.insert(1, 7);
        (0..blocks).for_each(|_| tally.hit(Source::Peer, Duration::from_micros(900)));
        report.take(&tally);
        report
    }

    #[test]
    fn several_nodes_are_told_apart_and_a_single_one_is_told_as_before() {
        let table = of_two(3).to_string();
        for part in
            ["peer 3 (", "fetched    3 blocks, 12KiB", "node-2", "3, 12KiB", "5 requests", "node-2 after"]
        {
            assert!(table.contains(part), "{part}: {table}");
        }
        assert!(table.lines().all(|line| line.chars().count() <= 110), "{table}");
        let json: serde_json::Value = serde_json::from_str(&of_two(3).json()).unwrap();
        assert_eq!((&json["fetched_blocks"], &json["hits"]["peer"]), (&3.into(), &3.into()));
        let second = &json["nodes"][1];
        assert_eq!((&second["node"], &second["fetched"]["blocks"]), (&"node-2".into(), &3.into()));
        assert_eq!(second["requests"], 7);
        for word in ["peer", "node", " each,"] {
            assert!(!report().to_string().contains(word), "{word}");
        }
    }

    #[test]
    fn an_object_store_is_told_of_and_nothing_in_it_is_not_right() {
        let object =
            ObjectReport { store: "s3://b".into(), blocks: 12, uploaded_bytes: 4096, ..Default::default() };
        let mut with = Report { object: Some(object.clone()), ..report() };
        let mut tally = Tally::default();
        tally.hit(Source::Object, Duration::from_millis(20));
        with.take(&tally);
        let table = with.to_string();
        for part in ["object 1 (", "object 20.0 ms", "12 blocks in s3://b", "4KiB went up"] {
            assert!(table.replace("p50 ", "").contains(part), "{part}: {table}");
        }
        assert!(with.is_right() && !report().to_string().contains("object"));
        let empty = Some(ObjectReport { blocks: 0, ..object });
        assert!(!Report { object: empty.clone(), ..report() }.is_right());
        assert!(Report { object: empty, ended: "signal", ..report() }.is_right());
    }

    #[test]
    fn nodes_that_had_nothing_from_each_other_are_not_right_unless_they_were_stopped() {
        assert!(of_two(1).is_right());
        assert!(!of_two(0).is_right());
        assert!(Report { ended: "signal", ..of_two(0) }.is_right());
    }

    #[test]
    fn a_wrong_byte_or_a_lost_block_is_not_right() {
        assert!(report().is_right());
        assert!(!Report { wrong_bytes: 1, ..report() }.is_right());
        assert!(!Report { lost_durable_blocks: 1, ..report() }.is_right());
    }
}
