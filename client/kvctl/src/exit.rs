//! How a command ends: a stable exit code, and for a failure one cause and one way out, as cargo writes it.
//!
//! ```text
//! 0 ok | 1 failure | 2 usage | 3 not found | 4 degraded | 5 unreachable | 6 denied
//! ```

use std::fmt::Write as _;

use kv_block::code::Code;
use kv_block::{Fault, FaultKind};

use crate::paint::{Ink, Paint};

/// What the process exits with. Scripts rely on the numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Exit {
    /// It was done.
    Ok = 0,
    /// It was not done, or not wholly.
    Failure = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// What was named is not there.
    NotFound = 3,
    /// The daemon serves, but something is out of order.
    Degraded = 4,
    /// No daemon answers.
    Unreachable = 5,
    /// The caller may not.
    Denied = 6,
}

/// Why a command ended early, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// One cause, lower case, no full stop.
    pub(crate) message: String,
    /// One way out.
    pub(crate) help: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), help: None }
    }

    /// The command line makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    #[must_use]
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The lines for stderr. What a daemon said may not steer the terminal.
    pub(crate) fn render(&self, paint: Paint) -> String {
        let mut text = format!("{} {}\n", paint.ink(Ink::Bad, "error:"), printable(&self.message));
        if let Some(help) = &self.help {
            let _ = writeln!(text, "{} {}", paint.ink(Ink::Note, "help:"), printable(help));
        }
        text
    }
}

/// `text` without control characters: names come from other processes and may hold anything.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        let exit = match (fault.kind, fault.code) {
            (FaultKind::NotFound, _) => Exit::NotFound,
            (FaultKind::Denied, _) => Exit::Denied,
            (_, Code::Unreachable) => Exit::Unreachable,
            (FaultKind::Unavailable | FaultKind::Busy | FaultKind::Full, _) => Exit::Degraded,
            _ => Exit::Failure,
        };
        let wait = fault.retry_after.map_or(String::new(), |wait| {
            format!(" (again in {})", crate::units::milliseconds(wait.as_millis() as u64))
        });
        let message = if fault.message.is_empty() {
            format!("{}: {}{wait}", fault.code, fault.code.title())
        } else {
            format!("{}: {}: {}{wait}", fault.code, fault.code.title(), fault.message)
        };
        let help = format!("{} More: kvctl explain {}", fault.code.action(), fault.code);
        Self::new(exit, message).help(help)
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code as Grpc;
        let ours = !status.details().is_empty();
        match status.code() {
            // Made by our own side of the connection: the daemon said nothing at all.
            Grpc::DeadlineExceeded | Grpc::Cancelled if !ours => {
                Self::new(Exit::Unreachable, "the daemon did not answer in time")
                    .help("allow more with --timeout 60s, or see `kvctl doctor`")
            }
            Grpc::Unimplemented if !ours => {
                Self::new(Exit::Failure, format!("the daemon does not know this call: {}", status.message()))
                    .help("compare the two with `kvctl version`; use the kvctl that came with the daemon")
            }
            _ => kv_api::fault::from_status(&status).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_ends_in_the_exit_its_kind_calls_for() {
        let exit = |code: Code| Failure::from(Fault::new(code, "x")).exit;
        assert_eq!(exit(Code::UnknownTenant), Exit::NotFound);
        assert_eq!(exit(Code::Denied), Exit::Denied);
        assert_eq!(exit(Code::Unreachable), Exit::Unreachable);
        assert_eq!(exit(Code::TierDegraded), Exit::Degraded);
        assert_eq!(exit(Code::QueueFull), Exit::Degraded);
        assert_eq!(exit(Code::BadRequest), Exit::Failure);
        assert_eq!(exit(Code::Bug), Exit::Failure);
    }

    #[test]
    fn a_fault_is_written_with_cause_and_way_out() {
        let text = Failure::from(Fault::new(Code::Denied, "uid 1000")).render(Paint::plain());
        assert_eq!(
            text,
            "error: KVD-1010: the caller may not do that: uid 1000\nhelp: Allow it in the configuration: \
             `workers.uids` for workers, `listen.admin_uids` for administration. More: kvctl explain KVD-1010\n"
        );
    }

    #[test]
    fn a_daemon_that_says_nothing_is_unreachable() {
        assert_eq!(Failure::from(tonic::Status::deadline_exceeded("x")).exit, Exit::Unreachable);
        assert_eq!(Failure::from(tonic::Status::cancelled("x")).exit, Exit::Unreachable);
        let slow = kv_api::fault::to_status(&Fault::new(Code::DeadlinePassed, "x"));
        assert_eq!(Failure::from(slow).exit, Exit::Failure, "the daemon answered: its own deadline passed");
    }

    #[test]
    fn escape_sequences_never_reach_the_terminal() {
        let text = Failure::new(Exit::Failure, "a\u{1b}[2Jb").render(Paint::plain());
        assert_eq!(text, "error: a?[2Jb\n");
    }
}
