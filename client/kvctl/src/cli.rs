//! The command line. Every page of help fits a terminal of 80 x 24: what all commands take stands on the
//! page of `kvctl options` alone.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use kv_block::{BlockKey, Scope, Tier};

use crate::cmd;
use crate::units::{parse_bytes, parse_duration};

const HELP: &str = "{about}\n\nUsage: {usage}\n\n{subcommands}{after-help}\n";
const MORE: &str = "`kvctl COMMAND --help` says more, `kvctl options` what every command takes.";

/// Look at, and look after, a kvd daemon
#[derive(Debug, Parser)]
#[command(name = "kvctl", version, disable_help_subcommand = true, max_term_width = 80)]
#[command(help_template = HELP, after_help = MORE, propagate_version = false)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Socket path or https://host:port [/run/kvd/kvd.sock]
    #[arg(long, global = true, env = "KVCTL_ENDPOINT", value_name = "WHERE")]
    #[arg(hide = true)]
    pub(crate) endpoint: Option<String>,
    /// Longest wait for the daemon to connect or answer
    #[arg(long, global = true, default_value = "10s", value_name = "TIME", value_parser = parse_duration)]
    #[arg(hide = true)]
    pub(crate) timeout: Duration,
    /// PEM file of the authority behind the daemon's certificate
    #[arg(long, global = true, env = "KVCTL_TLS_CA", value_name = "FILE")]
    #[arg(hide = true)]
    pub(crate) tls_ca: Option<PathBuf>,
    /// PEM file with this user's certificate
    #[arg(long, global = true, env = "KVCTL_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    #[arg(hide = true)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// PEM file with the certificate's private key
    #[arg(long, global = true, env = "KVCTL_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    #[arg(hide = true)]
    pub(crate) tls_key: Option<PathBuf>,
    /// Name in the daemon's certificate, when not the host's
    #[arg(long, global = true, value_name = "NAME")]
    #[arg(hide = true)]
    pub(crate) tls_name: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Health of the daemon, on one screen
    Status(cmd::status::Arguments),
    /// List tiers, blocks, clients, tenants, peers, packs, GPUs, ...
    Get(cmd::get::Arguments),
    /// All about one tier, block, client, tenant, peer, pack or GPU
    Describe(cmd::describe::Arguments),
    /// Why a block is here, or why it is not
    Why(cmd::why::Arguments),
    /// What a code (KVD-3001) or a miss reason means
    Explain(cmd::explain::Arguments),
    /// Keep blocks for a time, or until kvd restarts; `unpin` ends it
    Pin(cmd::pin::Arguments),
    /// Let pinned blocks go again
    #[command(hide = true)]
    Unpin(cmd::unpin::Arguments),
    /// Remove blocks from host memory, from disk or from both
    Evict(cmd::evict::Arguments),
    /// Remove everything of a tenant or a tier from this node
    Purge(cmd::purge::Arguments),
    /// Read and check every block
    Verify(cmd::verify::Arguments),
    /// The object store: list its packs, collect, what it costs
    Object(cmd::object::Arguments),
    /// Set a tenant's quota until the next restart
    Quota(cmd::quota::Arguments),
    /// Take no new work, move blocks to peers; `undrain` ends it
    Drain(cmd::drain::Arguments),
    /// Take new work again
    #[command(hide = true)]
    Undrain,
    /// Put, look up and read blocks; print p50, p99 and throughput
    Bench(cmd::bench::Arguments),
    /// Name every missing prerequisite and the command that mends it
    Doctor(cmd::doctor::Arguments),
    /// Check a configuration file, print the one in force
    Config(cmd::config::Arguments),
    /// Versions of kvctl and of the daemon
    Version(cmd::version::Arguments),
    /// Completion script for bash, zsh or fish
    Completion(cmd::completion::Arguments),
    /// What every command takes
    #[command(hide = true)]
    Options,
}

/// How an answer is written. (Doc comments on the values would make every page of help a long one.)
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub(crate) enum Format {
    // For people.
    #[default]
    Table,
    // For people with a wide terminal.
    Wide,
    // For programs; names are those of the protocol.
    Json,
    // The same as YAML.
    Yaml,
    // One name a line.
    Name,
}

/// Output of a command that answers once.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Show {
    /// Format of the answer
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value_t, hide_default_value = true)]
    pub(crate) output: Format,
}

/// Again and again.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Watch {
    /// Look again every so often [2s when no time is given]
    #[arg(short, long, value_name = "EVERY", num_args = 0..=1, default_missing_value = "2s")]
    #[arg(value_parser = parse_duration, require_equals = true)]
    pub(crate) watch: Option<Duration>,
}

