"""An owner who takes memory back slows the answer and never ends it."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.lab.model_workload import vouch_for
from shoal.lab.random_model import write_random_model
from shoal.lab.scenario import Squeeze
from shoal.lab.shapes import SHAPES
from shoal.units import MIB
from tests.lab.fixture import MakeLab

PORT = 7433
TOKENS = 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """410 MB in eight layers."""
    path = tmp_path_factory.mktemp("models") / "large.gguf"
    shape = msgspec.structs.replace(SHAPES["tiny"], num_layers=8, hidden_size=1024, feed_forward_size=3072)
    write_random_model(path, shape, quantisation="F32")
    return path


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cap_mib", [400, 640], ids=["streams at first", "holds everything at first"])
def test_a_squeezed_device_gives_memory_back_and_goes_on(lab: MakeLab, model: Path, cap_mib: int) -> None:
    cluster = lab(
        {
            "devices": {"home": {"memory_mib": cap_mib, "disk_mb_s": 800, "files": [{"path": str(model)}]}, "client": {}},
            "links": [{"between": ["home", "client"]}],
        }
    )
    vouch_for(cluster, "home", cluster.files_folder("home") / model.name, original=model)
    agent = cluster.start("home", f"shoal up --listen={{address}}:{PORT} --models={{files}} --memory={cap_mib * MIB}")
    cluster.wait_listening(agent, PORT)
    ask = (
        f"shoal run {cluster.files_folder('home') / model.name} --agent={{address:home}}:{PORT} --json --temperature=0 --raw"
    )
    ask += f" --threads=1 --context=512 --max-tokens={TOKENS} -- one"

    def answer(*, squeezed: bool) -> dict[str, Any]:
        process, page_ins = cluster.start("client", ask), cluster.usage("home").page_ins
        if squeezed:
            time.sleep(3)
            cluster.apply(Squeeze(device="home", memory_mib=300))
        try:
            assert process.wait(90) == 0, process.stderr.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"no answer within a minute and a half: {cluster.usage('home')}")
        return {**json.loads(process.stdout.read_text()), "page_ins": cluster.usage("home").page_ins - page_ins}

    answers = [answer(squeezed=is_squeezed) for is_squeezed in (False, True, False)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"] == answers[2]["token_ids"]
    assert cluster.usage("home").oom_kills == 0
    # Once it has given back enough, no page is lost any more: without that it takes minutes for a few tokens.
    assert answers[2]["page_ins"] < 5000
