"""The hook under DistributedDataParallel: the same as plain DDP, and an error on all ranks when one is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = """
import json, sys, time, torch, torch.distributed as dist
import shoal.pytorch as sp
rank, size, store, hooked, pause = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "hook", float(sys.argv[5])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
model = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.001)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
reduce = sp.TreeReduce() if hooked else None
if hooked:
    model.register_comm_hook(reduce, sp.tree_hook)
x = torch.randn(100, 8, generator=torch.Generator().manual_seed(rank))
losses = []
try:
    for step in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        print(step, file=sys.stderr, flush=True)
        time.sleep(pause)
except Exception as error:
    print(json.dumps({"error": str(error)}), flush=True)
    sys.exit(3)
print(json.dumps({"losses": losses, "weights": [p.sum().item() for p in net.parameters()]}), flush=True)
if reduce is not None:
    reduce.close()
dist.destroy_process_group()
"""


def start(folder: Path, kind: str, pause_s: float = 0.0) -> list[subprocess.Popen[str]]:
    script, store = folder / "script.py", folder / f"store-{kind}-{pause_s}"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), "3", str(store), kind, str(pause_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(3)
    ]  # fmt: skip


@pytest.mark.full
def test_the_hook_reduces_as_ddp_does(tmp_path: Path) -> None:
    found = {}
    for kind in ("plain", "hook"):
        outputs = []
        for process in start(tmp_path, kind):
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            outputs.append(json.loads(out.strip().splitlines()[-1]))
        assert len({tuple(output["weights"]) for output in outputs}) == 1, "the same bits on all ranks"
        found[kind] = [output["losses"] for output in outputs]
    for plain, hooked in zip(found["plain"], found["hook"], strict=True):
        assert hooked == pytest.approx(plain, rel=1e-4)
        assert hooked[-1] < hooked[0]


@pytest.mark.full
def test_a_lost_rank_is_an_error_on_all_others(tmp_path: Path) -> None:
    processes = start(tmp_path, "hook", 0.2)
    assert processes[2].stderr is not None
    assert processes[2].stderr.readline().startswith("0")
    processes[2].send_signal(signal.SIGKILL)
    began_s = time.monotonic()
    for process in processes[:2]:
        out, err = process.communicate(timeout=20)
        assert process.returncode == 3, err
        # By the exchange, or by the process group that DDP itself uses for buffers, whichever notices first.
        assert json.loads(out.strip().splitlines()[-1])["error"]
    assert time.monotonic() - began_s < 10.0
    processes[2].communicate()
