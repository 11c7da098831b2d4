"""The requests of the demo: a frontend program and a chat, by clients that know no MemServe.

Both return their outputs by name, greedy, so that two runs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..errors import MemServeError

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletionMessageParam

ANSWER_TOKENS = 16
TURN_TOKENS = 24
PROGRAM_LIMIT_S = 240.0

DOCUMENT = """\
Visitor guide to the Harbour Light Museum.

The Harbour Light Museum stands on a low rock at the mouth of the river, twelve minutes on foot
from the old railway station. Its tower was finished in 1861 after three years of work. The
first keeper, Marta Lindqvist, lit an oil lamp there every evening for twenty-six years and
wrote down the weather each morning in a green notebook. Nineteen of her notebooks survive and
lie in the glass case on the ground floor. The lamp burned rapeseed oil until 1889, then
paraffin, and from 1924 electricity.

The museum has five rooms. The ground floor shows tools, uniforms and the notebooks. The first
floor shows models of the forty ships that were guided past the shoals. The second floor is the
keeper's kitchen, left as it was in 1951, with an iron stove, a blue kettle and a calendar of
that year. The third floor holds the clockwork that turned the lens once every nine seconds; it
is wound by hand on Sundays at noon while visitors watch. At the top is the lantern room with
the great lens, made of two hundred and ten pieces of glass, each cut and polished by hand. From
its gallery one sees the two islands, the ferry pier and, on clear days, the snow on the
northern hills.

The museum opens at nine in the morning and closes at six in the evening, except on Mondays,
when it is closed. Tickets cost eight crowns; children under ten and members of the harbour
guild enter free. There are one hundred and forty-two steps and no lift, so visitors who cannot
climb stairs may watch the lantern room on a screen beside the entrance. Dogs are welcome on the
ground floor only. The cafe in the former oil store sells fish soup, rye bread and apple cake
until half past four. The last boat to the islands leaves the pier at a quarter past five, and
the keeper of the museum rings the fog bell once, ten minutes before, to remind everybody who
has forgotten the time.
"""

QUESTIONS = (
    "Who was the first keeper?",
    "How many steps are there?",
    "What does the cafe sell?",
)

TURNS = (
    "When does the museum open, and what does a ticket cost?",
    "May I bring my dog?",
    "When does the last boat leave?",
)

# The frontend announces the shared prefix, then asks each question; a chat asks once a turn.
REQUESTS = 1 + len(QUESTIONS) + len(TURNS)


def import_clients() -> None:
    """The slow part: SGLang's frontend brings torch with it."""
    import openai  # noqa: F401
    import sglang  # noqa: F401


def run_program(url: str) -> dict[str, str]:
    """A program of the SGLang frontend language: one document, three questions in parallel."""
    import sglang as sgl

    done: Future[dict[str, str]] = Future()

    @sgl.function
    def interview(s, document, questions):  # type: ignore[no-untyped-def]
        # A streamed program runs on a thread of its own, where nobody sees it fail.
        try:
            done.set_result(_interview(s, document, questions))
        except Exception as error:  # noqa: BLE001 - raised again by done.result()
            done.set_exception(error)

    # Streamed, so that the time to the first token can be seen.
    endpoint = sgl.RuntimeEndpoint(url)
    interview.run(document=DOCUMENT, questions=QUESTIONS, backend=endpoint, stream=True)
    try:
        return done.result(PROGRAM_LIMIT_S)
    except TimeoutError:
        raise MemServeError(f"the program did not end within {PROGRAM_LIMIT_S:.0f} s") from None


def _interview(s: Any, document: str, questions: Sequence[str]) -> dict[str, str]:
    import sglang as sgl

    s += document
    # The document is on its way to another thread; without waiting, fork may find nothing to share.
    s.sync()
    forks = s.fork(len(questions))
    for fork, question in zip(forks, questions, strict=True):
        fork += f"\nQuestion: {question}\nAnswer:"
        fork += sgl.gen("answer", max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    forks.join()
    for fork in forks:
        if fork.error() is not None:
            raise MemServeError(f"a fork of the program failed: {fork.error()}")
    return {f"answer {index}": fork["answer"] for index, fork in enumerate(forks, 1)}


def run_chat(url: str) -> dict[str, str]:
    """A conversation through the OpenAI SDK, streamed; each turn repeats all before it."""
    import openai

    outputs = {}
    guide = "Answer from this guide, in one sentence.\n\n" + DOCUMENT
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": guide}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        for number, question in enumerate(TURNS, 1):
            messages.append({"role": "user", "content": question})
            text = _stream_turn(client, model, messages)
            outputs[f"turn {number}"] = text
            messages.append({"role": "assistant", "content": text})
    return outputs


def _stream_turn(client: OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=TURN_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        # SGLang's own fields: what was cached where, and the tokens themselves.
        extra_body={
            "return_cached_tokens_details": True,
            "return_input_ids_in_sglext": True,
            "return_output_ids_in_sglext": True,
        },
    )
    parts = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    return "".join(parts)
