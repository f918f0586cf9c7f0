"""Processes of a test that form a group of ranks. They are forked, so that nothing has to be imported again."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(count: int, folder: Path, call: Callable[[], Any]) -> list[Any]:
    """What ``call`` gives on each of ``count`` ranks: tensors in plain containers. One rank has no process group."""
    folder.mkdir(parents=True, exist_ok=True)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, count, folder, call)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()  # nothing where it has ended
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, call: Callable[[], Any]) -> None:
    try:
        torch.set_num_threads(1)  # OpenMP would wait for threads that only the forked process has
        if count > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
        torch.save(call(), folder / f"result-{rank}")
        if count > 1:
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
