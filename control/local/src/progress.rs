//! How far it is: a bar on a terminal, a line every few seconds elsewhere. On standard error.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::replay::Live;

const LINE_EVERY: Duration = Duration::from_secs(5);
const DRAW_EVERY: Duration = Duration::from_millis(100);

/// Shows how far a replay is.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    total: u64,
    next: Instant,
}

impl Progress {
    /// Of so many requests; `terminal` says whether standard error is one.
    pub fn new(total: u64, terminal: bool) -> Self {
        let style = "{elapsed:>4} [{bar:30}] {pos}/{len} requests  {msg}";
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let plain = ProgressStyle::default_bar();
            bar.set_style(ProgressStyle::with_template(style).unwrap_or(plain).progress_chars("=> "));
            bar
        });
        let every = if bar.is_some() { DRAW_EVERY } else { LINE_EVERY };
        Self { bar, total, next: Instant::now() + every }
    }

    /// Shows the counts, if it is time to.
    pub fn show(&mut self, live: &Live) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        let done = live.requests.load(Ordering::Relaxed);
        let words = words(live);
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(words);
                self.next = now + DRAW_EVERY;
            }
            None => {
                eprintln!("{done}/{} requests  {words}", self.total);
                self.next = now + LINE_EVERY;
            }
        }
    }

    /// Something happened that is worth a line.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }

    /// Nothing more to show.
    pub fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn words(live: &Live) -> String {
    let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::Relaxed);
    let (host, disk, peer) = (count(&live.hits_host), count(&live.hits_disk), count(&live.hits_peer));
    let object = count(&live.hits_object);
    let (hits, misses) = (host + disk + peer + object, count(&live.misses));
    let share = 100 * hits / (hits + misses).max(1);
    let more = |name, count| if count > 0 { format!(", {name} {count}") } else { String::new() };
    let (peer, object) = (more("peer", peer), more("object", object));
    let wrong = count(&live.wrong_bytes);
    format!("blocks read: host {host}, disk {disk}{peer}{object} ({share}% hits)  wrong bytes {wrong}")
}
