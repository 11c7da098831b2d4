"""The work of one instance: prompts in chunks, then a token a step for every stream.

Prompts wait in one queue, first come first served, and go before streams: while a prompt can be
computed no stream moves, which is what SGLang does unless told to mix them. A step of prefill takes
chunks of as many prompts as fit. What a prompt has in DRAM is loaded layer by layer while the step
computes, so that the step takes the longer of the two.

Streams are not simulated token by token: all of them go on together until the first one ends or a
prompt comes in, and the time of so many steps is a sum.

    k steps = k * (fixed + streams * stream + context * c) + c * streams * k * (k - 1) / 2
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, isclose, sqrt

from sglang_memserve.types import PageKey

from .agenda import Agenda, Alarm
from .memory import Memory, Seat
from .profile import Profile


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Where a prompt's tokens came from: pages that were in HBM and in DRAM, tokens computed."""

    hbm_pages: int
    dram_pages: int
    new_tokens: int


@dataclass(slots=True, eq=False)
class Job:
    """A prompt to compute and ``output_tokens`` to generate; 0: only compute.

    ``on_pages`` hears how many leading pages are there, whenever these are more; ``on_prefilled``
    when the prompt is computed and the first token is out; ``on_done`` at the end.
    ``given_pages``: leading ones that somebody put into its HBM slots already. ``answered_keys``:
    of the pages that prompt and answer fill, which stay behind; empty: the prompt's alone do."""

    keys: Sequence[PageKey]
    prompt_tokens: int
    output_tokens: int
    on_pages: Callable[[int], None]
    on_prefilled: Callable[[Prefilled], None]
    on_done: Callable[[], None]
    given_pages: int = 0
    answered_keys: Sequence[PageKey] = ()
    seat: Seat | None = None
    at: int = 0
    cached_tokens: int = 0

    @property
    def left_tokens(self) -> int:
        return self.prompt_tokens - self.at


@dataclass(slots=True)
class _Run:
    """Decode steps under way: ``steps`` of them from ``began`` on."""

    began: float
    steps: int
    alarm: Alarm


