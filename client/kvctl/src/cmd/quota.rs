//! `kvctl quota`: how many bytes a tenant may hold, until the next restart.

use clap::{Args, Subcommand};
use kv_api::v1;

use crate::cli::{Global, parse_tenant};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::out;
use crate::units::{bytes, parse_bytes};

const LASTING: &str = "It lasts until the daemon restarts; write it to the configuration to keep it.";

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Set a tenant's quota
    #[command(after_help = LASTING)]
    Set {
        /// Tenant, such as team-a
        #[arg(value_parser = parse_tenant)]
        tenant: String,
        /// Most bytes it may hold, such as 64GiB; none lifts the quota
        #[arg(value_parser = parse_quota)]
        size: Quota,
    },
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let What::Set { tenant, size } = arguments.what;
    let daemon = connect::connect(global).await?;
    daemon
        .within(
            daemon
                .admin()
                .set_quota(daemon.request(v1::SetQuotaRequest { tenant: tenant.clone(), bytes_max: size.0 })),
        )
        .await?;
    let quota = size.0.map_or("none".into(), bytes);
    out::print(&format!("quota of {tenant}: {quota}\n"))?;
    Ok(Exit::Ok)
}

/// Bytes, or no quota. A type of its own, because clap takes an `Option` for an argument left out.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Quota(Option<u64>);

fn parse_quota(text: &str) -> Result<Quota, String> {
    match text {
        "none" => Ok(Quota(None)),
        text => Ok(Quota(Some(parse_bytes(text)?))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_quota_must_be_said_in_words() {
        assert_eq!(parse_quota("none"), Ok(Quota(None)));
        assert_eq!(parse_quota("64GiB"), Ok(Quota(Some(64 << 30))));
        assert_eq!(parse_quota("0"), Ok(Quota(Some(0))), "it may hold nothing");
        assert!(parse_quota("much").is_err());
    }
}
