"""Texts encoded piece by piece have the ids of the whole, whatever is remembered."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_memserve.router.prompt import pieces
from sglang_memserve.router.prompt.pieces import Pieces, cut, why_not
from sglang_memserve.router.prompt.tokenize import TRIED_TEXT, ModelTokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(tokenizer)


def prefixed() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return trained(tokenizer)


def llama() -> Tokenizer:
    """With a token before each text, and normal forms."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    trained(tokenizer)
    start = tokenizer.token_to_id("<|start|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start)]
    )
    return tokenizer


def trained(tokenizer: Tokenizer) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRIED_TEXT], trainer)
    return tokenizer


KINDS = {make.__name__: make() for make in (gpt2, prefixed, llama)}
WORDS = st.sampled_from(
    [
        "the",
        "word",
        "don't",
        "x1",
        "1x",
        "it's",
        "A",
        "é",
        "<|end|>",
        "\u4f60\u597d",
        "e\u0301",
        "_",
    ]
)
SPACES = st.sampled_from([" ", " ", " ", " ", "  ", "\n", " \n ", "\t", "", ".", ". "])
TEXTS = st.lists(st.tuples(WORDS, SPACES), max_size=60).map(
    lambda pairs: "".join(word + space for word, space in pairs)
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXTS, max_size=6), capacity=st.sampled_from([0, 40, 200, 10**6]))
@settings(max_examples=60, deadline=None)
def test_pieces_have_the_ids_of_the_whole(kind: str, texts: list[str], capacity: int) -> None:
    tokenizer = KINDS[kind]

    def alone(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def many(wanted: list[str]) -> list[list[int]]:
        return [alone(text) for text in wanted]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", 8)
        patch.setattr(pieces, "SEARCHED_CHARACTERS", 20)
        known = Pieces(many, capacity=capacity)
        for text in [*texts, *texts]:
            assert "".join(cut(text)) == text
            assert known.encode(text) == alone(text)
            known.check()
            if capacity >= 10**6:
                assert known.missing_characters(text) == 0
        both = "".join(texts)
        assert known.encode(both) == alone(both)
        assert known.missing_characters(both) <= len(both)


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_tokenizer_gives_its_own_ids(kind: str, tmp_path: Path) -> None:
    model = ModelTokenizer.from_folder(saved(KINDS[kind], tmp_path / kind))
    assert not model.recalls([TRIED_TEXT * 3])
    for text in ("", "a", TRIED_TEXT, TRIED_TEXT * 3, "x" * 5000, "\u4f60" * 5000):
        assert model.encode(text) == KINDS[kind].encode(text).ids
        assert model.encode(text) == KINDS[kind].encode(text).ids
    assert model.recalls([TRIED_TEXT * 3])
    assert not model.recalls(["x" * 5000])


def test_who_may_not_be_cut_says_why(tmp_path: Path) -> None:
    good = orjson.loads((saved(gpt2(), tmp_path / "m") / "tokenizer.json").read_bytes())

    def with_token(content: str, **more: bool) -> bytes:
        tokenizer = gpt2()
        tokenizer.add_tokens([AddedToken(content, **more)])
        return (saved(tokenizer, tmp_path / "m") / "tokenizer.json").read_bytes()

    def reason(**changed: object) -> str:
        return why_not(orjson.dumps({**good, **changed}))

    assert reason() == ""
    assert "model" in reason(model={"type": "Unigram"})
    assert "model" in reason(model={"type": "BPE", "dropout": 0.1})
    assert "normalizer" in reason(normalizer={"type": "Lowercase"})
    assert reason(pre_tokenizer=None) == "pre-tokenizer"
    assert reason(pre_tokenizer={"type": "Metaspace"}) == "pre-tokenizer"
    assert reason(pre_tokenizer={"type": "ByteLevel", "use_regex": False}) == "pre-tokenizer"
    odd = {"type": "Split", "pattern": {"Regex": ".+"}, "behavior": "Isolated", "invert": False}
    both = {"type": "Sequence", "pretokenizers": [odd, {"type": "ByteLevel"}]}
    assert reason(pre_tokenizer=both) == "pre-tokenizer"
    assert "two words" in why_not(with_token("two words"))
    assert "spaces" in why_not(with_token("word", rstrip=True))
    assert "spaces" in why_not(with_token("word", lstrip=True))
    assert why_not(with_token("<|word|>", lstrip=True, rstrip=True)) == ""
    assert "not understood" in why_not(b"{}")
    assert "not understood" in why_not(b"no JSON")


def test_a_pattern_that_lies_is_found_out(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    # Looks like the usual kind, and takes two words at a time.
    lying = r"\p{L}+ \p{L}+|\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}]+"
    split = pre_tokenizers.Split(Regex(lying), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    folder = saved(trained(tokenizer), tmp_path / "m")
    assert why_not((folder / "tokenizer.json").read_bytes()) == ""
    model = ModelTokenizer.from_folder(folder)
    text = TRIED_TEXT * 3
    assert model.encode(text) == tokenizer.encode(text).ids
    assert model.encode(text) == tokenizer.encode(text).ids
    assert not model.recalls([text])
