"""Everything that agents, their workers and their clients say to each other.

Three conversations, all of length-prefixed msgpack messages:

* **client - agent**: `Hello`, then one request after the other: `AskStatus`, `AskSurvey`, `ListModels`, `LoadModel`,
  `UnloadModel`, `Generate`, `Embed`, `Tokenize`, `Detokenize` or `ApplyTemplate`; answers come back on the same connection.
* **agent - agent**: the same door. A connection that sends `StartWorker` is a *lease*: the worker lives until the
  connection closes, from whichever side. So a head that dies leaves nothing running elsewhere.
* **agent - worker**: the worker's standard input and output. End of file on its input ends the worker.

Fields are only ever appended, with a default.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from shoal.ids import DeviceId, EngineId, LayerRange, ModelHash, NodeId
from shoal.placement.baselines import BaselineName

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


class Through(Message, frozen=True):
    """From here on this is a conversation with another device's agent, at an address that `Status` named. No answer, or
    `Failed`: only agents prove to each other who they are, so their owner's commands speak through one."""

    address: str


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
    is_paused: bool = False
    """Its owner wants others to have nothing of it."""


class Ping(Message, frozen=True):
    """Answered at once by `Pong`: how far is it? With `load`, how much gets there in that time?"""

    load: bytes = b""


class Pong(Message, frozen=True):
    """The answer to `Ping`."""


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
    for_plan: bool = False
    """Measure as thoroughly as a plan deserves, or use what was so measured; a small model's engine starts without."""
    fresh: bool = False
    """Measure whatever is kept."""
    head: bool = False
    """Time the output projection too, where it is measured thoroughly."""
    memory_bytes: int | None = None
    """What the model may use on this device; where that is little, the worker measures the disk too."""
    encrypts: bool = False
    """Whether the frames of its ring shall be encrypted, and its neighbours prove who they are."""


class AcceleratorReport(msgspec.Struct, frozen=True):
    """A graphics processor beside the processor that a worker computes on: `name` is ggml's, `memory_bytes` what the model
    may use of its memory, and times are as those of `WorkerReport`, hidden states copied there and back."""

    name: str
    memory_bytes: int
    layer_s: float
    batch_layer_s: float
    shares_memory: bool = False
    """Whether its memory is the processor's."""


class WorkerReport(Message, frozen=True):
    """What a worker measured at start; `runtime_bytes` is what it takes without any weights."""

    layer_s: float
    num_threads: int
    num_threads_prefill: int
    runtime_bytes: int
    layer_bytes: list[int]
    output_bytes: int
    cache_bytes_per_token_and_layer: int
    hidden_size: int
    context_length: int
    model_name: str
    description: str
    compute_device: str
    read_bytes_per_s: float = 0.0
    """Of the model file past the page cache; 0 where it was not measured or weights cannot be streamed."""
    ring_bytes_min: int = 0
    """The least memory through which this device streams weights."""
    batch_layer_s: float = 0.0
    """A layer for `BATCH_TOKENS` tokens at once."""
    output_s: float = 0.0
    """The output projection of one token; 0 where it was not measured."""
    read_mode: str = "direct"
    """How this device reads past the page cache: a `ReadMode` of `placement/profile.py`."""
    spreads: dict[str, float] = {}
    """By field, (longest - shortest) / median of its repetitions."""
    embedding_row_bytes: int = 0
    age_s: float = 0.0
    """How long ago it was measured: profiles are kept."""
    accelerator: AcceleratorReport | None = None


class AssignLayers(Message, frozen=True):
    """Load these layers and listen for the previous stage. Answered by `StageReady` or `Failed`."""

    windows: list[LayerRange]
    """Of consecutive layers, one per round."""
    context: int
    micro_batch: int
    num_stages: int
    head: bool
    memory_bytes: int | None = None
    """Of the whole worker, where its weights do not all fit: the rest is streamed. None keeps all of them."""
    idle_s: float = 0.0
    """How long the other stages are expected to take for a token: time to read ahead."""
    ring_bytes: int = 0
    """For what is read ahead; 0 leaves it to the worker."""
    residency: ResidencyMode = "auto"
    window_layers: int = 0
    accelerator_layers: list[int] = []
    """How many of each window's last layers the device's accelerator computes; empty: none."""


class StageReady(Message, frozen=True):
    """Loaded. `port` is where the previous stage dials, 0 in a ring of one."""

    port: int
    mapped_bytes: int
    copied_bytes: int
    cache_bytes: int
    activation_bytes: int
    ring_bytes: int = 0
    streamed_bytes: int = 0
    """Read from disk for every token."""
    holds_windows: bool = True
    """Whether what is streamed for one window can stay while a prompt's micro-batches pass."""
    ring_key: bytes = b""
    """The public key, 32 bytes, that the worker's links are proven with; none where the ring is not encrypted."""


