"""Token ids equal those of transformers and of SGLang's own chat serving; the queue is bounded.

The oracle is a stand-in-free path through the engine's code: transformers' tokenizer class over
the same folder, and ``OpenAIServingChat._apply_jinja_template`` on the parsed request.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sglang_memserve.errors import ConfigError, PeerError
from sglang_memserve.router.prompt.bodies import Chat, Opaque, Texts, TokenIds
from sglang_memserve.router.prompt.chat_template import ChatTemplate, Unrenderable
from sglang_memserve.router.prompt.tokenize import (
    INLINE_CHARACTERS,
    Backend,
    ModelTokenizer,
    Tokenization,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' }}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}"
    "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}"
    "{{- '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    "{% if enable_thinking %}<think>{{ reasoning_effort }}{% endif %}"
)
PARTS = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}({{ part['type'] }}){{ part['text'] }}{% endfor %}"
    "{% endif %}{{ message | tojson }}{% endfor %}{% if messages[0]['content'] == 'bad' %}"
    "{{ raise_exception('no') }}{% endif %}"
)
STRICT_TOOLS = "{% for tool in tools or [] %}{{ tool['name'] | upper }}{% endfor %}" + PARTS
CORPUS = ["The quick brown fox jumps over the lazy dog. def f(x): return x", "user assistant"]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object"}, "strict": None, "x": 1},
}


def make_folder(
    folder: Path, template: str | None, *, bos: bool = False, config: Mapping[str, Any] = {}
) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": [1, "ü"]}'}}],
}
BODIES: list[dict[str, Any]] = [
    {"messages": [user("Why does the fox jump?")]},
    {"messages": [user("  two\n\n lines<|im_end|>")]},
    {"messages": [{"role": "System", "content": "Be brief."}, user("Why?")]},
    {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]},
    {"messages": [{**user("x"), "name": "dropped"}, {"role": "assistant", "content": "so"}]},
    {
        "messages": [user("x"), {"role": "assistant", "content": "So the"}],
        "continue_final_message": True,
    },
    {"messages": [user("x")], "tools": [TOOL]},
    {"messages": [user("x")], "tools": [TOOL], "tool_choice": "none"},
    {
        "messages": [user("x")],
        "tools": [TOOL, {"type": "function", "function": {"name": "g", "description": "d"}}],
        "tool_choice": {"type": "function", "function": {"name": "g"}},
    },
    {
        "messages": [
            user("x"),
            CALL,
            {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]},
        ],
        "tools": [TOOL],
    },
    {"messages": [user("x")], "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [user("x")], "reasoning_effort": "high"},
    {"messages": [user("x")], "reasoning_effort": "none"},
    {"messages": [user("x")], "reasoning": {"enabled": True, "effort": "low"}},
    {
        "messages": [
            user("x"),
            {"role": "assistant", "content": "a", "reasoning_content": "r", "name": "n"},
            user("y"),
        ]
    },
]


def engine_ids(folder: Path, body: dict[str, Any]) -> list[int]:
    """What SGLang's chat serving makes of a request, its tokenizer manager reduced to a name."""
    from types import SimpleNamespace

    from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.parser.jinja_template_utils import detect_jinja_template_content_format
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    serving = object.__new__(OpenAIServingChat)
    serving.tokenizer_manager = SimpleNamespace(tokenizer=tokenizer, served_model_name="m")
    serving.template_manager = SimpleNamespace(
        jinja_template_content_format=detect_jinja_template_content_format(tokenizer.chat_template),
        jinja_template_may_reorder_tool_results=False,
        reasoning_config=None,
        python_chat_template=None,
        chat_template_name=None,
    )
    serving.chat_encoding_spec = None
    serving._encoding_adapter = None
    serving._reasoning_detector = None
    serving.reasoning_parser = None
    serving.is_minimax_m3 = False
    serving._tokenizer_auto_adds_specials = len(tokenizer.encode("")) > 0
    serving._prompt_text_round_trip_is_lossy = False
    request = ChatCompletionRequest.model_validate({"model": "m", **json.loads(json.dumps(body))})
    tools = None
    if request.tools and request.tool_choice != "none":
        chosen = request.tool_choice
        tools = [
            tool.model_dump()
            for tool in request.tools
            if isinstance(chosen, str) or tool.function.name == chosen.function.name
        ] or None
    if request.chat_template_kwargs:
        effort = request.chat_template_kwargs.pop("reasoning_effort", None)
        request.reasoning_effort = effort or request.reasoning_effort
    return list(serving._apply_jinja_template(request, tools, False).prompt_ids)


