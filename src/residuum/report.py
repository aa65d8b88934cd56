"""The report: result folders in, one self-contained HTML page out, for a reader who is new to such measurements."""

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from residuum import readings
from residuum.charts import Chart
from residuum.files import write_atomically
from residuum.folders import Result, read
from residuum.panels import many_panels, one_panels, tables
from residuum.rates import RATES
from residuum.readings import cosine, listed, number, percent

MARK = b'<meta name="generator" content="residuum">'  # of every page


def write(folders: Sequence[Path], out: Path) -> None:
    """Write one page about one result, or one page that compares several.

    Args:
        folders: Folders that `residuum probe` or `demo` wrote.
        out: The page to write, whole or not at all.

    Raises:
        ValueError: If no folder is given, or one is no complete result; the message says what is wrong with which.
        OSError: If the page cannot be written.
    """
    if not folders:
        raise ValueError("report: no result folder given; make one with: residuum probe MODEL --data D --out DIR")
    page = render(_labelled([read(Path(folder)) for folder in folders], [Path(folder) for folder in folders]))
    write_atomically(Path(out), lambda path: path.write_text(page, encoding="utf-8") and None)


def check_free(out: Path, *, replace: bool) -> None:
    """Refuse a place where no page can be written; only pages of residuum are replaced.

    Raises:
        ValueError: If the name does not end in .html.
        FileNotFoundError: If its folder is not there.
        FileExistsError: If something is there that may not be replaced.
    """
    if out.suffix.lower() != ".html":
        raise ValueError(f"{out} is no name of a page; write --out FILE.html")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder; make it first, or choose another place for {out.name}")
    if not out.exists():
        return
    if not out.is_file() or MARK not in out.read_bytes()[:10_000]:
        raise FileExistsError(f"{out} exists and is no page of residuum; choose another file")
    if not replace:
        raise FileExistsError(f"{out} exists; choose another file, or replace it with --force")


def _labelled(results: list[Result], folders: list[Path]) -> list[Result]:
    """The same results under names that differ: the titles, with the folder's name or a number where those repeat."""
    labels = [result.label for result in results]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({folder.resolve().name})" for label, folder in zip(labels, folders, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [f"{number + 1}: {label}" for number, label in enumerate(labels)]
    return [replace(result, label=label) for result, label in zip(results, labels, strict=True)]


def render(results: Sequence[Result]) -> str:
    """The page as HTML.

    Args:
        results: One result to be explained, or several to be compared.
    """
    panels = one_panels(results[0]) if len(results) == 1 else many_panels(results)
    content = {
        "results": results,
        "panels": panels,
        "facts": tables(results),
        "sizes": readings.SIZES,
        "comparable": _comparable(results),
    }
    return fill("report.html.j2", content, [panel.chart for panel in panels.values()])


def fill(template: str, content: Mapping[str, Any], charts: Sequence[Chart]) -> str:
    """A self-contained page: a template with its content, the style, and the script that draws the charts.

    Args:
        template: Its file name.
        content: What it shows, by the names it uses; text is escaped.
        charts: What the script draws, each into the element "chart-ID" of the template.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("residuum", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "subscripts": subscripts,
        "percent": percent,
        "number": number,
        "cosine": cosine,
        "listed": listed,
        "settings": partial(readings.settings, names={repr(rate): name for name, rate in RATES.items()}),
    }
    parts = Path(__file__).with_name("templates")
    js, plotly = (parts / "report.js").read_text(encoding="utf-8"), get_plotlyjs() if charts else ""
    return environment.get_template(template).render(
        **content,
        data=Markup(script_json({"charts": list(charts)})),
        css=Markup((parts / "report.css").read_text(encoding="utf-8")),
        js=Markup(js),
        plotly=Markup(plotly),
        policy=policy((plotly, js)),
    )


def subscripts(formula: str) -> str:
    """A formula with what follows an underscore set low: "h_{l+1} = h_l" has l+1 and l below the line."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"_(?:\{([^}]*)\}|(\w'?))", lambda m: f"<sub>{m[1] or m[2]}</sub>", str(escape(formula))))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character ends the element or starts a comment in it.

    Raises:
        ValueError: If a number is nan or infinite.
    """
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def policy(scripts: Sequence[str]) -> str:
    """What the browser lets the page do: run exactly these scripts, and load nothing from anywhere.

    Args:
        scripts: The text of each script of the page.
    """
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; "
        "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _comparable(results: Sequence[Result]) -> list[str]:
    """What differs between results that are compared, so that their numbers are not taken for more than they are."""
    found = []
    for key, what in (("data", "data set"), ("split", "split"), ("loss", "loss"), ("examples", "number of examples")):
        values = sorted({str(result.about[key]) for result in results})
        if len(values) > 1:
            found.append(f"{what} ({'; '.join(values)})")
    if len({str(result.about.get("data_sha256")) for result in results}) > 1 and not found:
        found.append("data (their checksums differ)")
    return found
