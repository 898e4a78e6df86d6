"""A worker: the child process that holds one engine's weights on this device.

    STARTED -- StartWorker --> MEASURED -- AssignLayers --> LOADED -- ConnectRing --> SERVING
            -- OpenTexts --> READING

Its agent speaks to it over standard input and output. End of file there means that the agent is gone, and ends the
process at once, wherever it is; so does a lost neighbour in the ring, after saying so.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar

import msgspec

from shoal import __version__
from shoal.compute.backend import Backend, accelerator_name, compute_devices
from shoal.compute.gguf import GGUFFile, TensorInfo
from shoal.compute.model import Model, describe, matrix_names
from shoal.compute.split import AnyStage, SplitStage, split_windows
from shoal.compute.stage import Stage
from shoal.compute.streaming import Streaming, measure_read_rate, read_mode, ring_bytes_min, room_bytes, row_runs
from shoal.errors import InfeasiblePlacement, LinkError, RemoteProtocolError, ShoalError
from shoal.ids import EngineId, LayerRange
from shoal.placement.memory_watch import CHECK_EVERY_S, MemoryWatch
from shoal.placement.profile import HEAD_ROOM_BYTES
from shoal.placement.window import TensorLoad, choose_residency
from shoal.runtime.answer import Conversation
from shoal.runtime.errors_by_name import failure
from shoal.runtime.free_memory import PageFaults, available_bytes, unused_bytes
from shoal.runtime.kept_profiles import KeptProfiles, Measured, key_of_start
from shoal.runtime.messages import (
    AcceleratorReport,
    AnyMessage,
    AssignLayers,
    Cancel,
    ConnectRing,
    Delivered,
    Embed,
    EngineLost,
    Generate,
    Message,
    OpenTexts,
    RingConnected,
    StageReady,
    StartWorker,
    TextsReady,
    WorkerReport,
    decode,
    encode,
)
from shoal.runtime.profile import MEMORY_SHARE, ComputeProfile, own_bytes
from shoal.runtime.ring import RingHead, RingStage, ThreadCounts, frame_shape
from shoal.runtime.texts import ModelTexts
from shoal.transport.delivery import Delivery
from shoal.transport.link import Inbound, Outbound, RingKeys, RingListener, dial
from shoal.units import MIB

_THOROUGH_BYTES = 256 * MIB
"""Models from this size are measured as a plan deserves, once: loading them takes as long."""
_FITS_SURELY_BYTES = 1024 * MIB
"""A memory larger than twice the model's file, and by this, surely holds it with its cache and the runtime."""
_SPARE_BYTES = 64 * MIB
"""Where less than this is free on the device, weights that were copied are given up for such that the system can take."""
_RING_TIMEOUT_S = 60.0
"""For the previous stage to dial in: it may still be loading its layers."""


_Expected = TypeVar("_Expected", bound=Message)


