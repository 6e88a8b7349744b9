"""How many tokens to draft: as many as pay, from measured times and measured chances.

Time is what drafting spends: every draft adds a row to the verifying forward, and a step of the MTP block. What they
take by number of rows is measured when the engine starts, on the machine and the model that serve, and followed from
then on, as is what a token takes under the load there is. A draft's chance to be kept is looked up by the probability
that the block itself gave it, in a table of what became of drafts so far. So a sequence drafts deep where its text is
easy, and not at all where it is hard.

Whether drafting pays at all under a load is not computed but tried: for every size of the batch (by powers of two) the
rates of steps with and without it are followed, the better one is taken, and the other tried again now and then.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from collections.abc import Sequence as Rows

from nemo_lite_serving.scheduler import Sequence, Span

PATIENCE = 32, 256  # decode steps until a sequence that does not draft tries again: at first, and in the end
BUCKETS = 10  # of the block's own probability
PRIOR = 8.0  # drafts that the first guess of a bucket, its own probability, counts for


class StepTimes:
    """Seconds of a forward by its rows: straight lines between measured points, and on beyond the last.

    What is learnt later moves the nearest point, faster down than up (a busy machine only ever adds time), and all
    points beyond it in proportion: they may not be tried as long as they look slow.
    """

    def __init__(self, points: Rows[tuple[int, float]]):
        self.rows = [rows for rows, _ in points]
        self.seconds = [seconds for _, seconds in points]
        for i in range(1, len(points)):  # more rows never take less: what looks so is noise
            self.seconds[i] = max(self.seconds[i], self.seconds[i - 1])

    def __call__(self, rows: float) -> float:
        if len(self.rows) == 1:
            return self.seconds[0]
        i = min(max(bisect.bisect_left(self.rows, rows), 1), len(self.rows) - 1)
        (x0, y0), (x1, y1) = (self.rows[i - 1], self.seconds[i - 1]), (self.rows[i], self.seconds[i])
        return y0 + (y1 - y0) * max(rows - x0, 0) / (x1 - x0)

    def learn(self, rows: int, seconds: float) -> None:
        i = min(range(len(self.rows)), key=lambda i: abs(self.rows[i] - rows))
        if 0.75 <= rows / self.rows[i] <= 1.34:
            before = self.seconds[i]
            after = before + (0.3 if seconds < before else 0.05) * (seconds - before)
            for j in range(i, len(self.seconds)):
                self.seconds[j] *= after / before if before else 1.0
            self.seconds[i] = after


class Switch:
    """Drafting on or off at one size of the batch: what is faster, found by trying both."""

    TRY, AGAIN = 24, 600  # steps of a trial, and from one to the next

    def __init__(self):
        self._tokens, self._seconds, self._steps = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, {True: 0, False: 0}
        self._asked = self._last = self._left = 0
        self._trial = True

    def ask(self) -> bool:
        """Whether to draft in this step."""
        self._asked += 1
        if self._left:
            self._left -= 1
            return self._trial
        untried = next((on for on in (True, False) if self._steps[on] < self.TRY // 2), None)
        if untried is not None or self._asked - self._last >= self.AGAIN:
            self._trial = untried if untried is not None else self.advantage <= 1
            self._last, self._left = self._asked, self.TRY - 1
            return self._trial
        return self.advantage > 1

    @property
    def trying(self) -> bool:
        return self._left > 0

    @property
    def advantage(self) -> float:
        """The rate of steps that draft over that of steps that do not; 1 as long as one of them is unknown."""
        off = self._tokens[False] * self._seconds[True]
        return self._tokens[True] * self._seconds[False] / off if off else 1.0

    def learn(self, on: bool, tokens: int, seconds: float) -> None:
        self._tokens[on] = 0.98 * self._tokens[on] + tokens
        self._seconds[on] = 0.98 * self._seconds[on] + seconds
        self._steps[on] += 1


class DraftPolicy:
    """Decides which sequences draft, and after each draft which go on. Not adaptive: all draft `most` tokens."""

    def __init__(self, most: int, *, adaptive: bool):
        self.most, self.adaptive = most, adaptive
        self.verify = self.block = StepTimes([(1, 0.0)])
        self.token_seconds = 0.0  # what a token takes now, all sequences together; 0: nothing measured yet
        self.gain = most / 2  # drafts kept in a step that drafts, of all sequences; the first guess is a hopeful one
        self.deeper = 0.6  # chance of a draft behind a kept one
        self._kept = [PRIOR * (i + 0.5) / BUCKETS for i in range(BUCKETS)]
        self._tried = [PRIOR] * BUCKETS
        self._rows = 1
        self._switches: dict[int, Switch] = {}
        self._advantage = 1.0
        self.on, self._since, self._trying = True, 0, False  # what is done now, for how many steps, as a trial

    def measure(self, engine) -> None:
        """Time the trunk and the MTP block over rows."""
        runner, blocks = engine.runner, engine.blocks
        room = min(engine.plan.max_num_seqs, blocks.num_blocks // blocks.blocks_for(2 + self.most))
        points = [rows for rows in (1, 2, 3, 5, 8, 16, 32, 64, 128) if rows <= max(2, room * (1 + self.most))]
        verify = dict(runner.time_trunk(blocks, rows, self.most) for rows in points)
        block = dict(runner.time_block(blocks, rows) for rows in points if rows <= room)
        self.verify, self.block = StepTimes(sorted(verify.items())), StepTimes(sorted(block.items()))

    # -------------------------------------------------------------------------------------------------------- deciding

    def choose(self, spans: Rows[Span], room: Callable[[Sequence, int], bool]) -> list[int]:
        """The most that the sequence of each span may draft; 0 for those whose next step is no decode step."""
        # Not before the first token: the last of a prompt may have to leave a snapshot, which drafts would blur.
        ready = [s.seq.finish_reason is None and s.seq.remaining == 1 and bool(s.seq.output) for s in spans]
        self._rows = max(sum(ready), 1)
        wanted = [0] * len(spans)
        if self.adaptive and any(ready) and not self._ask():
            return wanted
        for i, span in enumerate(spans):
            seq = span.seq
            if not ready[i] or not self._worth_starting(seq):
                continue
            most = min(self.most, seq.request.max_tokens - len(seq.output) - 1)
            while most > 0 and not room(seq, seq.computed + most + 2):
                most -= 1
            wanted[i] = max(most, 0)
        return wanted

    def _ask(self) -> bool:
        switch = self._switches.setdefault(self._rows.bit_length(), Switch())
        on = switch.ask()
        self.on, self._since, self._trying = on, self._since + 1 if on == self.on else 0, switch.trying
        self._advantage = switch.advantage
        return on

    def _worth_starting(self, seq: Sequence) -> bool:
        seq.retrying = self.adaptive and (self._trying or seq.idle_steps >= seq.patience)
        if not self.adaptive or self._trying:  # a trial is to learn the times, too
            return True
        if seq.retrying:
            seq.patience = min(2 * seq.patience, PATIENCE[1])
            return True
        # A step that drafts makes 1 + gain tokens; if that is `advantage` times the rate of a step that does not, the
        # gain at which both are equally fast follows.
        pays = seq.gain is None or 1 + seq.gain > (1 + self.gain) / self._advantage
        if pays:
            seq.patience = PATIENCE[0]
        return pays

    def go_on(self, made: int, chances: Rows[float]) -> list[bool]:
        """Which rows draft one more behind `made`, given the chance that all their drafts so far are kept."""
        if not self.adaptive or not self.token_seconds:
            return [True] * len(chances)
        value, row = self.deeper * self.token_seconds, self._row_seconds(made + 1)
        hopeful = [chance * value > row for chance in chances]
        count = sum(hopeful)
        gained = sum(chance for chance, hope in zip(chances, hopeful) if hope) * value
        if not count or gained <= self.block(count) + count * row:
            return [False] * len(chances)
        return hopeful

    def keep_last(self, made: int, chance: float) -> bool:
        """Whether the last of `made` drafts is worth its row in the verifying forward."""
        return not self.adaptive or not self.token_seconds or chance * self.token_seconds > self._row_seconds(made)

    def chance(self, probability: float) -> float:
        """How likely a draft is kept to which the block gave this probability."""
        bucket = min(int(probability * BUCKETS), BUCKETS - 1)
        return self._kept[bucket] / self._tried[bucket]

    def _row_seconds(self, made: int) -> float:
        """What the row of a sequence's draft number `made` adds to the verifying forward."""
        n = self._rows
        return max(self.verify(n * (1 + made)) - self.verify(n * made), 0.0) / n

    # -------------------------------------------------------------------------------------------------------- learning

    def observe(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """What became of a sequence's drafts."""
        self.gain += 0.02 * (accepted - self.gain)
        seq.gain = (self.gain if seq.gain is None else seq.gain) * 0.9 + 0.1 * accepted
        for k in range(min(accepted + 1, drafted)):  # beyond the first refused draft nothing was learnt
            kept = float(k < accepted)
            if k:
                self.deeper += 0.02 * (kept - self.deeper)
            if k < len(seq.confidence):
                bucket = min(int(seq.confidence[k] * BUCKETS), BUCKETS - 1)
                # Old outcomes fade: what is served changes.
                self._kept[bucket] = self._kept[bucket] * 0.995 + kept
                self._tried[bucket] = self._tried[bucket] * 0.995 + 1

    def stepped(self, rows: int, tokens: int, reading: float, seconds: float) -> None:
        """A step that only decoded read so many rows in `reading` seconds, and made so many tokens in all of them."""
        self.verify.learn(rows, reading)
        if self.adaptive and self._since > 1:  # the steps around a change belong to neither
            self._switches.setdefault(self._rows.bit_length(), Switch()).learn(self.on, tokens, seconds)
        if tokens:
            now = seconds / tokens
            self.token_seconds = self.token_seconds * 0.9 + now * 0.1 if self.token_seconds else now
