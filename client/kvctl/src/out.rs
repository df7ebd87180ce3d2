//! Data goes to stdout; a closed pipe (`kvctl get blocks | head`) is the reader's good right.

use std::io::{IsTerminal, Write as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::cli::{Format, Watch};
use crate::exit::{Exit, Failure};
use crate::structured::{self, Named};

/// Writes data.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(Exit::Ok as i32),
        Err(error) => Err(Failure::new(Exit::Failure, format!("cannot write to standard output: {error}"))),
    }
}

/// Writes a word to the person, beside the data.
pub(crate) fn note(text: &str) {
    // Nobody is left to tell when stderr is gone.
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One answer as `format` wants it: for programs the message, for people what `text` makes of it.
pub(crate) fn answer<M: Named>(
    format: Format,
    message: &M,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    print(&structured::text(format, false, || structured::json(message)).unwrap_or_else(text))
}

/// Unix seconds now.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Prints what `look` gives, once, or again and again with `--watch`: on a terminal in place, elsewhere one
/// after the other.
pub(crate) async fn watched(
    watch: &Watch,
    mut look: impl AsyncFnMut() -> Result<(String, Exit), Failure>,
) -> Result<Exit, Failure> {
    let Some(every) = watch.watch else {
        let (text, exit) = look().await?;
        print(&text)?;
        return Ok(exit);
    };
    // A bound keeps a typing error from becoming a load test.
    let every = every.max(Duration::from_millis(100));
    let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
    loop {
        let (text, _) = look().await?;
        print(&format!("{clear}{text}"))?;
        tokio::time::sleep(every).await;
    }
}
