//! What operators ask about the GPUs of a node, in the words of the protocol.

use kv_api::v1;
use kv_block::code::Code;

use crate::gpu::view::{GpuState, GpuView, GpusView};

/// The GPUs as a message.
pub(super) fn list(view: GpusView) -> v1::ListGpusResponse {
    let GpusView { driver, absent, gpus } = view;
    v1::ListGpusResponse {
        driver: driver.unwrap_or_default(),
        absent: absent.unwrap_or_default(),
        gpus: gpus.into_iter().map(gpu).collect(),
    }
}

/// One of them. Every field is named, so that one that is added is not forgotten here.
fn gpu(view: GpuView) -> v1::GpuInfo {
    let GpuView {
        ordinal,
        uuid,
        name,
        bus,
        numa_node,
        memory_bytes,
        free_bytes,
        state,
        reason,
        method,
        caches,
        cache_bytes,
        pool_trouble,
        pool_bytes_max,
        pool_bytes_used,
        pool_blocks,
        pool_hits,
        copies_under_way,
        bytes_under_way,
        copies_waiting,
        bytes_in,
        bytes_out,
        bytes_across,
        copies_done,
        copies_failed,
        kept,
        reaches,
    } = view;
    v1::GpuInfo {
        ordinal,
        uuid,
        name,
        bus,
        numa_node,
        memory_bytes,
        free_bytes,
        state: state.name().into(),
        reason,
        method,
        caches,
        cache_bytes,
        pool_trouble,
        pool_bytes_max,
        pool_bytes_used,
        pool_blocks,
        pool_hits,
        copies_under_way,
        bytes_under_way,
        copies_waiting,
        bytes_in,
        bytes_out,
        bytes_across,
        copies_done,
        copies_failed,
        kept,
        reaches,
    }
}

/// The pools, one for each device that has one.
pub(super) fn tiers(view: &GpusView) -> impl Iterator<Item = v1::TierInfo> + '_ {
    let asked = |gpu: &&GpuView| gpu.pool_bytes_max > 0 || !gpu.pool_trouble.is_empty();
    let is_well = |gpu: &GpuView| gpu.state == GpuState::Ok && gpu.pool_trouble.is_empty();
    view.gpus.iter().filter(asked).map(move |gpu| v1::TierInfo {
        tier: v1::Tier::Device.into(),
        shard: gpu.ordinal,
        bytes_max: gpu.pool_bytes_max,
        bytes_wanted: gpu.pool_bytes_max,
        bytes_used: gpu.pool_bytes_used,
        blocks: gpu.pool_blocks,
        state: if is_well(gpu) { "ok" } else { "degraded" }.into(),
        reason: if gpu.reason.is_empty() { gpu.pool_trouble.clone() } else { gpu.reason.clone() },
        numa_node: gpu.numa_node.unwrap_or(0),
        notes: vec![gpu.uuid.clone()],
        ..v1::TierInfo::default()
    })
}