@pytest.mark.filterwarnings("ignore")  # importing the engine warns about much that is not ours
@pytest.mark.parametrize("template", [CHATML, PARTS, STRICT_TOOLS], ids=["chatml", "parts", "bare"])
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_chat_ids_are_the_engines(tmp_path: Path, template: str, bos: bool) -> None:
    pytest.importorskip("sglang")
    folder = make_folder(tmp_path / "m", template, bos=bos)
    ours = ModelTokenizer.from_folder(folder)
    for body in BODIES:
        assert ours.chat(body) == engine_ids(folder, body), body


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_text_ids_are_those_of_transformers(tmp_path: Path, bos: bool) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_folder(tmp_path / "m", None, bos=bos)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    ours = ModelTokenizer.from_folder(folder)
    for text in ["", "a", " The fox\n\n<|im_start|>x", "ünï你好", "x" * 5000]:
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_a_llama_tokenizer_without_post_processor_gets_its_bos(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", None, config={"tokenizer_class": "LlamaTokenizerFast"})
    assert ModelTokenizer.from_folder(folder).encode("fox")[0] == 0
    off = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}
    folder = make_folder(tmp_path / "off", None, config=off)
    assert ModelTokenizer.from_folder(folder).encode("fox")[0] != 0


@pytest.mark.parametrize(
    "messages",
    [
        [user([{"type": "image_url", "image_url": {"url": "x"}}])],
        [user(3)],
        ["hi"],
        [{"role": "owner", "content": "x"}],
        [{"role": "system", "content": "x", "tools": [TOOL]}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [user("bad")],
    ],
)
def test_what_only_the_engine_can_render_is_said_so(messages: list[Any]) -> None:
    with pytest.raises(Unrenderable):
        ChatTemplate(PARTS, {"bos_token": "<s>"}).render({"messages": messages})


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(Unrenderable):
        template.render({"messages": [user("x")]})


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        ModelTokenizer.from_folder(tmp_path)
    folder = make_folder(tmp_path / "m", None)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="tokenizer_config"):
        ModelTokenizer.from_folder(folder)


async def no_engine(_: Mapping[str, Any]) -> Sequence[int]:
    raise PeerError("nobody there")


def test_an_engine_that_disagrees_is_asked_instead(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", CHATML)
    local = ModelTokenizer.from_folder(folder)

    async def engine(question: Mapping[str, Any]) -> Sequence[int]:
        return [1, 2, 3] if "messages" in question else local.encode(question["prompt"])

    async def scenario() -> None:
        service = Tokenization(engine)
        await service.prepare(str(folder))
        assert service.backends == (Backend.LOCAL, Backend.ENGINE)
        chat = await service.tokenize(Chat({"messages": [user("x")]}))
        assert chat.ids == ([1, 2, 3],)
        assert (await service.tokenize(Texts(("fox",)))).ids == (local.encode("fox"),)
        service.close()

    asyncio.run(scenario())


def test_without_folder_and_engine_there_are_no_ids_and_no_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        service = Tokenization(no_engine)
        await service.prepare(str(tmp_path / "nowhere"))
        answer = await service.tokenize(Texts(("fox",)))
        assert (answer.ids, "nobody there" in answer.reason) == ((), True)
        assert (await service.tokenize(TokenIds(([1],)))).ids == ([1],)
        assert (await service.tokenize(Opaque("multimodal"))).reason == "multimodal"
        service.close()

    asyncio.run(scenario())


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "m", None)
    release = threading.Event()

    async def scenario() -> None:
        service = Tokenization(no_engine, threads=1, max_queue=2)
        await service.prepare(str(folder))

        def slow(self: ModelTokenizer, text: str) -> list[int]:
            assert release.wait(30)
            return [7]

        monkeypatch.setattr(ModelTokenizer, "encode", slow)
        long = Texts(("x" * (INLINE_CHARACTERS + 1),))
        waiting = [asyncio.create_task(service.tokenize(long)) for _ in range(3)]
        await asyncio.sleep(0)
        assert (await service.tokenize(long)).reason == "tokenizer busy"
        release.set()
        assert [task.ids for task in await asyncio.gather(*waiting)] == [([7],)] * 3
        service.close()

    asyncio.run(scenario())


def test_short_prompts_need_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "m", CHATML)
    threads: set[str] = set()

    def encode(self: ModelTokenizer, text: str) -> list[int]:
        threads.add(threading.current_thread().name)
        return [7]

    async def scenario() -> None:
        service = Tokenization(no_engine, threads=1)
        await service.prepare(str(folder))
        monkeypatch.setattr(ModelTokenizer, "encode", encode)
        monkeypatch.setattr(ModelTokenizer, "chat", lambda self, _: encode(self, ""))
        half = "x" * (INLINE_CHARACTERS // 2)
        for short in (Texts((half, half)), Chat({"messages": [user(half), user(half)]})):
            await service.tokenize(short)
        assert threads == {threading.current_thread().name}
        threads.clear()
        for long in (
            Texts((half, half, "x")),
            Chat({"messages": [user(half), user(half), user("x")]}),
            Chat({"messages": [user("x")], "tools": [{}]}),
            Chat({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
        ):
            await service.tokenize(long)
        assert len(threads) == 1 and threads != {threading.current_thread().name}
        service.close()

    asyncio.run(scenario())


def test_tokenizing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, sglang_memserve.router.prompt.tokenize, sglang_memserve.router.http.proxy\n"
        "print(sorted({'torch', 'transformers', 'sglang', 'nixl'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
