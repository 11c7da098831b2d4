"""How the benchmarks start the engines they compare with: the same in all of them."""

from __future__ import annotations

from pathlib import Path

from benchmark import vllm_server
from benchmark.engine import contenders
from benchmark.serving import servers
from benchmark.serving.setups import SETUPS


def test_both_benchmarks_start_vllm_with_the_same_words() -> None:
    python, model = Path("/env/bin/python"), Path("/model")
    common = vllm_server.arguments(python, model)
    engine = contenders.vllm(python, model, [1])
    assert engine.argv[: len(common)] == common
    assert engine.environment["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    given = servers.Given(model, servers.Sizes(), peer_vllm=str(python))
    fleet = SETUPS["vllm-1p1d"].fleet
    served = servers._vllm(fleet, 12345, 8192, given)
    assert tuple(served[: len(common)]) == common
    assert "--kv-transfer-config" in served and served[served.index("--port") + 1] == "12345"
    # It does not begin with a context for which it has no room, and keeps one block for itself.
    small = servers._vllm(fleet, 12345, 4096, given)
    assert small[small.index("--max-model-len") + 1] == "4096"
    assert small[small.index("--num-gpu-blocks-override") + 1] == "129"
    assert engine.environment.items() <= servers._vllm_environment(1, 12346).items()
