"""What the page kernel is compiled to, which needs no device, and what loads it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from oracle.pages import PagedPool
from sglang_memserve.errors import DeviceError
from sglang_memserve.memory.copies.moves import PageMoves, move_pages
from sglang_memserve.memory.layout import BlockLayout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.interpreter import InterpretedFunction

NUMBERS = ("first_tensor", "num_tensors", "count", "k_words", "v_words")


def compiled(to_blocks: bool, word: tl.dtype, align: int) -> str:
    """PTX for an H100, as the launcher would have it for sizes that are multiples of 16."""
    constants = {"TO_BLOCKS": to_blocks, "WORD": word, "ALIGN": align, "CHUNK": 1024}
    signature = dict.fromkeys(("tensors", "pages", "blocks"), "*i64")
    signature |= dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    multiples = {(names.index(name),): [["tt.divisibility", 16]] for name in ("k_words", "v_words")}
    source = ASTSource(move_pages, signature, constants, multiples)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return str(kernel.asm["ptx"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("to_blocks", [True, False])
def test_a_thread_moves_16_bytes_at_a_time(to_blocks: bool) -> None:
    code = compiled(to_blocks, tl.int64, 16)
    loads = re.findall(r"ld\.global[^ ]*\.(v\d\.b\d+)", code)
    stores = re.findall(r"st\.global[^ ]*\.(v\d\.b\d+)", code)
    # A chunk is 8 KiB, a program 128 threads: four accesses each, all under way at once.
    assert loads == stores == ["v2.b64"] * 4


def test_odd_sizes_are_moved_word_by_word() -> None:
    code = compiled(True, tl.int16, 2)
    assert re.findall(r"st\.global[^ ]*\.(b\d+)", code) == ["b16"] * 8


def launched(layout: BlockLayout, lead: int = 0) -> dict[str, object]:
    """How the kernel is launched over such a pool."""
    seen: dict[str, object] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> object:
            seen["grid"] = grid
            return lambda *numbers, **constants: seen.update(constants)

    pool = PagedPool.random(layout, 64, seed=1, lead=lead)
    moves = PageMoves(pool.tensors(), Kernel())
    numbers = torch.arange(64)
    moves.gather(numbers, numbers, programs=32)
    return seen


def test_words_as_long_as_all_addresses_allow() -> None:
    smollm2 = BlockLayout(30, 16, 3, 64, 64, 2)
    assert launched(smollm2) == {
        "grid": (32,),
        "TO_BLOCKS": True,
        "WORD": tl.int64,
        "ALIGN": 16,
        "CHUNK": 1024,
        "num_warps": 4,
    }
    assert launched(smollm2, lead=1)["WORD"] == tl.int16
    assert launched(smollm2, lead=4)["ALIGN"] == 8
    odd = launched(BlockLayout(1, 1, 1, 3, 5, 1))
    assert (odd["WORD"], odd["ALIGN"], odd["CHUNK"]) == (tl.int8, 1, 8)


def test_a_kernel_that_cannot_be_compiled_is_one_clear_error() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> object:
            raise RuntimeError("Failed to find C compiler")

    pool = PagedPool.random(BlockLayout(1, 1, 1, 4, 4, 2), 4, seed=1)
    with pytest.raises(DeviceError, match="C compiler"):
        PageMoves(pool.tensors(), Kernel()).prepare()


def test_preparing_moves_nothing() -> None:
    pool = PagedPool.random(BlockLayout(2, 1, 1, 4, 4, 2), 4, seed=1)
    held = pool.blocks()
    PageMoves(pool.tensors(), InterpretedFunction(move_pages.fn)).prepare()
    assert pool.blocks() == held


def test_one_kernel_a_direction_whatever_is_copied() -> None:
    """Else the first copy of another size would wait for the compiler."""
    plain = {parameter.name for parameter in move_pages.params if parameter.do_not_specialize}
    assert plain == {"first_tensor", "num_tensors", "count"}
    unaligned = {p.name for p in move_pages.params if p.do_not_specialize_on_alignment}
    assert unaligned == {"pages", "blocks"}


WITHOUT = ("sglang", "nixl", "msgspec", "flashinfer", "xxhash", "zmq", "sgl_kernel_ext")


def test_copies_run_on_a_machine_that_has_little() -> None:
    """A GPU machine for test/gpu may have torch, Triton and numpy, and nothing else of ours."""
    code = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
import sglang_memserve.memory.swap, sglang_memserve.memory.arena
assert "triton" not in sys.modules, "Triton is for accelerators only"
import sglang_memserve.memory.copies.moves
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
