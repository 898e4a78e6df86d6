"""What the planner is asked for an engine: devices as their workers measured them, and what the owner wants.

It is kept as long as the engine stands, so that it can be asked again with other figures or more devices.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from shoal.errors import InfeasiblePlacement
from shoal.ids import DeviceId
from shoal.placement.planner import Plan, cost_of, make_plan, plan_baseline, plan_by_hand, plan_of_rounds
from shoal.placement.profile import Cluster, ModelProfile
from shoal.runtime.channel import Distance
from shoal.runtime.cluster_profile import device_of_report, links_from_head, model_of_report
from shoal.runtime.messages import EngineOptions, WorkerReport

MICRO_BATCH = 512
MICRO_BATCH_RING = 128
"""Of several devices: with few micro-batches they wait for each other at a prompt's beginning and end. Half of it would make
up for no more of that, and smaller ones compute more slowly."""
MICRO_BATCH_STREAMING = 64
"""Less room for activations is more for weights, which are read for every token; prompts are read more often for it."""
_UNLIMITED_BYTES = sys.maxsize // 4


@dataclass(frozen=True)
class Candidate:
    """A device that may take part. `distance` is from the head, `memory_bytes` what a worker may take there."""

    device: DeviceId
    report: WorkerReport
    memory_bytes: int
    distance: Distance

    def at(self, layer_s: float | None) -> Candidate:
        """The same, where a layer was seen to take as long as this; None where it was not seen."""
        if layer_s is None:
            return self
        times = self.report.layer_s, self.report.batch_layer_s, self.report.output_s
        scaled = [seconds * layer_s / self.report.layer_s for seconds in times]
        report = msgspec.structs.replace(self.report, layer_s=scaled[0], batch_layer_s=scaled[1], output_s=scaled[2])
        return replace(self, report=report)


@dataclass(frozen=True)
class Question:
    """The head is the first candidate. Without `may_stream`, weights that do not fit are refused."""

    candidates: tuple[Candidate, ...]
    options: EngineOptions
    may_stream: bool

    @property
    def is_open(self) -> bool:
        """Whether the planner decides who holds what."""
        return self.options.layer_counts is None and self.options.placement == "planned"

    def seen(self, layer_s: Mapping[DeviceId, float]) -> Question:
        """The same with what layers were seen to take, by device."""
        return replace(self, candidates=tuple(each.at(layer_s.get(each.device)) for each in self.candidates))

    def joined_by(self, newcomers: tuple[Candidate, ...]) -> Question:
        return replace(self, candidates=(*self.candidates, *newcomers))

    def answer(self) -> tuple[Plan, int]:
        """The plan and its micro-batch, which goes with it: a device alone takes more tokens at once than several, and
        streamed weights want the memory.

        Raises:
            InfeasiblePlacement: nothing fits.
            RequestError: the context is longer than the model's.
            ValueError: what was asked by hand does not fit the devices or the model.
        """
        cluster = self._cluster()
        if self.options.micro_batch is not None:
            return self._plan(cluster, self.options.micro_batch), self.options.micro_batch
        micro_batch = MICRO_BATCH if len(self.candidates) == 1 else MICRO_BATCH_RING
        plan = self._plan(cluster, micro_batch)
        if plan.streamed_bytes:
            return self._plan(cluster, MICRO_BATCH_STREAMING), MICRO_BATCH_STREAMING
        if self.is_open and len(plan.stages) == 1 and micro_batch != MICRO_BATCH:
            with contextlib.suppress(InfeasiblePlacement):
                alone = self._plan(cluster.subset({cluster.head.id}), MICRO_BATCH)
                if not alone.streamed_bytes:
                    return msgspec.structs.replace(alone, left_out=plan.left_out), MICRO_BATCH
        return plan, micro_batch

    def cost_s(self, plan: Plan, micro_batch: int) -> float:
        """What an earlier plan costs with these figures, in seconds of its objective."""
        prompt_tokens = self.options.prompt_tokens
        return cost_of(plan, self._cluster(), self._model(micro_batch), prompt_tokens=prompt_tokens)

    def _cluster(self) -> Cluster:
        names = [each.device for each in self.candidates]
        return Cluster(
            devices=tuple(
                device_of_report(
                    each.report,
                    each.device,
                    # The other ways do not ask how much there is: the system, or the window, sees to it.
                    memory_bytes=each.memory_bytes if self.options.residency == "auto" else _UNLIMITED_BYTES,
                    may_stream=self.may_stream,
                )
                for each in self.candidates
            ),
            links=links_from_head(names, [each.distance for each in self.candidates]),
        )

    def _model(self, micro_batch: int) -> ModelProfile:
        return model_of_report(self.candidates[0].report, context=self.options.context, micro_batch=micro_batch)

    def _plan(self, cluster: Cluster, micro_batch: int) -> Plan:
        options, model, prompt_tokens = self.options, self._model(micro_batch), self.options.prompt_tokens
        if options.layer_counts is not None:
            on_accelerator = options.accelerator_layers
            return plan_by_hand(
                options.layer_counts,
                cluster,
                model,
                rounds=options.rounds,
                on_accelerator=on_accelerator,
                prompt_tokens=prompt_tokens,
            )
        if options.placement != "planned":
            if options.rounds is not None:
                raise ValueError(f"--rounds {options.rounds}: --placement {options.placement} chooses its rounds itself")
            return plan_baseline(options.placement, cluster, model, prompt_tokens=prompt_tokens)
        if options.rounds is not None:
            return plan_of_rounds([options.rounds], cluster, model, prompt_tokens=prompt_tokens)
        return make_plan(cluster, model, prompt_tokens=prompt_tokens)
