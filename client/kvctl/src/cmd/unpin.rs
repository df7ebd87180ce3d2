//! `kvctl unpin`: lets pinned blocks go again.

use clap::Args;
use kv_api::v1;

use crate::cli::{Global, Show};
use crate::connect;
use crate::exit::{Exit, Failure};
use crate::names::{self, Blocks};
use crate::out;
use crate::units::counted;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    blocks: Blocks,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let daemon = connect::connect(global).await?;
    let keys = arguments.blocks.keys(&daemon).await?;
    let mut total = v1::UnpinResponse::default();
    for names in names::requests(&keys, daemon.client.keys_per_request_max()) {
        let answer = daemon
            .within(
                daemon.blocks().unpin(daemon.request(v1::UnpinRequest { names: Some(names), session: 0 })),
            )
            .await?;
        total.unpinned += answer.unpinned;
    }
    let text = || format!("{} unpinned\n", counted(total.unpinned.into(), "block"));
    out::answer(arguments.show.output, &total, text)?;
    Ok(if total.unpinned == 0 { Exit::NotFound } else { Exit::Ok })
}
