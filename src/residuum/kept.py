"""Kept runs: what figures and claims read of a finished run, in one small file that can be committed and sent."""

import json
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from lzma import LZMAError
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZIP_LZMA, BadZipFile, ZipFile, ZipInfo

import torch
from jaxtyping import Float32
from torch import Tensor

from residuum.files import write_atomically
from residuum.names import one_line
from residuum.runfolders import read_object
from residuum.runs import Finished
from residuum.worker import KINDS

_WHOLE = ("history.json", "indices.json", "values.json")
_PROVENANCE = ("created", "seconds", "versions", "device", "dtype", "data_sha256", "parameters")
_PROFILES = ("profile", "initial", "train")
_WEIGHTS = "weights.safetensors"
_ABOUT = "run.json"
_NAMES = {_ABOUT, "provenance.json", *_WHOLE, *(f"{name}.safetensors" for name in _PROFILES), _WEIGHTS}
_DROPPED = 12  # of the 23 binary digits of a float32 behind the first
# What reading a damaged file, or one that somebody wrote by hand, may raise.
_DAMAGE = (
    BadZipFile,
    EOFError,
    LZMAError,
    zlib.error,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)


def keep(run: Finished, path: Path, quantities: Mapping[str, Collection[str]]) -> None:
    """Write PATH, a zip file (compressed with LZMA).

    It holds what was asked for, history, indices or values, where the run came from, and of its profiles some
    quantities, every value rounded to 12 binary digits (by at most 1 part in 4096). Weights of runs with values only,
    whose networks are tiny and drawn by figures. No path of the machine: of a data file the name and the SHA-256.

    Args:
        run: A finished run.
        path: The file; its folder is made.
        quantities: By the name of a profile the quantities to keep; those that were not measured are passed over.

    Raises:
        OSError: If the file cannot be written; an old one is untouched then.
    """
    whole = (*_WHOLE, _WEIGHTS) if (run.folder / "values.json").is_file() else _WHOLE
    files = {name: (run.folder / name).read_bytes() for name in whole if (run.folder / name).is_file()}
    if about := read_object(run.folder / "provenance.json"):
        files["provenance.json"] = _json({name: about[name] for name in _PROVENANCE if name in about})
    for name, some in quantities.items():
        if (run.folder / f"{name}.safetensors").is_file():
            files[f"{name}.safetensors"] = _part(run, name, some)
    about = {"key": run.job.key, "description": _placeless(run), "quantities": _listed(quantities)}
    files[_ABOUT] = _json(about | {"files": sorted(files)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: _pack(part, files))


def unpack(path: Path, folder: Path, quantities: Mapping[str, Collection[str]]) -> Finished:
    """The finished run that was kept, unpacked into a new folder.

    Args:
        path: The file.
        folder: Where to; it is made.
        quantities: What must have been kept, as in `keep`.

    Raises:
        ValueError: If it is no kept run, is cut short or damaged, does not fit this version of the code, or holds other
            quantities.
        OSError: If the folder cannot be written.
    """
    try:
        files = _read(path)
        about = json.loads(files[_ABOUT])
        job = KINDS[about["description"]["kind"]].from_description(about["description"])
        if job.key != about["key"]:
            raise ValueError(f"it says that it is the run {about['key']}, but describes {job.key}")
        if sorted(files.keys() - {_ABOUT}) != about["files"]:
            raise ValueError(f"it holds {sorted(files)}, not {about['files']}")
        kept = about["quantities"]
    except _DAMAGE as error:
        raise ValueError(f"{path} is no kept run, or is damaged: {one_line(error)}") from None
    if kept != _listed(quantities):
        raise ValueError(f"{path} was kept for another version of its study: remove it, and have the run kept anew")
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Finished(job, folder)


def _read(path: Path) -> dict[str, bytes]:
    """The files in a zip file by their names, all of which are ours."""
    with ZipFile(path) as archive:
        names = archive.namelist()
        if strange := sorted(set(names) - _NAMES):
            raise ValueError(f"it holds {strange[0]!r}")
        if len(set(names)) < len(names) or _ABOUT not in names:
            raise ValueError(f"it holds {names}: each file once, and {_ABOUT} among them, was expected")
        return {name: archive.read(name) for name in names}


def _listed(quantities: Mapping[str, Collection[str]]) -> dict[str, list[str]]:
    return {name: sorted(some) for name, some in sorted(quantities.items())}


def _placeless(run: Finished) -> Mapping[str, object]:
    """What determines the run; of a data file its name without its place, which no key depends on."""
    description = run.job.describe()
    data = description.get("data")
    if isinstance(data, dict) and data.get("sha256"):
        description["data"] = data | {"name": Path(data["name"]).name}
    return description


def _part(run: Finished, name: str, quantities: Collection[str]) -> bytes:
    """Some quantities of a profile of the run, rounded, as the file that `profiles.load` reads."""
    part = run.profile(name).select(quantities)
    part = replace(part, measures={n: replace(m, values=rounded(m.values)) for n, m in part.measures.items()})
    with TemporaryDirectory() as folder:
        part.save(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def rounded(values: Float32[Tensor, "example point"]) -> Float32[Tensor, "example point"]:
    """The nearest numbers of 12 binary digits; the rest of each is zeros, which compress well."""
    half = 1 << (_DROPPED - 1)
    found = ((values.view(torch.int32) + half) & -(1 << _DROPPED)).view(torch.float32)
    return torch.where(values.isfinite() & found.isfinite(), found, values)


def _json(value: object) -> bytes:
    return f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode()


def _pack(path: Path, files: Mapping[str, bytes]) -> None:
    """A zip file without times, in a fixed order."""
    with ZipFile(path, "w") as archive:
        for name in sorted(files):
            archive.writestr(ZipInfo(name), files[name], ZIP_LZMA)
