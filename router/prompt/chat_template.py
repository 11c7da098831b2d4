"""A chat request to the text that the engine tokenizes, without transformers or torch. Pure.

Does what SGLang 0.5.23 does between the request and ``apply_chat_template``
(``openai.protocol``, ``OpenAIServingChat._apply_jinja_template``,
``parser.jinja_template_utils``) and what transformers does inside it
(``utils.chat_template_utils``). Requests with features that only the engine can render raise
``Unrenderable``: they are routed without a prefix, and the instance answers them as ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import orjson
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]

TEXT_PARTS = ("text", "input_text")
GENERIC_ROLES = ("system", "assistant", "tool", "function", "developer", "latest_reminder", "root")
# In the order in which SGLang's message model dumps them.
MESSAGE_FIELDS = (
    "content",
    "tool_call_id",
    "name",
    "phase",
    "reasoning_content",
    "tool_calls",
    "prefix",
)
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "ultra", "max")


class Unrenderable(Exception):
    """This request's prompt is the engine's business; the text says why."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """``text`` is encoded without special tokens. ``prefix``, if any, is the beginning of the
    answer: encoded by itself (a BOS in front dropped) and put behind."""

    text: str
    prefix: str | None


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model wrote; for rendering it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike jinja2's own filter this one does not escape HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A compiled template. ``special_tokens`` are visible to it by name (``bos_token``, ...).

    Raises ValueError when ``source`` is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
        self._special_tokens = dict(special_tokens)
        self.wants_parts = _wants_parts(source, tree)

    def render(self, body: Mapping[str, Any]) -> Rendered:
        """The prompt of a ``/v1/chat/completions`` body. Raises Unrenderable."""
        messages = [_message(raw, self.wants_parts) for raw in body["messages"]]
        prefix = None
        last = messages[-1]
        if last["role"] == "assistant" and isinstance(last["content"], str):
            if body.get("continue_final_message"):
                prefix = last["content"]
                messages.pop()
            else:
                messages[-1] = {"role": "user", "content": last["content"]}
        tools = _tools(body)
        variables = {**self._special_tokens, **_template_variables(body)}
        try:
            try:
                text = self._render(messages, tools, variables)
            except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
                # Some templates want the bare functions; SGLang tries that second, too.
                bare = [tool.get("function", tool) for tool in tools] if tools else None
                text = self._render(messages, bare, variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise Unrenderable(f"chat template refused: {error}") from error
        return Rendered(text, prefix or None)

    def _render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        fixed = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": True,
        }
        return self._template.render({**fixed, **variables})


def _wants_parts(source: str, tree: jinja2.nodes.Template) -> bool:
    """Whether the template iterates over the parts of a message's content.

    SGLang: ``detect_jinja_template_content_format`` ("openai" against "string").
    """
    if any(word in source for word in ("image", "audio", "video", "vision")):
        return True
    return any(_is_content(loop.iter) for loop in tree.find_all(jinja2.nodes.For))


def _is_content(node: jinja2.nodes.Node) -> bool:
    """``message.content``, ``message['content']`` and so on, through filters, tests and slices."""
    while True:
        if isinstance(node, jinja2.nodes.Filter):
            if node.node is None:
                return False
            node = node.node
        elif isinstance(node, jinja2.nodes.Test) or (
            isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice)
        ):
            node = node.node
        else:
            break
    if isinstance(node, jinja2.nodes.Getitem):
        named = isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    elif isinstance(node, jinja2.nodes.Getattr):
        named = node.attr == "content"
    else:
        return False
    owner = node.node
    return named and isinstance(owner, jinja2.nodes.Name) and owner.name in ("message", "msg", "m")


def _message(raw: Any, wants_parts: bool) -> Message:
    """One message as SGLang hands it to the template: known fields only, nothing that is None."""
    if not isinstance(raw, dict) or not isinstance(raw.get("role"), str):
        raise Unrenderable("malformed message")
    if raw.get("tools"):
        raise Unrenderable("tools in a message")
    role = raw["role"]
    content = _content(raw.get("content"), wants_parts)
    if role == "user":
        return {"role": role, "content": content}
    role = role.lower()
    if role not in GENERIC_ROLES:
        raise Unrenderable("unknown role")
    message: Message = {"role": role}
    for field in MESSAGE_FIELDS:
        value = raw.get(field)
        if field == "content":
            if not isinstance(content, list):
                message[field] = content
        elif value is not None:
            message[field] = _tool_calls(value, role) if field == "tool_calls" else value
    if isinstance(content, list):
        # SGLang puts a list back last; a template that dumps whole messages sees the order.
        message["content"] = content
    if role == "tool" and isinstance(content, list):
        message["content"] = " ".join(part["text"] for part in content)
    return message


def _content(content: Any, wants_parts: bool) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unrenderable("malformed content")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            raise Unrenderable("content that is not text")
        if not isinstance(part.get("text"), str):
            raise Unrenderable("malformed content")
        texts.append(part["text"])
    if wants_parts:
        return [{"type": "text", "text": text} for text in texts]
    return " ".join(texts)


def _tool_calls(calls: Any, role: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise Unrenderable("malformed tool_calls")
    dumped = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise Unrenderable("malformed tool_calls")
        arguments = function.get("arguments")
        if role == "assistant" and isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments)
            except orjson.JSONDecodeError as error:
                raise Unrenderable("tool call arguments that are not JSON") from error
            if not isinstance(arguments, dict):
                raise Unrenderable("tool call arguments that are no object")
        dumped.append(
            {
                "id": call.get("id"),
                "index": call.get("index"),
                "type": call.get("type", "function"),
                "function": {"name": function.get("name"), "arguments": arguments},
            }
        )
    return dumped


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools a template sees, in SGLang's own dump (``openai.protocol.Tool``)."""
    tools = body.get("tools")
    choice = body.get("tool_choice")
    if not tools or choice == "none":
        return None
    if not isinstance(tools, list):
        raise Unrenderable("malformed tools")
    wanted = None
    if isinstance(choice, dict):
        wanted = (choice.get("function") or {}).get("name")
    dumped = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise Unrenderable("malformed tools")
        if wanted is None or function.get("name") == wanted:
            dumped.append(_tool(tool, function))
    return dumped or None


