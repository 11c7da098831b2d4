"""English-looking text from a seed: enough different sentences that two texts share no page."""

from __future__ import annotations

import random


def _list(text: str) -> tuple[str, ...]:
    return tuple(text.split("|"))


_WHO = _list(
    "the night nurse|our site manager|a retired engineer|the harbour master|my oldest "
    "sister|the new librarian|an angry customer|the county archive|his first employer|a "
    "travelling musician|the repair crew|our German partner|the school board|a careful "
    "gardener|the ferry company|one of the judges|the village baker|a young chemist|the "
    "landlord|their translator"
)
_DID = _list(
    "repaired|misplaced|described|measured|sold|painted|borrowed|inspected|photographed|replaced|catalogued|delivered|questioned|restored|cancelled|postponed|weighed|compared|recorded|hid"
)
_WHAT = _list(
    "the copper kettle|a box of old letters|the second bridge|three broken lamps|the "
    "winter timetable|a map of the valley|the insurance papers|two crates of apples|the "
    "church organ|a small sailing boat|the water meter|a list of complaints|the blue "
    "notebook|the kitchen roof|a set of brass weights|the missing invoice|an unusual "
    "stone|the school piano|the weather station|a pair of climbing boots"
)
_HOW = _list(
    "before the rain began|with great care|for the third time|without telling anybody|in "
    "less than an hour|because of a misunderstanding|near the railway station|at their "
    "own expense|while everybody slept|as the contract demands|during the long "
    "strike|after a short argument|in spite of the cost|on the last day of March|with "
    "borrowed tools|under a false name|by candle light|at the request of the mayor|on the"
    " way to the coast|for reasons of safety"
)
_ASK = _list(
    "Summarise this in one paragraph|List the three main points|Explain why that "
    "happened|Say what should be done next|Rewrite this for a child|Draft a polite "
    "reply|Tell me what is missing|Give an example of the opposite|Put this in order of "
    "time|Name the likely costs"
)


def sentence(source: random.Random) -> str:
    subject = source.choice(_WHO)
    text = f"{subject} {source.choice(_DID)} {source.choice(_WHAT)} {source.choice(_HOW)}"
    return f"{text[0].upper()}{text[1:]} ({source.randrange(1, 1000)})."


def text(source: random.Random, words: int) -> str:
    """Whole sentences, ``words`` words or a few more (about 1.3 tokens each with SmolLM2)."""
    sentences: list[str] = []
    count = 0
    while count < words:
        sentences.append(sentence(source))
        count += sentences[-1].count(" ") + 1
    return " ".join(sentences)


def question(source: random.Random) -> str:
    return f"{source.choice(_ASK)}, and mention {source.choice(_WHAT)}."
