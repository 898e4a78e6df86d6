"""Some layers of a model on one device, with their part of the KV cache: what one hop of the ring computes.

A stage has a window of consecutive layers for each round of the ring, one in most rings; `forward` computes one.

A graph is built once per shape (tokens in the micro-batch, cells of the cache in view, outputs wanted) and kept; every
further run of that shape only writes its inputs. All graphs share one buffer of activations, because only one runs
at a time: the buffer is reserved for the largest shape first, so that it never moves.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shoal.compute import ggml
from shoal.compute.backend import Backend, TensorPort
from shoal.compute.model import EmbeddingTable, Model, matrix_names
from shoal.compute.models.transformer import LayerTensors, MicroBatch, multiply
from shoal.compute.prefetch import Prefetch, ReadAhead
from shoal.compute.streaming import StreamedTensors, Streaming, row_runs
from shoal.compute.weights import Weights
from shoal.errors import ContextExceeded
from shoal.ids import LayerRange

L = ggml.lib
FloatArray = np.ndarray[Any, np.dtype[np.float32]]

CELLS_STEP = 256
"""The KV cache is read in steps of this many cells, so that 256 decode steps share one graph. llama.cpp's figure."""
_GRAPHS_PER_WINDOW_MAX = 24
_NODES_PER_LAYER_MAX = 48
_SEGMENT_BYTES_MIN = 1024 * 1024
"""Streamed tensors smaller than this are waited for, used and forgotten together: each time costs some 20 us."""