class AgentPipe:
    """The worker's side of the conversation with its agent."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self._reader = reader
        self._writer = writer
        self._inbox: queue.SimpleQueue[AnyMessage] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._write_lock = threading.Lock()
        threading.Thread(target=self._read, name="agent-pipe", daemon=True).start()

    def receive(self) -> AnyMessage:
        return self._inbox.get()

    def send(self, message: Message) -> None:
        try:
            with self._write_lock:
                self._writer.write(encode(message))
                self._writer.flush()
        except OSError:
            _end(1)

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def _read(self) -> None:
        try:
            while len(size := self._reader.read(4)) == 4:
                message = decode(self._reader.read(int.from_bytes(size, "big")))
                if isinstance(message, Cancel):
                    self._cancelled.set()
                else:
                    if isinstance(message, (Generate, Embed)):
                        self._cancelled.clear()
                    self._inbox.put(message)
        finally:
            _end(0)


class Worker:
    """One engine's worker, from its start to its end."""

    def __init__(self, pipe: AgentPipe) -> None:
        self._pipe = pipe

    def run(self) -> None:
        start = self._pipe.receive()
        if isinstance(start, OpenTexts):
            self._read_texts(Path(start.model_path))
        if not isinstance(start, StartWorker):
            raise RemoteProtocolError(f"the agent sent {type(start).__name__} where StartWorker or OpenTexts is due")
        self._engine: EngineId = start.engine
        self._model = Model(Path(start.model_path))
        self._backend = Backend(start.compute_device or "CPU")
        self._measure(start)
        assigned = self._expect(AssignLayers)
        # What is decided here is about this device's own memory: an accelerator's layers are in no part of it.
        windows = assigned.windows
        if assigned.accelerator_layers:
            own, _ = split_windows(windows, assigned.accelerator_layers, head=assigned.head)
            assigned = msgspec.structs.replace(assigned, windows=own)
        self._load(assigned, start, windows)
        connect = self._expect(ConnectRing)
        inbound, outbound = self._connect(connect, assigned)
        if assigned.head:
            self._serve(assigned, inbound, outbound, holds_windows=connect.holds_windows)
        else:
            assert inbound is not None
            assert outbound is not None
            watch = functools.partial(self._keep_within_memory, assigned)
            ring_stage = RingStage(
                self._stage, inbound, outbound, self._threads, num_stages=assigned.num_stages, while_waiting=watch
            )
            self._pipe.send(RingConnected())
            ring_stage.run()

    def _read_texts(self, path: Path) -> NoReturn:
        """Answers questions about texts, without weights, until the agent ends it."""
        texts = ModelTexts(GGUFFile.open(path).metadata)
        self._pipe.send(TextsReady())
        while True:
            request = self._pipe.receive()
            try:
                self._pipe.send(texts.answer(request))
            except (ShoalError, ValueError) as error:
                self._pipe.send(failure(error))

    def _measure(self, start: StartWorker) -> None:
        measured, now_s = self._measured(start), time.time()
        self._threads = ThreadCounts(measured.num_threads, measured.num_threads_prefill)
        self._layer_s = measured.layer_s
        self._read_bytes_per_s = measured.read_bytes_per_s
        shape = self._model.shape
        self._pipe.send(
            WorkerReport(
                layer_s=measured.layer_s,
                num_threads=measured.num_threads,
                num_threads_prefill=measured.num_threads_prefill,
                runtime_bytes=own_bytes(),
                layer_bytes=self._model.layer_bytes,
                output_bytes=self._model.output_bytes,
                cache_bytes_per_token_and_layer=shape.kv_bytes_per_token_and_layer,
                hidden_size=shape.hidden_size,
                context_length=shape.context_length,
                model_name=shape.name,
                description=describe(shape),
                compute_device=self._backend.device_name,
                read_bytes_per_s=measured.read_bytes_per_s,
                ring_bytes_min=ring_bytes_min(self._model),
                batch_layer_s=measured.batch_layer_s,
                output_s=measured.output_s,
                read_mode=measured.read_mode,
                spreads=measured.spreads,
                embedding_row_bytes=self._model.file.tensors["token_embd.weight"].num_bytes // shape.vocab_size,
                age_s=max(0.0, now_s - measured.measured_s),
                accelerator=measured.accelerator,
            )
        )

    def _measured(self, start: StartWorker) -> Measured:
        """What this device can do, as it is kept or measured now."""
        path = self._model.path
        # A small model starts at once, and is hardly worth more than knowing which number of threads suits it.
        is_thorough = start.for_plan or path.stat().st_size >= _THOROUGH_BYTES
        key, kept = key_of_start(start, path), KeptProfiles()
        found = None if start.fresh else kept.find(key, now_s=time.time())
        measured = found
        if measured is None or (start.head and not measured.is_complete):
            measured = self._measured_anew(start, is_thorough=is_thorough)
        if is_thorough and measured is not found:
            kept.keep(key, measured)
        if not self._may_stream(start.memory_bytes):
            return measured
        # Never kept: other programs share the disk, and reading for a moment says what it gives now.
        return msgspec.structs.replace(measured, read_bytes_per_s=measure_read_rate(path), read_mode=read_mode(path))

    def _measured_anew(self, start: StartWorker, *, is_thorough: bool) -> Measured:
        profile = ComputeProfile(
            self._model,
            self._backend,
            num_threads=start.num_threads,
            repack=start.repack,
            # An accelerator is timed for a moment, alone as beside a processor: two layers are as far from its memory as
            # all of them, and Mesa's software driver crashes when more are timed over and over.
            for_plan=is_thorough and self._backend.is_host,
            head=start.head,
            memory_bytes=start.memory_bytes,
        )
        return Measured(
            layer_s=profile.layer.seconds,
            batch_layer_s=profile.batch_layer.seconds,
            output_s=profile.output.seconds if profile.output else 0.0,
            is_complete=start.head,
            num_threads=profile.num_threads,
            num_threads_prefill=profile.num_threads_prefill,
            spreads=profile.spreads,
            measured_s=time.time(),
            is_steady=profile.is_steady,
            accelerator=None if start.compute_device else self._measured_accelerator(),
        )

    def _measured_accelerator(self) -> AcceleratorReport | None:
        """What a graphics processor beside this processor would do, where this build of ggml finds one."""
        name = accelerator_name(self._backend)
        if not name:
            return None
        device = next(device for device in compute_devices() if device.name == name)
        memory_bytes = int(MEMORY_SHARE * device.memory_free_bytes)
        with contextlib.closing(Backend(name)) as backend:
            profile = ComputeProfile(self._model, backend, num_threads=1, repack=False)
        return AcceleratorReport(
            name,
            memory_bytes,
            profile.layer.seconds,
            profile.batch_layer.seconds,
            shares_memory=device.kind == "integrated gpu",
        )

    def _may_stream(self, memory_bytes: int | None) -> bool:
        """Whether the disk's rate is worth measuring: it is the owner's too."""
        size = self._model.path.stat().st_size
        return self._backend.is_host and memory_bytes is not None and memory_bytes <= 2 * size + _FITS_SURELY_BYTES

    def _load(self, assigned: AssignLayers, start: StartWorker, windows: Sequence[LayerRange]) -> None:
        """Loads `windows`, of which `assigned` has this processor's part."""
        self._watch: MemoryWatch | None = None
        streaming = None
        if assigned.residency == "window":
            streaming = self._slide_window(assigned)
        elif assigned.residency == "auto" and self._backend.is_host:
            self._beside_bytes = self._bytes_beside_weights(assigned)
            memory_bytes = self._bytes_of_everything(assigned)
            if assigned.memory_bytes is not None and assigned.memory_bytes < memory_bytes:
                memory_bytes = assigned.memory_bytes
                streaming = self._choose_streaming(assigned, memory_bytes)
            self._watch = MemoryWatch(memory_bytes)
        self._stage = stage = self._make_stage(assigned, windows, streaming, repack=start.repack)
        if self._watch is not None:
            self._bring_in()
            self._faults = PageFaults()
            self._next_check_s = time.monotonic() + CHECK_EVERY_S
        self._listener = None
        self._ring_keys: RingKeys | None = None
        if assigned.num_stages > 1:
            self._ring_keys = RingKeys() if start.encrypts else None
            self._listener = RingListener(start.ring_host, engine=self._engine, version=__version__)
        self._pipe.send(
            StageReady(
                port=self._listener.port if self._listener else 0,
                mapped_bytes=stage.weights.mapped_bytes,
                copied_bytes=stage.weights.copied_bytes,
                cache_bytes=stage.cache_bytes,
                activation_bytes=stage.activation_bytes,
                ring_bytes=stage.streamed.ring_bytes if stage.streamed else 0,
                streamed_bytes=stage.streamed.turn_bytes if stage.streamed else 0,
                holds_windows=stage.holds_windows,
                ring_key=self._ring_keys.public_key if self._ring_keys else b"",
            )
        )

    def _make_stage(
        self, assigned: AssignLayers, windows: Sequence[LayerRange], streaming: Streaming | None, *, repack: bool
    ) -> AnyStage:
        repack = repack and assigned.residency == "auto"
        if assigned.accelerator_layers:
            return SplitStage(
                self._model,
                windows,
                self._backend,
                Backend(accelerator_name(self._backend)),
                assigned.accelerator_layers,
                context=assigned.context,
                micro_batch=assigned.micro_batch,
                head=assigned.head,
                repack=repack,
                streaming=streaming,
            )
        return Stage(
            self._model,
            windows,
            self._backend,
            context=assigned.context,
            micro_batch=assigned.micro_batch,
            head=assigned.head,
            repack=repack,
            streaming=streaming,
            # A device alone would ask for what it has just used.
            prefetch=assigned.residency == "mmap" and assigned.num_stages > 1,
        )

    def _bring_in(self) -> None:
        """Where nothing is streamed, what is missing is read ahead; a stage that streams has read it."""
        stage = self._stage
        if stage.streaming is None and (missing_bytes := self._model.file.missing_bytes(stage.weights.mapped)):
            stage.bring_in(is_short=unused_bytes() < missing_bytes)

    def _choose_streaming(self, assigned: AssignLayers, memory_bytes: int) -> Streaming | None:
        by_window, vector_bytes = self._loads(assigned)
        # A token's time in a matrix goes with its bytes: both are dominated by reading it once.
        total_bytes = sum(run.num_bytes for runs in by_window for run in runs)
        per_byte_s = self._layer_s * sum(map(len, assigned.windows)) / max(1, total_bytes)
        residency = choose_residency(
            [[TensorLoad(run.name, room_bytes(run), run.num_bytes * per_byte_s) for run in runs] for runs in by_window],
            available_bytes=memory_bytes - self._beside_bytes - vector_bytes,
            # Nobody asked how fast the disk is as long as everything fitted.
            read_bytes_per_s=self._read_bytes_per_s or measure_read_rate(self._model.path),
            idle_s=assigned.idle_s,
            ring_bytes=assigned.ring_bytes,
        )
        if not residency.streamed:
            return None
        return Streaming(frozenset(residency.streamed), residency.ring_bytes)

    def _bytes_of_everything(self, assigned: AssignLayers) -> int:
        """What the worker takes with all its weights in memory."""
        by_window, vector_bytes = self._loads(assigned)
        return self._beside_bytes + vector_bytes + sum(room_bytes(run) for runs in by_window for run in runs)

    def _loads(self, assigned: AssignLayers) -> tuple[list[list[TensorInfo]], int]:
        """What may be streamed, by window in the order of use; and the bytes of the small tensors, which always stay."""
        tensors = self._model.file.tensors
        by_window = [
            [run for name in names for run in row_runs(tensors[name])]
            for names in matrix_names(self._model, assigned.windows, head=assigned.head)
        ]
        layers = [layer for window in assigned.windows for layer in range(window.first, window.stop)]
        return by_window, sum(tensors[name].num_bytes for layer in layers for name in self._model.layer_vectors(layer))

    def _slide_window(self, assigned: AssignLayers) -> Streaming:
        """Nothing stays: layers pass through room for some of them, read ahead and forgotten after use.

        Source: Li et al., TPI-LLM (2024), its sliding-window memory scheduler.
        """
        tensors = self._model.file.tensors
        by_window = matrix_names(self._model, assigned.windows, head=assigned.head)
        runs = [run for names in by_window for name in names for run in row_runs(tensors[name])]
        layer_bytes = max(self._model.layer_bytes)
        ring_bytes = max(assigned.window_layers * layer_bytes, 2 * max(map(room_bytes, runs)))
        return Streaming(frozenset(run.name for run in runs), ring_bytes)

    def _bytes_beside_weights(self, assigned: AssignLayers) -> int:
        """What the worker will take that is no weights. Cache and activations are counted in full, though most of their
        pages are taken only as a conversation grows."""
        # Nothing is read for a stage that only stays to be measured.
        empty = Stage(
            self._model,
            assigned.windows,
            self._backend,
            context=assigned.context,
            micro_batch=assigned.micro_batch,
            head=assigned.head,
            repack=False,
        )
        stage_bytes = empty.cache_bytes + empty.activation_bytes
        empty.close()
        frame_bytes = 4 * self._model.shape.hidden_size * assigned.micro_batch
        num_frames = assigned.num_stages + 2 if assigned.num_stages > 1 else 1
        return own_bytes() + stage_bytes + num_frames * frame_bytes + HEAD_ROOM_BYTES

    def _keep_within_memory(self, assigned: AssignLayers) -> None:
        """Streams what the owner's programs took of the memory, and takes it back when they are done."""
        now_s = time.monotonic()
        if self._watch is None or now_s < self._next_check_s:
            return
        self._next_check_s = now_s + CHECK_EVERY_S
        stage, free_bytes = self._stage, available_bytes()
        missing_bytes = stage.missing_bytes()
        if stage.weights.copied_bytes:
            # Copies are no page cache: nobody can take them, and who runs out of memory is killed.
            missing_bytes = max(missing_bytes, _SPARE_BYTES - free_bytes)
        memory_bytes = self._watch.step(
            missing_bytes=missing_bytes,
            resident_bytes=stage.weights.mapped_bytes + stage.weights.copied_bytes,
            available_bytes=free_bytes,
            now_s=now_s,
            reread_bytes=self._faults.since_last_bytes(),
        )
        if memory_bytes is None:
            return
        with contextlib.suppress(InfeasiblePlacement):  # it is as little as can be already
            streaming = self._choose_streaming(assigned, memory_bytes)
            if streaming != stage.streaming:
                stage.stream_anew(streaming)
                self._bring_in()

    def _connect(self, connect: ConnectRing, assigned: AssignLayers) -> tuple[Inbound, Outbound] | tuple[None, None]:
        if self._listener is None:
            return None, None
        keys = self._ring_keys
        if keys is not None and not (connect.next_key and connect.previous_key):
            raise RemoteProtocolError("the head names no keys of this stage's neighbours, whose links are to be encrypted")
        # Everyone dials and is dialled at once: whoever did one after the other would wait for all the others.
        with ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(
                self._listener.accept, timeout_s=_RING_TIMEOUT_S, keys=keys, previous_key=connect.previous_key
            )
            sock = dial(
                connect.next_host,
                connect.next_port,
                engine=self._engine,
                version=__version__,
                keys=keys,
                next_key=connect.next_key,
            )
            inbound = accepting.result()
        self._listener.close()
        shape = frame_shape(self._stage, assigned.num_stages)

        def tell(delivery: Delivery) -> None:
            if connect.next_node is not None:
                self._pipe.send(Delivered(connect.next_node, *delivery, at_s=time.monotonic()))

        outbound = Outbound(sock, shape, frames_max=assigned.num_stages + 1, on_delivery=tell)
        return inbound, outbound

    def _serve(
        self, assigned: AssignLayers, inbound: Inbound | None, outbound: Outbound | None, *, holds_windows: bool
    ) -> None:
        head = RingHead(
            self._stage,
            self._engine,
            self._threads,
            num_stages=assigned.num_stages,
            holds_windows=holds_windows,
            inbound=inbound,
            outbound=outbound,
            while_waiting=functools.partial(self._keep_within_memory, assigned),
        )
        conversation = Conversation(
            head,
            self._model.file.metadata,
            micro_batch=self._stage.micro_batch,
            emit=self._pipe.send,
            is_cancelled=self._pipe.is_cancelled,
        )
        self._pipe.send(RingConnected())
        while True:
            request = self._pipe.receive()
            try:
                if isinstance(request, Generate):
                    self._pipe.send(conversation.answer(request))
                elif isinstance(request, Embed):
                    self._pipe.send(conversation.embed(request))
                else:
                    raise RemoteProtocolError(f"the agent sent {type(request).__name__}, which is no request")
            except LinkError:
                raise
            except (ShoalError, ValueError) as error:
                self._pipe.send(failure(error))

    def _expect(self, kind: type[_Expected]) -> _Expected:
        message = self._pipe.receive()
        if not isinstance(message, kind):
            raise RemoteProtocolError(f"the agent sent {type(message).__name__} where {kind.__name__} is due")
        return message


def main() -> None:
    """Entry of `python -m shoal.runtime.worker`."""
    reader = os.fdopen(os.dup(0), "rb")
    writer = os.fdopen(os.dup(1), "wb")
    # Whatever a library prints must not get between the messages.
    os.dup2(2, 1)
    pipe = AgentPipe(reader, writer)
    try:
        Worker(pipe).run()
    except LinkError as error:
        pipe.send(EngineLost(str(error)))
    except (ShoalError, ValueError, MemoryError) as error:
        pipe.send(failure(error))
    _end(1)


def _end(status: int) -> NoReturn:
    """Ends the process now: threads that block in the kernel or in ggml are not waited for."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
