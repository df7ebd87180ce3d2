"""Runs SGLang's server with HiCache on a machine without a GPU: ``python sglang_cpu.py`` and the server's arguments.

Two things of HiCache need a GPU, and only these are replaced: the registration of host memory with CUDA (left out), and
the three kernels that copy pages between device and host for ``--hicache-io-backend direct`` (written with torch).
Everything else is SGLang's: the radix tree, the controller and its threads, the host pools, the storage factory.
"""

import sys

import torch
from sglang.srt.mem_cache.pool_host import common, mha

Tensors = list[torch.Tensor]


def host_to_host(
    src_layers: Tensors, dst_layers: Tensors, src_indices: torch.Tensor, dst_indices: torch.Tensor, page_size: int
) -> None:
    """Rows of layers, ``layer_first`` on both sides."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def layers_to_pages(
    src_ptrs: Tensors, dst_ptrs: Tensors, src_indices: torch.Tensor, dst_indices: torch.Tensor, page_size: int
) -> None:
    """Rows of all layers, first those of K, to pages ``[page, layer, token, ...]`` of K and of V."""
    pages, layers = dst_indices[::page_size] // page_size, len(src_ptrs) // len(dst_ptrs)
    for at, source in enumerate(src_ptrs):
        rows = source[src_indices]
        dst_ptrs[at // layers][pages, at % layers] = rows.view(-1, page_size, *rows.shape[1:])


def pages_to_layer(
    src_ptrs: Tensors,
    dst_ptrs: Tensors,
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """The other way round, for one layer."""
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        rows = source[src_indices[::page_size] // page_size, layer_id]
        target[dst_indices] = rows.reshape(-1, *rows.shape[2:])


# Where it is imported: the processes that SGLang starts import this file too.
common._cuda_host_register = lambda buffer, registration_granularity_bytes=None: None
mha.transfer_kv_direct = host_to_host
mha.transfer_kv_all_layer_direct_lf_pf = layers_to_pages
mha.transfer_kv_per_layer_direct_pf_lf = pages_to_layer

if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
