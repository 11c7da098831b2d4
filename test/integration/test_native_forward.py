"""A model's forward through native ops gives the results of SGLang's own: a real model runner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from integration.harness import process_environment
from sgl_kernel_ext.ops import cpu_features
from sglang_memserve.kernels import native

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(native() is None, reason="no native code"),
]

LIMIT_S = 240


def test_every_way_through_the_model_gives_the_same_logits(tiny_model: Path) -> None:
    """Rows go straight through, layer by layer, with torch's products, with torch's fused ops."""
    script = Path(__file__).with_name("native_forward.py")
    with process_environment() as environment:
        done = subprocess.run(
            [sys.executable, str(script), str(tiny_model)],
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
    assert result["heard"] == result["passes"], "a hook on a module was passed by"
    differences = result["differences"]
    assert differences["layer by layer"] == 0
    assert differences["torch's fused ops"] == 0
    features = cpu_features()
    # Elsewhere torch sums in another order; scores are rounded to 8 bits.
    same_sums = features["avx512_bf16"] and not features["amx_bf16"]
    limit = 0.0 if same_sums else 0.02 * result["largest logit"]
    assert differences["torch's products"] <= limit
