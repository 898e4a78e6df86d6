"""One member of a run, carried out: what is decided by `training/member.py` is done here, with a trainee that knows tensors.

The caller's thread computes, reduces and applies; only it touches the trainee. Whatever is decided meanwhile (a state that
came, a snapshot that is due, a sum that counts after all) waits in its inbox. Other threads: control links, exchanges,
connections of the shelf, one that fetches, one for disks.

    while (task := run.next_task()) is not None:
        run.contribute(task, ...)         # None: the step is to be done again, under another record
"""

from __future__ import annotations

import queue
import secrets
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from shoal.effects import Fact
from shoal.errors import DeviceRefused, DeviceUnreachable, ShoalError
from shoal.exchange.pull import ByteArray, Fetched, Offer, Puller, Shelf
from shoal.exchange.runner import Exchange, FloatArray
from shoal.exchange.wire import SocketWire
from shoal.ids import GroupId, NodeId
from shoal.membership.group.facts import (
    Attach,
    CheckpointDue,
    CreateGroup,
    JoinGroup,
    LeaveGroup,
    RecordAdopted,
    Recover,
    ReportProgress,
    Resumed,
    Suspended,
)
from shoal.membership.messages import Attachment, Member
from shoal.network.graph import Link
from shoal.runs import checkpoint as checkpoints
from shoal.runs.checkpoint import Checkpoint
from shoal.runs.control import Control, unreachable
from shoal.runs.port import Hello, Port, dial, receive_message, send_message
from shoal.runs.rates import Rates, answer, probe, shortage
from shoal.runs.trust import Trust, device_of
from shoal.runs.votes import Life, Votes
from shoal.topology.policy import chunk_bytes_of, has_moved, plan_for, revised
from shoal.topology.tree import Plan
from shoal.training import member as m
from shoal.training.ledger import CatchUp, Committed, Compute, Entry
from shoal.training.samples import Interval, SampleOrder

EXCHANGE_S = 600.0
"""Of one all-reduce. Faults are found by connections and silence, long before."""
CONNECT_S = 10.0
NUDGE_S = 0.3
JOIN_S = 30.0
"""Without a link to any member for so long, a joiner gives up: nobody answers, or the run has ended."""
ANSWER_S = 2.0
_EPOCHS_PER_GENERATION = 1 << 20
DONATE_S = 10.0
GRADIENT_SOURCES = 4
"""What shard sizes of gradients are made for: the same number everywhere, since manifests must be equal."""
LOG_STEPS_MAX = 256
SLOWER, SHARE_MIN, SHARE_MORE = 1.1, 0.1, 0.1
"""A step that takes so many times the usual halves what donors give of their time; any other gives that much more."""
_RECENT_STEPS = 9
POLL_S = 0.05
SHUT_S = 2.0
_DIGEST_BITS = 24
"""A float32 holds so many exactly."""
_TAIL = 4
"""Behind gradients and buffers: summed loss, whether a later record is known, clip norm and how many gave one; then
everyone's speed and digest; then, for each member, how fast bytes come to it from each."""


class Trainee(Protocol):
    """A model and its optimiser. Called by one thread."""

    fingerprint: str
    """Equal ones compute the same bits from the same gradients."""
    num_gradients: int
    num_buffers: int

    def state(self) -> tuple[ByteArray, dict[str, object]]:
        """A copy of all tensors as a safetensors file without metadata, and what is no tensor."""

    def load(self, state: ByteArray, about: dict[str, object]) -> None:
        """Takes over such a state. Raises ShoalError if it does not fit."""

    def buffers(self) -> FloatArray:
        """What the model keeps besides parameters, [num_buffers]."""

    def apply(self, x: FloatArray, *, step: int) -> None:
        """One optimiser step with the mean gradient and the buffers in `x`, [num_gradients + num_buffers]."""

    def digest(self) -> str:
        """Hexadecimal digits that name the bits of the parameters."""


class Settings(msgspec.Struct, frozen=True):
    """What the founder of a run decides."""

    order: SampleOrder
    fingerprint: str
    num_steps: int
    epoch_base: int
    founding: str = ""
    """Names this beginning of the run, by chance."""


class Task(NamedTuple):
    """This member's part of a step."""

    epoch: int
    step: int
    part: Interval


class StepDone(NamedTuple):
    """A step that this member applied: mean loss over the global batch, and where its seconds went."""

    step: int
    loss: float
    num_members: int
    compute_s: float
    exchange_s: float
    step_s: float


class _Share(NamedTuple):
    """What this member computed for a step that does not count yet."""

    step: int
    part: Interval
    gradients: FloatArray
    loss_sum: float
    compute_s: float


class _Open(NamedTuple):
    epoch: int
    members: tuple[NodeId, ...]
    rates: dict[Link, float]
    """What all members knew as the plan was last looked at."""
    plan: Plan | None = None
    exchange: Exchange | None = None
    num_plans: int = 0
    chunk_bytes: int = 0


