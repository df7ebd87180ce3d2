//! Log lines on standard error: text for a terminal, one JSON object a line for everything else.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

use crate::config::Log;
use crate::config::units::LogFormat;

/// How lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    Json,
    Text { colour: bool },
}

fn shape(format: LogFormat, terminal: bool, no_colour: bool) -> Shape {
    match format {
        LogFormat::Json => Shape::Json,
        LogFormat::Auto if !terminal => Shape::Json,
        LogFormat::Auto | LogFormat::Text => Shape::Text { colour: terminal && !no_colour },
    }
}

/// Starts logging for the whole process. Says so when it had been started before.
pub fn init(log: &Log) -> Result<(), String> {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let filter = EnvFilter::try_new(&log.level).map_err(|error| error.to_string())?;
    let base = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let done = match shape(log.format, std::io::stderr().is_terminal(), no_colour) {
        Shape::Json => base.json().flatten_event(true).with_current_span(false).try_init(),
        Shape::Text { colour } => base.compact().with_ansi(colour).try_init(),
    };
    done.map_err(|error| error.to_string())
}

/// Whether `level` is a level or a list of directives; if not, what is expected.
pub(crate) fn check_level(level: &str) -> Result<(), String> {
    let known = |word: &str| {
        ["off", "error", "warn", "info", "debug", "trace"]
            .contains(&word.trim().to_ascii_lowercase().as_str())
    };
    for part in level.split(',') {
        let (target, word) = part.rsplit_once('=').unwrap_or(("-", part));
        if target.trim().is_empty() || !known(word) {
            return Err(format!(
                "`{part}` is not error, warn, info, debug, trace or off, nor a directive such as kv_ssd=debug"
            ));
        }
    }
    EnvFilter::try_new(level).map(drop).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_off_a_terminal_and_colour_only_on_one() {
        assert_eq!(shape(LogFormat::Auto, false, false), Shape::Json);
        assert_eq!(shape(LogFormat::Auto, true, false), Shape::Text { colour: true });
        assert_eq!(shape(LogFormat::Auto, true, true), Shape::Text { colour: false });
        assert_eq!(shape(LogFormat::Text, false, false), Shape::Text { colour: false });
        assert_eq!(shape(LogFormat::Json, true, false), Shape::Json);
    }

    #[test]
    fn levels_are_checked() {
        for good in ["info", "INFO", "info,kv_ssd=debug", "kvd::http=off,warn"] {
            assert_eq!(check_level(good), Ok(()), "{good}");
        }
        for bad in ["", "loud", "info,", "=debug", "kv_ssd=loud", "info;debug"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
