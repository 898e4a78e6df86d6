"""Everything that agents, their workers and their clients say to each other.

Three conversations, all of length-prefixed msgpack messages:

* **client - agent**: `Hello`, then one of `AskStatus`, `Generate` or `AskSurvey`; answers come back on the same connection.
* **agent - agent**: the same door. A connection that sends `StartWorker` is a *lease*: the worker lives until the
  connection closes, from whichever side. So a head that dies leaves nothing running elsewhere.
* **agent - worker**: the worker's standard input and output. End of file on its input ends the worker.

Fields are only ever appended, with a default.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal.ids import DeviceId, EngineId, LayerRange, ModelHash

CONTROL_PROTOCOL = 1
MESSAGE_BYTES_MAX = 16 * 1024 * 1024


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the class name is the tag."""


# ---- greetings and failures, in every conversation


class Hello(Message, frozen=True):
    """First in both directions on every connection."""

    protocol: int
    version: str


class Failed(Message, frozen=True):
    """The last answer, when what was asked cannot be done. `kind` is a class of `errors.py`."""

    kind: str
    text: str


# ---- what a device is


class ModelFile(msgspec.Struct, frozen=True):
    """A model by its content. The size is there so that a device need not hash files that cannot be it."""

    hash: ModelHash
    num_bytes: int


class AskSurvey(Message, frozen=True):
    """Who are you, and do you have this model? No model asks only the first."""

    model: ModelFile | None = None


class Survey(Message, frozen=True):
    """A device's answer. `model_folders` are where it looked when it has no such model."""

    device: DeviceId
    version: str
    system: str
    num_cores: int
    memory_total_bytes: int
    memory_usable_bytes: int
    has_model: bool
    model_folders: list[str]
    engines: list[str] = []
    num_refused_frames: int = 0


class AskStatus(Message, frozen=True):
    """Asks an agent for itself and all its peers."""


class DeviceStatus(Message, frozen=True):
    """One line of `shoal status`: `survey` where the device answered, else why not."""

    address: str
    round_trip_s: float | None
    survey: Survey | None
    problem: str = ""


class Status(Message, frozen=True):
    """Answer to `AskStatus`; the asked agent comes first."""

    devices: list[DeviceStatus]


# ---- an engine's life


class StartWorker(Message, frozen=True):
    """Start a worker for this model, and measure. Answered by `WorkerReport` or `Failed`."""

    engine: EngineId
    model: ModelFile
    model_path: str = ""
    """Filled in by the worker's own agent: a path never comes from elsewhere."""
    num_threads: int | None = None
    compute_device: str | None = None
    ring_host: str = ""
    repack: bool = True


class WorkerReport(Message, frozen=True):
    """What a worker measured at start."""

    layer_s: float
    num_threads: int
    num_threads_prefill: int
    memory_usable_bytes: int
    layer_bytes: list[int]
    output_bytes: int
    cache_bytes_per_token_and_layer: int
    hidden_size: int
    context_length: int
    model_name: str
    description: str
    compute_device: str


class AssignLayers(Message, frozen=True):
    """Load these layers and listen for the previous stage. Answered by `StageReady` or `Failed`."""

    layers: LayerRange
    context: int
    micro_batch: int
    num_stages: int
    head: bool


class StageReady(Message, frozen=True):
    """Loaded. `port` is where the previous stage dials, 0 in a ring of one."""

    port: int
    mapped_bytes: int
    copied_bytes: int
    cache_bytes: int
    activation_bytes: int


class ConnectRing(Message, frozen=True):
    """Dial the next stage, and wait for the previous one. Answered by `RingConnected` or `Failed`."""

    next_host: str
    next_port: int


class RingConnected(Message, frozen=True):
    """Both links of this stage stand."""


class EngineLost(Message, frozen=True):
    """A worker ended, or its links did."""

    text: str


# ---- requests


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True):
    """How to choose tokens; the meanings and ranges are `text.sampler`'s."""

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None


class EngineOptions(msgspec.Struct, frozen=True):
    """What the owner may decide about an engine; other values make another engine."""

    context: int | None = None
    micro_batch: int = 512
    layer_counts: list[int] | None = None
    num_threads: int | None = None
    compute_device: str | None = None
    repack: bool = True


class Generate(Message, frozen=True):
    """Answer a conversation (`messages`), a raw text (`prompt`) or token ids. Exactly one of the three is given.

    Answered by any number of `Progress` and `Delta`, one `EngineDescription` before the first token, and `Finished` or
    `Failed`. Closing the connection cancels.
    """

    model: str
    messages: list[ChatMessage] | None = None
    prompt: str | None = None
    token_ids: list[int] | None = None
    max_tokens: int | None = None
    stop: list[str] = []
    ignore_end: bool = False
    sampling: Sampling = Sampling()
    options: EngineOptions = EngineOptions()
    template_arguments: dict[str, Any] = {}
    forced_ids: list[int] = []
    """Teacher forcing: these ids are fed instead of what was sampled; what would have been chosen is in `best_ids`."""
    digest: bool = False
    """Whether `Finished` carries a hash over the bits of all logits, for comparing runs."""


class Cancel(Message, frozen=True):
    """To a worker: stop the present request at the next token."""


class Progress(Message, frozen=True):
    """What takes long before the first token. `done` of `total` in `unit`s, where that is known."""

    text: str
    done: int = 0
    total: int = 0


class StageDescription(msgspec.Struct, frozen=True):
    """One stage of an engine, in ring order."""

    device: DeviceId
    first: int
    stop: int
    num_threads: int
    memory_bytes: int
    head: bool


class EngineDescription(Message, frozen=True):
    """Who holds what, and why others hold nothing."""

    model: str
    model_hash: ModelHash
    stages: list[StageDescription]
    context: int
    left_out: list[tuple[DeviceId, str]] = []


class Delta(Message, frozen=True):
    """New text (may be empty while a character is incomplete) and the token that brought it."""

    text: str
    token_id: int


class StageTimes(msgspec.Struct, frozen=True):
    """Where one stage spent a decode step, medians in seconds: computing, waiting for the others, sending and receiving."""

    compute_s: float
    wait_s: float
    wire_s: float


class Finished(Message, frozen=True):
    """The answer is complete. `reason` is 'stop' (end of text or stop string), 'length' or 'cancelled'."""

    reason: Literal["stop", "length", "cancelled"]
    text: str
    """What was held back for stop strings and belongs to the answer after all."""
    prompt_tokens: int
    cached_tokens: int
    token_ids: list[int]
    prefill_s: float
    decode_s: float
    stages: list[StageTimes]
    hop_us: list[float] = []
    """Per decode step: (token time - computing of all stages) / hops, microseconds; empty in a ring of one."""
    best_ids: list[int] = []
    best_gaps: list[float] = []
    logits_digest: str = ""


_ALL = (
    Hello | Failed | AskSurvey | Survey | AskStatus | Status | DeviceStatus | StartWorker | WorkerReport | AssignLayers
    | StageReady | ConnectRing | RingConnected | EngineLost | Generate | Cancel | Progress | EngineDescription | Delta
    | Finished
)  # fmt: skip
AnyMessage = _ALL

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(_ALL)


def encode(message: Message) -> bytes:
    """A message with its length in front, big endian 4 bytes."""
    payload = _encoder.encode(message)
    return len(payload).to_bytes(4, "big") + payload


def decode(payload: bytes | bytearray | memoryview) -> AnyMessage:
    """Raises msgspec.DecodeError (or its ValidationError) on anything that is no message of ours."""
    return _decoder.decode(payload)
