//! `kvctl why`: why a block is here or not. A miss is an answer, so it exits with 0 either way.

use clap::Args;
use kv_api::v1;
use kv_block::{BlockKey, MissReason};

use crate::cli::{Format, Global, Show, parse_block_bytes};
use crate::cmd::describe::block_fields;
use crate::cmd::explain::reason_page;
use crate::cmd::get::tier_name;
use crate::connect::{self, Daemon};
use crate::exit::{Exit, Failure, printable};
use crate::names::{self, Blocks, Named};
use crate::out;
use crate::structured::{self, hex};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    blocks: Blocks,
    /// With --scope: the block length it would be stored with
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = parse_block_bytes)]
    block_bytes: u32,
    #[command(flatten)]
    show: Show,
}

pub(crate) async fn run(global: &Global, arguments: Arguments) -> Result<Exit, Failure> {
    let named = arguments.blocks.meaning()?;
    let daemon = connect::connect(global).await?;
    let keys = arguments.blocks.keys(&daemon).await?;
    let several = keys.len() > 1;
    // Asking around costs every peer a question: once is enough, as the first absent block ends a prefix.
    let mut asked_around = false;
    for key in keys {
        let mut answer = explain(&daemon, names_of(key)).await?;
        if let Some(named) = &named
            && answer
                .miss
                .as_ref()
                .is_some_and(|miss| kv_api::convert::miss_reason(miss) == MissReason::NeverStored)
        {
            answer = compare(&daemon, named, arguments.block_bytes).await?.unwrap_or(answer);
        }
        let mut elsewhere = None;
        if answer.miss.is_some() && !std::mem::replace(&mut asked_around, true) {
            elsewhere = find_elsewhere(&daemon, key).await;
        }
        let format = arguments.show.output;
        let text = structured::text(format, several, || json(&answer, elsewhere.as_ref()));
        out::print(&text.unwrap_or_else(|| match format {
            Format::Name => format!("block/{key}\n"),
            _ => page(&key, &answer, elsewhere.as_ref(), named.as_ref(), out::now()),
        }))?;
    }
    Ok(Exit::Ok)
}

fn names_of(key: BlockKey) -> v1::Names {
    names::requests(&[key], 1).next().unwrap_or_default()
}

async fn explain(daemon: &Daemon, names: v1::Names) -> Result<v1::ExplainResponse, Failure> {
    daemon
        .within(
            daemon.blocks().explain(daemon.request(v1::ExplainRequest { names: Some(names), session: 0 })),
        )
        .await
}

/// Which peer has the block, or expects it. That it is not here stands without it, so a failure is none.
async fn find_elsewhere(daemon: &Daemon, key: BlockKey) -> Option<v1::Found> {
    let request = v1::LookupRequest { names: Some(names_of(key)), peers: true, ..Default::default() };
    let answer = daemon.within(daemon.blocks().lookup(daemon.request(request))).await.ok()?;
    answer.found.into_iter().next().filter(|found| !found.node.is_empty())
}

/// The answer for programs; `elsewhere` is beside what the daemon itself explains.
fn json(answer: &v1::ExplainResponse, elsewhere: Option<&v1::Found>) -> serde_json::Value {
    let mut json = structured::json(answer);
    json["elsewhere"] = elsewhere.map_or(serde_json::Value::Null, structured::json);
    json
}

/// Asks again by scope: only then can the daemon compare it with the scopes it has blocks of. `None` when
/// it does not take the scope (no more room, or not that block length); the plain answer stands then.
async fn compare(
    daemon: &Daemon,
    named: &Named,
    block_bytes: u32,
) -> Result<Option<v1::ExplainResponse>, Failure> {
    let request = v1::RegisterRequest {
        session: 0,
        scope: Some(kv_api::convert::scope_message(&named.scope)),
        slice: Some(kv_api::convert::slice_message(&named.slice)),
        block_bytes,
    };
    let registered = daemon.within(daemon.sessions().register(daemon.request(request))).await;
    let Ok(registered) = registered else { return Ok(None) };
    let names = v1::Names {
        binding: registered.binding,
        sequence_hashes: vec![named.hash.as_bytes().to_vec().into()],
        keys: Vec::new(),
    };
    explain(daemon, names).await.map(Some)
}

