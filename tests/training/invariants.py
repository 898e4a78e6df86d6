"""What must hold in every run, whoever comes, goes, dies or is cut off: Chaos's invariants, by their numbers.

I1  one child per epoch                              I6  who becomes active has the bits of the others
I2  no step commits in two epochs                    I7  who is suspended commits nothing
I3  one epoch and step, one digest                   I8  with a quorum and a quiet network, steps commit
I4  members of an epoch are a step apart at most     I9  no shard with a wrong hash or of another version is taken
I5  a pass over the data has every sample once       I10 nobody active waits for a joiner's transfer

I9 is about bytes: `tests/exchange/test_pull.py` has it. All others are checked in `run_world.py` as it plays; I10 is
`test_nobody_waits_for_a_joiner_to_pull_its_state`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from shoal.membership.messages import Record
from shoal.training.ledger import Entry
from shoal.training.samples import SampleOrder

QUIET_S_MAX = 20.0
"""I8: from one commit to the next, once faults have stopped. Broken connections alone may take 8 s to be noticed."""


class Invariants:
    """Told what happens; `checked` counts how often each was put to the test."""

    def __init__(self, order: SampleOrder) -> None:
        self._order = order
        self.checked: Counter[str] = Counter()
        self.committed: dict[int, Entry] = {}
        self._records: dict[tuple[int, int], Record] = {}
        self._digests: dict[tuple[int, int], str] = {}
        self._latest: dict[int, tuple[int, str]] = {}
        """By step: the epoch that applied it last, and the digest."""
        self._committed_at_s: dict[int, float] = {}

    def adopted(self, record: Record) -> None:
        """A device follows this record."""
        known = self._records.setdefault((record.generation, record.epoch), record)
        assert known == record, f"I1: epoch {record.epoch} of generation {record.generation} has two records"
        self.checked["I1"] += 1

    def applied(self, epoch: int, step: int, digest: str, *, is_running: bool) -> None:
        """A device has applied a step's sum."""
        assert is_running, f"I7: step {step} was applied by a device that is suspended"
        known = self._digests.setdefault((epoch, step), digest)
        assert known == digest, f"I3: step {step} of epoch {epoch} has two digests"
        self._latest[step] = max(self._latest.get(step, (epoch, digest)), (epoch, digest))
        self.checked.update(("I3", "I7"))

    def apart(self, epoch: int, applied: Iterable[int]) -> None:
        """Members of an open epoch have applied so many steps."""
        steps = list(applied)
        assert max(steps) - min(steps) <= 1, f"I4: members of epoch {epoch} are at steps {sorted(steps)}"
        self.checked["I4"] += len(steps) > 1

    def opened(self, applied: int, digest: str) -> None:
        """A device is active in an epoch from now on, with what it has applied before."""
        if applied >= 0:
            assert self._latest[applied][1] == digest, f"I6: a device with other bits at step {applied} became active"
            self.checked["I6"] += 1

    def says_committed(self, entry: Entry, now_s: float, *, is_running: bool) -> None:
        """A device knows that a step counts."""
        assert is_running, f"I7: step {entry.step} was committed by a device that is suspended"
        known = self.committed.setdefault(entry.step, entry)
        assert known == entry, f"I2: step {entry.step} was committed in epochs {known.epoch} and {entry.epoch}"
        self._committed_at_s.setdefault(entry.step, now_s)
        self.checked["I2"] += 1

    def ends(self, quiet_since_s: float) -> None:
        """All steps are committed; faults stopped at `quiet_since_s`."""
        for step, entry in self.committed.items():
            parts = [part for _, part in entry.parts if len(part)]
            whole = self._order.interval(step)
            assert parts[0].first == whole.first, f"I5: step {step} begins at sample {parts[0].first}"
            assert parts[-1].stop == whole.stop, f"I5: step {step} ends at sample {parts[-1].stop}"
            assert all(one.stop == other.first for one, other in pairwise(parts)), f"I5: step {step} has gaps or doubles"
        self._check_passes(self.committed)
        times = [quiet_since_s, *sorted(at_s for at_s in self._committed_at_s.values() if at_s > quiet_since_s)]
        longest_s = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
        assert longest_s <= QUIET_S_MAX, f"I8: nothing was committed for {longest_s:.1f} s of quiet"
        self.checked["I8"] += len(times) > 1

    def _check_passes(self, committed: Mapping[int, Entry]) -> None:
        """Whole passes over the data: each sample once."""
        passes: dict[int, list[int]] = {}
        for step in sorted(committed):
            interval = self._order.interval(step)
            passes.setdefault(interval.data_epoch, []).extend(self._order.samples(interval))
        for samples in list(passes.values())[:-1]:
            assert sorted(samples) == list(range(self._order.num_samples)), "I5: a pass lacks samples or has them twice"
            self.checked["I5"] += 1
