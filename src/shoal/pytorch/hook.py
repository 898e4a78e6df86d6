"""Gradients over trees for any script with DistributedDataParallel: a communication hook.

    model = DistributedDataParallel(model)
    with TreeReduce() as reduce:
        model.register_comm_hook(reduce, sp.tree_hook)

The process group that DDP needs anyway is used once, to find each other. A rank that is lost ends the exchange, and every
other rank gets an error; nothing more is promised there.
"""

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
import torch.distributed as dist

from shoal.exchange.runner import Exchange
from shoal.exchange.wire import SocketWire
from shoal.ids import NodeId
from shoal.runs.port import parse_address
from shoal.topology.policy import plan_for

_ADDRESS_BYTES = 64
_CONNECT_S = 30.0


class TreeReduce:
    """This rank's end. Made on all ranks at once, after `init_process_group`.

    Args:
        host: an address of this device that the others reach.
        timeout_s: of one bucket.
    """

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 600.0) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        self._size = size
        self._names = tuple(NodeId(f"rank{index:05}") for index in range(size))
        self._exchange: Exchange | None = None
        self._pool = ThreadPoolExecutor(1, "shoal-buckets")
        if size > 1:
            self._exchange = Exchange(self._names[rank], self._connect(host, rank))
            self._exchange.enter(0, plan_for(self._names, {}, num_bytes=1.0))

    def _connect(self, host: str, rank: int) -> dict[NodeId, SocketWire]:
        with socket.create_server((host, 0), backlog=self._size) as listener:
            own = f"{host}:{listener.getsockname()[1]}".encode()
            if len(own) > _ADDRESS_BYTES:
                raise ValueError(f"the address {own.decode()} is longer than {_ADDRESS_BYTES} characters")
            sent = torch.tensor(list(own.ljust(_ADDRESS_BYTES)), dtype=torch.uint8)
            received = [torch.empty_like(sent) for _ in range(self._size)]
            dist.all_gather(received, sent)
            found: dict[int, socket.socket] = {}
            for other in range(rank + 1, self._size):
                address = parse_address(bytes(received[other].tolist()).decode().strip())
                found[other] = socket.create_connection(address, timeout=_CONNECT_S)
                found[other].sendall(rank.to_bytes(4, "little"))
            listener.settimeout(_CONNECT_S)
            while len(found) < self._size - 1:
                sock, _ = listener.accept()
                sock.settimeout(_CONNECT_S)
                found[int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "little")] = sock
        return {self._names[other]: SocketWire(sock) for other, sock in found.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown()
        if self._exchange is not None:
            self._exchange.close()

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Over all ranks, the same bits on each."""
        if self._exchange is None:
            return x
        total = self._exchange.all_reduce(x.detach().to("cpu", torch.float32).numpy(), timeout_s=self._timeout_s)
        return (torch.from_numpy(total) / self._size).to(x.device, x.dtype)

    def submit(self, x: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """The mean, later; in the order of the calls, which is the same on all ranks."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()

        def reduce() -> None:
            try:
                future.set_result(self.mean(x))
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]

        self._pool.submit(reduce)
        return future


def tree_hook(state: TreeReduce, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """For `register_comm_hook`, which reads the annotations."""
    return state.submit(bucket.buffer())
