"""A model's forward through native ops gives the results of SGLang's own: a real model runner."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from integration.harness import process_environment
from sgl_kernel_ext.ops import cpu_features
from sglang_memserve.kernels import native

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(native() is None, reason="no native code"),
]

LIMIT_S = 240


def _qwen2(**sizes: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            values.data.normal_()
    return model


def _qwen3(**sizes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(head_dim=48, **sizes))
    for name, values in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            values.data.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def model(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of a tiny random model, with the tokenizer of ``tiny_model``."""
    if request.param == "llama":
        return tiny_model
    import torch

    torch.manual_seed(1)
    make = {"qwen2": _qwen2, "qwen3": _qwen3}[request.param]
    made = make(
        vocab_size=json.loads((tiny_model / "config.json").read_text())["vocab_size"],
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    folder: Path = tmp_path_factory.mktemp(request.param) / "model"
    weights = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(tiny_model, folder, ignore=weights)
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_every_way_through_the_model_gives_the_same_logits(model: Path) -> None:
    """Rows go straight through, layer by layer, with torch's products, with torch's fused ops."""
    script = Path(__file__).with_name("native_forward.py")
    with process_environment() as environment:
        done = subprocess.run(
            [sys.executable, str(script), str(model)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["short way"] == "StraightThrough"
    assert result["again"] == 0
    assert sum(result["taken"].values()) == result["passes"] and all(result["taken"].values())
    assert result["heard"] == result["passes"], "a hook on a module was passed by"
    differences = result["differences"]
    assert differences["layer by layer"] == 0
    assert differences["torch's fused ops"] == 0
    features = cpu_features()
    # Elsewhere torch sums in another order; scores are rounded to 8 bits.
    same_sums = features["avx512_bf16"] and not features["amx_bf16"]
    limit = 0.0 if same_sums else 0.02 * result["largest logit"]
    assert differences["torch's products"] <= limit