class ConnectRing(Message, frozen=True):
    """Dial the next stage, and wait for the previous one. Answered by `RingConnected` or `Failed`."""

    next_host: str
    next_port: int
    holds_windows: bool = True
    """Whether every stage does."""
    next_key: bytes = b""
    previous_key: bytes = b""
    """What the neighbours' links are proven with."""
    next_node: NodeId | None = None
    """Whose link the frames measure, where the next stage's device is a member; None: nobody's."""


class Delivered(Message, frozen=True):
    """From a worker to its own agent: its frames went to member `peer`, as `transport/delivery.py` saw at `at_s` on this
    machine's monotonic clock."""

    peer: NodeId
    num_bytes: int
    seconds: float
    is_full: bool
    round_trip_min_s: float | None
    at_s: float


class RingConnected(Message, frozen=True):
    """Both links of this stage stand."""


class EngineLost(Message, frozen=True):
    """A worker ended, or its links did."""

    text: str


# ---- requests


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, as OpenAI's API has it: content is a text, a list of parts, or nothing but tool calls."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


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


ResidencyMode = Literal["auto", "mmap", "window"]
"""What of the weights is in memory: what fits, the rest streamed; what the system keeps of the map (prima.cpp's way); or a
sliding window of some layers (TPI-LLM's)."""


PlacementName = Literal["planned"] | BaselineName


class EngineOptions(msgspec.Struct, frozen=True):
    """What the owner may decide about an engine; other values make another engine."""

    context: int | None = None
    micro_batch: int | None = None
    """Most tokens computed at once; None is 512 on one device, 128 over several, which compute different ones at a time, and
    64 where weights are streamed and want the memory."""
    layer_counts: list[int] | None = None
    accelerator_layers: list[int] | None = None
    """Of each device's layers, with `layer_counts`: how many its accelerator computes."""
    prompt_tokens: int = 512
    """How long prompts are expected to be: a plan is for one of them and an answer of 128 tokens."""
    placement: PlacementName = "planned"
    """Who holds which layers, where `layer_counts` does not say it: our planner, or a published way."""
    rounds: int | None = None
    """How often a token goes round the ring; None leaves it to the planner."""
    residency: ResidencyMode = "auto"
    window_layers: int = 0
    """How many layers are in memory at once with residency "window"."""
    num_threads: int | None = None
    compute_device: str | None = None
    repack: bool = True
    encrypts: bool | None = None
    """Whether what goes round the ring is encrypted; None: wherever the devices have proven to each other who they are."""


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
    trace: bool = False
    """Whether `Finished` carries the times of every step."""
    logprobs: int | None = None
    """Whether each `Delta` carries its token's log-probability, and those of that many likeliest tokens beside it."""
    prompt_logprobs: int | None = None
    """The same for the prompt, as `PromptScores`; nothing of the cache is used then."""
    echo: bool = False
    """Whether `Accepted` carries the prompt's text."""
    structured: bool = False
    """Whether reasoning and tool calls are taken out of the text, where the chat template marks them."""
    tools: list[dict[str, Any]] = []
    """Functions that the model may call, as in OpenAI's API. Needs `messages` and a template that takes tools."""
    tool_choice: Literal["auto", "none", "required"] = "auto"
    tool_name: str = ""
    """With `required`: the one function to call."""
    parallel_tool_calls: bool = True
    reasoning_effort: str = ""
    """Handed to the template, as far as it knows of such a thing; 'none' turns reasoning off."""
    json_schema: str = ""
    """A JSON schema that the answer (after any reasoning) must satisfy; enforced token by token."""


class Embed(Message, frozen=True):
    """Turn one text, or token ids, into a vector. Answered by `Embedded` or `Failed`."""

    model: str
    text: str | None = None
    token_ids: list[int] | None = None
    options: EngineOptions = EngineOptions()


class Embedded(Message, frozen=True):
    """`values` are float32, little endian, of length 1 as a vector."""

    values: bytes
    prompt_tokens: int


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
    windows: list[LayerRange]
    num_threads: int
    memory_bytes: int
    head: bool
    streamed_bytes: int = 0
    """Weights that are read from disk for every token, because they do not fit."""


class EngineDescription(Message, frozen=True):
    """Who holds what, and why others hold nothing."""

    model: str
    model_hash: ModelHash
    stages: list[StageDescription]
    context: int
    left_out: list[tuple[DeviceId, str]] = []
    hidden_size: int = 0
    encrypts: bool = False
    """Whether its devices proved to each other who they are, and what goes round is encrypted."""
    token_s: float = 0.0
    """What a token is predicted to take."""


