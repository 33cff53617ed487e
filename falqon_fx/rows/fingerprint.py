"""Hashes by which update="rows" sees that a parameter changed."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.kernels.cpu import native as cpu


def fingerprint(batch: Tensor) -> Tensor:
    """64-bit hash of the bits of each tensor of a batch [G, m, n]; zeros hash to zero.

    Σ_ij word_ij · q_i · p_j mod 2**64 with fixed odd-looking p and q: it depends on the place of
    every element and sees every change of a single one. A word is 64 bits of a row; its upper half
    is added to the lower, since what differs in the last bits of a word, such as two signs, could
    cancel modulo 2**64.
    """
    # The second view gives a dimension of size 1 the stride that a view as int64 asks for.
    batch = batch.detach().contiguous().view(-1).view(batch.shape)
    if batch.storage_offset():
        batch = batch.clone()  # a view as int64 must be aligned
    bits = batch.view(
        {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[batch.element_size()]
    )
    if bits.shape[-1] * bits.element_size() % 8:
        words = bits.to(torch.int64)
    else:
        whole = bits.view(torch.int64)
        words = torch.add(whole, whole >> 32, alpha=5)
    # Sums over rows vectorise, those over a few columns don't.
    columns = words.mul_(_hash_weights(words.shape[1], words, 0x3F58476D1CE4E5B9)[:, None]).sum(1)
    return (columns * _hash_weights(words.shape[2], words, 0x1E3779B97F4A7C15)).sum(-1)


def fingerprints(tensors: list[Tensor]) -> Tensor:
    """The `fingerprint` of each of G tensors of one shape, int64 [G]."""
    if tensors[0].device.type == "cpu" and (compiled := cpu.fingerprints(tensors)) is not None:
        return compiled
    return fingerprint(torch.stack(tensors))


def _hash_weights(count: int, like: Tensor, multiplier: int) -> Tensor:
    mixed = torch.arange(1, count + 1, device=like.device) * multiplier
    return (mixed ^ (mixed >> 29)) * multiplier | 1


def site_number(mixed: Tensor) -> Tensor:
    """The 32 bits by which random numbers tell a site from others, from a 64-bit hash of it."""
    return (mixed ^ (mixed >> 32)) & 0xFFFFFFFF
