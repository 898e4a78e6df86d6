"""shoal itself as a scenario's workload: every device is an agent, the first one is asked.

Each device has its own copy of the model and is told what the original's hash is, as if it had been hashed in an earlier
life: so nothing has read the copy when the run begins.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from shoal.errors import LabError, ModelNotFound
from shoal.lab.cluster import Lab
from shoal.lab.scenario import FileSpec, Scenario, Workload
from shoal.runtime.model_store import ModelStore
from shoal.units import MIB

PORT = 7433
_CLIENT_BYTES = 96 * MIB
"""Of a device's memory, for the client that asks there: 60 MB measured, and its share of libraries."""


def with_model(
    scenario: Scenario,
    model: Path,
    prompt: str,
    *,
    max_tokens: int,
    layers: str | None = None,
    context: int | None = None,
    threads: int | None = None,
) -> Scenario:
    """The scenario, with shoal on its devices and a question to the first.

    Args:
        layers: counts per device by hand, as for `shoal run`.
        context: tokens of prompt and answer together, as for `shoal run`.
        threads: of every device; measured if None.

    Raises:
        ModelNotFound: no such file.
    """
    if not model.is_file():
        raise ModelNotFound(f"--model {model}: no such file")
    head, *others = scenario.devices
    devices = {}
    for name, device in scenario.devices.items():
        memory_bytes = scenario.memory_bytes(name)
        command = ["shoal", "up", f"--listen={{address}}:{PORT}", "--models={files}", "--members=none"]
        if memory_bytes is not None:
            command.append(f"--memory={max(0, memory_bytes - (_CLIENT_BYTES if name == head else 0))}")
        if name == head:
            command += [f"--peer={{address:{other}}}:{PORT}" for other in others]
        devices[name] = msgspec.structs.replace(
            device, command=command, files=[*device.files, FileSpec(path=str(model.absolute()))], ready_port=PORT
        )
    ask = ["shoal", "run", f"{{files}}/{model.name}", f"--agent={{address}}:{PORT}", "--json", f"--max-tokens={max_tokens}"]
    ask += ["--temperature=0", f"--seed={scenario.seed}", *([f"--layers={layers}"] if layers else [])]
    ask += [f"--threads={threads}"] if threads else []
    ask += [f"--context={context}"] if context else []
    workload = Workload(device=head, command=[*ask, "--", prompt])
    return msgspec.structs.replace(scenario, devices=devices, workload=workload)


def vouch_for_copies(lab: Lab, model: Path) -> None:
    """Tells every device the hash of its copy. Raises LabError where the devices have no copy."""
    for name in lab.devices:
        copy = lab.files_folder(name) / model.name
        if not copy.is_file():
            raise LabError(f"{name} has no copy of {model.name}")
        vouch_for(lab, name, copy, original=model)


def vouch_for(lab: Lab, device: str, copy: Path, *, original: Path) -> None:
    """Tells a device that a file has the hash of another."""
    known, status = ModelStore([]).identify(original), copy.stat()
    stamp = {str(copy.resolve()): {"stamp": [status.st_size, status.st_mtime_ns], "sha256": known.hash}}
    cache = lab.device_folder(device) / "home/.cache/shoal/model-hashes.json"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps(stamp))
