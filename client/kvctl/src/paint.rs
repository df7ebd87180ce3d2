//! Colour, only where somebody sees it: on a terminal, and as `NO_COLOR` and `CLICOLOR_FORCE` say.

use std::io::IsTerminal;

/// What a word means to the reader.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Ink {
    /// As it is.
    #[default]
    Plain,
    /// In order.
    Good,
    /// Look at it.
    Warn,
    /// Out of order.
    Bad,
    /// A hint.
    Note,
    /// A heading.
    Head,
}

/// Whether to colour.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Paint(bool);

impl Paint {
    /// No colour.
    #[cfg(test)]
    pub(crate) fn plain() -> Self {
        Self(false)
    }

    /// For standard output.
    pub(crate) fn stdout() -> Self {
        Self::of(std::io::stdout().is_terminal())
    }

    /// For standard error.
    pub(crate) fn stderr() -> Self {
        Self::of(std::io::stderr().is_terminal())
    }

    fn of(terminal: bool) -> Self {
        Self(coloured(terminal, |name| std::env::var(name).ok()))
    }

    /// `text` in this ink.
    pub(crate) fn ink(self, ink: Ink, text: &str) -> String {
        let code = match ink {
            _ if !self.0 || text.is_empty() => return text.to_owned(),
            Ink::Plain => return text.to_owned(),
            Ink::Good => "32",
            Ink::Warn => "33",
            Ink::Bad => "1;31",
            Ink::Note => "36",
            Ink::Head => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// The rule of no-color.org and bixense.com/clicolors: `NO_COLOR` wins, then `CLICOLOR_FORCE`, then the
/// terminal unless it is dumb.
fn coloured(terminal: bool, variable: impl Fn(&str) -> Option<String>) -> bool {
    let set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    if set("NO_COLOR") {
        return false;
    }
    if set("CLICOLOR_FORCE") && variable("CLICOLOR_FORCE").as_deref() != Some("0") {
        return true;
    }
    terminal && variable("TERM").as_deref() != Some("dumb") && variable("CLICOLOR").as_deref() != Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_follows_terminal_and_environment() {
        let with = |terminal, set: &'static [(&str, &str)]| {
            coloured(terminal, |name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
        };
        assert!(with(true, &[]));
        assert!(!with(false, &[]));
        assert!(!with(true, &[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")]), "NO_COLOR wins");
        assert!(with(true, &[("NO_COLOR", "")]), "empty counts as unset");
        assert!(with(false, &[("CLICOLOR_FORCE", "1")]));
        assert!(!with(false, &[("CLICOLOR_FORCE", "0")]));
        assert!(!with(true, &[("TERM", "dumb")]));
        assert!(!with(true, &[("CLICOLOR", "0")]));
    }
}