/// Output of a listing.
#[derive(Debug, Clone, Args)]
pub(crate) struct Listing {
    #[command(flatten)]
    pub(crate) show: Show,
    #[command(flatten)]
    pub(crate) watch: Watch,
    /// Leave the line of headings out
    #[arg(long)]
    pub(crate) no_headers: bool,
    /// Sort by the column with this heading; -COLUMN: largest first
    #[arg(long, value_name = "COLUMN", allow_hyphen_values = true)]
    pub(crate) sort_by: Option<String>,
}

/// Splits `describe block/KEY`, the name that `get -o name` prints, into the words that the grammar has.
pub(crate) fn spread(mut words: Vec<OsString>) -> Vec<OsString> {
    let Some(verb) = words.iter().skip(1).position(|word| word == "describe") else { return words };
    let at = verb + 2;
    let named = words.get(at).and_then(|word| word.to_str()).and_then(|word| word.split_once('/'));
    let Some((noun, name)) = named.map(|(noun, name)| (noun.to_owned(), name.to_owned())) else {
        return words;
    };
    words.splice(at..=at, [noun.into(), name.into()]);
    words
}

/// A tier by name.
pub(crate) fn tier_parser() -> impl TypedValueParser<Value = Tier> {
    PossibleValuesParser::new(Tier::ALL.map(Tier::name)).map(|name| {
        Tier::ALL.into_iter().find(|tier| tier.name() == name).expect("one of the possible values")
    })
}

/// A tenant by name.
pub(crate) fn parse_tenant(text: &str) -> Result<String, String> {
    if Scope::is_tenant(text) {
        Ok(text.to_owned())
    } else {
        Err("a tenant's name is 1 to 63 of a-z, 0-9 and '-'".into())
    }
}

/// The beginning of a key.
pub(crate) fn parse_key_prefix(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("block/").unwrap_or(text).to_ascii_lowercase();
    let hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if hex && digits.len() <= 2 * BlockKey::BYTES {
        Ok(digits)
    } else {
        Err("not up to 32 hex digits".into())
    }
}

/// A size like 64KiB that a block length can be.
pub(crate) fn parse_block_bytes(text: &str) -> Result<u32, String> {
    let bytes = parse_bytes(text)?;
    u32::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("{text} is not a block length"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Calls `see` with each command's line and what it prints for `--help`.
    fn each(command: &clap::Command, path: &str, see: &mut impl FnMut(&str, &str)) {
        let line = format!("{path} --help");
        let page = Cli::command().try_get_matches_from(line.split(' ')).unwrap_err().to_string();
        see(path, &page);
        for sub in command.get_subcommands() {
            each(sub, &format!("{path} {}", sub.get_name()), see);
        }
    }

    #[test]
    fn every_page_of_help_fits_80_by_24() {
        let mut pages = 0;
        each(&Cli::command(), "kvctl", &mut |path, page| {
            pages += 1;
            let lines = page.trim_end().lines().count();
            assert!(lines < 24, "{path}: {lines} lines\n{page}");
            let widest = page.lines().max_by_key(|line| line.chars().count()).unwrap_or("");
            assert!(widest.chars().count() <= 80, "{path}: too wide: {widest}");
        });
        assert!(pages > 25, "only {pages} pages were looked at");
    }

    #[test]
    fn no_command_has_an_argument_called_as_a_global_one() {
        fn walk(command: &clap::Command, globals: &[&str], path: &str) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                for argument in sub.get_arguments() {
                    assert!(!globals.contains(&argument.get_id().as_str()), "{path} {}", argument.get_id());
                }
                walk(sub, globals, &path);
            }
        }
        let command = Cli::command();
        let globals = command.get_arguments().filter(|argument| argument.is_global_set());
        let globals: Vec<&str> = globals.map(|argument| argument.get_id().as_str()).collect();
        assert!(globals.contains(&"timeout"));
        walk(&command, &globals, "kvctl");
    }

    #[test]
    fn a_name_with_its_noun_is_two_words_to_describe_alone() {
        let spread = |line: &str| {
            let words = spread(line.split(' ').map(OsString::from).collect());
            words.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(spread("kvctl describe block/ab -o json"), "kvctl describe block ab -o json");
        assert_eq!(
            spread("kvctl --timeout 1s describe tier/host/0"),
            "kvctl --timeout 1s describe tier host/0"
        );
        for same in ["kvctl", "kvctl describe", "kvctl describe block ab", "kvctl why block/ab"] {
            assert_eq!(spread(same), same);
        }
    }

    #[test]
    fn watch_takes_a_time_only_after_an_equals_sign() {
        let watch = |line: &str| match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Status(arguments) => arguments.watch.watch,
            _ => unreachable!(),
        };
        assert_eq!(watch("kvctl status"), None);
        assert_eq!(watch("kvctl status -w"), Some(Duration::from_secs(2)));
        assert_eq!(watch("kvctl status --watch=500ms"), Some(Duration::from_millis(500)));
    }
}
