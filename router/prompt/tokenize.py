"""Prompts to token ids, exactly as the engine does it, without torch.

``ModelTokenizer`` reads the model folder: ``tokenizer.json`` through the ``tokenizers`` library,
the chat template from ``chat_template.jinja`` or ``tokenizer_config.json``. ``Tokenization`` runs
it in a few threads behind a bounded queue. Where the folder cannot be read here, or gives other
ids than the engine does on a probe, the instances' ``/tokenize`` route is asked instead; where
that fails too, the request is routed without a prefix.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from sglang_memserve.errors import ConfigError, LimitExceeded, PeerError
from tokenizers import Tokenizer

from .bodies import Body, Chat, Opaque, Source, Texts, TokenIds
from .chat_template import ChatTemplate, Unrenderable
from .pieces import Pieces, why_not

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Encoded in less time than it takes to hand it to a thread and to be told of it (half a millisecond
# where both share a core), and short enough not to hold up the event loop.
INLINE_CHARACTERS = 2048
# Looking up so much takes no longer either.
RECALLED_CHARACTERS = 256 * 1024
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The classes whose ``add_bos_token`` SGLang honours (``hf_transformers.tokenizer``).
BOS_CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GemmaTokenizer",
    "GemmaTokenizerFast",
    "CohereTokenizerFast",
)
PROBE_TEXT = "  The prefix, the whole prefix:\n\tdef f(x):  # ünïcode 12345 \u4f60\u597d"
# Longer than a few pieces.
TRIED_TEXT = "".join(
    f"{PROBE_TEXT} it's {i} o'clock, don't   wait;\nfoo_bar(x) -> {i * i}\r\n\n A I a é word {i}th "
    "some more of the usual words in a row so that there is a place to cut "
    for i in range(20)
)
PROBE_CHAT: Body = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PROBE_TEXT},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
}

AskEngine = Callable[[Mapping[str, Any]], Awaitable[Sequence[int]]]
"""Posts a body to some instance's ``/tokenize``; raises PeerError."""


class ModelTokenizer:
    """One model's tokenizer and chat template. ``encode`` and ``chat`` may run in any thread."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, bos: str | None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        # Special tokens of plain text: what the post-processor adds, or the flag SGLang restores.
        self._bos_id = tokenizer.token_to_id(bos) if bos is not None else None
        self._pieces: Pieces | None = None
        self._around: tuple[list[int], list[int]] = ([], [])

    def remember_pieces(self) -> None:
        """Encode texts piece by piece from now on.

        Raises ConfigError where other ids came of that: it is tried, since a tokenizer may have any
        pattern."""
        alone, whole = self._whole("a", special=False), self._whole("a", special=True)
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), None)
        if at is None:
            raise ConfigError("the tokens around a text depend on it")
        self._around = (whole[:at], whole[at + len(alone) :])
        self._pieces = Pieces(self._many)
        if self.encode(TRIED_TEXT) != self._with_bos(self._whole(TRIED_TEXT, special=True)):
            self._pieces = None
            raise ConfigError("pieces of a text have other ids than the whole")

    def recalls(self, texts: Sequence[str]) -> bool:
        """Whether the ids of ``texts`` are here but for a little."""
        if self._pieces is None or sum(map(len, texts)) > RECALLED_CHARACTERS:
            return False
        return sum(map(self._pieces.missing_characters, texts)) <= INLINE_CHARACTERS

    def _whole(self, text: str, *, special: bool) -> list[int]:
        if len(text) <= INLINE_CHARACTERS:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        else:
            # ``encode`` keeps the interpreter's lock, and with it the event loop from turning.
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    def _many(self, texts: list[str]) -> list[list[int]]:
        if len(texts) == 1:
            return [self._whole(texts[0], special=False)]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def _raw(self, text: str) -> list[int]:
        if self._pieces is None:
            return self._whole(text, special=False)
        return self._pieces.encode(text)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._bos_id is None else [self._bos_id, *ids]

    @classmethod
    def from_folder(cls, folder: Path) -> ModelTokenizer:
        """Raises ConfigError with the reason when the folder has no tokenizer we can read."""
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise ConfigError(f"tokenizer.json in {folder}: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config)
        source = _template_source(folder, config)
        try:
            template = ChatTemplate(source, special) if source is not None else None
        except ValueError as error:
            logger.warning("%s: %s; chats are routed without a prefix", folder, error)
            template = None
        adds_bos = not len(tokenizer.encode("").ids) and config.get("tokenizer_class") in (
            BOS_CLASSES
        )
        wanted = config.get("add_bos_token")
        bos = special.get("bos_token") if adds_bos and (wanted is None or wanted) else None
        model = cls(tokenizer, template, bos)
        if reason := why_not((folder / "tokenizer.json").read_bytes()):
            logger.info("%s: texts are encoded whole (%s)", folder, reason)
            return model
        try:
            model.remember_pieces()
        except ConfigError as error:
            logger.warning("%s: texts are encoded whole (%s)", folder, error)
        return model

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, special tokens included."""
        if self._pieces is None:
            return self._with_bos(self._whole(text, special=True))
        head, tail = self._around
        return self._with_bos([*head, *self._pieces.encode(text), *tail])

    def chat(self, body: Body) -> list[int]:
        """Ids of a chat request. Raises Unrenderable."""
        if self._template is None:
            raise Unrenderable("no chat template")
        rendered = self._template.render(body)
        ids = self._raw(rendered.text)
        if rendered.prefix is not None:
            ids = ids + self._continuation(rendered.prefix)
        return ids

    def _continuation(self, prefix: str) -> list[int]:
        # SGLang encodes it as a text of its own and drops the BOS in front.
        alone: list[int] = self._tokenizer.encode(prefix, add_special_tokens=False).ids
        whole = self.encode(prefix)
        return whole[1:] if whole[1:] == alone else whole