class Accepted(Message, frozen=True):
    """The request is understood, and reading its prompt begins; what goes wrong from here on is no fault of the request."""

    prompt_tokens: int
    cached_tokens: int
    prompt_text: str = ""


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """A token's bytes and natural log-probability before sampling (None for a text's first token), and the likeliest
    alternatives as (bytes, log-probability), likeliest first."""

    token: bytes
    logprob: float | None
    top: list[tuple[bytes, float]] = []


class PromptScores(Message, frozen=True):
    """Scores of some more of the prompt's tokens, in order."""

    scores: list[TokenScore]


class ToolCallDelta(msgspec.Struct, frozen=True, array_like=True):
    """More of a tool call: its name comes with its first piece, its arguments (JSON) in pieces."""

    index: int
    name: str = ""
    arguments: str = ""


class Delta(Message, frozen=True, omit_defaults=True):
    """New text (may be empty while a character is incomplete) and the token that brought it."""

    text: str
    token_id: int
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    score: TokenScore | None = None

    @property
    def is_text_only(self) -> bool:
        """Whether there is nothing but text, which may be empty."""
        return not (self.reasoning or self.tool_calls or self.score)


class StageTimes(msgspec.Struct, frozen=True):
    """Where one stage spent a decode step, medians in seconds: computing, waiting for the others, sending and receiving,
    and waiting for its disk."""

    compute_s: float
    wait_s: float
    wire_s: float
    disk_s: float = 0.0


class StepTrace(msgspec.Struct, frozen=True, array_like=True):
    """One decode step: its seconds, and of each visit to a stage those of computing, of waiting for the disk, and in all."""

    token_s: float
    visits: list[tuple[float, float, float]]


class Finished(Message, frozen=True):
    """The answer is complete. `reason` is 'stop' (end of text or stop string), 'length', 'tool_calls' or 'cancelled'."""

    reason: Literal["stop", "length", "tool_calls", "cancelled"]
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
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = []
    reasoning_tokens: int = 0
    reads_per_prompt: int = 1
    """How often streamed weights were read for the prompt."""
    trace: list[StepTrace] = []


# ---- models, and their texts without an engine


class ListModels(Message, frozen=True):
    """Asks an agent for the models in its folders."""


class ModelEntry(msgspec.Struct, frozen=True):
    """A model that an agent has: `name` is what `Generate.model` may say; the time of change is in seconds since 1970."""

    name: str
    path: str
    num_bytes: int
    modified_s: float


class Models(Message, frozen=True):
    """Answer to `ListModels`."""

    models: list[ModelEntry]


class LoadModel(Message, frozen=True):
    """Deploy the engine that `Generate` would, without asking anything. Answered by `Progress` and `EngineDescription`."""

    model: str
    options: EngineOptions = EngineOptions()
    may_stream: bool = True
    """Whether weights that do not fit memory are read from disk for every token; else such a model is refused."""


class UnloadModel(Message, frozen=True):
    """End an engine, once nobody is being answered by it. Answered by `Unloaded`, also where there is none."""

    model: str
    options: EngineOptions = EngineOptions()


class Unloaded(Message, frozen=True):
    """There is no such engine (any more)."""


class OpenTexts(Message, frozen=True):
    """To a fresh worker: open only the texts of this model - vocabulary and template - and answer what follows."""

    model_path: str


class TextsReady(Message, frozen=True):
    """They are open."""


class Tokenize(Message, frozen=True):
    """A text's token ids. Answered by `Tokenized`."""

    model: str
    text: str
    add_special: bool = True
    parse_special: bool = True


class Tokenized(Message, frozen=True):
    """Token ids, and the bytes of each."""

    token_ids: list[int]
    pieces: list[bytes]


class Detokenize(Message, frozen=True):
    """The text of token ids, special tokens included. Answered by `Detokenized`."""

    model: str
    token_ids: list[int]


class Detokenized(Message, frozen=True):
    """Bytes that are no UTF-8 have become U+FFFD."""

    text: str


class ApplyTemplate(Message, frozen=True):
    """A conversation as the text of a prompt. Answered by `Prompt`."""

    model: str
    messages: list[ChatMessage]
    tools: list[dict[str, Any]] = []
    add_generation_prompt: bool = True
    template_arguments: dict[str, Any] = {}


class Prompt(Message, frozen=True):
    """What the model reads, and how many tokens that is."""

    text: str
    num_tokens: int


_ALL = (
    Hello | Failed | Ping | Pong | AskSurvey | Survey | AskStatus | Status | DeviceStatus | Through
    | StartWorker | WorkerReport | AssignLayers | StageReady | ConnectRing | RingConnected | EngineLost | Delivered
    | Generate | Cancel | Progress | EngineDescription | Delta | Finished | Accepted | PromptScores
    | Embed | Embedded | ListModels | Models | LoadModel | UnloadModel | Unloaded
    | OpenTexts | TextsReady | Tokenize | Tokenized | Detokenize | Detokenized | ApplyTemplate | Prompt
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
