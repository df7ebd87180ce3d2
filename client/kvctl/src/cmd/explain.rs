//! `kvctl explain`: the page of a code or of a miss reason. Works without a daemon.

use clap::Args;
use kv_block::MissReason;
use kv_block::code::Code;

use crate::exit::{Exit, Failure};
use crate::out;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// KVD-3001, 3001 or a miss reason such as evicted_quota; none lists all
    code: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    out::print(&match &arguments.code {
        Some(text) => explain(text)?,
        None => list(),
    })?;
    Ok(Exit::Ok)
}

/// The page called `text`.
fn explain(text: &str) -> Result<String, Failure> {
    if let Ok(code) = text.parse::<Code>() {
        return Ok(format!(
            "{code}: {}\n\nCause:  {}\nDo:     {}\nKind:   {:?}: {}\n",
            code.title(),
            code.cause(),
            code.action(),
            code.kind(),
            code.kind().advice()
        ));
    }
    let name = text.trim().to_ascii_lowercase().replace('-', "_");
    if let Some(reason) = MissReason::ALL.into_iter().find(|reason| reason.name() == name) {
        let (cause, action) = reason_page(reason);
        return Ok(format!("{reason} (a miss reason)\n\nCause:  {cause}\nDo:     {action}\n"));
    }
    let near = MissReason::ALL.into_iter().map(|reason| (strsim::jaro_winkler(reason.name(), &name), reason));
    let near = near.filter(|(likeness, _)| *likeness > 0.8).max_by(|a, b| a.0.total_cmp(&b.0));
    let help = match near {
        Some((_, reason)) => format!("did you mean {reason}? `kvctl explain` lists all"),
        None => "`kvctl explain` lists all codes and reasons".into(),
    };
    Err(Failure::new(Exit::NotFound, format!("nothing is called `{text}`")).help(help))
}

fn list() -> String {
    let codes = Code::ALL.iter().map(|code| (code.to_string(), code.title()));
    let reasons = MissReason::ALL.iter().map(|reason| (reason.to_string(), reason_page(*reason).0));
    codes.chain(reasons).map(|(name, title)| format!("{name:20} {title}\n")).collect()
}

/// Why a miss of this reason comes about, and what one can do.
pub(crate) fn reason_page(reason: MissReason) -> (&'static str, &'static str) {
    match reason {
        MissReason::NeverStored => (
            "This node has no memory of the block: it was never stored here, or so long ago that it is forgotten.",
            "Nothing, when it is new. Else see that writer and reader use the same scope: kvctl why --scope.",
        ),
        MissReason::EvictedCapacity => (
            "The eviction policy pushed it out to make room.",
            "Raise host.bytes_max, add a disk tier, or pin what must stay.",
        ),
        MissReason::EvictedQuota => (
            "Its tenant was over its quota, so the tenant's own coldest blocks went.",
            "Raise the quota: kvctl quota set TENANT SIZE.",
        ),
        MissReason::EvictedRequest => {
            ("Somebody removed it with evict or purge.", "Nothing; it comes back when it is stored again.")
        }
        MissReason::EvictedReclaim => (
            "Its disk segment was taken back and it was not read often enough to be moved.",
            "Raise disk.bytes_max.",
        ),
        MissReason::Expired => ("Its time to live ended.", "Store it with a longer ttl_s."),
        MissReason::ScopeDiffers => (
            "The same tokens are stored under another scope: some field of the scope differs.",
            "Make writer and reader agree in the fields named: kvctl why --scope FILE --hash HEX.",
        ),
        MissReason::Corrupt => (
            "Its bytes failed their checksum and were set aside. They were not served.",
            "Nothing for this block. When it comes again, check the machine's memory and disk.",
        ),
        MissReason::TierDegraded => (
            "It is on a tier that is out of service for now.",
            "See `kvctl describe tier disk`, or `object`, for the cause; the tier is probed and heals by itself.",
        ),
        MissReason::NotComplete => (
            "It was announced and its bytes have not all arrived.",
            "Wait for it: give the request a deadline. It ends with the session that announced it.",
        ),
        MissReason::Quota => (
            "The tenant's quota left no room to bring it up.",
            "Raise the quota, or release and unpin blocks of the tenant.",
        ),
        MissReason::TierTimeout => (
            "The tier did not answer before the caller's deadline.",
            "Allow more time, or see what keeps the tier busy: kvctl get tiers -o wide.",
        ),
        MissReason::AdmissionRejected => (
            "The admission policy did not find it worth keeping.",
            "Nothing, when it is read once. What is read again is admitted.",
        ),
        MissReason::Overloaded => (
            "The node had no free slot or I/O budget to bring it up in time.",
            "Look for pins and leases that fill host memory: kvctl get clients, kvctl get tenants.",
        ),
        MissReason::PeerDown => (
            "The peer that has it cannot be reached: it is gone, or its circuit is open after repeated failures.",
            "See `kvctl describe peer` for the last error; the peer is tried again by itself.",
        ),
        MissReason::PathFailed => (
            "The peer that has it let us read it, and every path to its bytes failed.",
            "See `kvctl describe peer` for the error of each path.",
        ),
        MissReason::PeerEvicted => (
            "A peer had it and does not any more: it was evicted there before it could be read.",
            "Nothing, when it is rare. Else the peer's host memory is too small for what others ask of it.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_and_reason_has_a_page() {
        for code in Code::ALL {
            assert_eq!(explain(&code.to_string()), explain(&(*code as u16).to_string()));
        }
        for reason in MissReason::ALL {
            assert!(explain(reason.name()).unwrap().contains("Cause:"));
        }
        assert_eq!(list().lines().count(), Code::ALL.len() + MissReason::ALL.len());
    }

    #[test]
    fn a_page_reads_so() {
        let wanted = "KVD-3001: a tier is out of service\n\nCause:  Repeated errors or slowness opened its circuit; \
                      requests miss instead of waiting.\nDo:     It is probed and heals by itself. See the last \
                      error in `kvctl describe tier`.\nKind:   Unavailable: recompute, and try again later\n";
        assert_eq!(explain("kvd-3001").unwrap(), wanted);
    }

    #[test]
    fn a_typing_error_gets_a_suggestion() {
        let failure = explain("evicted_quoat").unwrap_err();
        assert_eq!(failure.exit, Exit::NotFound);
        assert!(failure.help.unwrap().contains("evicted_quota"));
        assert_eq!(explain("KVD-9999").unwrap_err().exit, Exit::NotFound);
    }
}
