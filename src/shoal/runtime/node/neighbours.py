"""The members of this device's cluster, as its agent sees them: who is here, and how to talk to their agents.

The cores live on the thread of the control links; what the agent wants to know is asked there, and answered as a value.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple, TypeVar

from shoal.effects import Fact
from shoal.ids import NodeId
from shoal.membership.roster import MemberRemoved
from shoal.network.estimate import MEMORY_S
from shoal.network.facts import DeliveryObserved
from shoal.network.graph import Link, LinkGraph
from shoal.runtime.channel import Channel, connect_member
from shoal.runtime.messages import Delivered
from shoal.runtime.node.interpreter import Interpreter
from shoal.runtime.node.links import DEFAULT_PORT
from shoal.transport.secure import TrustStore

_ANSWER_S = 5.0
RATE_AGE_S_MAX = MEMORY_S
"""An older rate than this is measured again for a plan."""

Answer = TypeVar("Answer")


class Neighbour(NamedTuple):
    """A member that is here now, and where it may be dialled, the best address first.

    `bytes_per_s` is what the link there carries, where it was measured lately; None: not known.
    """

    node: NodeId
    name: str
    addresses: tuple[str, ...]
    bytes_per_s: float | None = None


class Neighbours:
    """Made before the interpreter starts, on the agent's loop.

    Args:
        on_agent: told on that loop that another's agent has dialled; its TLS is still to come.
        on_removed: told there that a device is no member any more.
    """

    def __init__(
        self,
        node: Interpreter,
        *,
        on_agent: Callable[[socket.socket, TrustStore], None],
        on_removed: Callable[[NodeId], None],
    ) -> None:
        self._node = node
        loop = asyncio.get_running_loop()

        def came(sock: socket.socket, trust: TrustStore) -> None:
            try:
                loop.call_soon_threadsafe(on_agent, sock, trust)
            except RuntimeError:  # the agent has ended
                sock.close()

        def learned(fact: Fact) -> None:
            if isinstance(fact, MemberRemoved):
                with suppress(RuntimeError):  # the agent has ended
                    loop.call_soon_threadsafe(on_removed, fact.node)

        node.on_agent, node.on_fact = came, learned

    async def here(self) -> list[Neighbour]:
        """Everybody else who is trusted and here, by name."""
        return await self._ask(self._look)

    async def connect(self, neighbour: Neighbour) -> Channel:
        """To its agent. Raises DeviceUnreachable or DeviceRefused."""
        trust = await self._ask(lambda: self._node.links.trust)
        return await connect_member(neighbour.node, neighbour.addresses, trust, default_port=DEFAULT_PORT)

    @property
    def me(self) -> NodeId:
        """This device."""
        return self._node.me

    def learn_delivery(self, delivered: Delivered) -> None:
        """Has the cores told. Returns at once."""
        fact = DeliveryObserved(
            delivered.peer, delivered.num_bytes, delivered.seconds, delivered.is_full, delivered.round_trip_min_s
        )
        self._node.post(lambda: self._node.learn(fact))

    def _look(self) -> list[Neighbour]:
        core, links, graph = self._node.core, self._node.links, self._node.graph()
        members = core.roster.roster.members
        found = [
            Neighbour(node, members[node].name, links.ways_to(node), self._rate_to(node, graph))
            for node in core.trusted
            if node in members and core.presence.is_here(node)
        ]
        return sorted(found, key=lambda neighbour: (neighbour.name, neighbour.node))

    def _rate_to(self, node: NodeId, graph: LinkGraph) -> float | None:
        link = Link(self._node.me, node)
        figures = graph.link(link)
        if figures is None or figures.rate is None or figures.rate.is_lower_bound:
            return None
        return graph.capacity_bytes_per_s(link) if graph.age_s(figures.rate) <= RATE_AGE_S_MAX else None

    async def _ask(self, question: Callable[[], Answer]) -> Answer:
        answer: Future[Answer] = Future()
        self._node.post(lambda: answer.set_result(question()))
        return await asyncio.wait_for(asyncio.wrap_future(answer), _ANSWER_S)
