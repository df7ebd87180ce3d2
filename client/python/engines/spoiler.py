"""A connector that stores wrong bytes with right checksums, so that the stories can show that they would notice.

It is :class:`kvd.vllm.KvdConnector` until the file named by ``KVD_SPOIL`` exists; from then on what it stores is zeroes.
"""

import os
from typing import TYPE_CHECKING

from kvd.vllm import KvdConnector
from kvd.vllm._copies import _HostRoom

if TYPE_CHECKING:
    import torch


class SpoilingConnector(KvdConnector):
    """See above."""

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        super().register_kv_caches(kv_caches)
        copy = _HostRoom._copy

        def spoil(room: "_HostRoom", at: int) -> None:
            copy(room, at)
            if os.path.exists(os.environ["KVD_SPOIL"]):
                for reservation in room.reservations:
                    reservation.write(bytes(len(reservation)))

        _HostRoom._copy = spoil  # type: ignore[method-assign]
