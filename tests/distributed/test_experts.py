"""Prepared stacks of experts that FSDP2 shards over two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed import ranks
from tests.test_expert_situations import sharded_beside_alone


@pytest.mark.slow
def test_two_ranks_train_as_one_process_does(tmp_path: Path):
    """On the same batch; a mean of two equal gradients is either of them."""
    assert all(all(same) for same in ranks.run(work, 2, tmp_path))


def work() -> list[bool]:
    return sharded_beside_alone(dist.init_device_mesh("cpu", (2,)))
