"""Run by ``test_native_forward``: one model in one process, computed in several ways.

    python native_forward.py MODEL

Prints a JSON object: what was computed natively, and for each way the largest difference of its
logits from those of all native ops together, over the same prompts and the tokens that follow them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from sglang.benchmark import one_batch
from sglang.kernels.fused_op import set_fused_op_backend
from sglang.kernels.spec import KernelBackend
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs, prepare_server_args

# New rows of one batch: up to 128 go in a call a layer, more in parts.
BATCHES = ([3], [8, 5, 1], [40, 5], [128], [120, 9], [300], [3] * 20)
STEPS = 4


def prompts(lengths: list[int]) -> list[list[int]]:
    source = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, 250, (n,), generator=source).tolist() for n in lengths]


def logits(runner: Any) -> list[torch.Tensor]:
    """Of every batch's prompts and of ``STEPS`` tokens after each."""
    found = []
    for lengths in BATCHES:
        runner.req_to_token_pool.clear()
        runner.token_to_kv_pool_allocator.clear()
        requests = one_batch.prepare_synthetic_inputs_for_latency_test(
            len(lengths), 0, prompts(lengths)
        )
        tokens, scores, batch = one_batch.extend(requests, runner)
        found.append(scores.clone())
        for _ in range(STEPS):
            tokens, scores = one_batch.decode(tokens, batch, runner)
            found.append(scores.clone())
    return found


def taken(short: Any) -> dict[str, int]:
    """How often each of the straight ways is taken from now on."""
    counts: dict[str, int] = {}

    def count(name: str, way: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted(*given: Any) -> torch.Tensor:
            counts[name] += 1
            return way(*given)

        return counted

    for name in ("_in_a_call_a_layer", "_part_by_part"):
        counts[name] = 0
        setattr(short, name, count(name, getattr(short, name)))
    return counts


def without_the_short_way(model: Any) -> Callable[[], None]:
    short = model.model.forward
    model.model.forward = short._long_way

    def back() -> None:
        model.model.forward = short

    return back


def without_thin_products(model: Any) -> Callable[[], None]:
    replaced = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        for kind in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod):
            if isinstance(method, kind):
                replaced.append((module, method))
                module.quant_method = kind()

    def back() -> None:
        for module, method in replaced:
            module.quant_method = method

    return back


def without_fused_ops(model: Any) -> Callable[[], None]:
    set_fused_op_backend(KernelBackend.TORCH)
    return lambda: set_fused_op_backend(None)


def load(folder: str) -> Any:
    flags = ["--model-path", folder, "--device", "cpu", "--page-size", "16"]
    flags += ["--disable-overlap-schedule", "--disable-cuda-graph", "--max-total-tokens", "4096"]
    args: ServerArgs = prepare_server_args([*flags, "--mem-fraction-static", "0.2"])
    args.resolve_once()
    one_batch._set_envs_and_config(args)
    ranks = one_batch.SpawnRanks(
        world_rank=one_batch.spawn_world_rank(args, tp_rank=0, pp_rank=0), gpu_id=0
    )
    one_batch.publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    runner, _ = one_batch.load_model(args, PortArgs.init_new(args), 0, 0)
    return runner.torch_runner


def main() -> int:
    load_plugins()
    runner = load(sys.argv[1])
    model = runner.model
    ways = {
        "layer by layer": (without_the_short_way,),
        "torch's products": (without_the_short_way, without_thin_products),
        "torch's fused ops": (without_the_short_way, without_fused_ops),
    }
    counts = taken(model.model.forward)
    expected = logits(runner)
    taken_ways = dict(counts)
    differences = {}
    for name, steps in ways.items():
        undo = [step(model) for step in steps]
        found = logits(runner)
        for back in reversed(undo):
            back()
        differences[name] = max(
            float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)
        )
    heard: list[int] = []
    listening = model.model.layers[-1].mlp.register_forward_hook(lambda *_: heard.append(1))
    logits(runner)
    listening.remove()
    again = max(float((a - b).abs().max()) for a, b in zip(expected, logits(runner), strict=True))
    print(
        json.dumps(
            {
                "short way": type(model.model.forward).__name__,
                "largest logit": max(float(scores.abs().max()) for scores in expected),
                "again": again,
                "passes": len(expected),
                "taken": taken_ways,
                "heard": len(heard),
                "differences": differences,
            }
        )
    )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    # SGLang leaves threads that would outlive the interpreter.
    status = main()
    os._exit(status)
