"""What the owner of a device asks of its agent, and the answers: `shoal invite`, `join`, `remove`, `leave`, `status`.

The owner's commands come over a control link like any other, dialled with the device's own key from the same machine:
whoever may read the state folder is the owner. So there is no second door and no second secret.

One MessagePack request per frame, one answer each, in order.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from itertools import accumulate
from math import inf
from pathlib import Path
from typing import TypeVar

import msgspec

from shoal.effects import Fact, Observed
from shoal.errors import (
    DeviceRefused,
    DeviceUnreachable,
    LinkClosed,
    LinkError,
    RemoteProtocolError,
    ShoalError,
)
from shoal.ids import NodeId
from shoal.membership.failure import MemberGone, MemberHere, Peer
from shoal.membership.group.facts import Decided
from shoal.membership.roster import (
    INVITATION_S_MAX,
    Admitted,
    Confirm,
    Device,
    Found,
    Invite,
    Rejected,
    Remove,
    UseInvitation,
    invitation_of,
)
from shoal.network.graph import Figure, LinkGraph
from shoal.runtime import errors_by_name
from shoal.runtime.channel import split_address
from shoal.runtime.messages import Failed
from shoal.runtime.node import clock
from shoal.runtime.node.interpreter import Interpreter
from shoal.runtime.node.links import DEFAULT_PORT
from shoal.runtime.node.state import find_agent, runs_from
from shoal.runtime.node.token import SECRET_BYTES, Token, print_token, read_token
from shoal.transport.control import AS_MEMBER, FRAME_BYTES_MAX, HEAD, PREFACE_MAGIC, ControlLink, FrameKind, frame
from shoal.transport.secure import TrustStore

ANSWER_S = 30.0
DECIDE_S = (0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0)
"""Bounds between which decisions are counted."""
_ATTEMPTS, _ATTEMPT_AGAIN_S = 3, 0.15
_LEAVE_S = 0.3
"""Long enough for the word to reach those to whom links stand."""


class Request(msgspec.Struct, frozen=True, tag=True):
    """Base of what the owner asks; the class name is the tag."""


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Base of what the agent answers."""


class AskCluster(Request, frozen=True):
    """Who is here, and what are the links like? Answered by `ClusterStatus`."""


class MakeInvitation(Request, frozen=True):
    """Let `uses` devices in within `valid_s` seconds; starts a cluster where there is none. Answered by `Invitation`."""

    uses: int = 1
    valid_s: float = INVITATION_S_MAX


class JoinCluster(Request, frozen=True):
    """Join by a token. Answered by `Joined`."""

    token: str


class RemoveDevice(Request, frozen=True):
    """The device with this name or beginning of an id may be here no more. Answered by `Done`."""

    device: str


class ConfirmDevice(Request, frozen=True):
    """Of those that came by an overused invitation, this one is right. Answered by `Done`."""

    device: str


class LeaveCluster(Request, frozen=True):
    """This device belongs nowhere any more. Answered by `Done`."""


class Pause(Request, frozen=True):
    """This device lends others nothing until `is_paused` is False again. Answered by `Done`."""

    is_paused: bool


class TellReceived(Request, frozen=True):
    """A program of the owner's, such as a training run, received `num_bytes` from `source` in `seconds`; `is_full`: the link
    was the limit. Answered by `Done`."""

    source: NodeId
    num_bytes: int
    seconds: float
    is_full: bool


AnyRequest = AskCluster | MakeInvitation | JoinCluster | RemoveDevice | ConfirmDevice | LeaveCluster | Pause | TellReceived


class Invitation(Answer, frozen=True):
    """The token to be typed elsewhere. `addresses` are this device's, as others are told."""

    token: str
    expires_s: float
    addresses: tuple[str, ...]


class Joined(Answer, frozen=True):
    """In the cluster now, with these devices (by name)."""

    cluster: str
    devices: tuple[str, ...]


class Done(Answer, frozen=True):
    """It is done; `text` says what, in one line."""

    text: str


