//! `kvctl config`: checks a file with the daemon's own parser; prints what the running daemon goes by.

use std::path::PathBuf;
use std::process::Command;

use clap::{Args, Subcommand};
use kv_api::v1;

use crate::cli::{Global, Show};
use crate::connect;
use crate::exit::{Exit, Failure, printable};
use crate::out;

const ORIGINS: &str = "Without --effective only what somebody set: a file, the environment or a flag.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Check a file as the daemon would: runs `kvd --check --config FILE`
    Check {
        /// Configuration file
        file: PathBuf,
    },
    /// Print what the running daemon goes by
    #[command(after_help = ORIGINS)]
    Print {
        /// Defaults, too: the whole configuration in force
        #[arg(long)]
        effective: bool,
        /// Say beside each value where it comes from
        #[arg(long)]
        origin: bool,
        /// Print the plan that follows from it, as `kvd --check` does
        #[arg(long, conflicts_with_all = ["effective", "origin"])]
        plan: bool,
        #[command(flatten)]
        show: Show,
    },
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    match arguments.what {
        What::Check { file } => check(&file),
        What::Print { effective, origin, plan, show } => {
            let daemon = connect::connect(global).await?;
            let answer =
                daemon.within(daemon.admin().get_config(daemon.request(v1::GetConfigRequest {}))).await?;
            out::answer(show.output, &answer, || match (plan, effective && !origin) {
                (true, _) => answer.plan.clone(),
                (_, true) => answer.toml.clone(),
                _ => values(&answer.values, effective, origin),
            })?;
            Ok(Exit::Ok)
        }
    }
}

/// Runs the daemon's binary: there is one parser, and it is the daemon's. Its words and its exit code are
/// passed on as they are.
fn check(file: &std::path::Path) -> Result<Exit, Failure> {
    let kvd = beside_or_on_path("kvd");
    let status = Command::new(&kvd).arg("--check").arg("--config").arg(file).status().map_err(|error| {
        Failure::new(Exit::Failure, format!("cannot run {}: {error}", kvd.display()))
            .help("the check is made by the daemon's own parser: put kvd beside kvctl or on PATH")
    })?;
    match status.code() {
        Some(0) => Ok(Exit::Ok),
        Some(code) => std::process::exit(code),
        None => Err(Failure::new(Exit::Failure, format!("{} was ended: {status}", kvd.display()))),
    }
}

/// The program beside this one when it is there, else by name through PATH.
fn beside_or_on_path(name: &str) -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| name.into())
}

/// `key = value` lines, which are TOML again; the origin stands behind as a comment.
fn values(values: &[v1::ConfigValue], defaults: bool, origin: bool) -> String {
    let shown: Vec<_> = values.iter().filter(|value| defaults || value.origin != "default").collect();
    let line = |value: &v1::ConfigValue| printable(&format!("{} = {}", value.key, value.value));
    let width = shown.iter().map(|value| line(value).chars().count()).max().unwrap_or(0);
    shown
        .into_iter()
        .map(|value| match origin {
            true => format!("{:width$}  # {}\n", line(value), printable(&value.origin)),
            false => format!("{}\n", line(value)),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(key: &str, value: &str, origin: &str) -> v1::ConfigValue {
        v1::ConfigValue { key: key.into(), value: value.into(), origin: origin.into() }
    }

    #[test]
    fn defaults_show_only_on_demand_and_origins_are_comments() {
        let all = [
            value("host.bytes_max", "\"2GiB\"", "/etc/kvd/kvd.toml:3"),
            value("node", "\"a\"", "default"),
            value("disk.dir", "\"/d\"", "flag"),
        ];
        assert_eq!(values(&all, false, false), "host.bytes_max = \"2GiB\"\ndisk.dir = \"/d\"\n");
        let text = values(&all, true, true);
        let wanted = "\
host.bytes_max = \"2GiB\"  # /etc/kvd/kvd.toml:3
node = \"a\"               # default
disk.dir = \"/d\"          # flag
";
        assert_eq!(text, wanted, "\n{text}");
        assert!(text.parse::<toml::Table>().is_ok());
    }

    #[test]
    fn the_daemon_beside_us_is_preferred() {
        assert_eq!(beside_or_on_path("no-such-program-here"), PathBuf::from("no-such-program-here"));
    }
}
