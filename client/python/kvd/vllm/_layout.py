"""What vLLM's KV cache looks like, and which of it becomes a block of kvd.

vLLM keeps a pool of numbered blocks. Layers that need the same blocks form a group; a layer's tensor is logically
``[block, head, token, channel]`` with K and V side by side in the last. A kvd block is one numbered block of one group
on one rank: the bytes of its layers, one after another, each in the order head, token, channel. ::

    group 0, vLLM block 7:   | layer 0: H x N x C | layer 1: H x N x C | ... |
                               '-- page_bytes[0] -'

Whatever we do not know how to read is refused when the engine starts, by name.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

import kvd
from kvd._engine import model_name
from kvd.vllm._identity import cache_dtype, order, weights_named

if TYPE_CHECKING:
    from vllm.config import VllmConfig

AXES = "layer,head,token,kv,dim"
"""The order of a kvd block, as the daemon reads it. K and V of a token and head lie side by side; together they are one
vector to it, as MLA's latent is, whatever their lengths, and with what else the page has of them."""
NULL_BLOCK = 0
"""vLLM's number for "no block here": what a sliding window has left behind."""


@dataclass(frozen=True)
class Group:
    """Layers that share a block table, as one rank holds them."""

    index: int
    """Position in vLLM's list of groups."""
    layers: tuple[str, ...]
    page_bytes: tuple[int, ...]
    """Bytes of one block in each layer."""
    block_tokens: int
    hashes_per_block: int
    """vLLM may hash shorter runs of tokens than this group's blocks hold."""
    window: int | None
    """Tokens that a sliding window looks back, itself included; ``None`` when all are needed."""
    heads: int
    """Head slots on one rank."""
    attention: str
    dtype: str
    order: str
    """What decides about the order of bytes in a page besides its sizes."""
    by_axes: bool
    """The layout of the scope is an order of axes and nothing else, so that the daemon can copy by it."""

    @property
    def block_bytes(self) -> int:
        return sum(self.page_bytes)

    @property
    def layout(self) -> str:
        """For the scope: the order of memory, and which layers these are."""
        return AXES if self.by_axes else f"{self.order},layer,head,token,kv;layers={self._digest}"

    def weights(self, weights: str) -> str:
        """For the scope: with what an order of axes has no place for."""
        return f"{weights};{self.order};layers={self._digest}" if self.by_axes else weights

    @property
    def _digest(self) -> str:
        return hashlib.blake2b("\n".join(self.layers).encode(), digest_size=8).hexdigest()

    def first_needed(self, tokens: int) -> int:
        """The first block that a request with ``tokens`` computed tokens still reads."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.block_tokens

    def names(self, hashes: "list[Any]", first: int, end: int) -> list[bytes]:
        """Names of the blocks ``first..end``, from the hashes of a request."""
        per = self.hashes_per_block
        return [bytes(hashes[(block + 1) * per - 1]) for block in range(first, end)]


@dataclass(frozen=True)
class Layout:
    """All groups, and how ranks share heads."""

    groups: tuple[Group, ...]
    align_tokens: int
    """What vLLM takes from us is a multiple of this."""
    hash_tokens: int
    """Tokens to a hash of vLLM."""
    slices: int
    """Distinct pieces of a block over all ranks."""
    replicas: int
    """Consecutive ranks that hold the same piece."""
    model: str

    def scope(self, group: Group, tenant: str, weights: str, lora: str = "", salt: str = "") -> dict[str, Any]:
        """Arguments of :class:`kvd.Scope`."""
        return {
            "model": self.model,
            "weights": group.weights(weights),
            "tenant": tenant,
            "block_tokens": group.block_tokens,
            "dtype": group.dtype,
            "attention": group.attention,
            "layout": group.layout,
            "lora": lora,
            "salt": salt,
        }

    def part(self, group: Group, slice_: int) -> tuple[int, int, int, int]:
        """Layers, heads of all ranks, and the heads of piece ``slice_``."""
        heads = group.heads
        return len(group.layers), heads * self.slices, heads * slice_, heads * (slice_ + 1)


def layout_of(config: "VllmConfig", cache: KVCacheConfig, model: str = "", *, by_axes: bool = False) -> Layout:
    """Reads vLLM's configuration. ``model``: what to call it, if not as vLLM does. ``by_axes``: blocks have names of their
    own, by which the daemon can copy them to and from devices; their bytes are the same.

    Raises ``ValueError`` that names what is not supported.
    """
    parallel = config.parallel_config
    for field in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, field, 1)) > 1:
            raise _unsupported(f"{field} = {size}", "use tensor or data parallelism")
    if getattr(config.cache_config, "calculate_kv_scales", False):
        raise _unsupported("calculate_kv_scales", "scales of one engine do not fit another; take them from the checkpoint")
    replicas = getattr(cache, "kv_tp_replicas", 1)
    hash_tokens = cache.hash_block_size or config.cache_config.block_size
    chosen = cache.prefix_cacheable_group_ids
    if len(chosen) != len(cache.kv_cache_groups):
        left = sorted(set(range(len(cache.kv_cache_groups))) - set(chosen))
        raise _unsupported(f"KV cache groups {left}", "their state cannot be found by the hash of a prefix")
    groups = tuple(
        _group(index, cache.kv_cache_groups[index], hash_tokens, cache_dtype(config), order(), by_axes)
        for index in chosen
    )
    align = cache.cache_hit_alignment_tokens or max(group.block_tokens for group in groups)
    for group in groups:
        if align % group.block_tokens:
            raise _unsupported(f"hits in steps of {align} tokens", f"group {group.index} has blocks of {group.block_tokens}")
    return Layout(
        groups=groups,
        align_tokens=align,
        hash_tokens=hash_tokens,
        slices=parallel.tensor_parallel_size // replicas,
        replicas=replicas,
        model=model or model_name(config.model_config.model),
    )


def _group(
    index: int, group: KVCacheGroupSpec, hash_tokens: int, numbers: str, order: str, by_axes: bool
) -> Group:
    layers, spec = group.layer_names, group.kv_cache_spec
    each = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else dict.fromkeys(layers, spec)
    specs = [_known(index, layer, each[layer]) for layer in layers]
    first = specs[0]
    if first.block_size % hash_tokens:
        raise _unsupported(f"group {index}: blocks of {first.block_size} tokens", f"hashes are of {hash_tokens}")
    kinds = {(_attention(one), _dtype(one, numbers), one.num_heads, one.block_size) for one in specs}
    if len(kinds) > 1:
        raise _unsupported(f"group {index}: layers of several kinds {sorted(kinds)}", "one kind in a group is")
    return Group(
        index=index,
        layers=tuple(layers),
        page_bytes=tuple(one.unpadded_page_size_bytes for one in specs),
        block_tokens=first.block_size,
        hashes_per_block=first.block_size // hash_tokens,
        window=first.sliding_window if isinstance(first, SlidingWindowSpec) else None,
        heads=first.num_heads,
        attention=_attention(first),
        dtype=_dtype(first, numbers),
        order=order,
        by_axes=by_axes,
    )


def _known(index: int, layer: str, spec: KVCacheSpec) -> AttentionSpec:
    # Exactly these: a subclass may keep something else in the same shape.
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec):
        raise _unsupported(f"group {index}, layer {layer}: {type(spec).__name__}", "full, sliding-window and MLA attention are")
    assert isinstance(spec, AttentionSpec)
    if spec.tokens_per_state != 1:
        raise _unsupported(f"group {index}, layer {layer}: tokens_per_state = {spec.tokens_per_state}", "1 is")
    return spec


def _attention(spec: AttentionSpec) -> str:
    if isinstance(spec, SlidingWindowSpec):
        return f"sliding:{spec.sliding_window}"
    return "mla" if isinstance(spec, MLAAttentionSpec) else "full"


def _dtype(spec: AttentionSpec, numbers: str) -> str:
    """What numbers these are. torch's type alone does not tell where vLLM keeps them as bare bytes; then it is
    ``numbers``, what vLLM was told to keep."""
    name = str(spec.dtype).removeprefix("torch.")
    told = str(getattr(spec, "cache_dtype_str", None) or numbers)
    if spec.kv_quant_mode == KVQuantMode.NONE:
        # What an indexer keeps as bytes, the digest of the configuration has.
        return name if spec.dtype.is_floating_point else f"{name}:{told}"
    return told


def _unsupported(what: str, instead: str) -> ValueError:
    return ValueError(f"kvd.vllm does not support {what}: {instead}")


SAME_ORDER = frozenset(
    {
        *("FlashAttentionBackend", "FlashAttentionDiffKVBackend", "FlashInferBackend", "FlexAttentionBackend"),
        *("TritonAttentionBackend", "TritonAttentionDiffKVBackend", "TurboQuantAttentionBackend"),
        *("RocmAiterUnifiedAttentionBackend", "CPUAttentionBackend"),
    }
)
"""vLLM's backends that read a block as written at the top of the file, or the only one of their device or KV cache type."""


