"""Each fuzz target for some seconds, from fixed seeds; `make fuzz` goes on for hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.fuzz.runner import fuzz
from tools.fuzz.target import Target
from tools.fuzz.targets import TARGETS

RUNS = {"plans": 200, "programs": 400, "feeds": 300, "engines": 800}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name: str, tmp_path: Path) -> None:
    findings = fuzz(TARGETS[name], range(RUNS.get(name, 200)), tmp_path)
    assert findings.found == []
    assert findings.runs == RUNS.get(name, 200)
    assert len(findings.outcomes) > 1, "inputs of one kind only reach little"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import time; time.sleep(60)", "took more than 1 seconds"),
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("import os; os._exit(3)", "ended with status 3"),
    ],
)
def test_a_death_is_a_finding_and_the_rest_goes_on(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that dies of seed 2, in the place of a real one."""
    lines = [
        "from tools.fuzz import runner, target, targets",
        "def attempt(seed, now):",
        "    (now / 'input').write_text(str(seed))",
        "    if seed == 2:",
        f"        {code}",
        "    return 'fine'",
        "made = target.Target('dying', 'dies', lambda folder: attempt)",
        "targets.TARGETS['dying'] = runner.TARGETS['dying'] = made",
    ]
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path.insert(0, '.')\n" + "\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    dying = Target("dying", "dies", lambda folder: lambda seed, now: "", seconds=1.0)
    findings = fuzz(dying, range(5), tmp_path / "out")
    assert [seed for seed, _ in findings.found] == [2]
    assert said in findings.found[0][1]
    assert findings.outcomes == {"fine": 4}
    assert (tmp_path / "out" / "dying-2" / "input").read_text() == "2"
