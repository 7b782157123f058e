"""Several processes under torchrun: one model, the same in all of them, of the mean of their gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import BERT, rows

import nmcompile
from nmcompile import ir as g
from nmcompile.errors import UnsupportedError

SCRIPT = """
import json, sys
import numpy as np
import nmcompile
from nmcompile import ir as g
from nmcompile.training.distil import Trainer
from nmcompile.training.losses import Bank
from nmcompile.training.ranks import Ranks

out, kind = sys.argv[1], sys.argv[2]
rows = json.loads(open(sys.argv[3]).read())
step, loss = Trainer._step, Trainer.loss
if kind == "alone":  # one process that takes the batches of both by itself
    def both(self, feeds):
        stream = self.batches.since(2 * self.progress.step)
        self.two = [next(stream), next(stream)]
        step(self, feeds)
        self.two = None

    def mean(self, feeds, bank=None):
        two, self.two = getattr(self, "two", None), None
        if two is None:
            return loss(self, feeds, bank)
        self.banks = getattr(self, "banks", None) or (Bank(), Bank())  # each process has its own
        return (loss(self, two[0], self.banks[0]) + loss(self, two[1], self.banks[1])) / 2

    Trainer._step, Trainer.loss = both, mean
found = nmcompile.train(sys.argv[4], data=rows, sparsity=0.7, solver="obs", steps=6, tokens=256, budget="60s",
                        masks="gradual", masks_options=("criterion:movement",))
rank = Ranks.joined("cpu").rank if kind == "ranks" else 0
np.savez(f"{out}/{kind}{rank}.npz", **{layer.name: layer.weight for layer in g.linear_layers(found.graph)})
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_one_that_takes_both_batches(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text(SCRIPT)
    (tmp_path / "rows.json").write_text(json.dumps(rows()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for kind, start in (("ranks", torchrun), ("alone", [sys.executable])):
        command = [*start, str(tmp_path / "s.py"), str(tmp_path), kind, str(tmp_path / "rows.json"), str(BERT)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    first, second, alone = (np.load(tmp_path / f"{name}.npz") for name in ("ranks0", "ranks1", "alone0"))
    assert len(first.files) > 10
    for name in first.files:
        np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(first[name] == 0, alone[name] == 0)
        np.testing.assert_allclose(first[name], alone[name], rtol=1e-3, atol=1e-4)


def test_the_command_writes_once(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(64)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(Path(sys.executable).parent / "nmcompile"), "train", str(BERT), "-o", str(tmp_path / "s.onnx"),
               "--data", str(tmp_path / "rows.jsonl"), "--sparsity", "0.7", "--solver", "obs", "--steps", "2",
               "--tokens", "256"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("held-out samples") == 1
    assert any((layer.weight == 0).mean() > 0.6 for layer in g.linear_layers(g.load(tmp_path / "s.onnx")))


def test_an_environment_of_no_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # some schedulers number their jobs so
    found = nmcompile.train(BERT, tmp_path / "s.onnx", data=rows(64), sparsity=0.7, solver="obs", steps=1, tokens=256)
    assert found.output is not None and found.output.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedError, match="WORLD_SIZE=2, but the processes cannot be connected"):
        nmcompile.train(BERT, tmp_path / "t.onnx", data=rows(64), sparsity=0.7, solver="obs", steps=1, tokens=256)
    assert not (tmp_path / "t.onnx").exists()
