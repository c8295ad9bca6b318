"""CRC-32C (Castagnoli), the checksum of TensorFlow's checkpoint files, in numpy. Imports no torch.

The data is cut into equal lanes whose checksums are computed together, one byte of every lane per step, and then
joined; a CRC is linear over GF(2). More than 100 MB/s, where a loop over bytes would take minutes per checkpoint.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78
_LANE_BYTES = 2048
_MASK_DELTA = 0xA282EAD8

Words = NDArray[np.uint32]


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of bytes."""
    values = np.frombuffer(data, np.uint8)
    num_lanes = len(values) // _LANE_BYTES
    state = 0xFFFFFFFF
    if num_lanes > 1:
        lanes = np.ascontiguousarray(values[: num_lanes * _LANE_BYTES].reshape(num_lanes, -1).T)
        for checksum in _advance(np.zeros(num_lanes, np.uint32), lanes).tolist():
            state = _skip_lane(state) ^ checksum
        values = values[num_lanes * _LANE_BYTES :]
    table = _byte_table().tolist()
    for value in values.tolist():
        state = table[(state ^ value) & 0xFF] ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The form in which LevelDB and TensorFlow store a CRC-32C: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _advance(states: Words, columns: NDArray[np.uint8]) -> Words:
    """States after further bytes: [lanes] states, [bytes, lanes] data."""
    table = _byte_table()
    for column in columns:
        states = table[(states ^ column) & 0xFF] ^ (states >> 8)
    return states


@lru_cache(maxsize=1)
def _byte_table() -> Words:
    """[256] the effect of one byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1).astype(np.uint32)
    return table


@lru_cache(maxsize=1)
def _lane_tables() -> list[list[int]]:
    """[4][256] the effect of a lane of zero bytes on each byte of the state."""
    starts = (np.arange(256, dtype=np.uint32) << np.uint32(8 * np.arange(4)[:, None])).astype(np.uint32)
    ends = _advance(starts.reshape(-1), np.zeros((_LANE_BYTES, 1), np.uint8))
    return [row.tolist() for row in ends.reshape(4, 256)]


def _skip_lane(state: int) -> int:
    first, second, third, fourth = _lane_tables()
    return first[state & 0xFF] ^ second[state >> 8 & 0xFF] ^ third[state >> 16 & 0xFF] ^ fourth[state >> 24]