class Aged(msgspec.Struct, frozen=True):
    """A figure and how old it is, seconds. `is_lower_bound`: it was never seen at its limit."""

    value: float
    age_s: float
    is_lower_bound: bool = False


class MemberStatus(msgspec.Struct, frozen=True):
    """One device of the roster, as this one sees it. `link` is where the link to it goes, or `problem` why there is none."""

    node: NodeId
    name: str
    presence: str
    incarnation: int | None
    since_s: float | None
    """How long ago it was last found to be here, or gone."""
    addresses: tuple[str, ...]
    link: str = ""
    problem: str = ""
    is_trusted: bool = False
    public_key: str = ""
    """Hexadecimal."""
    memory_free_bytes: Aged | None = None
    processor_idle: Aged | None = None
    on_mains: bool | None = None


class LinkStatus(msgspec.Struct, frozen=True):
    """One directed link. None: nobody measured it yet."""

    source: NodeId
    target: NodeId
    state: str
    rate_bytes_per_s: Aged | None
    round_trip_s: Aged | None
    load_bytes_per_s: Aged | None
    heard_age_s: float | None = None
    """Into this device: when anything last came."""


class Decisions(msgspec.Struct, frozen=True):
    """What this device decided as the leader of groups. `at_most` counts those that took no longer, by seconds."""

    num: int
    seconds: float
    """Of all together."""
    at_most: dict[float, int]


class ClusterStatus(Answer, frozen=True):
    """What `shoal status` shows. `cluster` is empty for a device that belongs nowhere."""

    me: NodeId
    name: str
    cluster: str
    is_removed: bool
    incarnation: int
    addresses: tuple[str, ...]
    members: tuple[MemberStatus, ...]
    links: tuple[LinkStatus, ...]
    waiting: dict[str, tuple[NodeId, ...]]
    """By invitation: devices of which the owner has to confirm the right ones."""
    groups: dict[str, str]
    """Of each group: epoch, leader and this device's part, in one line."""
    counters: dict[str, int]
    problems: tuple[str, ...] = ()
    is_paused: bool = False
    """Whether this device lends others nothing, as its owner said."""
    discovery: str = "off"
    """'off', 'on', or why nobody can be found on this network by multicast."""
    refusals: dict[str, int] = {}
    """Whom this device did not let in or hung up on, by reason."""
    decisions: Decisions | None = None


AnyAnswer = Invitation | Joined | Done | ClusterStatus | Failed
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
_answers: msgspec.msgpack.Decoder[AnyAnswer] = msgspec.msgpack.Decoder(AnyAnswer)


class _Joining:
    """A join under way: who asked for it, and whom to ask next."""

    def __init__(self, link: ControlLink | None, token: Token) -> None:
        self.link = link
        self.token = token
        self.contacts = list(token.contacts)
        self.asked: NodeId | None = None


