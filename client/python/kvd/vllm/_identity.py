"""Which computation a block comes from: what of vLLM's configuration decides about keys and values, for the names of blocks.

Bytes are right for an engine only when it would have computed the same ones itself. So the fields of vLLM's model and
multimodal configuration count unless they are listed here as harmless: one that a later vLLM adds makes names of its own
rather than wrong text. Of the other parts of the configuration, few fields reach keys and values; these are listed.

vLLM's own ``compute_hash`` is no help: it tells compiled graphs apart, so it has ports, paths and lengths in it, and
leaves out what changes numbers and not the graph (overrides of the model's configuration, seeds of dummy weights).

Only the scheduler's half computes this, and tells the ranks: loading a model writes into its configuration, and where
ranks are processes of their own, in theirs alone.
"""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.platforms import current_platform

from kvd._engine import has_weights, model_name, weights_of

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_HARMLESS_OF_MODEL = frozenset(
    {
        # Told apart by the digest of the weights, or by what these have made of the model's configuration.
        *("model", "model_weights", "revision", "hf_config", "hf_text_config", "hf_config_path", "hf_overrides"),
        *("config_format", "multimodal_config", "trust_remote_code"),
        # Counted where they decide, see below.
        *("seed", "max_model_len", "spec_target_max_model_len", "generation_config", "override_generation_config"),
        # How text becomes tokens, and logits become text.
        *("tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init", "max_logprobs", "logprobs_mode"),
        *("use_fp64_gumbel", "return_sampling_mask", "logits_processors", "enable_trace_replay", "pooler_config"),
        *("word_embeddings_untied_by_checkpoint",),
        # What is served to whom, and how it runs.
        *("served_model_name", "hf_token", "allowed_local_media_path", "allowed_media_domains", "io_processor_plugin"),
        *("renderer_num_workers", "enforce_eager", "disable_cascade_attn", "allow_deprecated_quantization"),
        *("enable_prompt_embeds", "enable_sleep_mode", "sleep_preserve_parameter_names", "sleep_mode_backend"),
        *("sleep_mode_offload_cudagraph", "enable_nccl_comm_suspend", "enable_cumem_allocator", "is_submodel_config"),
    }
)
_HARMLESS_OF_MULTIMODAL = frozenset(
    {
        # How many, from where, and through which memory. vLLM's hashes have what the items are.
        *("limit_per_prompt", "media_io_kwargs", "enable_mm_embeds", "interleave_mm_strings", "skip_mm_profiling"),
        *("mm_processor_cache_gb", "mm_processor_cache_type", "mm_shm_cache_max_object_size_mb", "mm_hasher_algorithm"),
        *("mm_encoder_only", "mm_encoder_tp_mode", "mm_encoder_attn_backend", "mm_tensor_ipc", "mm_ipc_gpu_memory_gb"),
        *("allow_missing_mm_embeddings", "mm_encoder_fp8_scale_save_path", "mm_encoder_fp8_scale_save_margin"),
        # By its contents.
        "mm_encoder_fp8_scale_path",
    }
)
_HARMLESS_OF_HF = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "max_model_len", "tie_word_embeddings"})
"""Where it lies, who wrote it; and what is noted down in here while a model is loaded."""
_OF_CACHE = (
    *("kv_cache_dtype_skip_layers", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
    *("kv_sharing_fast_prefill", "swa_bounded_replay"),
)
_OF_ATTENTION = (
    *("indexer_kv_dtype", "use_non_causal", "use_prefill_query_quantization", "disable_flashinfer_q_quantization"),
)
_OF_LORA = ("lora_dtype", "target_modules", "enable_tower_connector_lora", "enable_moe_shared_loras")
_SAME_AT_ANY_LENGTH = frozenset(
    {
        *("default", "linear", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"),
        *("proportional", "mrope", "bailing_mrope", "openpangu", "mllama4"),
    }
)
"""Kinds of rotary embedding that vLLM 0.32 computes from the model's configuration alone; ``longrope`` chooses its factors
by the length of the run, ``dynamic`` may."""
_FILES_OF_THE_MODEL = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor"})
"""Ways to load the same files."""


def cache_dtype(config: "VllmConfig") -> str:
    """What numbers the KV cache holds, as vLLM has resolved it, never ``auto``."""
    said = config.cache_config.cache_dtype
    if said == "auto":
        return str(config.model_config.dtype).removeprefix("torch.")
    # One kind of AMD's machines has another e4m3.
    return f"{said}-fnuz" if said.startswith("fp8") and current_platform.is_fp8_fnuz() else said


def order() -> str:
    """What decides about the order of bytes within a layer's block besides its sizes. vLLM's CPU kernels pack keys for
    the instructions that they use."""
    device = current_platform.device_name or current_platform.device_type
    if current_platform.is_cpu():
        has = {"amx": torch.cpu._is_amx_tile_supported(), "avx512": torch.cpu._is_avx512_supported()}
        device = "-".join([device, platform.machine(), *(name for name, there in has.items() if there)])
    return f"vllm-{_version()},{device}"


def weights_named(config: "VllmConfig", weights: str = "") -> str:
    """Which weights, and what is computed with them. ``weights``: what to call them, if not what is found out.

    Raises ``ValueError`` when it cannot be found out.
    """
    return f"{weights or _weights(config)}:{computed_as(config)}"


def _weights(config: "VllmConfig") -> str:
    model = config.model_config
    if Path(model.model).is_dir():
        if has_weights(model.model) or config.load_config.load_format == "dummy":
            return weights_of(model.model)
        # Such as those that vLLM fetches from an object store while it loads.
        raise _unknown(f"model {model.model}: weights that are not in its directory")
    # A branch moves, a commit does not. That of a configuration from elsewhere says nothing of the weights.
    commit = None if model.hf_config_path else getattr(model.hf_config, "_commit_hash", None)
    found: str | None = commit or model.revision
    if not found:
        raise _unknown(f"model {model.model} of unknown revision")
    return found


def _unknown(what: str) -> ValueError:
    return ValueError(f'kvd.vllm does not support {what}: say which weights: "weights" in the extra config')


def computed_as(config: "VllmConfig") -> str:
    """A digest of what besides the weights decides about keys and values."""
    told: dict[str, Any] = {"vllm": _version(), "cache": cache_dtype(config), **_of_model(config.model_config)}
    told |= {f"cache.{name}": getattr(config.cache_config, name, None) for name in _OF_CACHE}
    told |= {f"attention.{name}": getattr(config.attention_config, name, None) for name in _OF_ATTENTION}
    load = config.load_config
    if load.load_format == "dummy":
        told["dummy"] = config.model_config.seed
    elif load.load_format not in _FILES_OF_THE_MODEL:
        told["load"] = (load.load_format, load.model_loader_extra_config)
    if load.ignore_patterns != ["original/**/*"]:
        told["ignored"] = load.ignore_patterns
    if (lora := config.lora_config) is not None:
        # Usual ones are not told, so that an engine without adapters shares with one that has some.
        usual = {one.name: one.default for one in dataclasses.fields(lora)} | {"lora_dtype": config.model_config.dtype}
        told["lora"] = {name: value for name in _OF_LORA if (value := getattr(lora, name)) != usual[name]}
    if (spec := config.speculative_config) is not None and (draft := spec.draft_model_config) is not None:
        if draft is not config.model_config:
            # Its layers have keys and values too.
            commit = getattr(draft.hf_config, "_commit_hash", None) or draft.revision
            told["draft"] = (spec.method, model_name(draft.model), weights_of(draft.model, commit), _of_model(draft))
    if config.diffusion_config is not None:
        told["diffusion"] = config.diffusion_config
    if more := config.additional_config:
        told["additional"] = more if isinstance(more, dict) else more.compute_hash()
    text = json.dumps(_plain({name: value for name, value in told.items() if value not in (None, {}, [])}), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _of_model(model: "ModelConfig") -> dict[str, Any]:
    told: dict[str, Any] = {"model": _fields(model, _HARMLESS_OF_MODEL)}
    configurations = [_hf(model.hf_config), _hf(model.hf_text_config)]
    told["hf"] = configurations
    # From wherever the model says it: its configuration, or a file beside it.
    told["checkpoint"] = getattr(getattr(model, "model_arch_config", None), "quantization_config", None)
    if (multimodal := model.multimodal_config) is not None:
        told["multimodal"] = _fields(multimodal, _HARMLESS_OF_MULTIMODAL)
        if scales := multimodal.mm_encoder_fp8_scale_path:
            told["encoder_scales"] = hashlib.blake2b(Path(scales).read_bytes(), digest_size=8).hexdigest()
    tunes = any("Llama4" in one for one in getattr(model.hf_config, "architectures", None) or ())
    if tunes or any(_depends_on_length(one) for one in configurations):
        # `auto` fits the length to the machine only after the model has been built for its longest.
        told["length"] = "auto" if model.original_max_model_len == -1 else model.max_model_len
    if tunes:
        # Llama 4 scales queries in runs that are longer than 32K, if this does not say otherwise.
        generation = {**model.try_get_generation_config(), **model.override_generation_config}
        told["tuning"] = generation.get("attn_temperature_tuning")
    return told


def _depends_on_length(configuration: Mapping[str, Any]) -> bool:
    if configuration.get("dual_chunk_attention_config"):
        return True
    return any(
        kind not in _SAME_AT_ANY_LENGTH for key in ("rope_parameters", "rope_scaling") for kind in _rope_kinds(configuration, key)
    )


def _rope_kinds(within: Any, key: str) -> Iterator[Any]:
    """Kinds of rotary embedding under ``key`` anywhere in a configuration: models have parts, parts have kinds of layers."""
    if not isinstance(within, Mapping):
        return
    for name, inner in within.items():
        if name == key and isinstance(inner, Mapping):
            for one in (inner, *inner.values()):
                if isinstance(one, Mapping):
                    if (kind := one.get("rope_type", one.get("type"))) is not None:
                        yield kind
                    if one.get("use_fope"):
                        yield "fope"
        else:
            yield from _rope_kinds(inner, key)


def _hf(configuration: Any) -> dict[str, Any]:
    def harmful(part: Mapping[str, Any]) -> dict[str, Any]:
        left = ((key, value) for key, value in part.items() if key not in _HARMLESS_OF_HF)
        return {key: harmful(value) if isinstance(value, Mapping) else value for key, value in left}

    return harmful(configuration.to_dict())


def _fields(one: Any, harmless: frozenset[str]) -> dict[str, Any]:
    return {field.name: getattr(one, field.name) for field in dataclasses.fields(one) if field.name not in harmless}


def _plain(value: Any) -> Any:
    """A value as JSON has it, the same in every process: what has no such form is told by its class alone."""
    if isinstance(value, Mapping):
        # No values that are merely absent: some are set to nothing as a model is loaded.
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner) for inner in value), key=json.dumps)
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(_fields(value, frozenset()))
    if callable(to_dict := getattr(value, "to_dict", None)):
        return _plain(to_dict())
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, Path)):
        return str(value)
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _version() -> str:
    """Minor versions may order bytes differently, or compute a model differently."""
    return ".".join(vllm.__version__.split(".")[:2])
