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

/// The last report of the stream. A stream that ends unfinished or falls silent is a failure.
pub(crate) async fn follow(
    verb: &'static str,
    mut stream: tonic::Streaming<v1::Progress>,
    timeout: Duration,
) -> Result<v1::Progress, Failure> {
    let bar = bar(verb, "blocks", 0);
    let mut last = v1::Progress::default();
    let silence = timeout.max(SILENCE_MIN);
    loop {
        let next = tokio::time::timeout(silence, stream.message()).await.map_err(|_| {
            let heard = crate::units::seconds(silence.as_secs());
            Failure::new(Exit::Unreachable, format!("the daemon said nothing for {heard}"))
                .help("`kvctl status` shows whether it lives; work that nobody waits for is stopped, what is done stays done")
        })?;
        let Some(report) = next? else { break };
        bar.set_length(report.total);
        bar.set_position(report.done);
        last = report;
    }
    bar.finish_and_clear();
    if last.finished {
        return Ok(last);
    }
    Err(Failure::new(Exit::Failure, format!("it ended early, after {} of {} blocks", last.done, last.total))
        .help("run it again: what is done stays done"))
}
