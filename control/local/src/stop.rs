//! Ctrl-C and its like: the first asks for an orderly end, a later one ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// Exit status of a program that a signal ended (128 and SIGINT).
pub const EXIT_STOPPED: u8 = 130;

/// Signals that come so soon after the first are the same wish: `timeout` and the like send theirs twice.
const ECHO: Duration = Duration::from_secs(1);

/// Set once somebody asked for the end. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether it is time to end.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks for the end.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Watches SIGINT, SIGTERM and SIGHUP on a thread of its own.
    pub fn on_signals() -> anyhow::Result<Self> {
        let stop = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("starting a runtime for signals")?;
        let watch = |kind| {
            let _entered = runtime.enter();
            signal(kind).context("watching signals")
        };
        let mut signals =
            (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?, watch(SignalKind::hangup())?);
        let asked = stop.clone();
        let follow = async move {
            let mut first = None;
            loop {
                tokio::select! {
                    _ = signals.0.recv() => {}
                    _ = signals.1.recv() => {}
                    _ = signals.2.recv() => {}
                }
                if first.get_or_insert_with(Instant::now).elapsed() > ECHO {
                    eprintln!("stopped at once; files of this run are left behind");
                    std::process::exit(EXIT_STOPPED.into());
                }
                asked.ask();
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(move || runtime.block_on(follow))?;
        Ok(stop)
    }
}
