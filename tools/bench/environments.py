"""A virtual environment per peer, filled by pip once and kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .peers import Peer
from .protocol import PeerError


def environment(peer: Peer, folder: Path) -> Path:
    """The Python of a peer's environment, which is made where it is missing or was made for other versions.

    PeerError: it cannot be made; the message tells why in one line.
    """
    if not peer.packages and not peer.bare:
        return Path(sys.executable)
    place = (folder / peer.name).resolve()
    python, stamp = place / "bin" / "python", place / "installed.txt"
    wanted = "\n".join([sys.version, *peer.packages, *peer.bare])
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    place.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if peer.packages:
        _run([*pip, *peer.packages])
    if peer.bare:
        _run([*pip, "--no-deps", *peer.bare])
    stamp.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerError(f"cannot be installed: {error}") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise PeerError(f"cannot be installed: {said[-1][:300] if said else f'status {done.returncode}'}")
