//! Long work: follows a stream of progress to its end, with a bar on stderr when that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kv_api::v1;

use crate::exit::{Exit, Failure};

/// Fewest seconds without news before the daemon counts as gone: one step may read a whole segment.
const SILENCE_MIN: Duration = Duration::from_secs(60);

/// A bar over `total` things; draws only on a terminal.
pub(crate) fn bar(verb: &'static str, noun: &str, total: u64) -> ProgressBar {
    let target = if std::io::IsTerminal::is_terminal(&std::io::stderr()) {
        ProgressDrawTarget::stderr_with_hz(10)
    } else {
        ProgressDrawTarget::hidden()
    };
    let template = format!("{{msg:>9}} [{{bar:24}}] {{human_pos}} of {{human_len}} {noun}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).expect("a fixed template");
    ProgressBar::with_draw_target(Some(total), target)
        .with_style(style.progress_chars("=> "))
        .with_message(verb)
}

/// A report on long work.
pub(crate) trait Report: Default {
    /// How much of how much is done.
    fn done(&self) -> (u64, u64);
    /// Whether it is the last one.
    fn finished(&self) -> bool;
}

impl Report for v1::Progress {
    fn done(&self) -> (u64, u64) {
        (self.done, self.total)
    }

    fn finished(&self) -> bool {
        self.finished
    }
}

impl Report for v1::EvacuateProgress {
    fn done(&self) -> (u64, u64) {
        (self.offered, self.total)
    }

    fn finished(&self) -> bool {
        self.finished
    }
}

/// The last report of the stream. A stream that ends unfinished or falls silent is a failure.
pub(crate) async fn follow<R: Report>(
    verb: &'static str,
    mut stream: tonic::Streaming<R>,
    timeout: Duration,
) -> Result<R, Failure> {
    let bar = bar(verb, "blocks", 0);
    let mut last = R::default();
    let silence = timeout.max(SILENCE_MIN);
    loop {
        let next = tokio::time::timeout(silence, stream.message()).await.map_err(|_| {
            let heard = crate::units::seconds(silence.as_secs());
            Failure::new(Exit::Unreachable, format!("the daemon said nothing for {heard}"))
                .help("`kvctl status` shows whether it lives; work that nobody waits for is stopped, what is done stays done")
        })?;
        let Some(report) = next? else { break };
        let (done, total) = report.done();
        bar.set_length(total);
        bar.set_position(done);
        last = report;
    }
    bar.finish_and_clear();
    if last.finished() {
        return Ok(last);
    }
    let (done, total) = last.done();
    Err(Failure::new(Exit::Failure, format!("it ended early, after {done} of {total} blocks"))
        .help("run it again: what is done stays done"))
}
