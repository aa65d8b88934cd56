"""The house keeps its rules: imports go one way, every public name is documented, nothing unsafe is called."""

import ast
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

import residuum

SOURCE = Path(residuum.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each may import from earlier rows only, and not from its own row. docs/design.md, section 3.
ROWS = [
    [
        "schedules",
        "linear",
        "graphs",
        "draws",
        "names",
        "memory",
        "layouts",
        "vision",
        "calls",
        "copies",
        "readings",
        "processes",
        "bytes",
        "answers",
    ],
    ["spectra", "solvers", "effects", "descriptions"],
    ["derivatives"],
    ["solve", "streams", "finding", "recording", "files", "progress", "rates", "changed", "folders"],
    ["cutting", "data", "checkpoints", "conclusions", "layers", "drawing"],
    ["models", "profiles", "titles", "facts", "stability", "penalties", "solving"],
    ["probes", "nulls", "training", "zoos", "charts"],
    ["indices", "convergence", "loading", "plots", "curves", "watching", "folding"],
    ["efforts", "fitting"],
    ["probing", "panels"],
    ["report"],
    ["results", "flags", "runfolders"],
    ["jobs"],
    ["runs", "runindex", "engines"],
    ["toys"],
    ["worker", "claims"],
    ["sweeps", "experiments", "pages", "kept"],
    ["reproduce"],
    ["commands", "runscreen", "sweepscreen"],
    ["reproducescreen"],
    ["cli"],
]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts)


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("residuum"):
            if node.module == "residuum":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            else:
                yield node.module.removeprefix("residuum.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("residuum.") for a in node.names if a.name.startswith("residuum."))


def public() -> list[tuple[str, object]]:
    """Public functions, classes and their methods, with where they stand."""
    found = []
    for file in FILES:
        if file.name == "__init__.py":
            continue
        module = import_module(f"residuum.{name_of(file)}")
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__ and callable(thing):
                found.append((f"{name_of(file)}.{name}", thing))
                if inspect.isclass(thing):
                    found += [
                        (f"{name_of(file)}.{name}.{n}", f)
                        for n, f in vars(thing).items()
                        if not n.startswith("_") and isinstance(f, FunctionType)
                    ]
    return found


PUBLIC = public()


def test_imports_go_one_way() -> None:
    rank = {name: i for i, row in enumerate(ROWS) for name in row}
    for file in FILES:
        package = name_of(file).split(".")[0]
        if package not in rank:
            continue
        for target in imported(file):
            other = target.split(".")[0]
            assert other == package or rank.get(other, len(ROWS)) < rank[package], f"{name_of(file)} imports {target}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_rooms(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 450
    assert ast.get_docstring(ast.parse(text)), "a file's first line says what it is for"
    assert "from __future__ import annotations" not in text  # jaxtyping needs the annotations themselves


@pytest.mark.parametrize(("name", "thing"), PUBLIC, ids=[name for name, _ in PUBLIC])
def test_public_names_are_documented_and_annotated(name: str, thing: object) -> None:
    assert thing.__doc__
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, parameter
            assert parameter.kind is not inspect.Parameter.VAR_KEYWORD, "no **kwargs in public functions"


def test_what_users_import_is_documented_with_errors() -> None:
    for name in residuum.__all__:
        thing = getattr(residuum, name)
        if inspect.isfunction(thing):
            assert "Raises:" in thing.__doc__, name
            assert "Args:" in thing.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = residuum.nothing
    assert set(residuum.__all__) <= set(dir(residuum))


def test_probes_name_their_source() -> None:
    probes = [
        (name, thing)
        for name, thing in PUBLIC
        if name.startswith("probes.")
        and inspect.isfunction(thing)
        and str(inspect.signature(thing).return_annotation).startswith("dict")
    ]
    assert len(probes) >= 5
    for name, probe in probes:
        assert "Source:" in probe.__doc__, name


def test_nothing_unsafe_is_called() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "os.system"), f"{file}: {called}"
            assert not called.startswith(("pickle.", "marshal.", "yaml.")), f"{file}: {called}"
            keywords = {k.arg: k.value for k in node.keywords}
            if called == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True"
            if called in ("np.load", "numpy.load"):
                assert ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) == "False"
            assert "shell" not in keywords


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from residuum.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'plotly', 'sklearn', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stderr
    assert "probe" in done.stdout


COMMON = {"device", "dtype", "batch", "limit", "seed"}
ENGINE = {"engine", "workers", "time_limit", "memory", "gpu", "data_root", "retry_failed"}
OPTIONS = {
    "fold": {"model", "out", "data", "data_root", "norms", "force"} | COMMON,
    "demo": {"out", "epochs", "force"} | COMMON,
    "train": {"out", "data", "data_root", "blocks", "widths", "transition", "head", "epochs", "lr", "rate", "optimiser"}
    | {"momentum", "weight_decay", "clip", "accumulate", "precision", "augment", "shuffle_labels", "watch", "force"}
    | {
        "network",
        "width_factor",
        "sharing",
        "free",
        "norm",
        "couple",
        "couple_norms",
        "alike",
        "lipschitz",
        "lipschitz_norm",
        "penalty",
        "step",
        "dt",
        "tol",
        "reversible",
    }
    | COMMON,
    "probe": {
        "model",
        "data",
        "out",
        "data_root",
        "weights",
        "split",
        "probes",
        "blocks",
        "size",
        "normalise",
        "window",
    }
    | {"initial", "shuffled", "force"}
    | COMMON,
    "report": {"folders", "out", "force"},
    "sweep": {"runs", "out"} | ENGINE,
    "runs": {"out", "where", "compare", "csv", "parquet", "rebuild", "force"},
    "stability": {"out", "force"},
    "reproduce": {"ids", "out", "scale", "list", "check", "files", "kept"} | ENGINE,
    "data list": {"data_root"},
    "data fetch": {"name", "data_root"},
    "data digitclutter": {"out", "digits", "debris", "n", "test", "grey", "handwriting", "data_root", "workers", "seed"}
    | {"force"},
}


def test_the_command_line_is_frozen() -> None:
    """A new option is a decision: it is written down here, in the README where users need it, and in the changelog."""
    from dataclasses import fields

    from residuum import flags

    def options(command: type) -> set[str]:
        names = {field.name for field in fields(command)}
        for name, group in (("common", flags.Common), ("carried", flags.Carried)):
            names = names - {name} | {f.name for f in fields(group)} if name in names else names
        return names

    commands = {
        "demo": flags.Demo,
        "train": flags.Train,
        "probe": flags.Probe,
        "report": flags.Report,
        "sweep": flags.Sweep,
        "runs": flags.Runs,
        "fold": flags.Fold,
        "stability": flags.Stability,
        "reproduce": flags.Reproduce,
        "data list": flags.DataList,
        "data fetch": flags.DataFetch,
        "data digitclutter": flags.DataDigitclutter,
    }
    assert {name: options(command) for name, command in commands.items()} == OPTIONS
