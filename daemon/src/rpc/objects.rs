//! What operators ask about the object tier of a node, in the words of the protocol.

use kv_api::v1;
use kv_block::code::Code;
use kv_node::ShardReport;

use super::Shared;
use crate::node::Node;
use crate::object::ObjectView;

impl Shared {
    /// The object tiers, one of each principal; none where there is no store.
    pub(super) fn object_views(&self) -> Vec<ObjectView> {
        let all = self.objects.iter().flat_map(|objects| objects.all());
        all.map(|principal| principal.view()).collect()
    }
}

/// An object tier among the tiers of a node. It belongs to all shards of its principal; the first one stands for it.
pub(super) fn tier_info(view: &ObjectView, reports: &[ShardReport], node: &Node) -> v1::TierInfo {
    let principal = node.principals.iter().find(|principal| principal.name == view.principal);
    let shards = principal.map_or(0..0, |principal| principal.shards.clone());
    let total = |of: fn(&ShardReport) -> u64| reports[shards.clone()].iter().map(of).sum::<u64>();
    let report = view.report.as_ref();
    let mut notes = vec![view.place.to_string()];
    if let Some(report) = report {
        notes.push(format!("{} packs, {} of them in use here", report.packs, report.packs_listed));
        if report.packs_unread > 0 {
            notes.push(format!("{} packs are not read yet", report.packs_unread));
        }
        if !report.set_aside.is_empty() {
            notes.push(format!("{} packs cannot be used", report.set_aside.len()));
        }
    }
    v1::TierInfo {
        tier: v1::Tier::Object.into(),
        shard: shards.start as u32,
        bytes_used: report.map_or(0, |report| report.pack_bytes),
        blocks: report.map_or(0, |report| report.blocks as u64),
        state: view.state().into(),
        reason: view.trouble.clone().unwrap_or_default(),
        notes,
        bytes_written: total(|report| report.counters.upload_bytes),
        bytes_read: total(|report| report.counters.download_bytes),
        principal: view.principal.clone(),
        ..v1::TierInfo::default()
    }
}

/// What is wrong with the object tiers.
pub(super) fn warnings(views: &[ObjectView]) -> Vec<v1::Warning> {
    let warn = |view: &ObjectView| {
        let why = view.trouble.as_ref()?;
        let text = format!("the object store {} is out of service, its blocks miss: {why}", view.place);
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    let unreadable = |view: &ObjectView| {
        let round = view.report.as_ref()?.round_unreadable?;
        let text = format!(
            "round {round} of collection in {} cannot be read: nothing is deleted there until it is removed",
            view.place
        );
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    let overwrites = |view: &ObjectView| {
        view.report.as_ref().filter(|report| report.overwrites)?;
        let text = format!(
            "{} writes over what is there: nothing is collected there; have a rule of the bucket expire objects",
            view.place
        );
        Some(v1::Warning { code: Code::TierDegraded.to_string(), text })
    };
    views.iter().flat_map(|view| [warn(view), unreadable(view), overwrites(view)]).flatten().collect()
}
