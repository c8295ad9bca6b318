"""Silent corruption: ranks that should hold equal weights compare them."""

from __future__ import annotations

import socket
from collections import Counter

import torch
from torch import Tensor, nn

from albert.distributed import World, gather_rows
from albert.errors import PeerLostError

_BITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_PRIME = 1_000_003


def weights_checksum(model: nn.Module) -> Tensor:
    """[1] int64 on the CPU; any single flipped bit of any parameter changes it."""
    total = torch.zeros(1, dtype=torch.int64)
    for parameter in model.parameters():
        bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
        total = total * _PRIME + bits.sum(dtype=torch.int64).cpu()
    return total


def check_replicas(model: nn.Module, world: World, step: int) -> None:
    """Compare the weights of all ranks. Collective.

    Raises:
        PeerLostError: names the ranks whose weights differ from those of the most.
    """
    checksums = gather_rows(weights_checksum(model)).flatten().tolist()
    usual, count = Counter(checksums).most_common(1)[0]
    different = [rank for rank, checksum in enumerate(checksums) if checksum != usual]
    if not different:
        return
    which = f"rank {', '.join(map(str, different))}" if 2 * count > world.size else "some rank"
    raise PeerLostError(
        f"step {step}: the weights of {which} differ from the other ranks' (this is rank {world.rank} on "
        f"{socket.gethostname()}); its memory or processor is faulty; give the same command again without that "
        "host to go on from the last checkpoint"
    )
