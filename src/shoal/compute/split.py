"""A stage of two backends: each of its windows begins on the processor and ends on an accelerator.

Hidden states are copied over and back once per window. The head's output projection stays on the processor, whose memory it
is mapped from. Weights are streamed on the processor's side only: what the accelerator holds, stays there.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.compute.backend import Backend
from shoal.compute.model import Model
from shoal.compute.stage import FloatArray, Stage
from shoal.compute.streaming import StreamedTensors, Streaming
from shoal.compute.weights import Weights
from shoal.ids import LayerRange


def split_windows(
    windows: Sequence[LayerRange], accelerator_layers: Sequence[int], *, head: bool
) -> tuple[list[LayerRange], list[LayerRange]]:
    """The processor's and the accelerator's part of each window.

    Args:
        accelerator_layers: how many of each window's last layers are the accelerator's.
        head: a head's output projection comes after both: a further, empty window of the processor.

    Raises:
        ValueError: a window has fewer layers than the accelerator is to have of it.
    """
    if len(accelerator_layers) != len(windows) or any(
        not 0 <= count <= len(window) for count, window in zip(accelerator_layers, windows, strict=True)
    ):
        raise ValueError(
            f"accelerator layers {list(accelerator_layers)} do not fit windows {[str(each) for each in windows]}"
        )
    bounds = [window.stop - count for count, window in zip(accelerator_layers, windows, strict=True)]
    own = [LayerRange(window.first, bound) for window, bound in zip(windows, bounds, strict=True)]
    theirs = [LayerRange(bound, window.stop) for window, bound in zip(windows, bounds, strict=True)]
    return [*own, *([LayerRange(windows[-1].stop, windows[-1].stop)] if head else [])], theirs


class SplitStage:
    """As a `Stage` of `windows`. The first backend is the processor; `accelerator` belongs to the stage from now on."""

    def __init__(
        self,
        model: Model,
        windows: Sequence[LayerRange],
        backend: Backend,
        accelerator: Backend,
        accelerator_layers: Sequence[int],
        *,
        context: int,
        micro_batch: int,
        head: bool = False,
        repack: bool = True,
        streaming: Streaming | None = None,
    ) -> None:
        own, theirs = split_windows(windows, accelerator_layers, head=head)
        self.model, self.backend, self.is_head = model, backend, head
        self.windows = tuple(windows)
        self.layers = [layer for window in windows for layer in range(window.first, window.stop)]
        self._accelerator = accelerator
        self._own = Stage(
            model, own, backend, context=context, micro_batch=micro_batch, head=head, repack=repack, streaming=streaming
        )
        try:
            self._theirs = Stage(model, theirs, accelerator, context=context, micro_batch=micro_batch, repack=False)
        except BaseException:
            self._own.close()
            raise

    # ---- what is in memory here; the accelerator's is its own

    @property
    def context(self) -> int:
        return self._own.context

    @property
    def micro_batch(self) -> int:
        return self._own.micro_batch

    @property
    def weights(self) -> Weights:
        return self._own.weights

    @property
    def streaming(self) -> Streaming | None:
        return self._own.streaming

    @property
    def streamed(self) -> StreamedTensors | None:
        return self._own.streamed

    @property
    def cache_bytes(self) -> int:
        return self._own.cache_bytes

    @property
    def activation_bytes(self) -> int:
        return self._own.activation_bytes

    @property
    def disk_wait_ns(self) -> int:
        return self._own.disk_wait_ns

    @property
    def holds_windows(self) -> bool:
        return self._own.holds_windows

    def bring_in(self, *, is_short: bool) -> None:
        self._own.bring_in(is_short=is_short)

    def missing_bytes(self) -> int:
        return self._own.missing_bytes()

    def stream_anew(self, streaming: Streaming | None) -> None:
        self._own.stream_anew(streaming)

    # ---- computing

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
        """As `Stage.forward`."""
        x_BD = self._own.forward(x_BD, position, window=window, more=more)
        x_BD = self._theirs.forward(x_BD, position, window=window)
        if not self.is_head or window + 1 < len(self.windows):
            return x_BD
        return self._own.forward(
            x_BD, position, window=window + 1, more=more, num_outputs=num_outputs, wants_hidden=wants_hidden
        )

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        return self._own.embed(token_ids)

    def embed_into(self, token_ids: Sequence[int], x_BD: FloatArray) -> None:
        self._own.embed_into(token_ids, x_BD)

    def close(self) -> None:
        """Frees everything but the model file and the processor's backend."""
        self._own.close()
        self._theirs.close()
        self._accelerator.close()


AnyStage = Stage | SplitStage
