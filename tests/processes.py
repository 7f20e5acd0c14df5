"""Run a check in two processes of one group, as data-parallel training does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in two processes that meet in ``folder``; raises what one of them raises."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    mp.spawn(_process, (folder, work, arguments), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]


def _process(rank: int, folder: Path, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # torch's device meshes keep threads of the group, which abort one ordinary exit in three