class OwnerDesk:
    """Hears the owner of one device, on the interpreter's thread."""

    def __init__(self, interpreter: Interpreter) -> None:
        self._node = interpreter
        self._joining: _Joining | None = None
        self._changed_s: dict[NodeId, float] = {}
        self._decide_s = 0.0
        self._decided: Counter[float] = Counter()
        """By the least bound that is not below what it took."""
        interpreter.desk = self

    # ---- what the interpreter tells

    def owner_asked(self, link: ControlLink, payload: bytes) -> None:
        """Answers, now or when it is done."""
        try:
            request = _requests.decode(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"not a request of the owner's: {error}") from None
        try:
            answer = self._answer(link, request)
        except (ShoalError, ValueError) as error:
            answer = errors_by_name.failure(error)
        if answer is not None:
            self._say(link, answer)

    def learn(self, fact: Fact) -> None:
        """Goes on with what waits for it."""
        if isinstance(fact, MemberHere | MemberGone):
            self._changed_s[fact.node] = clock.now_s()
        elif isinstance(fact, Decided):
            self._decide_s += fact.decide_s
            self._decided[next((bound_s for bound_s in DECIDE_S if fact.decide_s <= bound_s), inf)] += 1
        elif isinstance(fact, Admitted):
            # The roster is whole only after this fact.
            self._node.call_later(0.0, self._be_admitted)
        elif isinstance(fact, Rejected) and self._joining is not None and fact.peer == self._joining.asked:
            self._end_joining(errors_by_name.failure(DeviceRefused(f"the member refuses: {fact.text}")))

    def link_opened(self, peer: NodeId) -> None:
        """The member that is asked to admit us answers."""
        joining, node = self._joining, self._node
        if joining is not None and peer == joining.asked:
            nonce = secrets.token_bytes(16)
            node.command(
                UseInvitation(peer, joining.token.secret, nonce, name=node.options.name, addresses=node.addresses())
            )

    def contact_failed(self, peer: NodeId, text: str) -> None:
        """It does not; perhaps the next one that the token names."""
        if self._joining is not None and peer == self._joining.asked:
            self._ask_next(text)

    # ---- requests

    def _answer(self, link: ControlLink, request: AnyRequest) -> AnyAnswer | None:
        match request:
            case AskCluster():
                return self.status()
            case MakeInvitation():
                return self.invite(request)
            case JoinCluster():
                self.join(request.token, link)
                return None
            case RemoveDevice():
                return self._remove(request.device)
            case ConfirmDevice():
                return self._confirm(request.device)
            case Pause():
                return self._pause(request.is_paused)
            case LeaveCluster():
                return self._leave()
            case TellReceived():
                return self._learn_received(request)

    def _pause(self, is_paused: bool) -> Done:
        self._node.state.is_paused = is_paused
        if is_paused:
            return Done("paused: what runs goes on, others get nothing new; `shoal resume` ends it")
        return Done("resumed: others may use this device again")

    def _learn_received(self, news: TellReceived) -> Done:
        if news.num_bytes < 0 or not 0.0 < news.seconds < inf:
            raise ValueError(f"{news.num_bytes} bytes in {news.seconds} s is no transfer")
        if news.source in self._node.core.trusted:
            self._node.step(Observed(news.source, self._node.me, news.num_bytes, news.seconds, saturated=news.is_full))
        return Done("")

    def _say(self, link: ControlLink | None, answer: AnyAnswer) -> None:
        if link is not None:
            self._node.links.answer(link, frame(FrameKind.OWNER, _encoder.encode(answer)))
            self._node.links.flush()

    def _is_member(self) -> bool:
        return self._node.me in self._node.core.roster.roster.members

    def invite(self, request: MakeInvitation) -> Invitation:
        """Makes an invitation, and a cluster where there is none.

        Raises:
            ValueError: times or uses that make no sense.
            DeviceRefused: this device may not invite.
        """
        node = self._node
        if not 1 <= request.uses <= 1000 or not 0.0 < request.valid_s <= INVITATION_S_MAX:
            raise ValueError("an invitation is for 1 to 1000 devices and at most 24 hours")
        roster = node.core.roster.roster
        if not roster.cluster:
            node.command(Found(name=node.options.name))
            node.tell_addresses()
        elif not self._is_member():
            raise DeviceRefused(_NO_SAY)
        addresses = node.addresses()
        if not addresses:
            raise DeviceRefused("this device only dials out, so nobody could ask it: start it with --members HOST:PORT")
        secret = secrets.token_bytes(SECRET_BYTES)
        expires_s = node.since_1970_s() + request.valid_s
        node.command(Invite(invitation_of(secret), expires_s, request.uses))
        here = node.core.presence.here()
        others = [
            (device.node, device.addresses)
            for device in node.core.roster.roster.members.values()
            if device.node in here and device.addresses
        ]
        return Invitation(print_token(secret, [(node.me, addresses), *others]), expires_s, addresses)

    def join(self, token: str, link: ControlLink | None) -> None:
        """Begins to join; the answer comes when it is done.

        Raises:
            ValueError: the token is none.
            DeviceRefused: this device is in a cluster already.
        """
        read = read_token(token)
        node = self._node
        roster = node.core.roster.roster
        if self._is_member() and len(roster.members) > 1:
            raise DeviceRefused(
                f"this device is in a cluster of {len(roster.members)} devices already, and can be in one only: "
                "`shoal leave` first"
            )
        if any(contact.node == node.me for contact in read.contacts):
            raise DeviceRefused("this token was made here: use it on the other device")
        if roster.cluster:  # a cluster of one, or one that it was removed from
            node.reset(keep_key=self._is_member())
        self._joining = _Joining(link, read)
        self._ask_next("")

    def _ask_next(self, problem: str) -> None:
        joining = self._joining
        assert joining is not None
        if not joining.contacts:
            self._end_joining(
                errors_by_name.failure(
                    DeviceUnreachable(
                        f"no member that the token names can be reached ({problem}): is `shoal up` running there, and do "
                        "both devices share a network?"
                    )
                )
            )
            return
        contact = joining.contacts.pop(0)
        joining.asked = contact.node
        self._node.links.contact(contact.node, contact.addresses)

    def _be_admitted(self) -> None:
        if self._joining is not None and self._is_member():
            roster = self._node.core.roster.roster
            others = sorted(device.name for device in roster.members.values() if device.node != self._node.me)
            self._end_joining(Joined(roster.cluster, tuple(others)))

    def _end_joining(self, answer: AnyAnswer) -> None:
        joining, self._joining = self._joining, None
        if joining is not None:
            self.on_joined(answer)
            self._say(joining.link, answer)

    def on_joined(self, answer: AnyAnswer) -> None:
        """For those who join without a link of the owner's; nothing here."""

    def _find(self, text: str, among: Iterable[Device]) -> Device:
        devices = list(among)
        found = [device for device in devices if device.name == text]
        if not found and len(text) >= 4:
            found = [device for device in devices if device.node.startswith(text.lower())]
        if len(found) == 1:
            return found[0]
        known = ", ".join(sorted(f"{device.name} ({device.node[:8]})" for device in devices)) or "none"
        problem = "names several devices; give the beginning of its id" if found else "is no device of this cluster"
        raise ValueError(f"'{text}' {problem}: {known}")

    def _remove(self, text: str) -> Done:
        if not self._is_member():
            raise DeviceRefused(_NO_SAY)
        device = self._find(text, self._node.core.roster.roster.members.values())
        if device.node == self._node.me:
            raise DeviceRefused("this is the device itself: `shoal leave` takes it out")
        self._node.command(Remove(device.node))
        return Done(f"{device.name} ({device.node[:8]}) is removed, for ever: to come back it joins anew, with a new key")

    def _confirm(self, text: str) -> Done:
        roster = self._node.core.roster.roster
        waiting = {node for nodes in roster.waiting.values() for node in nodes}
        names = {
            each.subject: Device(each.subject, b"", each.name, (), each.signer, 0.0)
            for each in roster.statements.values()
            if each.kind == "add" and each.subject in waiting
        }
        device = self._find(text, names.values())
        self._node.command(Confirm(device.node))
        return Done(f"{device.name} ({device.node[:8]}) is confirmed")

    def _leave(self) -> Done:
        if not self._node.core.roster.roster.cluster:
            raise DeviceRefused("this device is in no cluster")
        node = self._node
        num_told = len(node.core.trusted)
        others = len(node.core.roster.roster.members) - 1
        if self._is_member():
            node.command(Remove(node.me))
        node.call_later(_LEAVE_S, node.reset)
        if others > 0 and num_told == 0:
            return Done(
                f"left. None of the {others} others could be told: say `shoal remove {node.options.name}` on one of them"
            )
        return Done("left; this device has a new key now, and can join again by an invitation")

    # ---- status

    def ask_status(self, *, timeout_s: float = 5.0) -> ClusterStatus:
        """The same as `status`, for other threads than the interpreter's.

        Raises:
            DeviceUnreachable: the links do not answer in time, or have ended.
        """
        answer: Future[ClusterStatus] = Future()
        self._node.post(lambda: answer.set_result(self.status()))
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            raise DeviceUnreachable("the links to members do not answer") from None

    def status(self) -> ClusterStatus:
        """Everything this device knows, now."""
        node, core = self._node, self._node.core
        roster = core.roster.roster
        graph = node.graph()
        counters = {
            **{name: getattr(node.links.counters, name) for name in node.links.counters.__struct_fields__},
            "num_events": node.num_events,
            **{f"network_{name}": count for name, count in msgspec.structs.asdict(node.awareness.statistics).items()},
            **{f"probes_{name}": getattr(node.probes.counters, name) for name in node.probes.counters.__struct_fields__},
        }
        groups = {
            str(name): f"epoch {group.committed.epoch}, {len(group.committed.members)} members, led by "
            f"{_short_name(roster.members, group.leader)}; {group.role} and {group.standing} here"
            for name, group in core.groups.items()
        }
        return ClusterStatus(
            me=node.me,
            name=node.options.name,
            cluster=roster.cluster,
            is_removed=node.me in roster.removed,
            discovery="off" if node.discovery is None else node.discovery.problem or "on",
            is_paused=node.state.is_paused,
            incarnation=core.incarnation,
            addresses=node.addresses(),
            members=tuple(self._member(device, graph) for device in sorted(roster.members.values(), key=lambda d: d.name)),
            links=tuple(self._links(graph)),
            waiting=dict(roster.waiting),
            groups=groups,
            counters=counters,
            problems=(node.state.disk.problem,) if node.state.disk.problem else (),
            refusals=dict(node.links.refusals),
            decisions=self._decisions(),
        )

    def _decisions(self) -> Decisions:
        counts = accumulate(self._decided[bound_s] for bound_s in DECIDE_S)
        return Decisions(self._decided.total(), self._decide_s, dict(zip(DECIDE_S, counts, strict=True)))

    def _member(self, device: Device, graph: LinkGraph) -> MemberStatus:
        node, core, now_s = self._node, self._node.core, clock.now_s()
        figures = graph.device(device.node)
        resources = figures.resources if figures is not None else None
        is_me = device.node == node.me
        changed_s = self._changed_s.get(device.node)
        return MemberStatus(
            node=device.node,
            name=device.name,
            presence="this device" if is_me else self._presence(device.node),
            incarnation=core.incarnation if is_me else core.presence.incarnation_of(device.node),
            since_s=None if changed_s is None else now_s - changed_s,
            addresses=device.addresses,
            link=node.links.describe(device.node),
            problem="" if is_me else node.links.problems.get(device.node, ""),
            is_trusted=device.node in core.trusted,
            public_key=device.public_key.hex(),
            memory_free_bytes=_aged_value(resources.memory_free_bytes, resources.at_s, now_s) if resources else None,
            processor_idle=_aged_value(resources.processor_idle, resources.at_s, now_s) if resources else None,
            on_mains=resources.on_mains if resources is not None else None,
        )

    def _presence(self, peer: NodeId) -> str:
        watched = self._node.core.presence.watched.get(peer)
        if watched is None:
            return "here" if self._node.core.presence.is_here(peer) else "gone"
        if watched.state is Peer.CUT:
            return "here, link cut"
        return watched.state.value

    def _links(self, graph: LinkGraph) -> list[LinkStatus]:
        now_s, me = clock.now_s(), self._node.me
        members = self._node.core.roster.roster.members
        found = []
        for each in graph.links:
            source, target = each.link.source, each.link.target
            if source not in members or target not in members:
                continue
            watched = self._node.core.presence.watched.get(source) if target == me else None
            found.append(
                LinkStatus(
                    source,
                    target,
                    each.state.value,
                    _aged(each.rate, now_s),
                    _aged(each.round_trip, now_s),
                    _aged(each.load, now_s),
                    now_s - watched.heard_s if watched is not None else None,
                )
            )
        return found


