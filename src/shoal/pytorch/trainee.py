"""A model and its optimiser as a run sees them: a vector of gradients, a file of tensors, a name for their bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash

from shoal.errors import DeviceRefused
from shoal.exchange.pull import ByteArray
from shoal.exchange.runner import FloatArray

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""They treat every element by itself, so replaying gradients gives the same bits."""
_PROOF_STEPS = 20
_PROOF_SIZE = 1031


class TorchTrainee:
    """See `shoal.runs.run.Trainee`.

    Args:
        learning_rate: of each step, counted from 0; None: what the optimiser has. A schedule must be given so, because a
            device that joins applies steps that are past.

    Raises:
        ValueError: another optimiser, or its parameters are not the model's.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, learning_rate: Callable[[int], float] | None = None
    ) -> None:
        if type(optimizer) not in OPTIMIZERS:
            names = ", ".join(kind.__name__ for kind in OPTIMIZERS)
            raise ValueError(f"the optimiser is {type(optimizer).__name__}: one of {names} can be replayed bit by bit")
        self._model, self._optimizer, self._learning_rate = model, optimizer, learning_rate
        self._parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self._buffers = {name: each for name, each in model.named_buffers() if each.numel()}
        held = [each for group in optimizer.param_groups for each in group["params"]]
        if {id(each) for each in held} != {id(each) for each in self._parameters.values()}:
            raise ValueError("the optimiser holds other parameters than those of the model that want gradients")
        name_of = {id(each): name for name, each in self._parameters.items()}
        self._names = [name_of[id(each)] for each in held]
        self.num_gradients = sum(each.numel() for each in self._parameters.values())
        self.num_buffers = sum(each.numel() for each in self._buffers.values())
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        tensors = [(name, tuple(each.shape), str(each.dtype)) for name, each in self._tensors().items()]
        groups = [[repr(item) for item in sorted(_settings(group).items())] for group in self._optimizer.param_groups]
        kind = type(self._optimizer)
        facts = (tensors, kind.__name__, groups, torch.__version__, proof(kind, _settings(self._optimizer.param_groups[0])))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def _tensors(self) -> dict[str, torch.Tensor]:
        found = {f"parameter/{name}": each.detach() for name, each in self._parameters.items()}
        return found | {f"buffer/{name}": each.detach() for name, each in self._buffers.items()}

    def state(self) -> tuple[ByteArray, dict[str, object]]:
        tensors = {name: each.cpu().contiguous().clone() for name, each in self._tensors().items()}
        values: dict[str, dict[str, object]] = {}
        for name, parameter in zip(self._names, self._held(), strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous().clone()
                else:
                    values.setdefault(name, {})[key] = value
        groups = [_settings(group) for group in self._optimizer.param_groups]
        data = np.frombuffer(safetensors.torch.save(tensors), np.uint8)
        return data, json.loads(json.dumps({"groups": groups, "values": values}))

    def load(self, state: ByteArray, about: dict[str, Any]) -> None:
        try:
            tensors = safetensors.torch.load(state.tobytes())
            with torch.no_grad():
                for name, target in self._tensors().items():
                    source = tensors.pop(name)
                    if source.shape != target.shape or source.dtype != target.dtype:
                        raise DeviceRefused(f"{name} is {source.dtype} {tuple(source.shape)} in the state, not as here")
                    target.copy_(source)
            self._optimizer.state.clear()
            by_name = dict(zip(self._names, self._held(), strict=True))
            for name, source in tensors.items():
                parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
                target = by_name[parameter]
                place = "cpu" if key == "step" else target.device
                self._optimizer.state[target][key] = source.to(place)
            for name, values in about["values"].items():
                self._optimizer.state[by_name[name]].update(values)
            for group, settings in zip(self._optimizer.param_groups, about["groups"], strict=True):
                group.update({key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise DeviceRefused(f"the state does not fit this model and optimiser: {error!r}") from error

    @property
    def devices(self) -> list[torch.device]:
        """Where the parameters are."""
        return [each.device for each in self._parameters.values()]

    def zero_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> FloatArray:
        """Of all parameters one after the other, zeros where there is none, [num_gradients]."""
        x = np.zeros(self.num_gradients, np.float32)
        first = 0
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                x[first : first + parameter.numel()] = parameter.grad.detach().to("cpu", torch.float32).reshape(-1).numpy()
            first += parameter.numel()
        return x

    def buffers(self) -> FloatArray:
        found = [each.detach().to("cpu", torch.float32).reshape(-1) for each in self._buffers.values()]
        return torch.cat(found).numpy() if found else np.zeros(0, np.float32)

    def apply(self, x: FloatArray, *, step: int) -> None:
        source = torch.from_numpy(np.ascontiguousarray(x))
        first = 0
        for parameter in self._parameters.values():
            piece = source[first : first + parameter.numel()].reshape(parameter.shape)
            parameter.grad = piece.to(parameter.device, parameter.dtype, copy=True)
            first += parameter.numel()
        with torch.no_grad():
            for buffer in self._buffers.values():
                buffer.copy_(source[first : first + buffer.numel()].reshape(buffer.shape))
                first += buffer.numel()
        if self._learning_rate is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def digest(self) -> str:
        # Of all the model's bits, in every step: it finds a device that computes otherwise, which is nobody's forgery, so a
        # hash without secrets will do, at ten times the speed of one with.
        hashed = xxhash.xxh3_128()
        for tensor in self._tensors().values():
            x: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            hashed.update(x)
        return hashed.hexdigest()

    def _held(self) -> list[torch.nn.Parameter]:
        return [each for group in self._optimizer.param_groups for each in group["params"]]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What of a parameter group is neither a tensor nor changed by a schedule's first steps."""
    return {key: value for key, value in group.items() if key != "params"}


def proof(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> str:
    """What this device's arithmetic makes of a few steps with clipping on fixed data: equal proofs, equal bits.

    Fused kernels, vector widths and versions of torch may round differently.
    """
    known = {key: value for key, value in settings.items() if key not in ("initial_lr", "decoupled_weight_decay")}
    weights = torch.nn.Parameter(torch.linspace(-1.0, 1.0, _PROOF_SIZE))
    optimizer = kind([weights], **known)
    for step in range(_PROOF_STEPS):
        weights.grad = torch.sin(torch.arange(_PROOF_SIZE, dtype=torch.float32) * (step + 1)) * 3.0
        torch.nn.utils.clip_grad_norm_([weights], 1.0)
        optimizer.step()
    return hashlib.sha256(weights.detach().numpy().tobytes()).hexdigest()[:16]