def check_backends(config: "VllmConfig", layout: Layout) -> None:
    """Raises ``ValueError`` that names the attention backend whose order of bytes is not known."""
    for group in layout.groups:
        if group.attention == "mla":
            continue  # One vector for each token, whoever reads it.
        for backend in get_current_attn_backends(config, list(group.layers)):
            if backend.__name__ not in SAME_ORDER:
                raise _unsupported(f"the attention backend {backend.__name__}", "choose another by --attention-backend")


def pages_of(group: Group, caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The group's tensors as bytes, ``[block, head, token, channel bytes]`` each.

    Raises ``ValueError`` that names the layer when vLLM's tensor is not what its configuration says.
    """
    pages = []
    for layer, page_bytes in zip(group.layers, group.page_bytes, strict=True):
        if (tensor := caches.get(layer)) is None:
            raise ValueError(f"kvd.vllm: vLLM registered no KV cache for layer {layer}")
        seen = f"layer {layer}: tensor {tuple(tensor.shape)}, strides {tensor.stride()}, {tensor.dtype}"
        if tensor.dim() == 3 and group.attention == "mla":
            tensor = tensor.unsqueeze(1)
        if tensor.dim() != 4 or tensor.shape[1:3] != (group.heads, group.block_tokens) or tensor.stride(3) != 1:
            raise _unsupported(seen, f"[block, {group.heads} heads, {group.block_tokens} tokens, channel] is")
        pages.append(tensor.view(torch.uint8))
        if pages[-1][0].numel() != page_bytes:
            raise _unsupported(seen, f"{page_bytes} bytes a block is what vLLM's configuration says")
    return pages


def cache_layout(group: Group, pages: list[torch.Tensor], piece: kvd.Slice) -> kvd.CacheLayout:
    """How the group's pages (see :func:`pages_of`) lie in device memory. ``piece``: which layers and heads they are.

    Raises ``ValueError`` that says why there is no such layout.
    """
    first = pages[0]
    for layer, page in zip(group.layers, pages, strict=True):
        if (kind := page.device.type) != "cuda":
            raise ValueError(f"layer {layer} is in {kind} memory")
        if (page.shape, page.stride()) != (first.shape, first.stride()):
            raise ValueError(
                f"layer {layer} is {tuple(page.shape)} with strides {page.stride()}, "
                f"layer {group.layers[0]} {tuple(first.shape)} with {first.stride()}"
            )
    block, head, token, channel = first.stride()
    return kvd.CacheLayout.strided(
        {"page": block, "head": head, "token": token, "dim": channel},
        {"layer": 1},
        slice=piece,
        page_count=first.shape[0],
        page_tokens=group.block_tokens,
        head_dim=first.shape[3],
        element_bits=8,
        content="latent",
    )