_NO_SAY = "this device was removed from its cluster, so it has no say there: join one by an invitation"


def _short_name(members: dict[NodeId, Device], node: NodeId | None) -> str:
    if node is None:
        return "nobody"
    return members[node].name if node in members else node[:8]


def _aged(figure: Figure | None, now_s: float) -> Aged | None:
    return None if figure is None else Aged(figure.mean, max(0.0, now_s - figure.at_s), figure.is_lower_bound)


def _aged_value(value: float | None, at_s: float, now_s: float) -> Aged | None:
    return None if value is None else Aged(float(value), max(0.0, now_s - at_s))


# ---- the owner's side

_Kind = TypeVar("_Kind", bound=Answer)


class OwnerLink:
    """A command's link to the agent that runs from a state folder; blocking.

    Raises:
        DeviceUnreachable: no agent runs from there, or it does not answer.
        DeviceRefused: it does not take this command for its owner's.
    """

    def __init__(self, folder: Path, *, timeout_s: float = ANSWER_S) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._open(folder, timeout_s)
                return
            except DeviceUnreachable:
                if attempt == _ATTEMPTS or not runs_from(folder):
                    raise
                time.sleep(_ATTEMPT_AGAIN_S)  # a device that just left is changing its key

    def _open(self, folder: Path, timeout_s: float) -> None:
        address, keys = find_agent(folder)
        host, port = split_address(address, default_port=DEFAULT_PORT)
        try:
            sock = socket.create_connection((host, port), timeout=5.0)
        except OSError as error:
            raise DeviceUnreachable(
                f"the agent of {folder} does not answer at {address} ({error.strerror or error}): start it with `shoal up`"
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.sendall(PREFACE_MAGIC + AS_MEMBER)
            self._socket = TrustStore(keys, [keys.public_key]).dial(sock, keys.node)
        except OSError as error:
            sock.close()
            raise DeviceUnreachable(f"the agent of {folder} does not answer ({error.strerror or error})") from error
        except LinkError as error:
            raise DeviceUnreachable(f"what answers at {address} is not the agent of {folder}: {error}") from error
        self._socket.settimeout(timeout_s)
        try:
            kind, payload = self._receive()
        except ShoalError:
            self.close()
            raise
        if kind != FrameKind.WELCOME:
            self.close()
            raise DeviceRefused(f"the agent of {folder} refuses: {payload[:512].decode(errors='replace')}")

    def ask(self, request: AnyRequest, kind: type[_Kind]) -> _Kind:
        """One request, one answer.

        Raises:
            ShoalError: what the agent answers instead.
            DeviceUnreachable: it went away, or does not answer in time.
        """
        try:
            self._socket.sendall(frame(FrameKind.OWNER, _encoder.encode(request)))
        except OSError as error:
            raise DeviceUnreachable(f"the agent is gone ({error.strerror or error})") from error
        answer = _answers.decode(self._receive()[1])
        if isinstance(answer, Failed):
            raise errors_by_name.revive(answer)
        if not isinstance(answer, kind):
            raise RemoteProtocolError(f"the agent answered {type(answer).__name__} where {kind.__name__} is due")
        return answer

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> OwnerLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> tuple[int, bytes]:
        try:
            size, kind = HEAD.unpack(self._receive_exactly(HEAD.size))
            if size > FRAME_BYTES_MAX:
                raise RemoteProtocolError(f"the agent announces {size} bytes, {FRAME_BYTES_MAX} are allowed")
            return kind, self._receive_exactly(size)
        except TimeoutError:
            raise DeviceUnreachable("the agent does not answer in time") from None
        except (OSError, LinkClosed) as error:
            raise DeviceUnreachable(f"the agent is gone ({error})") from error

    def _receive_exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise LinkClosed("connection closed")
            data += part
        return bytes(data)
