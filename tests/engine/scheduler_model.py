"""The scheduler as plain Python, for prompts of which no two begin with the same slice: who runs, with how many tokens.

The rules: rank order; a decoding sequence takes one token, a prompt as many as are left of `step_tokens` after one for
each decoding sequence; a slice is taken when a token needs it; when none is free the youngest gives all of its own back
and begins again, but those of its prompt stay for it until they are wanted (longest left first, the last slice first);
after such a step nobody is admitted; a sequence is admitted when there is room for what it and the running ones will
soon need.
"""

from dataclasses import dataclass, field


@dataclass
class Modelled:
    prompt: int  # tokens
    most: int  # new tokens
    made: int = 0  # new tokens so far
    fed: int = 0  # tokens in the arena
    slices: int = 0
    idle: int = 0  # slices of its prompt that are kept for it while it waits
    left: int = 0  # when it gave way

    @property
    def known(self) -> int:
        return self.prompt + self.made


@dataclass
class SchedulerModel:
    slices: int
    slice_tokens: int
    max_active: int
    step_tokens: int
    sequences: list[Modelled] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    done: set[int] = field(default_factory=set)
    preemptions: int = 0

    def step(self) -> list[tuple[int, int]]:
        """(sequence, tokens in the arena after it) of every row; `finish` what it says is done before the next."""
        for _ in range(2):
            self._rows: list[tuple[int, int]] = []
            self._short = False
            decoding = sum(self._of(n).fed + 1 == self._of(n).known for n in self.running)
            self._budget = max(1, self.step_tokens - decoding)
            i = 0
            while i < len(self.running):
                self._feed(self.running[i])
                i += 1
            if not self._short:
                self._admit()
            if self._rows:
                break
        for number, fed in self._rows:
            s = self._of(number)
            s.made += fed == s.known
        return self._rows

    def finish(self, number: int) -> None:
        self.running.remove(number)
        self.done.add(number)
        self._of(number).slices = 0

    @property
    def used(self) -> int:
        return sum(s.slices + s.idle for s in self.sequences)

    def _of(self, number: int) -> Modelled:
        return self.sequences[number]

    def _feed(self, number: int) -> None:
        s = self._of(number)
        if s.idle:
            s.slices, s.fed, s.idle = s.idle, min(s.idle * self.slice_tokens, s.prompt), 0
        left = s.known - s.fed
        decodes = left == 1 and s.made > 0
        count = 1 if decodes else min(left, self._budget)
        if count == 0:
            return
        while s.slices < self._slices(s.fed + count):
            while self.used == self.slices:
                if not self._evict() and self._preempt() == number:
                    return
            s.slices += 1
        self._budget -= 0 if decodes else count
        s.fed += count
        self._rows.append((number, s.fed))

    def _evict(self) -> bool:
        idle = [s for s in self.sequences if s.idle]
        if idle:
            min(idle, key=lambda s: s.left).idle -= 1
        return bool(idle)

    def _preempt(self) -> int:
        youngest = self.running.pop()
        s = self._of(youngest)
        self.preemptions += 1
        self._short = True
        s.idle = self._slices(s.prompt) if s.fed >= s.prompt else s.fed // self.slice_tokens
        s.left = self.preemptions
        s.slices = s.fed = 0
        return youngest

    def _admit(self) -> None:
        while self._budget > 0 and len(self.running) < self.max_active:
            waiting = [n for n in range(len(self.sequences)) if n not in self.done and n not in self.running]
            if not waiting:
                return
            soon = sum(self._soon(n) for n in (*self.running, waiting[0]))
            idle = sum(s.idle for n, s in enumerate(self.sequences) if n != waiting[0])
            if self.running and soon > self.slices - self.used + idle:
                return
            self.running.append(waiting[0])
            self._feed(waiting[0])
            if self._short:
                return

    def _soon(self, number: int) -> int:
        s = self._of(number)
        ahead = min(s.known + (self.slice_tokens + 1) // 2, s.prompt + s.most - 1)
        return max(0, self._slices(ahead) - s.slices - s.idle)

    def _slices(self, tokens: int) -> int:
        return -(-tokens // self.slice_tokens)