class Engine:
    """``slowness``: how many times longer everything takes. ``frozen``: (from, to) seconds in which
    nothing moves. Both are for scenarios in which something is wrong with an instance."""

    def __init__(self, agenda: Agenda, profile: Profile, memory: Memory, page_tokens: int) -> None:
        self._agenda = agenda
        self._profile = profile
        self._memory = memory
        self._page_tokens = page_tokens
        self._waiting: deque[Job] = deque()
        # (step at which it ends, order of arrival, job): all of them generate.
        self._streams: list[tuple[int, int, Job]] = []
        self._context = 0
        self._steps = 0
        self._count = 0
        self._computing = False
        self._run: _Run | None = None
        self.slowness = 1.0
        self.frozen: list[tuple[float, float]] = []
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.computed_tokens = 0
        self.generated_tokens = 0

    def fits(self, job: Job) -> bool:
        """Whether it could be served if it were alone."""
        return self._pages(job) <= self._memory.hbm.total

    def submit(self, job: Job) -> None:
        assert self.fits(job), (job.prompt_tokens, job.output_tokens)
        self._waiting.append(job)
        if self._run is not None:
            self._cut_short(self._run)
        elif not self._computing:
            self._next()

    @property
    def running(self) -> int:
        """Streams, and prompts that have begun."""
        return len(self._streams) + sum(job.seat is not None for job in self._waiting)

    @property
    def waiting(self) -> int:
        return sum(job.seat is None for job in self._waiting)

    @property
    def used_tokens(self) -> int:
        """KV slots that nobody else can have now."""
        hbm = self._memory.hbm
        return (hbm.total - hbm.available) * self._page_tokens

    def idle(self) -> bool:
        return not (self._waiting or self._streams)

    # -- one step after the other --

    def _next(self) -> None:
        if not self._prefill() and self._streams:
            self._decode()

    def _prefill(self) -> bool:
        """One step of it, if anything can be computed."""
        times, budget = self._profile.prefill, self._profile.prefill.chunk_tokens
        parts: list[tuple[Job, int]] = []
        loaded_pages, seconds = 0, times.fixed_s
        for job in self._waiting:
            if budget <= 0:
                break
            if job.seat is None:
                if len(self._streams) + len(parts) >= self._profile.decode.max_streams:
                    break
                seat = self._admit(job)
                if seat is None:
                    break
                loaded_pages += seat.dram_pages
            tokens = min(budget, job.left_tokens)
            seconds += times.tokens_s(tokens, job.at)
            budget -= tokens
            parts.append((job, tokens))
        if not parts:
            assert self._streams or not self._waiting, "a prompt that fits cannot be admitted"
            return False
        loaded_bytes = loaded_pages * self._page_tokens * self._profile.kv_bytes_per_token
        seconds = max(seconds, loaded_bytes / self._profile.load_bytes_per_s)
        self._computing = True
        self.prefill_s += seconds * self.slowness
        self._agenda.at(
            self._end_of(self._agenda.now, seconds), lambda: self._end_of_prefill(parts)
        )
        return True

    def _admit(self, job: Job) -> Seat | None:
        """Its place in HBM; None while there is none."""
        seat = self._memory.admit(job.keys, self._pages(job), job.given_pages)
        if seat is not None:
            job.seat = seat
            # Less than all: ``keys`` do not reach the last token.
            job.at = job.cached_tokens = seat.ready * self._page_tokens
            if seat.ready:
                job.on_pages(seat.ready)
        return seat

    def _end_of_prefill(self, parts: Sequence[tuple[Job, int]]) -> None:
        self._computing = False
        ended: list[Job] = []
        for job, tokens in parts:
            assert job.seat is not None
            job.at += tokens
            self.computed_tokens += tokens
            pages = min(job.at // self._page_tokens, len(job.keys))
            if pages > job.seat.ready:
                self._memory.computed(job.seat, pages)
                job.on_pages(pages)
            if not job.left_tokens:
                self._waiting.remove(job)
                ended.append(job)
        for job in ended:
            self._prefilled(job)
        if not self._computing and self._run is None:
            self._next()

    def _prefilled(self, job: Job) -> None:
        assert job.seat is not None
        new = job.prompt_tokens - job.cached_tokens
        self.generated_tokens += job.output_tokens
        goes_on = job.output_tokens > 1
        if goes_on:
            self._count += 1
            end = self._steps + job.output_tokens - 1
            heapq.heappush(self._streams, (end, self._count, job))
            self._context += job.prompt_tokens
        else:
            self._memory.leave(job.seat, job.answered_keys)
        job.on_prefilled(Prefilled(job.seat.hbm_pages, job.seat.dram_pages, new))
        if not goes_on:
            job.on_done()

    def _decode(self) -> None:
        steps = self._streams[0][0] - self._steps
        assert steps > 0, steps
        now = self._agenda.now
        alarm = self._agenda.at(self._end_of(now, self._steps_s(steps)), self._end_of_run)
        self._run = _Run(now, steps, alarm)

    def _cut_short(self, run: _Run) -> None:
        """The step that is under way is the last one: a prompt waits."""
        worked_s = self._worked_s(run.began, self._agenda.now) / self.slowness
        steps = min(self._steps_in(worked_s), run.steps)
        if steps < run.steps:
            run.alarm.cancel()
            end = self._end_of(run.began, self._steps_s(steps))
            run.steps, run.alarm = steps, self._agenda.at(end, self._end_of_run)

    def _end_of_run(self) -> None:
        run = self._run
        assert run is not None
        self._run = None
        self.decode_s += self._steps_s(run.steps) * self.slowness
        self._steps += run.steps
        self._context += run.steps * len(self._streams)
        ended: list[Job] = []
        while self._streams and self._streams[0][0] <= self._steps:
            job = heapq.heappop(self._streams)[2]
            self._context -= job.prompt_tokens + job.output_tokens - 1
            assert job.seat is not None
            self._memory.leave(job.seat, job.answered_keys)
            ended.append(job)
        for job in ended:
            job.on_done()
        if not self._computing and self._run is None:
            self._next()

    # -- sums --

    def _pages(self, job: Job) -> int:
        return ceil((job.prompt_tokens + job.output_tokens) / self._page_tokens)

    def _steps_s(self, steps: int) -> float:
        """Seconds of the next ``steps``."""
        one, growth = self._step()
        return steps * one + growth * steps * (steps - 1) / 2

    def _step(self) -> tuple[float, float]:
        """Seconds of the next step, and by how much each one after it is longer."""
        times, streams = self._profile.decode, len(self._streams)
        each = times.fixed_s + streams * times.stream_s + self._context * times.context_token_s
        return each, times.context_token_s * streams

    def _steps_in(self, seconds: float) -> int:
        """The number of the step that ends at ``seconds`` or is under way then; at least one."""
        one, growth = self._step()
        if one <= 0:
            return 1
        linear = one - growth / 2
        ahead = 2 * seconds / (linear + sqrt(linear * linear + 2 * growth * seconds))
        steps = round(ahead)
        if not isclose(ahead, steps, rel_tol=1e-9):
            steps = ceil(ahead)
        return max(steps, 1)

    def _end_of(self, start: float, seconds: float) -> float:
        """When work of ``seconds`` is done that begins at ``start``."""
        end = start + seconds * self.slowness
        for begin, over in self.frozen:
            if begin < end and start < over:
                end += over - max(start, begin)
        return end

    def _worked_s(self, start: float, end: float) -> float:
        stood_s = sum(max(0.0, min(end, over) - max(start, begin)) for begin, over in self.frozen)
        return end - start - stood_s

    def check(self) -> None:
        streams = [job for _, _, job in self._streams]
        assert self._context >= sum(job.prompt_tokens for job in streams), self._context
        assert all(end > self._steps for end, _, _ in self._streams)
        assert not (self._computing and self._run is not None)
        assert self._computing or self._run is not None or self.idle()
