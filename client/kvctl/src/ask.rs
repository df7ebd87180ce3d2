//! The question before something is destroyed.

use std::io::{BufRead as _, IsTerminal, Write as _};

use crate::exit::{Exit, Failure};

/// Asks on the terminal whether to do `what`. Without one nobody can be asked: then it takes `--yes`.
pub(crate) fn confirm(what: &str, yes: bool) -> Result<(), Failure> {
    let (stdin, mut stderr) = (std::io::stdin(), std::io::stderr());
    if yes {
        return Ok(());
    }
    if !(stdin.is_terminal() && stderr.is_terminal()) {
        return Err(Failure::usage(format!("{what}: nobody is there to confirm it"))
            .help("add --yes to do it, or --dry-run to see what would go"));
    }
    let _ = write!(stderr, "{what}? [y/N] ");
    let _ = stderr.flush();
    let mut answer = String::new();
    let read = stdin.lock().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
        return Ok(());
    }
    Err(Failure::new(Exit::Failure, "not confirmed; nothing was done"))
}
