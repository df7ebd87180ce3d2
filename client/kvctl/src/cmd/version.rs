//! `kvctl version`: ours and the daemon's, and whether they go together.

use clap::Args;

use crate::cli::{Format, Global, Show};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::structured;

/// Our own version.
pub(crate) const OWN: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Do not ask the daemon
    #[arg(long)]
    client: bool,
    /// Exit with 4 when the two do not go together
    #[arg(long, conflicts_with = "client")]
    check: bool,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = if arguments.client {
        None
    } else {
        let daemon = connect::connect(global).await?;
        Some(daemon.client.describe().await?.version)
    };
    let daemon = daemon.as_deref();
    let json = || serde_json::json!({ "kvctl": OWN, "daemon": daemon });
    let format = arguments.show.output;
    let text = structured::text(format, false, json);
    out::print(
        &text.unwrap_or_else(|| if format == Format::Name { format!("{OWN}\n") } else { page(daemon) }),
    )?;
    let skewed = daemon.is_some_and(|daemon| skew(OWN, daemon).is_some());
    Ok(if arguments.check && skewed { Exit::Degraded } else { Exit::Ok })
}

fn page(daemon: Option<&str>) -> String {
    let Some(daemon) = daemon else { return format!("kvctl  {OWN}\n") };
    let skew = skew(OWN, daemon).map_or(String::new(), |skew| format!("  ({skew})"));
    format!("kvctl  {OWN}\nkvd    {daemon}{skew}\n")
}

/// What is wrong between the two, if anything: they go together within one minor version of one major.
pub(crate) fn skew(kvctl: &str, daemon: &str) -> Option<String> {
    let parse = |version: &str| {
        let mut parts = version.split(['.', '-', '+']).map(str::parse::<u64>);
        Some((parts.next()?.ok()?, parts.next()?.ok()?))
    };
    match (parse(kvctl), parse(daemon)) {
        (Some(mine), Some(theirs)) if mine.0 == theirs.0 && mine.1.abs_diff(theirs.1) <= 1 => None,
        (Some(mine), Some(theirs)) if mine < theirs => Some("kvctl is too old for this daemon".into()),
        (Some(_), Some(_)) => Some("the daemon is too old for this kvctl".into()),
        _ => Some(format!("`{daemon}` is not a version")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_minor_versions_go_together() {
        assert_eq!(skew("0.2.0", "0.1.9"), None);
        assert_eq!(skew("1.4.0", "1.5.0-rc1"), None);
        assert!(skew("0.1.0", "0.3.0").unwrap().contains("kvctl is too old"));
        assert!(skew("2.0.0", "1.9.0").unwrap().contains("daemon is too old"));
        assert!(skew("0.1.0", "unknown").is_some());
    }
}
