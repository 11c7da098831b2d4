"""Ranks that must decide alike: two processes with SGLang's kind of group between them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_memserve.plugin.agreement import Agreement

LIMIT_S = 90.0
VOTES = [(True, True), (True, False), (False, True), (False, False)]

RANK = """
import datetime, json, os, sys, types, torch
from sglang_memserve.plugin.agreement import Agreement
rank, store, name, votes = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{store}", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)
names = ("tp_cache_group", "attn_cp_cache_group", "attn_tp_cache_group")
groups = dict.fromkeys(names) | {name: torch.distributed.group.WORLD}
ranks = Agreement.of(types.SimpleNamespace(**groups))
print(json.dumps([ranks.unanimous(vote[rank]) for vote in votes]), flush=True)
# Gloo ends a process whose partner takes the group down first.
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.parametrize("name", ["tp_cache_group", "attn_tp_cache_group"])
def test_all_ranks_say_yes_only_when_each_does(name: str, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "s"), name, json.dumps(VOTES)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(LIMIT_S)
    assert [process.returncode for process in processes] == [0, 0], said
    assert [json.loads(out) for out, _ in said] == [[True, False, False, False]] * 2


def test_one_rank_asks_nobody() -> None:
    groups: Any = SimpleNamespace(
        tp_cache_group=None, attn_cp_cache_group=None, attn_tp_cache_group=None
    )
    alone = Agreement.of(groups)
    assert alone.unanimous(True) and not alone.unanimous(False)