/// What an operator must know: GPUs that are lost, and memory that is kept for copies which never ended.
pub(super) fn warnings(view: &GpusView) -> Vec<v1::Warning> {
    let warn = |gpu: &GpuView| {
        let kept = match gpu.kept {
            0 => None,
            1 => Some("1 operation never ended, and its memory is kept".to_owned()),
            kept => Some(format!("{kept} operations never ended, and their memory is kept")),
        };
        let text = match (gpu.state, kept) {
            (GpuState::Lost, None) => format!("is lost until kvd restarts: {}", gpu.reason),
            (GpuState::Lost, Some(kept)) => {
                format!("is lost until kvd restarts: {}; {kept}", gpu.reason)
            }
            (GpuState::Ok | GpuState::Unused, Some(kept)) => format!("{kept} until kvd restarts"),
            (GpuState::Ok | GpuState::Unused, None) => return None,
        };
        let text = format!("GPU {} ({}): {text}", gpu.ordinal, gpu.bus);
        Some(v1::Warning { code: Code::GpuLost.to_string(), text })
    };
    let no_pool = |gpu: &GpuView| {
        let text = format!("GPU {} ({}): the pool has {}", gpu.ordinal, gpu.bus, gpu.pool_trouble);
        (!gpu.pool_trouble.is_empty()).then(|| v1::Warning { code: Code::GpuError.to_string(), text })
    };
    view.gpus.iter().filter_map(warn).chain(view.gpus.iter().filter_map(no_pool)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(ordinal: u32, state: GpuState) -> GpuView {
        GpuView { ordinal, bus: format!("0000:{ordinal:02x}:00.0"), state, ..GpuView::default() }
    }

    #[test]
    fn every_number_of_a_gpu_arrives_under_its_own_name() {
        let of = GpuView {
            ordinal: 3,
            uuid: "GPU-8f2c".into(),
            name: "NVIDIA H200".into(),
            bus: "0000:3b:00.0".into(),
            numa_node: Some(1),
            memory_bytes: 101,
            free_bytes: Some(102),
            state: GpuState::Ok,
            reason: "r".into(),
            method: "auto(batch)".into(),
            caches: 103,
            cache_bytes: 104,
            pool_trouble: "t".into(),
            pool_bytes_max: 105,
            pool_bytes_used: 106,
            pool_blocks: 107,
            pool_hits: 108,
            copies_under_way: 109,
            bytes_under_way: 110,
            copies_waiting: 111,
            bytes_in: 112,
            bytes_out: 113,
            bytes_across: 114,
            copies_done: 115,
            copies_failed: 116,
            kept: 117,
            reaches: vec!["GPU-11".into()],
        };
        let view = GpusView { driver: Some("12.8".into()), absent: None, gpus: vec![of] };
        let told = list(view);
        assert_eq!((&*told.driver, &*told.absent), ("12.8", ""));
        let wanted = v1::GpuInfo {
            ordinal: 3,
            uuid: "GPU-8f2c".into(),
            name: "NVIDIA H200".into(),
            bus: "0000:3b:00.0".into(),
            numa_node: Some(1),
            memory_bytes: 101,
            free_bytes: Some(102),
            state: "ok".into(),
            reason: "r".into(),
            method: "auto(batch)".into(),
            caches: 103,
            cache_bytes: 104,
            pool_trouble: "t".into(),
            pool_bytes_max: 105,
            pool_bytes_used: 106,
            pool_blocks: 107,
            pool_hits: 108,
            copies_under_way: 109,
            bytes_under_way: 110,
            copies_waiting: 111,
            bytes_in: 112,
            bytes_out: 113,
            bytes_across: 114,
            copies_done: 115,
            copies_failed: 116,
            kept: 117,
            reaches: vec!["GPU-11".into()],
        };
        assert_eq!(told.gpus, [wanted]);
    }

    #[test]
    fn a_pool_is_a_tier_and_a_device_without_one_is_none() {
        let pool =
            GpuView { pool_bytes_max: 64, pool_bytes_used: 3, pool_blocks: 2, ..view(1, GpuState::Ok) };
        let lost = GpuView { pool_bytes_max: 64, ..view(2, GpuState::Lost) };
        let all = GpusView { gpus: vec![view(0, GpuState::Ok), pool, lost], ..GpusView::default() };
        let told: Vec<_> = tiers(&all)
            .map(|tier| (tier.tier(), tier.shard, tier.bytes_used, tier.blocks, tier.state))
            .collect();
        let device = v1::Tier::Device;
        assert_eq!(told, [(device, 1, 3, 2, "ok".into()), (device, 2, 0, 0, "degraded".into())]);
    }

    #[test]
    fn where_there_are_none_the_reason_is_told_and_nothing_is_warned_of() {
        let none = GpusView::none("no CUDA driver: x");
        assert_eq!(warnings(&none), []);
        let told = list(none);
        assert_eq!((&*told.driver, &*told.absent, told.gpus.len()), ("", "no CUDA driver: x", 0));
    }

    #[test]
    fn what_is_lost_or_kept_is_warned_of_and_the_rest_is_not() {
        let lost = GpuView { reason: "cuEventQuery said so".into(), ..view(1, GpuState::Lost) };
        let cases = [
            (view(0, GpuState::Ok), None),
            (view(0, GpuState::Unused), None),
            (lost.clone(), Some("GPU 1 (0000:01:00.0): is lost until kvd restarts: cuEventQuery said so")),
            (
                GpuView { kept: 2, ..lost },
                Some(
                    "GPU 1 (0000:01:00.0): is lost until kvd restarts: cuEventQuery said so; 2 operations never \
                     ended, and their memory is kept",
                ),
            ),
            (
                GpuView { kept: 1, ..view(2, GpuState::Ok) },
                Some(
                    "GPU 2 (0000:02:00.0): 1 operation never ended, and its memory is kept until kvd restarts",
                ),
            ),
        ];
        for (gpu, wanted) in cases {
            let told = warnings(&GpusView { gpus: vec![gpu.clone()], ..GpusView::default() });
            let texts: Vec<_> = told.iter().map(|warning| &*warning.text).collect();
            assert_eq!(texts, wanted.into_iter().collect::<Vec<_>>(), "{gpu:?}");
            assert!(told.iter().all(|warning| warning.code == "KVD-3007"));
        }
    }
}