class Stage:
    """Layers of `model`, ready to compute.

    Args:
        windows: of consecutive layers, in order, one per round; only a head's may be empty.
        context: tokens that the KV cache holds, at least 1.
        micro_batch: most tokens in one call of `forward`.
        head: whether this device also embeds tokens and computes logits; then its windows end with the model's last layer.
        repack: copy matrices into the device's faster order where it has one; a stage that streams does without.
        streaming: what is read from disk each time it is needed; None keeps everything in memory.
        prefetch: ask the system for the next window's weights when one is done (`compute/prefetch.py`).
    """

    def __init__(
        self,
        model: Model,
        windows: Sequence[LayerRange],
        backend: Backend,
        *,
        context: int,
        micro_batch: int = 512,
        head: bool = False,
        repack: bool = True,
        streaming: Streaming | None = None,
        prefetch: bool = False,
    ) -> None:
        if head and windows[-1].stop != model.shape.num_layers:
            raise ValueError(f"the head holds the last layers, not {windows[-1]} of {model.shape.num_layers}")
        self.model = model
        self.windows = tuple(windows)
        self.layers = [layer for window in windows for layer in range(window.first, window.stop)]
        self.backend = backend
        self.is_head = head
        self.context = context
        self.micro_batch = min(micro_batch, context)
        self._num_cells_max = -(-context // CELLS_STEP) * CELLS_STEP
        self.embedding = EmbeddingTable(model) if head else None
        self._rope_name = model.rope_factor_name(context=context) if self.layers else None
        self._repack = repack
        self._place(streaming)
        self._prefetch: Prefetch | None = None
        self._read_ahead: ReadAhead | None = None
        if prefetch:
            tensors, by_window = model.file.tensors, matrix_names(model, self.windows, head=head)
            self._prefetch = Prefetch(model.file, [[tensors[name] for name in names] for names in by_window])
        self._cache = _KeyValueCache(model, len(self.layers), self._num_cells_max, backend)
        self._layer_tensors = self._tensors_of_layers()
        self._graphs: OrderedDict[_GraphShape, _StageGraph] = OrderedDict()
        self._allocator = L.ggml_gallocr_new(backend.default_buffer_type)
        self._reserve()

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    @property
    def num_graphs(self) -> int:
        """Graphs that are kept at present."""
        return len(self._graphs)

    @property
    def activation_bytes(self) -> int:
        return int(L.ggml_gallocr_get_buffer_size(self._allocator, 0))

    def forward(
        self,
        x_BD: FloatArray,
        position: int,
        *,
        window: int = 0,
        more: bool = False,
        num_outputs: int | None = None,
        wants_hidden: bool = False,
    ) -> FloatArray:
        """Computes one micro-batch in one window.

        Args:
            x_BD: hidden states that enter the window's first layer, [tokens, hidden size], float32.
            position: of the first token; all before it must have been computed.
            window: index of the window.
            more: the same window comes next again, so what was streamed for it stays where `holds_windows`.
            num_outputs: the head's last window returns logits of that many last tokens; others always return all.
            wants_hidden: the head stops before the output projection, as embeddings want it.

        Returns:
            Hidden states [tokens, hidden size], or from the head's last window logits [num_outputs, vocabulary] (normalised
            hidden states [num_outputs, hidden size] with `wants_hidden`): a view that the next call overwrites.

        Raises:
            ContextExceeded: position + tokens is beyond the cache.
        """
        num_tokens = len(x_BD)
        if not 0 < num_tokens <= self.micro_batch:
            raise ValueError(f"{num_tokens} tokens in a micro-batch: 1 to {self.micro_batch} are allowed")
        if position + num_tokens > self.context:
            raise ContextExceeded(f"{position + num_tokens} tokens do not fit a context of {self.context}: raise --context")
        if not len(self.windows[window]) and not self._ends(window):
            return x_BD
        self._unseen.discard(window)
        wanted = num_tokens if not self._ends(window) or num_outputs is None else num_outputs
        self._has_projected |= self._ends(window) and not wants_hidden and wanted > 0
        shape = _GraphShape(num_tokens, _cells(position + num_tokens), wanted, wants_hidden, window)
        output_BD = self._graph(shape).run(self.backend, x_BD, position, keep=more and self.holds_windows)
        if self._prefetch is not None and not more:
            self._prefetch.after(window)
        return output_BD

    @property
    def disk_wait_ns(self) -> int:
        """How long `forward` has waited for streamed weights so far."""
        return self.streamed.waited_ns if self.streamed is not None else 0

    @property
    def holds_windows(self) -> bool:
        """Whether what is streamed for any one window stays until it is used again, if it is asked to."""
        if self.streamed is None:
            return True
        sizes = [[self.streamed.num_bytes(name) for name in names] for names in self._streamed_names]
        # The ring's end may be passed over, by as much as the next piece takes.
        return all(sum(of_window) + max(of_window, default=0) <= self.streamed.ring_bytes for of_window in sizes)

    def _ends(self, window: int) -> bool:
        """Whether the window turns hidden states into logits."""
        return self.is_head and window == len(self.windows) - 1

    def forward_tokens(self, token_ids: Sequence[int], position: int, *, num_outputs: int = 1) -> FloatArray:
        """As `forward`, from token ids, for a head that holds every layer."""
        return self.forward(self.embed(token_ids), position, num_outputs=num_outputs)

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        """Hidden states [tokens, hidden size] that enter layer 0; a fresh array."""
        x_BD = np.empty((len(token_ids), self.model.shape.hidden_size), dtype=np.float32)
        self.embed_into(token_ids, x_BD)
        return x_BD

    def embed_into(self, token_ids: Sequence[int], x_BD: FloatArray) -> None:
        """As `embed`, into the first rows of `x_BD`, which is contiguous."""
        assert self.embedding is not None, "only the head embeds"
        self.embedding.gather(token_ids, x_BD)

    def close(self) -> None:
        """Frees everything but the model file and the backend, which their owners close."""
        if self._prefetch is not None:
            self._prefetch.close()
        self._stop_reading_ahead()
        self._drop_graphs()
        if self._allocator:
            L.ggml_gallocr_free(self._allocator)
            self._allocator = None
        self._cache.close()
        self.weights.close()
        if self.streamed is not None:
            self.streamed.close()

    def _place(self, streaming: Streaming | None) -> None:
        """Gives every tensor its place: in memory, or in the ring in its turn."""
        model, backend, head = self.model, self.backend, self.is_head
        self.streaming = streaming
        by_window = matrix_names(model, self.windows, head=head)
        matrices = [name for names in by_window for name in names]
        vectors = [name for layer in self.layers for name in model.layer_vectors(layer)]
        vectors += [self._rope_name] if self._rope_name else []
        vectors += ["output_norm.weight"] if head else []
        tensors = model.file.tensors
        runs = {name: [tensors[name]] if streaming is None else row_runs(tensors[name]) for name in matrices}
        in_order = [run for name in matrices for run in runs[name]]
        self.streamed: StreamedTensors | None = None
        self._streamed_names: list[list[str]] = [[] for _ in by_window]
        """What is streamed for each window, in order."""
        if streaming is not None:
            if not backend.is_host:
                raise ValueError(f"device {backend.device_name} has memory of its own: only host devices stream weights")
            self._streamed_names = [
                [run.name for name in names for run in runs[name] if run.name in streaming.names] for names in by_window
            ]
            turns = [run for run in in_order if run.name in streaming.names]
            self.streamed = StreamedTensors(model.file.part_paths, turns, streaming)
            in_order = [run for run in in_order if run.name not in streaming.names]
        resident = [*in_order, *(tensors[name] for name in vectors)]
        self.weights = Weights(
            model.file,
            resident,
            # Repacked kernels may give other bits, and a device that streams has no memory for copies.
            repackable=matrices if self._repack and streaming is None else (),
            backend=backend,
        )
        self._unseen = {window for window, names in enumerate(by_window) if names}
        """Windows whose weights may still have to come from disk for the first time."""
        self._has_projected = False
        """Whether the output projection has been used: for embeddings it never is."""
        if streaming is not None:
            model.file.keep_resident(resident)
            self._unseen.clear()
            self._has_projected = True
        self._vectors = self.weights.tensors
        placed = self.weights.tensors | (self.streamed.tensors if self.streamed else {})
        self._matrices = {name: [placed[run.name] for run in runs[name]] for name in matrices}

    def stream_anew(self, streaming: Streaming | None) -> None:
        """Changes what is streamed, between two micro-batches; the cache stays.

        Where all was in memory in an order of the device's own, or will be (`repack`), last bits may change.

        Raises:
            ValueError: the device has memory of its own.
        """
        self._stop_reading_ahead()
        self._drop_graphs()
        self.weights.close()
        if self.streamed is not None:
            self.streamed.close()
        self._place(streaming)
        self._layer_tensors = self._tensors_of_layers()

    def bring_in(self, *, is_short: bool) -> None:
        """Begins to read what stays in memory, ahead of its first use, where nothing is streamed.

        Args:
            is_short: whether there is too little unused memory; then what is cached of the file's other layers gives way.

        Raises:
            BadModelFile: a file is gone.
        """
        self._stop_reading_ahead()
        if is_short:
            self.model.file.take_out_others(self.weights.mapped)
        self._read_ahead = ReadAhead(self.model.file, self.weights.mapped)

    def _stop_reading_ahead(self) -> None:
        if self._read_ahead is not None:
            self._read_ahead.close()
            self._read_ahead = None

    def missing_bytes(self) -> int:
        """Of the mapped weights that stay, how much the system has taken; 0 until each window has been used once."""
        if self._unseen:
            return 0
        unread = () if self._has_projected else (self.model.output_name,)
        return self.model.file.missing_bytes(info for info in self.weights.mapped if info.name not in unread)

    def _drop_graphs(self) -> None:
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()

    def _tensors_of_layers(self) -> dict[int, LayerTensors]:
        found = {}
        for index, layer in enumerate(self.layers):
            prefix = f"blk.{layer}."
            found[layer] = LayerTensors(
                matrices={name: self._matrices[prefix + name] for name in self.model.architecture.matrices},
                vectors={name.removeprefix(prefix): t for name, t in self._vectors.items() if name.startswith(prefix)},
                keys=self._cache.keys[index],
                values=self._cache.values[index],
                rope_factors=self._vectors[self._rope_name] if self._rope_name else None,
            )
        return found

    def _reserve(self) -> None:
        """Takes the activation buffer for the largest micro-batch over the whole context, and checks the kernels."""
        for window in range(len(self.windows)):
            shape = _GraphShape(self.micro_batch, self._num_cells_max, self._outputs_max(), False, window)
            graph = _StageGraph(self, shape)
            self.backend.require_support(graph.graph)
            if not L.ggml_gallocr_reserve(self._allocator, graph.graph):
                raise MemoryError(f"no memory on {self.backend.device_name} for activations of {self.micro_batch} tokens")
            graph.close()

    def _outputs_max(self) -> int:
        # Logits of a whole micro-batch are wanted only when scoring; decoding and prefill want one row. Room for more
        # is taken when it is asked for, and the graphs are then built anew.
        return 1 if self.is_head else self.micro_batch

    def _graph(self, shape: _GraphShape) -> _StageGraph:
        graph = self._graphs.get(shape)
        if graph is None:
            while len(self._graphs) >= _GRAPHS_PER_WINDOW_MAX * len(self.windows):
                self._graphs.popitem(last=False)[1].close()
            graph = _StageGraph(self, shape)
            size_before = self.activation_bytes
            if not L.ggml_gallocr_alloc_graph(self._allocator, graph.graph):
                raise MemoryError(f"no memory on {self.backend.device_name} for activations of {shape.num_tokens} tokens")
            if self.activation_bytes != size_before:
                # The buffer moved: what older graphs point to is gone.
                self._drop_graphs()
            graph.bind(is_host=self.backend.is_host)
            if self.streamed is not None:
                graph.cut(self.streamed, self._streamed_names[shape.window])
            self._graphs[shape] = graph
        self._graphs.move_to_end(shape)
        return graph


class _KeyValueCache:
    """Keys and values of every token so far, f16, one row per token and layer: [width, cells]."""

    def __init__(self, model: Model, num_layers: int, num_cells: int, backend: Backend) -> None:
        self._context = ggml.new_context(max(1, 2 * num_layers))
        shape = model.shape
        self.keys = [self._new(shape.kv_width, num_cells) for _ in range(num_layers)]
        self.values = [self._new(shape.value_width, num_cells) for _ in range(num_layers)]
        self.num_bytes = num_cells * num_layers * shape.kv_bytes_per_token_and_layer
        self._memory: FloatArray | None = None
        self._buffer = None
        if not num_layers:
            return
        if backend.is_host:
            # calloc'ed: pages are taken when a token reaches them, and are zero, so that masked cells hold no NaN.
            self._memory = np.zeros(self.num_bytes // 4 + 16, dtype=np.float32)
            base = -(-self._memory.ctypes.data // 64) * 64
            self._buffer = L.ggml_backend_cpu_buffer_from_ptr(base, self.num_bytes)
            for tensor in (*self.keys, *self.values):
                L.ggml_backend_tensor_alloc(self._buffer, tensor, base)
                base += L.ggml_nbytes(tensor)
        else:
            self._buffer = L.ggml_backend_alloc_ctx_tensors_from_buft(self._context, backend.default_buffer_type)
            if not self._buffer:
                raise MemoryError(f"no memory on {backend.device_name} for a cache of {self.num_bytes} bytes")
            L.ggml_backend_buffer_clear(self._buffer, 0)

    def _new(self, width: int, num_cells: int) -> ggml.Tensor:
        return L.ggml_new_tensor_2d(self._context, L.GGML_TYPE_F16, width, num_cells)

    def close(self) -> None:
        if self._buffer:
            L.ggml_backend_buffer_free(self._buffer)
            self._buffer = None
        if self._context:
            L.ggml_free(self._context)
            self._context = None
        self._memory = None


class _GraphShape(NamedTuple):
    """What a graph is drawn for."""

    num_tokens: int
    num_cells: int
    num_outputs: int
    wants_hidden: bool
    window: int


class _StageGraph:
    """One window's layers, drawn for one shape of micro-batch."""

    def __init__(self, stage: Stage, shape: _GraphShape) -> None:
        num_tokens, num_cells, num_outputs, wants_hidden, window = shape
        hidden_size = stage.model.shape.hidden_size
        num_layers = len(stage.windows[window])
        # A matrix in n runs takes n products and n - 1 concatenations.
        num_nodes_max = _NODES_PER_LAYER_MAX * (num_layers + 1) + 2 * sum(map(len, stage._matrices.values()))
        self._context = ggml.new_context(num_nodes_max, extra_bytes=L.ggml_graph_overhead_custom(num_nodes_max, False))
        self._segments_context: Any = None
        self._segments: list[_Segment] = []
        self._first_name: str | None = None
        self.graph = L.ggml_new_graph_custom(self._context, num_nodes_max, False)
        self._num_tokens, self._num_cells, self._num_outputs = num_tokens, num_cells, num_outputs
        self._x = self._input(L.GGML_TYPE_F32, hidden_size, num_tokens)
        self._batch: MicroBatch | None = None
        if num_layers:
            self._batch = MicroBatch(
                context=self._context,
                graph=self.graph,
                num_tokens=num_tokens,
                num_cells=num_cells,
                positions_B=self._input(L.GGML_TYPE_I32, num_tokens),
                rows_B=self._input(L.GGML_TYPE_I64, num_tokens),
                mask_CB=self._input(L.GGML_TYPE_F16, num_cells, num_tokens),
            )
        self._output = self._draw(stage, window, wants_hidden=wants_hidden)
        if self._output is not None:
            L.ggml_set_output(self._output)
            L.ggml_build_forward_expand(self.graph, self._output)

    def _input(self, ggml_type: int, *shape: int) -> ggml.Tensor:
        sizes = (ctypes.c_int64 * len(shape))(*shape)
        tensor = L.ggml_new_tensor(self._context, ggml_type, len(shape), sizes)
        # Inputs keep their place for as long as the graph runs, but activations of other graphs may overlap them.
        L.ggml_set_input(tensor)
        return tensor

    def _draw(self, stage: Stage, window: int, *, wants_hidden: bool) -> ggml.Tensor | None:
        shape, model = stage.model.shape, stage.model
        x, layers, ends = self._x, stage.windows[window], stage._ends(window)
        for layer in range(layers.first, layers.stop):
            num_outputs = self._num_outputs if ends and layer + 1 == layers.stop else self._num_tokens
            assert self._batch is not None
            x = model.architecture.layer(shape, self._batch, stage._layer_tensors[layer], x, num_outputs)
        if not ends or x is None:
            return x
        if self._batch is None:
            stride = x.contents.nb[1]
            first = self._num_tokens - self._num_outputs
            x = L.ggml_view_2d(self._context, x, shape.hidden_size, self._num_outputs, stride, first * stride)
        norm = stage._vectors["output_norm.weight"]
        normalised = L.ggml_mul(self._context, L.ggml_rms_norm(self._context, x, shape.norm_epsilon), norm)
        if wants_hidden:
            return normalised
        return multiply(self._context, stage._matrices[model.output_name], normalised)

    def bind(self, *, is_host: bool) -> None:
        """Opens the inputs and the output, once the allocator has given them addresses.

        An input that the graph does not use has none: the mask where no output is wanted, for example.
        """

        def port(tensor: ggml.Tensor, shape: tuple[int, ...], dtype: type[np.generic]) -> TensorPort | None:
            return TensorPort(tensor, shape, dtype, is_host=is_host) if tensor.contents.data else None

        tokens = (self._num_tokens,)
        self._x_port = port(self._x, (*tokens, int(self._x.contents.ne[0])), np.float32)
        if self._batch is not None:
            self._positions_port = port(self._batch.positions_B, tokens, np.int32)
            self._rows_port = port(self._batch.rows_B, tokens, np.int64)
            self._mask_port = port(self._batch.mask_CB, (*tokens, self._num_cells), np.float16)
        if self._output is not None:
            shape = (self._num_outputs, int(self._output.contents.ne[0]))
            self._output_port = TensorPort(self._output, shape, np.float32, is_host=is_host)

    def cut(self, streamed: StreamedTensors, names: Sequence[str]) -> None:
        """Cuts the graph into segments, each of which needs streamed tensors that are there together.

        Args:
            names: of all that are streamed for this window, in order.
        """
        self._streamed, self._first_name = streamed, names[0] if names else None
        by_address = {ctypes.addressof(tensor.contents): name for name, tensor in streamed.tensors.items()}
        nodes = [L.ggml_graph_node(self.graph, index) for index in range(L.ggml_graph_n_nodes(self.graph))]
        uses: dict[str, int] = {}
        for index, node in enumerate(nodes):
            operand = node.contents.src[0]
            name = by_address.get(ctypes.addressof(operand.contents)) if operand else None
            if name is not None:
                assert name not in uses, f"{name} is used twice: it cannot be streamed"
                uses[name] = index
        # What this graph leaves out, because nobody wants its output, is passed over in its turn.
        groups: list[list[str]] = [[]]
        group_bytes = 0
        for name in names:
            num_bytes = streamed.num_bytes(name)
            if groups[-1] and (group_bytes >= _SEGMENT_BYTES_MIN or group_bytes + num_bytes > streamed.ring_bytes // 2):
                groups.append([])
                group_bytes = 0
            groups[-1].append(name)
            group_bytes += num_bytes
        # Nodes go with the last group that was waited for before them.
        parts: list[tuple[list[str], list[ggml.Tensor]]] = []
        stop = len(nodes)
        for group in reversed(groups):
            begins = [uses[name] for name in group if name in uses]
            begin = min(begins, default=stop) if group is not groups[0] else 0
            parts.append((group, nodes[begin:stop]))
            stop = begin
        graph_bytes = sum(L.ggml_graph_overhead_custom(len(part), False) for _, part in parts if part)
        self._segments_context = ggml.new_context(1, extra_bytes=graph_bytes)
        self._segments = [_Segment(streamed, group, self._subgraph(part)) for group, part in reversed(parts)]

    def _subgraph(self, nodes: list[ggml.Tensor]) -> Any:
        if not nodes:
            return None
        graph = L.ggml_new_graph_custom(self._segments_context, len(nodes), False)
        for node in nodes:
            L.ggml_graph_add_node(graph, node)
        return graph

    def run(self, backend: Backend, x_BD: FloatArray, position: int, *, keep: bool) -> FloatArray:
        """With `keep`, what was streamed stays for the next run, which is of the same window."""
        if self._x_port is not None:
            self._x_port.write(x_BD)
        if self._batch is not None:
            positions = np.arange(position, position + self._num_tokens)
            for port in (self._positions_port, self._rows_port):
                if port is not None:
                    port.write(positions)
            if self._mask_port is not None:
                self._mask_port.write(_causal_mask(positions, self._num_cells))
        if not self._segments:
            backend.compute(self.graph)
        if self._first_name is not None:
            self._streamed.seek(self._first_name)
        for segment in self._segments:
            segment.run(backend, keep=keep)
        if self._output is None:
            return np.empty((0, 0), dtype=np.float32)
        return self._output_port.read()

    def close(self) -> None:
        self._segments.clear()
        if self._segments_context:
            L.ggml_free(self._segments_context)
            self._segments_context = None
        if self._context:
            L.ggml_free(self._context)
            self._context = None


class _Segment:
    """Nodes of a graph that are computed while some streamed tensors are in memory."""

    def __init__(self, streamed: StreamedTensors, names: list[str], graph: Any) -> None:
        self._streamed = streamed
        self._names = names
        self._graph = graph

    def run(self, backend: Backend, *, keep: bool) -> None:
        for name in self._names:
            self._streamed.acquire(name)
        if self._graph is not None:
            backend.compute(self._graph)
        if keep:
            return
        for name in self._names:
            self._streamed.release(name)


def _cells(num_tokens: int) -> int:
    return -(-num_tokens // CELLS_STEP) * CELLS_STEP


def _causal_mask(positions: np.ndarray[Any, np.dtype[np.int64]], num_cells: int) -> np.ndarray[Any, np.dtype[np.float16]]:
    """[tokens, cells]: 0 where a token may look, minus infinity elsewhere."""
    return np.where(np.arange(num_cells) <= positions[:, None], np.float16(0.0), np.float16(-np.inf))