/// The answer in words.
fn page(
    key: &BlockKey,
    answer: &v1::ExplainResponse,
    elsewhere: Option<&v1::Found>,
    named: Option<&Named>,
    now: u64,
) -> String {
    let Some(miss) = &answer.miss else {
        let known = answer.block.as_ref().map_or(String::new(), |block| indented(&block_fields(block, now)));
        let pack = match hex(&answer.pack) {
            id if id.is_empty() => id,
            id => format!("  The object store has it, too, in pack {id}.\n"),
        };
        return format!("{key} is here\n{known}{pack}");
    };
    let reason = kv_api::convert::miss_reason(miss);
    let (cause, action) = reason_page(reason);
    let mut text = format!("{key} is not here: {reason}\n");
    if !answer.pack.is_empty() {
        text += &format!("  But the object store has it, in pack {}:\n", hex(&answer.pack));
        text += "  who reads it here and waits gets it from there.\n";
    }
    text.extend(elsewhere.and_then(on_node));
    if !answer.pack.is_empty() {
        // Nobody has to mend anything.
        return text + &format!("  {cause}\n");
    }
    text += &format!("  {cause}\n");
    for field in &miss.fields {
        text += &match named.and_then(|named| field_value(named, field)) {
            Some(value) => format!("  differs: {} (here asked for: {value})\n", printable(field)),
            None => format!("  differs: {}\n", printable(field)),
        };
    }
    text += &format!("  {action}\n");
    // What is gone left its name behind, little else.
    if let Some(block) = answer.block.as_ref().filter(|block| !block.tenant.is_empty()) {
        let (tenant, model) = (printable(&block.tenant), printable(&block.model));
        text += &format!("  It was stored by tenant {tenant}, model {model}.\n");
    }
    text
}

/// The line about the node that has it or will have it.
fn on_node(found: &v1::Found) -> Option<String> {
    let node = printable(&found.node);
    match found.what.as_ref()? {
        v1::found::What::Tier(tier) => {
            let tier = tier_name(*tier);
            Some(format!(
                "  But it is on {node} ({tier}): who reads it here and waits fetches it from there.\n"
            ))
        }
        v1::found::What::Miss(miss) if kv_api::convert::miss_reason(miss) == MissReason::NotComplete => {
            Some(format!("  But {node} expects it: who reads it here and waits fetches it from there.\n"))
        }
        v1::found::What::Miss(_) => None,
    }
}

/// What the caller's scope says in this field. The salt stays a secret.
fn field_value(named: &Named, field: &str) -> Option<String> {
    let scope = serde_json::to_value(&named.scope).ok()?;
    let value = scope.get(field)?;
    Some(value.as_str().map_or_else(|| value.to_string(), printable))
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use kv_block::{Scope, SequenceHash, Slice};

    use super::*;

    #[test]
    fn a_miss_names_reason_cause_and_way_out() {
        let miss = kv_api::convert::miss_message(MissReason::EvictedQuota, Vec::new());
        let answer = v1::ExplainResponse { miss: Some(miss), ..Default::default() };
        let page = page(&BlockKey([0xab; 16]), &answer, None, None, 0);
        let wanted = format!(
            "{} is not here: evicted_quota\n  Its tenant was over its quota, so the tenant's own coldest blocks \
             went.\n  Raise the quota: kvctl quota set TENANT SIZE.\n",
            "ab".repeat(16)
        );
        assert_eq!(page, wanted);
    }

    #[test]
    fn a_differing_scope_shows_the_fields_and_never_the_salt() {
        let scope = Scope { dtype: "bf16".into(), salt: "secret".into(), ..Scope::default() };
        let named = Named { scope, slice: Slice::whole(1, 1), hash: SequenceHash::from(1) };
        let fields = ["dtype", "block_tokens", "salt"].map(str::to_owned).to_vec();
        let miss = kv_api::convert::miss_message(MissReason::ScopeDiffers, fields);
        let answer = v1::ExplainResponse { miss: Some(miss), ..Default::default() };
        let page = page(&named.key(), &answer, None, Some(&named), 0);
        assert!(page.contains("differs: dtype (here asked for: bf16)\n"), "{page}");
        assert!(page.contains("differs: block_tokens (here asked for: 0)\n"), "{page}");
        assert!(page.contains("differs: salt\n") && !page.contains("secret"), "{page}");
    }

    #[test]
    fn what_the_object_store_has_is_not_lost() {
        let miss = kv_api::convert::miss_message(MissReason::EvictedCapacity, Vec::new());
        let answer =
            v1::ExplainResponse { miss: Some(miss), pack: vec![0xcd; 32].into(), ..Default::default() };
        let gone = page(&BlockKey([1; 16]), &answer, None, None, 0);
        let wanted = format!("  But the object store has it, in pack {}:\n", "cd".repeat(32));
        assert!(gone.contains(&wanted) && !gone.contains("Raise host.bytes_max"), "{gone}");
        let here = page(&BlockKey([1; 16]), &v1::ExplainResponse { miss: None, ..answer }, None, None, 0);
        assert!(here.contains("The object store has it, too, in pack cdcd"), "{here}");
    }

    #[test]
    fn a_hit_shows_where_it_is() {
        let block = v1::BlockInfo { tiers: vec![v1::Tier::Host.into()], ..Default::default() };
        let answer = v1::ExplainResponse { block: Some(block), ..Default::default() };
        let page = page(&BlockKey([1; 16]), &answer, None, None, 0);
        assert!(page.starts_with(&format!("{} is here\n  Key:", "01".repeat(16))), "{page}");
        assert!(page.lines().any(|line| line.split_whitespace().eq(["Tiers:", "host"])), "{page}");
    }
}
