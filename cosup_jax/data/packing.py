"""Bin packing in constant time per item: which example next, which Ctx row for a passage.

Both keep what is free or pending in buckets by length, and a bit set of the lengths in use, so
that the best fit is the highest or the lowest bit of one integer.
"""

import collections
from collections.abc import Sequence

from cosup_jax.data.batch import BatchShape


class Queue:
    """Pending examples in shuffled order; hands out the oldest that fits, else the best fit.

    Those in the window lie in buckets by [Ret] count and length; a bit set per [Ret] count tells
    which lengths are there.
    """

    def __init__(self, tokens: Sequence[int], rets: Sequence[int], window: int):
        self.tokens, self.rets, self.window = tokens, rets, window
        self.taken = bytearray(len(tokens))
        self.head = self.tail = self.pending = 0
        self.buckets = collections.defaultdict(collections.deque)
        self.present = dict.fromkeys(sorted(set(rets)), 0)
        self._fill()

    def __len__(self) -> int:
        return len(self.tokens) - self.tail + self.pending

    def take(self, gap: int, slots: int) -> int:
        """Removes and returns an example of at most `gap` tokens and `slots` [Ret], or -1."""
        while self.head < self.tail and self.taken[self.head]:
            self.head += 1
        if self.head == self.tail:
            return -1
        item = self.head
        if self.tokens[item] > gap or self.rets[item] > slots:
            item = self._best_fit(gap, slots)
            if item < 0:
                return -1
        self._remove(item)
        self._fill()
        return item

    def put_back(self, items: list[int]) -> None:
        """Returns items that were taken since the last call; they are the oldest of their kind."""
        for item in reversed(items):
            self.taken[item] = 0
            rets, tokens = self.rets[item], self.tokens[item]
            self.buckets[rets, tokens].appendleft(item)
            self.present[rets] |= 1 << tokens
            self.head = min(self.head, item)
        self.pending += len(items)

    def _best_fit(self, gap: int, slots: int) -> int:
        best, longest, fitting = -1, -1, (1 << (gap + 1)) - 1
        for rets, present in self.present.items():
            if rets > slots:
                break
            tokens = (present & fitting).bit_length() - 1
            if tokens >= max(longest, 0):
                item = self.buckets[rets, tokens][0]
                if tokens > longest or item < best:
                    best, longest = item, tokens
        return best

    def _remove(self, item: int) -> None:
        key = rets, tokens = self.rets[item], self.tokens[item]
        bucket = self.buckets[key]
        bucket.popleft()  # an item that is handed out is always the oldest of its bucket
        if not bucket:
            self.present[rets] ^= 1 << tokens
        self.taken[item] = 1
        self.pending -= 1

    def _fill(self) -> None:
        while self.pending < self.window and self.tail < len(self.tokens):
            rets, tokens = self.rets[self.tail], self.tokens[self.tail]
            self.buckets[rets, tokens].append(self.tail)
            self.present[rets] |= 1 << tokens
            self.tail += 1
            self.pending += 1


class CtxRows:
    """Ctx rows of one step; a passage goes where the fewest tokens remain, and only once."""

    def __init__(self, shape: BatchShape, tokens: Sequence[int]):
        self.tokens = tokens  # of each passage
        self.row_of: dict[int, int] = {}  # passage -> row, in order of placement
        self._room = [shape.L] * shape.U  # free tokens of each row
        self._slots = [shape.P] * shape.U
        self._open = {shape.L: list(range(shape.U))}  # free tokens -> open rows
        self._rooms = 1 << shape.L  # bit set of the keys above that have rows

    def add(self, passages: Sequence[int]) -> bool:
        """Places all of them, or none."""
        new = [passage for passage in passages if passage not in self.row_of]
        if self._add(new):
            return True
        # What does not fit empty rows is left out for ever: not for its order alone.
        return not self.row_of and self._add(sorted(new, key=self.tokens.__getitem__, reverse=True))

    def _add(self, new: Sequence[int]) -> bool:
        """As `add`, of passages that are not there yet, in this order."""
        for count, passage in enumerate(new):
            if not self._place(passage):
                for placed in new[:count]:
                    self._move(self.row_of.pop(placed), self.tokens[placed], 1)
                return False
        return True

    def _place(self, passage: int) -> bool:
        tokens = self.tokens[passage]
        enough = self._rooms >> tokens
        if not enough:
            return False
        room = tokens + (enough & -enough).bit_length() - 1
        row = self.row_of[passage] = self._open[room][0]
        self._move(row, -tokens, -1)
        return True

    def _move(self, row: int, tokens: int, slots: int) -> None:
        """Changes what is free in a row; a row without a slot is not open."""
        before = self._room[row]
        after = self._room[row] = before + tokens
        if self._slots[row]:
            rows = self._open[before]
            rows.remove(row)
            if not rows:
                self._rooms ^= 1 << before
        self._slots[row] += slots
        if self._slots[row]:
            self._open.setdefault(after, []).append(row)
            self._rooms |= 1 << after