class Run:
    """Joins, or founds where no peer is given.

    Args:
        name: of the run.
        num_steps: in all.
        listen: HOST:PORT for other members; port 0 takes a free one.
        peers: addresses of members.
        folder: for checkpoints, one every `checkpoint_every` steps, and for what this member promised. Who was in the run
            before comes back to the others; a founder that finds none of them goes on from the newest checkpoint.
        members_min: the first step waits for so many.
        trust: what this member proves, and whom it talks to; None: links are plain and prove nothing.

    Raises:
        DeviceUnreachable: no peer answers.
        DeviceRefused: the run has another model, optimiser, data set or length.
    """

    def __init__(
        self,
        name: str,
        trainee: Trainee,
        order: SampleOrder,
        *,
        num_steps: int,
        listen: str = "127.0.0.1:0",
        peers: tuple[str, ...] = (),
        folder: Path | None = None,
        checkpoint_every: int = 50,
        members_min: int = 1,
        samples_per_s: float = 1.0,
        trust: Trust | None = None,
    ) -> None:
        self.name = GroupId(name)
        self._trust = trust
        self.trainee = trainee
        self.settings = Settings(order, trainee.fingerprint, num_steps, 1, secrets.token_hex(8))
        self.folder, self._checkpoint_every = folder, checkpoint_every
        self.transfer_s: float | None = None
        self.transfer_bytes = 0
        self.committed = -1
        self.is_finished = False
        self.on_step: Callable[[StepDone], None] = lambda _: None
        """Called with every step that is applied here, also one of which this member had no part."""
        self.on_loss: Callable[[], None] = lambda: None
        """Called, on any thread, when this member notices that another is lost or that an exchange broke."""
        self.warnings: list[str] = []
        self.peers, self._members_min, self._samples_per_s = peers, members_min, samples_per_s
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._disk = ThreadPoolExecutor(1, "shoal-disk")
        self._background = ThreadPoolExecutor(16, "shoal-background")
        self._is_closed = self._is_leaving = self._is_suspended = False
        self._fatal: Exception | None = None
        self._wires: dict[tuple[int, NodeId], socket.socket] = {}
        self._accepted: set[socket.socket] = set()
        self._errand = 0
        """Counts what this member was told to fetch; what belongs to another one is not applied any more."""
        self._clip_norm: float | None = None
        self._has_measured = False
        self._task: Task | None = None
        self._share: _Share | None = None
        self._opened: _Open | None = None
        self._log_first: int | None = None
        """The first gradient that is kept for shadows."""
        self._log_ends: int | None = None
        """With the first step of this epoch that counts, nobody needs them any more."""
        self._has_snapshot = False
        self._mean: FloatArray | None = None
        self.loss: float | None = None
        self.snapshot_s = 0.0
        self._votes = Votes(folder, self.name) if folder is not None else None
        self.num_restored = 0
        """Steps in the checkpoint from which a founder goes on."""
        try:
            self._start(listen)
        except BaseException:
            if self._votes is not None:
                self._votes.close()
            raise

    def _start(self, listen: str) -> None:
        former = self._former()
        if former is not None and not self.peers:
            self.peers = self._answering(former)
            former = former if self.peers else None
        self._reset(None)
        history = self._restored()
        self.num_restored = len(history)
        self._is_founder = not self.peers
        self._port = Port(listen, self._accept, trust=self._trust)
        self.address = self._port.address
        self._begin(history if self._is_founder else None, former)
        self._nudger = threading.Thread(target=self._nudge, daemon=True)
        self._nudger.start()

    # ---- what the training loop calls

    def next_task(self) -> Task | None:
        """Waits for this member's part of the next step. None: the run has ended, or this member has left it.

        Raises:
            ShoalError: it cannot go on here.
        """
        heard_s = time.monotonic()
        while True:
            self._drain()
            if self._fatal is not None:
                raise self._fatal
            share: _Share | None = None
            with self._lock:
                task, core = self._task, self._core
                has_left = core.phase is m.Phase.GONE and self._is_leaving  # who was cut off asks to be let in again
                if self.is_finished or has_left or self._is_closed:
                    return None
                if task is not None and task.step >= self.settings.num_steps:
                    self._task = None
                elif task is not None:
                    self._task = None
                    self._task_s = time.monotonic()
                    share = self._share
                    if len(task.part) and (share is None or (share.step, share.part) != (task.step, task.part)):
                        return task
            if task is not None and share is not None and len(task.part) and task.step < self.settings.num_steps:
                # The exchange broke and the same is asked for: it is reduced again, not computed again.
                self._contribute(task, share.gradients, share.loss_sum, share.compute_s)
                continue
            if task is not None:
                # Nothing to compute: the run is over, or the others' share is everything.
                self._contribute(task, None, 0.0, 0.0)
                continue
            if core.ledger is not None or self._control.has_links():
                heard_s = time.monotonic()
            elif self.peers and all(peer in self._control.other_runs for peer in self.peers):
                address, other = next(iter(self._control.other_runs.items()))
                raise DeviceRefused(
                    f"the run at {address} is '{other}', and this one is '{self.name}': is it the same script?"
                )
            elif time.monotonic() - heard_s > JOIN_S:
                raise unreachable(self.peers)
            with suppress(queue.Empty):
                self._inbox.get(timeout=0.2)()

    def contribute(
        self, task: Task, gradients: FloatArray, *, loss_sum: float, clip_norm: float | None = None
    ) -> StepDone | None:
        """Adds this member's gradients of the summed loss to the others', and applies the mean. Blocks.

        Args:
            gradients: [num_gradients]; nobody writes to them any more, since they may be sent again.

        Returns:
            None where the step did not come about, and is to be done again: ask for the next task. Where nothing but the
            exchange broke, what was computed is sent again then, and the task is the one after.
        """
        self._clip_norm = clip_norm
        compute_s = time.monotonic() - self._task_s
        self._share = _Share(task.step, task.part, gradients, loss_sum, compute_s)
        return self._contribute(task, gradients, loss_sum, compute_s)

    def leave(self) -> None:
        """At the next step boundary; from any thread."""
        with self._lock:
            self._is_leaving = True
            record = self._core.record
            if record is None or record.actives in ((), (self.me,)):
                self._is_closed = True
            else:
                self._control.command(LeaveGroup(self.name))
            self._changed.notify_all()

    def close(self) -> None:
        """Gives others what they are pulling, writes a checkpoint, and ends."""
        if self._core.ledger is not None and (self.is_finished or self.members == (self.me,)):
            self._save()  # others may not have the last step of one that leaves
        give_up_s, sent = time.monotonic() + DONATE_S, -1
        while self._has_shadows() and not self.is_finished and self.shelf.bytes_sent > sent and time.monotonic() < give_up_s:
            sent = self.shelf.bytes_sent
            time.sleep(1.0)
        if self._votes is not None and (self.is_finished or self._is_leaving):
            with suppress(ShoalError):
                self._votes.forget()
        self._shut(is_orderly=True)

    def _shut(self, *, is_orderly: bool) -> None:
        """Closes all connections and ends all threads; those of the others' that wait are told first where it is orderly."""
        with self._lock:
            self._is_closed = True
            opened, self._opened = self._opened, None
            self._changed.notify_all()
        if opened is not None and opened.exchange is not None:
            if not is_orderly:
                opened.exchange.abort()
            opened.exchange.close()
        self._port.close()
        self._control.close()
        self._puller.close()
        with self._lock:
            left, self._wires = self._wires, {}
            served = list(self._accepted)
        for sock in left.values():
            sock.close()
        for sock in served:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # its thread closes it
        self._disk.shutdown()
        self._background.shutdown()
        if self._votes is not None:
            self._votes.close()
        self._nudger.join()
        give_up_s = time.monotonic() + SHUT_S
        while self._accepted and time.monotonic() < give_up_s:
            time.sleep(0.005)

    # ---- for whoever asks

    @property
    def members(self) -> tuple[NodeId, ...]:
        record = self._core.record
        return record.actives if record is not None else ()

    @property
    def entries(self) -> list[Entry]:
        """The ledger: what is committed."""
        with self._lock:
            return list(self._core.ledger.entries) if self._core.ledger is not None else []

    def statistics(self) -> dict[str, object]:
        """For `shoal runs`."""
        listed, absent = self._control.listed()
        with self._lock:
            core = self._core
            return {
                "run": self.name,
                "node": self.me,
                "address": self.address,
                "phase": str(core.phase),
                "step": core.applied,
                "num_steps": self.settings.num_steps,
                "members": len(self.members),
                "has_state": core.ledger is not None,
                "is_suspended": self._is_suspended,
                "num_listed": len(listed),
                "absent": absent,
                "loss": self.loss,
                "samples_per_s": round(core.samples_per_s, 2),
                "plan": self._opened.plan.policy if self._opened is not None and self._opened.plan is not None else None,
                "received_bytes_per_s": {node: round(rate) for node, rate in self.rates.bytes_per_s().items()},
                "bytes_given": self.shelf.bytes_sent,
                "warnings": [
                    *self.warnings[-8:],
                    *(f"{each.node}: {each.reason}" for each in self._puller.quarantined[-8:]),
                ],
            }

    # ---- beginning

    def _former(self) -> Life | None:
        """Who this member was, if it still is on the same device."""
        life = self._votes.former if self._votes is not None else None
        device = self._trust.device if self._trust is not None else None
        return life if life is not None and device_of(life.node) == (device or life.node) else None

    def _answering(self, former: Life) -> tuple[str, ...]:
        """Addresses of those who were in the run when this member was last in it, and still are.

        Whoever listens there and is in no record was started again as well, and waits for others itself.
        """
        record = former.record
        others = [member for member in record.members if member.node != former.node] if record is not None else []

        def is_there(member: Member) -> bool:
            hello = Hello(self.name, "ask", former.node)
            with suppress(ShoalError, OSError, msgspec.MsgspecError):
                sock = dial(member.address, hello, trust=self._trust, node=member.node, timeout_s=ANSWER_S)
                with sock:
                    sock.settimeout(ANSWER_S)
                    send_message(sock, b"status")
                    said = msgspec.json.decode(receive_message(sock), type=dict[str, object])
                    return said.get("node") == member.node and bool(said.get("members"))
            return False

        there = list(self._background.map(is_there, others))
        if others and not any(there):
            self._warn(
                f"none of the {len(others)} others that were in the run '{self.name}' answers: it begins anew from the "
                "newest checkpoint here, and whoever comes back joins it"
            )
        return tuple(member.address for member, answers in zip(others, there, strict=True) if answers)

    def _reset(self, history: list[Entry] | None, former: Life | None = None) -> None:
        self._life = former or Life(
            self.name, self._trust.new_node() if self._trust is not None else NodeId(secrets.token_hex(8))
        )
        self.me = self._life.node
        self._core = m.Member(
            self.me,
            self.settings.order,
            history=history,
            members_min=self._members_min if history is not None else 1,
            samples_per_s=self._samples_per_s,
        )
        self._task = self._opened = self._log_first = self._log_ends = self._mean = None
        self._has_snapshot = False
        self._share = None
        self._task_s = self._stepped_s = time.monotonic()
        self._kept: dict[int, FloatArray] = {}
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.rates = Rates()
        self._errand += 1
        self._goal = ""
        self._donors: tuple[NodeId, ...] = ()
        self._last_digest = history[-1].digest if history else ""

    def _restored(self) -> list[Entry]:
        """A founder's ledger, with its state in the trainee."""
        found = checkpoints.newest(self.folder) if self.folder is not None and not self.peers else None
        if found is None:
            return []
        saved, state = found
        if saved.run != self.name or saved.fingerprint != self.trainee.fingerprint:
            raise DeviceRefused(
                f"the checkpoint in {self.folder} is of run '{saved.run}' with another model or optimiser than here: "
                "take another folder, or the script that wrote it"
            )
        self.trainee.load(state, saved.about)
        base = 1 + max((entry.epoch for entry in saved.history), default=0)
        self.settings = msgspec.structs.replace(self.settings, epoch_base=base)
        self.committed = len(saved.history) - 1
        return saved.history

    def _begin(self, history: list[Entry] | None, former: Life | None = None) -> None:
        """Comes into being as a new member of the group, or as a later incarnation of a former one."""
        with self._lock:
            if former is not None:
                former = msgspec.structs.replace(former, incarnation=former.incarnation + 1)
            self._reset(history, former)
            if self._votes is not None:
                self._votes.begin(self._life)
            self.shelf = Shelf(find=self._offer)
            self._puller = Puller(self._dial_shelf, observed=partial(self.rates.observe, is_full=False))
            self._control = Control(
                self._life,
                founding=self.settings.founding if history is not None else _founding_of(self._life),
                store=self._store if self._votes is not None else None,
                on_fact=self._on_fact,
                on_status=self._on_status,
                on_gone=self._on_gone,
                on_outdated=self._on_outdated,
                trust=self._trust,
            )
            self._control.start(self.address, self.peers)
            if history is not None:
                self._control.command(CreateGroup(self.name, address=self.address))
                value = msgspec.msgpack.encode(self.settings)
                self._control.command(Attach(self.name, Attachment("run", "", value)))
            else:
                self._control.command(JoinGroup(self.name, address=self.address))

    def _store(self, group: bytes) -> None:
        """On the thread that writes. Raises CannotWrite."""
        assert self._votes is not None
        try:
            self._votes.write(group)
        except ShoalError as error:
            self._fail(error)
            raise

    def _on_outdated(self) -> None:
        self._inbox.put(lambda: self._restart("the run was begun anew while this device was away"))

    def _accept(self, sock: socket.socket, hello: Hello) -> None:
        """A connection came in; on a thread of its own."""
        if hello.run != self.name or self._is_closed:
            if hello.kind == "control":
                with suppress(ShoalError):
                    send_message(sock, msgspec.msgpack.encode(Hello(self.name, "control", self.me)))  # not the one sought
            sock.close()
            return
        with self._lock:
            self._accepted.add(sock)
        try:
            self._serve(sock, hello)
        finally:
            with self._lock:
                self._accepted.discard(sock)

    def _serve(self, sock: socket.socket, hello: Hello) -> None:
        if hello.kind == "control":
            self._control.accept(sock, hello)
        elif hello.kind == "shelf":
            self.shelf.serve(sock)
        elif hello.kind == "chunks":
            with self._lock:
                old = self._wires.pop((hello.epoch, hello.node), None)
                self._wires[hello.epoch, hello.node] = sock
                self._changed.notify_all()
            if old is not None:
                old.close()
        elif hello.kind == "probe":
            with suppress(ShoalError), sock:
                answer(sock, partial(self.rates.observe, hello.node), self._usual_step_s())
        else:
            self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        try:
            asked = receive_message(sock)
            if asked == b"leave":
                self.leave()
            elif asked == b"recover" and self._is_suspended and self._core.ledger is not None:
                self._control.command(Recover(self.name))
            send_message(sock, msgspec.json.encode(self.statistics()))
        except ShoalError:
            pass
        finally:
            sock.close()

    def _dial_shelf(self, node: NodeId) -> socket.socket:
        address = self._control.addresses.get(node)
        if address is None:
            raise DeviceUnreachable(f"nobody knows where {node} listens")
        return dial(address, Hello(self.name, "shelf", self.me), trust=self._trust, node=node)

    # ---- events of the core

    def _tell(self, event: m.Event) -> None:
        with self._lock:
            opened = self._opened
            for effect in self._core.step(event, time.monotonic()):
                self._carry_out(effect)
            if opened is not None and self._opened is opened and self._core.open_epoch != opened.epoch:
                self._end_exchange(opened, is_orderly=isinstance(event, m.StepApplied))
            self._changed.notify_all()

    def _spawn(self, call: Callable[..., None], *arguments: object) -> None:
        """On another thread; what goes wrong there that should not is raised in the caller's."""

        def run() -> None:
            try:
                call(*arguments)
            except Exception as error:
                if not self._is_closed:
                    self._fail(error)

        with suppress(RuntimeError):  # it is being shut
            self._background.submit(run)

    def _end_exchange(self, opened: _Open, *, is_orderly: bool) -> None:
        self._opened = None
        self._task = None
        if opened.exchange is not None:
            if not is_orderly:
                opened.exchange.abort()
            self._spawn(opened.exchange.close)

    def _carry_out(self, effect: m.Effect) -> None:
        if isinstance(effect, m.Tell):
            self._control.say(effect.peers, effect.status)
        elif isinstance(effect, m.Report):
            self._control.command(ReportProgress(self.name, effect.applied, effect.has_state, effect.is_ready))
        elif isinstance(effect, m.Open):
            self._end_errand()
            if self._opened is not None:
                self._end_exchange(self._opened, is_orderly=False)
            self._opened = _Open(effect.epoch, effect.members, effect.rates)
            self._spawn(self._connect, self._opened)
        elif isinstance(effect, Compute):
            self._task = Task(effect.epoch, effect.step, effect.part)
            self._inbox.put(_wake)
        elif isinstance(effect, m.Apply):
            step = effect.step
            self._inbox.put(lambda: self._apply(step))
        elif isinstance(effect, Committed):
            self.committed = effect.entry.step
            if self._log_ends is not None and effect.entry.epoch >= self._log_ends:
                self._log_first = self._log_ends = None
            self._trim()
        elif isinstance(effect, m.Snapshot):
            self._snapshot(effect.num_donors)
        elif isinstance(effect, m.PullState):
            self._go_for("state", effect.donors)
        elif isinstance(effect, m.Follow):
            self._go_for("gradients", effect.donors)
        elif isinstance(effect, CatchUp):
            self._go_for("gradients", (effect.donor,))
        elif isinstance(effect, m.AskRecord):
            self._control.command(Attach(self.name, Attachment("exchange", str(effect.epoch), b"")))
        else:
            assert isinstance(effect, m.Restart)
            reason = effect.reason
            self._inbox.put(lambda: self._restart(reason))

    def _on_fact(self, fact: Fact) -> None:
        if isinstance(fact, RecordAdopted):
            values = {attachment.capability: attachment.value for attachment in fact.record.attachments}
            # A record without this member is news only to one that was in one before.
            if "run" not in values or (not fact.is_member and self._core.record is None):
                return
            if (refusal := self._take_settings(values["run"])) is not None:
                self._fail(refusal)
                return
            parts = {
                part: tuple(each.node for each in fact.record.members if each.part == part) for part in ("active", "shadow")
            }
            # A recovered run outranks all epochs of the one before, however many those who were lost had.
            generation = (fact.record.generation >> 32) - 1
            epoch = self.settings.epoch_base + fact.record.epoch + generation * _EPOCHS_PER_GENERATION
            self._tell(m.Adopted(epoch, parts["active"], parts["shadow"]))
        elif isinstance(fact, Suspended):
            self._suspend()
        elif isinstance(fact, CheckpointDue):
            self._inbox.put(lambda: self._save() if self._core.ledger is not None else None)
        elif isinstance(fact, Resumed):
            if self._is_suspended:
                self._is_suspended = False
                self._warn(f"'{self.name}' goes on: it has a majority of its members again")
            self._tell(m.Resumed())

    def _suspend(self) -> None:
        self._tell(m.Halted())
        if self.is_finished or self._is_closed:
            return
        self._is_suspended = True
        listed, absent = self._control.listed()
        do = "does" if len(absent) == 1 else "do"
        self._warn(
            f"'{self.name}' waits: {len(absent)} of its {len(listed)} members {do} not answer, and a majority has to. "
            f"It goes on when they are back; are they lost for good: `shoal runs recover {self.name}`"
        )

    def _take_settings(self, value: bytes) -> ShoalError | None:
        theirs = msgspec.msgpack.decode(value, type=Settings)
        ours = msgspec.structs.replace(self.settings, epoch_base=theirs.epoch_base, founding=theirs.founding)
        if theirs == ours:
            self.settings = theirs
            self._control.founding = theirs.founding
            return None
        if theirs.fingerprint != ours.fingerprint:
            what = "another model, optimiser or version of torch, or this device computes other bits"
        elif theirs.order != ours.order:
            what = (
                f"{theirs.order.num_samples} samples, batches of {theirs.order.global_batch} and seed {theirs.order.seed}, "
                f"here {ours.order.num_samples}, {ours.order.global_batch} and {ours.order.seed}"
            )
        else:
            what = f"{theirs.num_steps} steps, here {ours.num_steps}"
        return DeviceRefused(f"the run '{self.name}' has {what}: start the same script on every device")

    def _on_status(self, peer: NodeId, status: m.Status) -> None:
        self._tell(m.Heard(peer, status))

    def _on_gone(self, peer: NodeId) -> None:
        self._puller.forget(peer)
        self.rates.forget(peer)
        with self._lock:
            opened = self._opened
        if opened is not None and peer in opened.members:
            self.on_loss()
            # What it owed may still be on its way, and its connections say so first; a frozen peer's say nothing.
            timer = threading.Timer(0.5, lambda: self._tell(m.Broken(opened.epoch)))
            timer.daemon = True
            timer.start()

    def _nudge(self) -> None:
        while not self._is_closed:
            time.sleep(NUDGE_S)
            self._tell(m.Nudged())

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._fatal = self._fatal or error
            self._changed.notify_all()
        self._inbox.put(_wake)

    # ---- exchanges

    def _connect(self, opened: _Open) -> None:
        """A wire to each member of the epoch: of two, the one with the lesser name dials."""
        found: dict[NodeId, socket.socket] = {}
        others = [node for node in opened.members if node != self.me]
        give_up_s = time.monotonic() + CONNECT_S
        try:
            for node in (node for node in others if self.me < node):
                found[node] = self._dial_chunks(node, opened, give_up_s)
            with self._lock:
                for node in (node for node in others if node < self.me):
                    key = (opened.epoch, node)
                    self._changed.wait_for(
                        lambda key=key: key in self._wires or self._opened is not opened,  # type: ignore[misc]
                        max(0.0, give_up_s - time.monotonic()),
                    )
                    if key not in self._wires:
                        raise DeviceUnreachable(f"member {node} did not connect")
                    found[node] = self._wires.pop(key)
                if self._opened is not opened:
                    raise DeviceUnreachable("another epoch began")
                if others:
                    plan = plan_for(opened.members, opened.rates, num_bytes=self._gradient_bytes)
                    wires = {node: SocketWire(sock) for node, sock in found.items()}
                    exchange = Exchange(self.me, wires, observed=self.rates.observe)
                    chunk_bytes = chunk_bytes_of(plan, opened.rates, num_bytes=self._gradient_bytes)
                    exchange.enter(0, plan, chunk_bytes=chunk_bytes)
                    self._opened = opened._replace(plan=plan, exchange=exchange, chunk_bytes=chunk_bytes)
                    self._changed.notify_all()
        except (ShoalError, ValueError):
            for sock in found.values():
                sock.close()
            self._tell(m.Broken(opened.epoch))

    def _dial_chunks(self, node: NodeId, opened: _Open, give_up_s: float) -> socket.socket:
        while True:
            address = self._control.addresses.get(node)
            if address is not None:
                with suppress(DeviceUnreachable):
                    hello = Hello(self.name, "chunks", self.me, epoch=opened.epoch)
                    return dial(address, hello, trust=self._trust, node=node)
            if time.monotonic() > give_up_s or self._opened is not opened:
                raise DeviceUnreachable(f"member {node} cannot be reached")
            time.sleep(POLL_S)

    def _exchange_of(self, epoch: int) -> _Open | None:
        """The epoch's exchange when it stands; None if the epoch is over."""
        with self._lock:
            self._changed.wait_for(
                lambda: (
                    self._opened is None
                    or self._opened.epoch != epoch
                    or self._opened.exchange is not None
                    or len(self._opened.members) == 1
                )
            )
            return self._opened if self._opened is not None and self._opened.epoch == epoch else None

    def _contribute(self, task: Task, gradients: FloatArray | None, loss_sum: float, compute_s: float) -> StepDone | None:
        opened = self._exchange_of(task.epoch)
        if opened is None:
            return None
        began_s = time.monotonic()
        try:
            total = self._reduce(opened, self._contribution(opened, task, gradients, loss_sum, compute_s))
            place = opened.members.index(self.me)
            num_tail = _num_tail(len(opened.members))
            sums, tail = total[:-num_tail], total[-num_tail:]
            self._check_digests(opened, tail[_TAIL + len(opened.members) : _TAIL + 2 * len(opened.members)])
            if task.step >= self.settings.num_steps:
                self._tell(m.Confirmed(task.epoch, task.step))
                self.is_finished = True
                return None
            num_samples = len(self.settings.order.interval(task.step))
            mean = sums
            mean[: self.trainee.num_gradients] /= np.float32(num_samples)
            if tail[3]:
                self._clip(opened, mean[: self.trainee.num_gradients], float(tail[2] / tail[3]), place)
            self._plan_anew(opened, tail[_TAIL + 2 * len(opened.members) :])
        except (ShoalError, TimeoutError) as error:
            if isinstance(error, Diverged):
                raise
            if task.step >= self.settings.num_steps and self._is_over():
                self.is_finished = True
            self.on_loss()
            self._tell(m.Broken(task.epoch))
            return None
        exchange_s = time.monotonic() - began_s
        self._checkpoint(task.step)
        speeds = {node: max(float(rate), 1e-3) for node, rate in zip(opened.members, tail[_TAIL:], strict=False)}
        with self._lock:
            self._mean = mean
        self.loss = float(tail[0]) / num_samples
        self._tell(m.Summed(task.epoch, task.step, bool(tail[1]), speeds))
        while True:
            self._drain()
            with self._lock:
                if self._core.applied >= task.step:
                    break
                if self._core.open_epoch != task.epoch:
                    return None
            with suppress(queue.Empty):
                self._inbox.get(timeout=0.1)()
        now_s = time.monotonic()
        step_s, self._stepped_s = now_s - self._stepped_s, now_s
        self._adapt_share(step_s)
        done = StepDone(task.step, self.loss, len(opened.members), compute_s, exchange_s, step_s)
        self.on_step(done)
        return done

    def _plan_anew(self, opened: _Open, told: FloatArray) -> None:
        """Between two steps, by what all members told with this one: so all go on with the same plan.

        Args:
            told: bytes/s to each member from each, 0 where unknown, [members * members].
        """
        members = opened.members
        links = [Link(source, target) for target in members for source in members]
        rates = {link: float(rate) for link, rate in zip(links, told, strict=True) if rate > 0}
        if opened.exchange is None or opened.plan is None or not has_moved(opened.rates, rates):
            return
        plan = revised(opened.plan, rates, num_bytes=self._gradient_bytes)
        chunk_bytes = chunk_bytes_of(plan, rates, num_bytes=self._gradient_bytes)
        num_plans = opened.num_plans
        if plan is not opened.plan or chunk_bytes != opened.chunk_bytes:
            num_plans += 1
            opened.exchange.enter(num_plans, plan, chunk_bytes=chunk_bytes)
        with self._lock:
            if self._opened is opened:
                self._opened = opened._replace(rates=rates, plan=plan, num_plans=num_plans, chunk_bytes=chunk_bytes)

    @property
    def _gradient_bytes(self) -> int:
        return 4 * (self.trainee.num_gradients + self.trainee.num_buffers)

    def _adapt_share(self, step_s: float) -> None:
        """What a joiner pulls must not slow training: where steps become longer, it gets less."""
        usual_s = self._usual_step_s() or step_s
        self._recent_s.append(step_s)
        if step_s > SLOWER * usual_s:
            self.shelf.share = max(SHARE_MIN, self.shelf.share / 2)
        else:
            self.shelf.share = min(1.0, self.shelf.share + SHARE_MORE)

    def _usual_step_s(self) -> float:
        """Of the last steps; 0 before the first."""
        recent = sorted(self._recent_s)
        return recent[len(recent) // 2] if recent else 0.0

    def _is_over(self) -> bool:
        """All steps are applied, and a member that has seen the end is gone."""
        return self._core.applied >= self.settings.num_steps - 1 and not self._control.is_running()

    def _contribution(
        self, opened: _Open, task: Task, gradients: FloatArray | None, loss_sum: float, compute_s: float
    ) -> FloatArray:
        trainee = self.trainee
        num_members, place = len(opened.members), opened.members.index(self.me)
        x = np.zeros(trainee.num_gradients + trainee.num_buffers + _num_tail(num_members), np.float32)
        if gradients is not None:
            x[: trainee.num_gradients] = gradients
        if place == 0 and trainee.num_buffers:
            x[trainee.num_gradients : trainee.num_gradients + trainee.num_buffers] = trainee.buffers()
        tail = x[-_num_tail(num_members) :]
        tail[0] = loss_sum
        tail[1] = self._core.knows_later_record
        if self._clip_norm is not None:
            tail[2], tail[3] = self._clip_norm, 1.0
        rate = self._core.samples_per_s
        if compute_s > 0 and gradients is not None:
            measured = len(task.part) / compute_s
            rate = 0.5 * (rate + measured) if self._has_measured else measured
            self._has_measured = True
        tail[_TAIL + place] = rate
        digest = self._last_digest
        tail[_TAIL + num_members + place] = int(digest[: _DIGEST_BITS // 4], 16) if digest else 0
        received = self.rates.bytes_per_s()
        row = tail[_TAIL + (2 + place) * num_members :][:num_members]
        row[:] = [received.get(node, 0.0) for node in opened.members]
        self._tell(m.Measured(received))
        return x

    def _reduce(self, opened: _Open, x: FloatArray) -> FloatArray:
        return x if opened.exchange is None else opened.exchange.all_reduce(x, timeout_s=EXCHANGE_S)

    def _clip(self, opened: _Open, x: FloatArray, norm_max: float, place: int) -> None:
        """The first member's coefficient is everyone's: devices may sum a norm in other orders."""
        coefficient = np.zeros(1, np.float32)
        if place == 0:
            norm = float(np.sqrt(np.dot(x.astype(np.float64), x.astype(np.float64))))
            coefficient[0] = min(1.0, norm_max / (norm + 1e-6))
        coefficient = self._reduce(opened, coefficient)
        if coefficient[0] < 1.0:
            x *= coefficient[0]

    def _check_digests(self, opened: _Open, digests: FloatArray) -> None:
        counts: dict[float, int] = {}
        for digest in digests.tolist():
            counts[digest] = counts.get(digest, 0) + 1
        if len(counts) > 1:
            most = max(counts, key=lambda digest: (counts[digest], -digests.tolist().index(digest)))
            others = [node for node, digest in zip(opened.members, digests.tolist(), strict=True) if digest != most]
            if self.me in others:
                raise Diverged("this device computed other bits than most members of the run: it cannot go on with them")
            self.warnings.append(f"{', '.join(others)} computed other bits and had to stop")

    # ---- on the caller's thread

    def _drain(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _apply(self, step: int) -> None:
        with self._lock:
            mean = self._mean
            if mean is None or self._core.applied != step - 1 or self._core.open_epoch is None:
                return
            self._mean = None
        self.trainee.apply(mean, step=step)
        self._last_digest = self.trainee.digest()
        self._share = None
        with self._lock:
            self._kept[step] = mean
            self._tell(m.StepApplied(step, self._last_digest))

    def _load(self, fetched: Fetched, errand: int) -> None:
        with self._lock:
            if errand != self._errand:
                return
        about = msgspec.json.decode(fetched.about, type=_About)
        self._share = None  # it was of another state
        self.trainee.load(fetched.data, about.about)
        self._last_digest = self.trainee.digest() if about.history else ""
        if about.history and about.history[-1].digest != self._last_digest:
            self._fail(DeviceRefused("the state that came does not have the bits that its ledger names"))
            return
        self._tell(m.StateHad(tuple(about.history)))

    def _replay(self, fetched: Fetched, errand: int, done: threading.Event) -> None:
        try:
            entry = msgspec.json.decode(fetched.about, type=Entry)
            with self._lock:
                if errand != self._errand or entry.step != self._core.applied + 1:
                    return
            x = fetched.data.view(np.float32)
            self.trainee.apply(x, step=entry.step)
            self._last_digest = self.trainee.digest()
            with self._lock:
                self._kept[entry.step] = x
                self._tell(m.Replayed(entry, self._last_digest))
        finally:
            done.set()

    def _restart(self, reason: str) -> None:
        self.warnings.append(f"joining anew: {reason}")
        self._control.command(LeaveGroup(self.name))
        self._control.close()
        self._puller.close()
        self._begin(None)

    # ---- state and gradients for others

    def _has_shadows(self) -> bool:
        record = self._core.record
        return record is not None and bool(record.shadows)

    def _snapshot(self, num_donors: int | None) -> None:
        if num_donors is None:
            # Who was a shadow until now may need gradients still, but has them once a step of this epoch counts.
            self._has_snapshot = False
            self._log_ends = self._core.record.epoch if self._core.record is not None else 0
            self.shelf.take("state")
            return
        self._has_snapshot, self._log_ends = True, None
        self._log_first = self._core.applied + 1
        history = list(self._core.entries)

        def make() -> None:
            began_s = time.monotonic()
            state, about = self.trainee.state()
            self.snapshot_s = time.monotonic() - began_s
            told = msgspec.json.encode(_About(history, about))

            def put() -> None:
                self.shelf.put("state", state, version=len(history), about=told, num_sources=num_donors)
                with self._lock:
                    if not self._has_snapshot:
                        self.shelf.take("state")

            self._spawn(put)

        self._inbox.put(make)

    def _offer(self, name: str) -> Offer | None:
        """A gradient that somebody asks for, if it is kept."""
        kind, _, number = name.partition("/")
        if kind != "gradient" or not number.isdigit():
            return None
        step = int(number)
        with self._lock:
            entries = self._core.entries
            if step not in self._kept or step >= len(entries):
                return None
            return Offer(self._kept[step].view(np.uint8), step, msgspec.json.encode(entries[step]), GRADIENT_SOURCES)

    def _trim(self) -> None:
        """Gradients that nobody will ask for any more."""
        applied = self._core.applied
        first = applied - 1
        if self._log_first is not None:
            first = min(first, max(self._log_first, applied - LOG_STEPS_MAX))
        for step in [step for step in self._kept if step < first]:
            del self._kept[step]
            self.shelf.take(f"gradient/{step}")

    # ---- fetching, on a thread of its own

    def _go_for(self, goal: str, donors: tuple[NodeId, ...]) -> None:
        """Whoever is on this errand already goes on with it, and asks the new donors next."""
        self._donors = donors
        if goal != self._goal:
            self._end_errand()
            self._goal = goal
            self._spawn(self._pull if goal == "state" else self._follow, self._errand, self._core)

    def _end_errand(self) -> None:
        self._errand += 1
        self._goal = ""

    def _is_over_errand(self, errand: int, core: m.Member) -> bool:
        return self._is_closed or errand != self._errand or core is not self._core

    def _fetch(self, name: str, errand: int, core: m.Member) -> Fetched | None:
        try:
            return self._puller.fetch(name, self._donors, give_up=lambda: self._is_over_errand(errand, core))
        except ShoalError as error:
            self.warnings.append(str(error))
            return None

    def _pull(self, errand: int, core: m.Member) -> None:
        while not self._is_over_errand(errand, core):
            fetched = self._fetch("state", errand, core)
            if fetched is not None:
                self.transfer_s, self.transfer_bytes = fetched.complete.seconds, fetched.data.nbytes
                self._probe()
                self._inbox.put(partial(self._load, fetched, errand))
                return
            time.sleep(POLL_S)

    def _probe(self) -> None:
        """The links between this joiner and its donors, one after the other; nobody waits for it.

        Where they cannot carry all gradients, the owner is told: this device would stay a shadow.
        """
        steps_s: list[float] = []
        for node in self._donors:
            address = self._control.addresses.get(node)
            if address is not None:
                hello = Hello(self.name, "probe", self.me)
                with suppress(ShoalError), dial(address, hello, trust=self._trust, node=node) as sock:
                    steps_s.append(probe(sock, partial(self.rates.observe, node)))
        received = self.rates.bytes_per_s()
        self._tell(m.Measured(received))
        step_s = statistics.median(steps_s) if steps_s else 0.0
        if step_s > 0 and (line := shortage(self._gradient_bytes, step_s, sum(received.values()))):
            self._warn(line)

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        sys.stderr.write(("\n" if sys.stderr.isatty() else "") + f"shoal: {line}\n")

    def _follow(self, errand: int, core: m.Member) -> None:
        while not self._is_over_errand(errand, core):
            fetched = self._fetch(f"gradient/{core.applied + 1}", errand, core)
            if self._is_over_errand(errand, core):
                return
            if fetched is None:
                if core.ledger is None:
                    self._tell(m.CaughtUp())
                time.sleep(POLL_S)
                continue
            done = threading.Event()
            self._inbox.put(partial(self._replay, fetched, errand, done))
            while not done.wait(0.2) and not self._is_over_errand(errand, core):
                continue
            if core.ledger is not None:
                with self._lock:
                    if errand == self._errand:
                        self._end_errand()  # a member is behind by one step, and has it now
                return

    # ---- disk

    def _checkpoint(self, step: int) -> None:
        """Before step `step` is applied, when its sum says that all before is committed."""
        if step and step % self._checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        if self.folder is None:
            return
        folder, history = self.folder, list(self._core.entries)
        state, about = self.trainee.state()
        saved = Checkpoint(self.name, self.trainee.fingerprint, history, about, checkpoints.state_hash(state))

        def save() -> None:
            try:
                checkpoints.write(folder, saved, state)
            except ShoalError as error:
                self._warn(str(error))

        self._disk.submit(save)


def _founding_of(life: Life) -> str:
    """Which beginning of the run it was in; empty: none."""
    record = life.record
    for attachment in record.attachments if record is not None else ():
        if attachment.capability == "run":
            return msgspec.msgpack.decode(attachment.value, type=Settings).founding
    return ""


def _wake() -> None:
    """For who waits at an inbox: there is news elsewhere."""


class Diverged(DeviceRefused):
    """This device's bits are others than those of most members."""


class _About(msgspec.Struct, frozen=True):
    history: list[Entry]
    about: dict[str, object]


def _num_tail(num_members: int) -> int:
    return _TAIL + (2 + num_members) * num_members