def _tool(tool: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    deferred = tool.get("defer_loading")
    known = {
        "description": function.get("description"),
        "name": function.get("name"),
        "parameters": function.get("parameters"),
    }
    for optional in ("strict", "defer_loading"):
        value = function.get(optional)
        if optional == "defer_loading" and value is None:
            value = deferred
        if value is not None:
            known[optional] = value
    ordered = {name: known[name] for name in function if name in known}
    return {
        "type": tool.get("type", "function"),
        "function": {**ordered, **known},
        "defer_loading": deferred,
    }


def _template_variables(body: Mapping[str, Any]) -> dict[str, Any]:
    """What SGLang adds for the template: ``chat_template_kwargs`` and the reasoning effort."""
    kwargs = body.get("chat_template_kwargs")
    variables = dict(kwargs) if isinstance(kwargs, dict) else {}
    if "chat_template" in variables:
        raise Unrenderable("a template in the request")
    effort = body.get("reasoning_effort")
    thinking = None
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict):
        asked = reasoning.get("effort")
        asked = reasoning.get("reasoning_effort") if asked is None else asked
        if asked is not None:
            effort = asked
        enabled = reasoning.get("enabled")
        enabled = reasoning.get("enable", False) if enabled is None else enabled
        if isinstance(enabled, str):
            enabled = enabled.strip().lower() in ("1", "true", "yes", "y", "on")
        thinking = True if enabled else None
    if effort is not None:
        if isinstance(effort, bool) or (isinstance(effort, str) and effort not in EFFORTS):
            raise Unrenderable("unusual reasoning effort")
        effort = float(effort) if isinstance(effort, int) else effort
        thinking = effort != "none"
    if thinking is not None:
        variables.setdefault("thinking", thinking)
        variables.setdefault("enable_thinking", thinking)
    named = variables.pop("reasoning_effort", None)
    effort = effort if named is None else named
    return variables if effort is None else {"reasoning_effort": effort, **variables}