class Backend(Enum):
    """Who makes the ids of one kind of prompt."""

    LOCAL = "local"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ids of each prompt, or why there are none."""

    ids: tuple[Sequence[int], ...]
    reason: str = ""


class Tokenization:
    """Tokenizing as a service to the event loop that owns it.

    ``threads`` encode at once, ``max_queue`` more may wait; beyond that ``tokenize`` answers
    without ids, since a late prefix is worth less than no prefix.
    """

    def __init__(
        self, ask: AskEngine, *, threads: int = 2, max_queue: int = 256, folder: Path | None = None
    ) -> None:
        self._ask = ask
        self._limit = threads + max_queue
        self._pending = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._folder = folder
        self._loaded: Path | None = None
        self._model: ModelTokenizer | None = None
        self._texts = Backend.ENGINE
        self._chats = Backend.ENGINE

    @property
    def backends(self) -> tuple[Backend, Backend]:
        """Who makes the ids of texts and of chats."""
        return self._texts, self._chats

    async def prepare(self, model_path: str) -> None:
        """Load the tokenizer of ``model_path`` (or of the configured folder) and try it against
        an engine. Never raises; what does not work is logged once and asked of the engines."""
        folder = self._folder or Path(model_path)
        if folder == self._loaded:
            return
        self._loaded = folder
        try:
            self._model = await self._run(lambda: ModelTokenizer.from_folder(folder))
        except (ConfigError, OSError, LimitExceeded) as error:
            self._model = None
            self._texts = self._chats = Backend.ENGINE
            logger.warning("tokenizing is left to the instances: %s", error)
            return
        self._texts = self._chats = Backend.LOCAL
        await self._verify(self._model)

    async def _verify(self, model: ModelTokenizer) -> None:
        """Compare with the engine once: a chat template may have been replaced there, say."""
        probes = (
            ("texts", {"prompt": PROBE_TEXT}, lambda: model.encode(PROBE_TEXT)),
            ("chats", dict(PROBE_CHAT), lambda: model.chat(PROBE_CHAT)),
        )
        for kind, question, ours in probes:
            try:
                theirs = await self._ask(question)
            except PeerError as error:
                logger.info("%s: tokenizer not compared with the engine: %s", kind, error)
                continue
            try:
                same = list(theirs) == await self._run(ours)
            except (Unrenderable, LimitExceeded):
                same = False
            if not same:
                logger.warning("%s: our token ids differ from the engine's, so it is asked", kind)
                if kind == "texts":
                    self._texts = Backend.ENGINE
                else:
                    self._chats = Backend.ENGINE

    async def tokenize(self, source: Source) -> Tokenized:
        """Ids of every prompt of ``source``. Never raises for a prompt's sake."""
        match source:
            case Opaque(reason):
                return Tokenized((), reason)
            case TokenIds(ids):
                return Tokenized(ids)
        backend = self._texts if isinstance(source, Texts) else self._chats
        try:
            if backend is Backend.LOCAL and self._model is not None:
                model = self._model
                short = _length(source) <= INLINE_CHARACTERS
                if short or (isinstance(source, Texts) and model.recalls(source.texts)):
                    return _encode(model, source)
                return await self._run(lambda: _encode(model, source))
            return await self._by_engine(source)
        except Unrenderable as error:
            return Tokenized((), str(error))
        except LimitExceeded:
            return Tokenized((), "tokenizer busy")
        except PeerError as error:
            return Tokenized((), f"no tokenizer ({error})")

    async def _by_engine(self, source: Texts | Chat) -> Tokenized:
        if isinstance(source, Chat):
            return Tokenized((await self._ask(source.body),))
        answers = [await self._ask({"prompt": text}) for text in source.texts]
        return Tokenized(tuple(answers))

    async def _run(self, work: Callable[[], T]) -> T:
        if self._pending >= self._limit:
            raise LimitExceeded(f"{self._pending} prompts wait for the tokenizer")
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Stop the threads; what waits is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _length(source: Texts | Chat) -> float:
    """Characters to encode, as far as that is easily said; infinite if it is not."""
    if isinstance(source, Texts):
        return sum(map(len, source.texts))
    messages = source.body.get("messages")
    if not isinstance(messages, list) or source.body.get("tools"):
        return math.inf
    contents = [one.get("content") if isinstance(one, dict) else None for one in messages]
    return sum(len(text) if isinstance(text, str) else math.inf for text in contents)


def _encode(model: ModelTokenizer, source: Texts | Chat) -> Tokenized:
    try:
        if isinstance(source, Chat):
            return Tokenized((model.chat(source.body),))
        return Tokenized(tuple(model.encode(text) for text in source.texts))
    except (RecursionError, jinja2.exceptions.SecurityError, ArithmeticError) as error:
        raise Unrenderable(f"{type(error).__name__} in the chat template") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} is no JSON object")
    return value


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    listed = _read_json(folder / "special_tokens_map.json")
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.get(name, listed.get(name))
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    """A file of its own goes before the configuration; of several templates SGLang takes the
    first one named."""
    for name in ("chat_template.jinja", "chat_template.json"):
        path = folder / name
        if not path.is_file():
            continue
        if name.endswith(".jinja"):
            return path.read_text(encoding="utf-8")
        value = _read_json(path).get("chat_template")
        if isinstance(value, str):
            return value
    value = config.get("chat_template")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = value[0].get("template")
    return value if isinstance(value, str) else None
