"""Reproducing: what is chosen, what stands in for what, and reports that are whole, safe and say what is missing."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure

from residuum import drawing, pages, reproduce, reproducescreen
from residuum.claims import Claim, Figure, Obtained, Results
from residuum.cli import main
from residuum.experiments import p3_extended
from residuum.jobs import Job
from residuum.pages import counts, markdown, page, shown
from residuum.reproduce import Choice, check_data, choose, gather, listing, report, stand_ins, summary
from residuum.runs import Finished, Run
from residuum.sweeps import Outcome
from whole import reproduced
from worlds import as_the_paper, make


def test_names_are_papers_figures_and_claims() -> None:
    whole = choose("tiny", [])
    assert {part.id for part in whole.parts} == {part.id for s in whole.studies for part in (*s.figures, *s.claims)}
    few = choose("tiny", ["p2-3", "p2-mnist-growth-small", "p2-3"])
    assert [part.id for part in few.parts] == ["p2-3", "p2-mnist-growth-small"]
    assert len(few.jobs) == 4
    with pytest.raises(ValueError, match=r"unknown figure, claim or paper 'p2-33'; did you mean 'p2-3'"):
        choose("tiny", ["p2-33"])
    with pytest.raises(ValueError, match=r"unknown figure, claim or paper 'p9'; .*; papers: p0, p1, p2, p3"):
        choose("tiny", ["p9"])


def npz(path: Path) -> Path:
    images = np.zeros((20, 8, 8), np.uint8)
    labels = np.arange(20) % 10
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return path


def test_a_file_stands_in_for_a_data_set_under_keys_of_its_own(tmp_path: Path) -> None:
    jobs = choose("small", ["p2-1"]).jobs
    found = stand_ins(jobs, {"cifar10": npz(tmp_path / "c.npz")})
    assert list(found) == [job.key for job in jobs]
    for job in jobs:
        other = found[job.key]
        assert isinstance(other, Run)
        if job.data.name == "cifar10":
            assert other.data.name.endswith("c.npz")
            assert other.key != job.key
            assert (other.model, other.training, other.seed) == (job.model, job.training, job.seed)
            assert (other.data.train, other.data.test) == (job.data.train, job.data.test)
        else:
            assert other is job
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        stand_ins(jobs, {"cifar": tmp_path / "c.npz"})
    every = [job for study in choose("small", []).studies for job in study.jobs]
    with pytest.raises(ValueError, match="unknown data set to be read from a file 'digitclutter'"):
        stand_ins(every, {"digitclutter": tmp_path / "c.npz"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        stand_ins(jobs, {"cifar10": tmp_path / "none.npz"})


def test_data_that_are_not_there_are_refused_before_anything_starts(tmp_path: Path) -> None:
    jobs = choose("small", ["p2-mnist-error-depth"]).jobs
    with pytest.raises(FileNotFoundError, match=r"data fetch mnist .*--files mnist=FILE.npz"):
        check_data(jobs, tmp_path)
    check_data(choose("tiny", []).jobs, tmp_path)  # the digits come with scikit-learn
    check_data(jobs, None)  # fetched when the first run needs them


@pytest.mark.parametrize(("complete", "missing"), [("mnist", "cifar10"), ("cifar10", "mnist")])
def test_data_of_runs_that_are_complete_need_not_be_there(
    complete: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figure reads MNIST and CIFAR-10."""

    def carried_out(*arguments: object) -> Outcome:
        raise ValueError("begins")

    def gather(jobs: Mapping[str, Job], out: Path) -> dict[str, Finished]:
        there = {key: job for key, job in jobs.items() if isinstance(job, Run) and job.data.name == complete}
        return {key: Finished(job, out / key) for key, job in there.items()}

    monkeypatch.setattr(reproducescreen, "gather", gather)
    monkeypatch.setattr(reproducescreen, "carried_out", carried_out)
    assert main(["reproduce", "p2-3", "--out", str(tmp_path / "out"), "--data-root", str(tmp_path)]) == 2
    assert f"does not hold {missing} " in capsys.readouterr().err


def test_the_list_counts_each_run_once_and_predicts_what_is_left(tmp_path: Path) -> None:
    choice = choose("small", ["p2-1", "p2-3", "p2-mnist-error-depth"])
    rows = listing(choice, {}).splitlines()
    assert [row.split()[:2] for row in rows[1:3]] == [["p2-1", "30"], ["p2-3", "30"]]
    assert rows[-1].split()[:3] == ["together", "30", "0"]
    minutes = float(rows[-1].split()[3].replace(",", ""))
    done = make(choice.jobs[:15], tmp_path, as_the_paper)
    half = listing(choice, done).splitlines()[-1].split()
    assert half[:3] == ["together", "30", "15"]
    assert float(half[3].replace(",", "")) < minutes
    assert max(map(len, rows)) <= 120
    unknown = replace(choice, studies=tuple(replace(s, minutes=lambda job: None) for s in choice.studies))
    assert listing(unknown, {}).splitlines()[-1].split()[3:] == ["0.0", "+", "30", "unknown"]


def plain(results: Results) -> MatplotlibFigure | None:
    """A line over the seeds of what is there."""
    if not results:
        return None
    figure, (axes,) = drawing.panels("Seeds", 1, 1, width=2.0, height=2.0)
    axes.plot([run.job.seed for run in results.values()], marker="o", label="seeds")
    axes.set(xlabel="run", ylabel="seed")
    return figure


def small_choice(tmp_path: Path, *, text: str = "it is so") -> tuple[Choice, dict]:
    """Two plain figures and two claims, on runs that were never run; one claim says some text."""
    choice = choose("tiny", ["p2-1"])
    results = make(choice.jobs, tmp_path / "made", as_the_paper)
    figures = tuple(Figure(f"p2-{i}", f"figure {i}", "what it shows", choice.jobs, plain) for i in (1, 2))
    claims = (
        Claim("p2-a", "page 1", text, "1 | 2", choice.jobs, lambda results: Obtained("2 | 3", "pass"), "few"),
        Claim("p2-b", "page 2", "it is not", "1", choose("tiny", ["p2-ablation"]).jobs, lambda results: None, ""),
    )
    (p2,) = (study for study in choice.studies if study.paper == "p2")
    study = replace(p2, figures=figures, claims=claims)
    return Choice("tiny", (study,), (*study.figures, *claims)), results


def test_a_report_has_figures_pages_and_all_claims(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path)
    written = report(choice, results, tmp_path / "out", notes=["mnist is read from m.npz."])
    folder = tmp_path / "out" / "tiny"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("claims.json", "claims.md", "claims.html", "p2.html"),
        *(f"p2/p2-{i}.{kind}" for i in (1, 2) for kind in ("png", "pdf")),
    }
    content = json.loads((folder / "claims.json").read_text())
    assert content["scale"] == "tiny"
    assert "mnist is read from m.npz." in content["notes"]
    assert [(claim["id"], claim["verdict"]) for claim in content["claims"]] == [("p2-a", "pass"), ("p2-b", "not run")]
    assert content["claims"][0]["runs"] == [job.key for job in choice.jobs if job.key in results][:4]
    assert "16 of 16 runs missing" in content["claims"][1]["obtained"]
    assert "1 pass, 1 not run" in (folder / "claims.md").read_text()
    assert "1 \\| 2" in (folder / "claims.md").read_text()  # a bar in a cell does not end it
    assert summary(written, choice.parts) == ["p2: 1 pass, 1 not run"]


def test_a_page_of_all_figures_is_not_replaced_by_one_of_a_few(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path)
    report(choice, results, tmp_path / "out")
    whole = (tmp_path / "out" / "tiny" / "p2.html").read_bytes()
    (tmp_path / "out" / "tiny" / "p2" / "p2-1.png").unlink()
    report(replace(choice, parts=choice.parts[:1]), results, tmp_path / "out")
    assert (tmp_path / "out" / "tiny" / "p2.html").read_bytes() == whole
    assert (tmp_path / "out" / "tiny" / "p2" / "p2-1.png").exists()


def test_text_of_claims_is_escaped(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path, text="<script>alert(1)</script>")
    report(choice, results, tmp_path / "out")
    for name in ("p2.html", "claims.html"):
        text = (tmp_path / "out" / "tiny" / name).read_text()
        assert "<script>alert" not in text
        assert "&lt;script&gt;alert" in text


def test_an_interrupted_report_leaves_the_old_one_and_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, results = small_choice(tmp_path)
    report(choice, results, tmp_path / "out")
    old = {path: path.read_bytes() for path in (tmp_path / "out").rglob("claims.*")}

    def stop(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "markdown", stop)
        with pytest.raises(KeyboardInterrupt):
            report(replace(choice, parts=choice.parts[:1]), {}, tmp_path / "out")
    assert {path: path.read_bytes() for path in old} == old
    assert not list((tmp_path / "out").rglob(".partial*"))
    report(choice, {}, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "tiny" / "claims.json").read_text())
    assert {claim["verdict"] for claim in content["claims"] if claim["paper"] != "p3"} == {"not run"}


def test_figures_say_how_many_runs_are_missing(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path)
    some = dict(list(results.items())[:2])
    report(choice, some, tmp_path / "out")
    assert (tmp_path / "out" / "tiny" / "p2" / "p2-1.png").exists()
    report(choice, {}, tmp_path / "none")
    assert "not drawn, 4 of 4 runs missing" in (tmp_path / "none" / "tiny" / "p2.html").read_text()
    assert not (tmp_path / "none" / "tiny" / "p2").exists()


def test_a_figure_that_cannot_be_drawn_says_so_and_stops_nothing(tmp_path: Path) -> None:
    def broken(results: Results) -> MatplotlibFigure | None:
        raise KeyError("<b>test_loss")

    choice, results = small_choice(tmp_path)
    (study,) = choice.studies
    study = replace(study, figures=(replace(study.figures[0], draw=broken), study.figures[1]))
    written = report(Choice("tiny", (study,), (*study.figures, *study.claims)), results, tmp_path / "out")
    said = "p2-1: could not be drawn: KeyError: '<b>test_loss'"
    assert written.undrawn == (said,)
    assert summary(written, study.claims)[0] == said
    folder = tmp_path / "out" / "tiny"
    page = (folder / "p2.html").read_text()
    assert "could not be drawn: KeyError: " in page
    assert "<b>test_loss" not in page
    assert {path.name for path in (folder / "p2").iterdir()} == {"p2-2.png", "p2-2.pdf"}
    content = json.loads((folder / "claims.json").read_text())
    assert [claim["verdict"] for claim in content["claims"]] == ["pass", "not run"]


def test_runs_of_several_versions_are_said_to_be(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path)
    first = choice.jobs[0]
    other = results | make([first], tmp_path / "later", as_the_paper, version="0.2.0")
    report(choice, other, tmp_path / "out")
    assert "residuum 0.1.0 (3), residuum 0.2.0 (1)" in (tmp_path / "out" / "tiny" / "claims.md").read_text()
    assert "Runs were made by" not in (tmp_path / "out" / "tiny" / "p2.html").read_text().replace(
        "Runs were made by residuum 0.1.0 (3), residuum 0.2.0 (1)", ""
    )


def test_runs_that_are_not_complete_are_not_gathered(tmp_path: Path) -> None:
    jobs = stand_ins(choose("tiny", ["p2-1"]).jobs, {})
    make(list(jobs.values()), tmp_path / "runs", as_the_paper)  # without done.json
    assert gather(jobs, tmp_path) == {}
    assert gather(jobs, tmp_path / "nowhere") == {}


FIGURE = Figure("f", "page 1", "what it shows", (), lambda results: None)


def test_charts_are_the_lines_that_were_drawn() -> None:
    with drawing.style():
        figure, (left, right) = drawing.panels("It rises:\nby 3, by 2\nor by 1", 1, 2)
        drawing.line(left, [1, 2, 4], [3.0, 2.0, 1.0], label="<b>trained</b>", number=1, spread=[0.5, 0.0, 0.25])
        left.axhline(1.5)  # lies in the axes' own coordinates: no data
        left.set(xlabel="L", ylabel="d", title="left", xscale="log", yscale="log")
        right.plot([0, 1], [0, 1], color="#009E73")
        right.plot([0.5, 0.8], [0.25, 0.5], marker="*", linestyle="none", label="point")
        right.set(xlabel="x", ylim=(0, 2), xlim=(-1, 2))
        right.set_xticks([0, 1], ["<i>first</i>", "last"])
    found = shown(FIGURE, figure)
    assert (found.title, found.picture) == ("It rises: by 3, by 2; or by 1", "")
    (first, one), (_, two) = found.charts
    (series,) = one["series"]
    assert (first, one["x"]["log"], one["y"]["log"], one["y"]["title"]) == ("left", True, True, "d")
    assert (series["x"], series["y"]) == ([1, 2, 4], [3.0, 2.0, 1.0])
    assert (series["low"], series["high"]) == ([2.5, 2.0, 0.75], [3.5, 2.0, 1.25])
    assert series["name"] == "<b>trained</b>"  # set as text
    assert series["drawn"] == {"color": "#d55e00", "fill": "rgba(213,94,0,.2)", "dash": "dash", "symbol": "square"}
    assert [(s["mode"], s["name"]) for s in two["series"]] == [("lines", ""), ("markers", "point")]
    assert two["y"]["range"] == [0.0, 2.0]
    assert series["hover"][1] == "&lt;b&gt;trained&lt;/b&gt;<br>L: 2<br><b>2</b>"
    assert two["series"][1]["hover"] == ["point<br>x: 0.5<br><b>0.25</b>", "point<br>x: last<br><b>0.5</b>"]
    assert "ticks" not in one["x"]
    assert two["x"]["ticks"] == [[0.0, "&lt;i&gt;first&lt;/i&gt;"], [1.0, "last"]]
    assert two["x"]["range"] == [-1.0, 2.0]
    assert two["y"]["title"] == "d"  # that of its row


def test_what_has_no_lines_is_shown_as_a_picture() -> None:
    with drawing.style():
        figure, (axes,) = drawing.panels("Regions", 1, 1)
        axes.imshow([[0.0, 1.0]])
    found = shown(FIGURE, figure)
    assert found.charts == ()
    assert f"data:image/png;base64,{found.picture[:20]}" in page("t", [], [found], [])


@pytest.mark.parametrize(
    "more",
    [
        lambda axes: axes.fill_between([1, 2], [0, 1], [2, 3]),
        lambda axes: axes.annotate("1 \u2191", (1, 1)),
        lambda axes: axes.axvspan(1, 2),
        None,
    ],
    ids=["a range", "an arrow", "a stripe", "nothing"],
)
def test_what_is_no_line_is_seen_in_a_picture_beside_the_lines(more: Callable[[Axes], object] | None) -> None:
    with drawing.style():
        figure, (axes,) = drawing.panels("Seeds", 1, 1)
        drawing.line(axes, [1, 2], [1, 2], label="mean", number=0, spread=[0.5, 0.5])
        axes.legend()
        if more:
            more(axes)
    found = shown(FIGURE, figure)
    assert len(found.charts) == 1
    assert bool(found.picture) == (more is not None)


def test_a_page_with_charts_has_a_place_for_each(tmp_path: Path) -> None:
    choice, results = small_choice(tmp_path)
    with drawing.style():
        figures = [shown(figure, figure.draw(results)) for figure in choice.studies[0].figures]
    text = page("Title", ["note"], figures, [("Claims", [])])
    places = re.findall(r'id="chart-([^"]+)"', text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    assert places == [chart["id"] for chart in data["charts"]]
    assert len(places) == 2
    assert len(set(places)) == len(places)


def test_lines_of_penalties_differ_on_a_page() -> None:
    """Dashes of one's own are dashes on a page: a fifth weight would look like the second."""
    figure, (axes,) = drawing.panels("Title", 1, 1)
    for style in p3_extended.LINES:
        axes.plot([1, 2], [1, 2], color="black", **style)
    ((_, chart),) = shown(FIGURE, figure).charts
    assert len({(line["drawn"]["dash"], line["mode"]) for line in chart["series"]}) == len(p3_extended.LINES) == 5


def test_names_of_lines_are_text_in_the_legend_and_escaped_where_one_points() -> None:
    figure, (axes,) = drawing.panels("Title", 1, 1)
    drawing.line(axes, [1, 2], [1, 2], label="L < 20 & more", number=0)
    ((_, chart),) = shown(FIGURE, figure).charts
    assert chart["series"][0]["name"] == "L < 20 & more"
    assert chart["series"][0]["hover"][0].startswith("L &lt; 20 &amp; more<br>")


def test_what_is_infinite_is_left_out_of_a_page() -> None:
    figure, (axes,) = drawing.panels("Title", 1, 1)
    drawing.line(axes, [1, 2, 3], [1, math.inf, math.nan], label="exploded", number=0)
    drawing.line(axes, [1, 2], [1, 2], label="of one seed", number=1, spread=[0.5, math.nan])
    found = shown(FIGURE, figure)
    assert [series["y"] for series in found.charts[0][1]["series"]] == [[1, 2], [1, None, None]]
    assert found.charts[0][1]["series"][0]["low"] == [0.5, 2]
    assert "exploded" in page("t", [], [found], [])


def test_empty_tables_are_said_to_be() -> None:
    assert counts([]) == "no claims"
    assert "## p9\n\nno claims." in markdown("t", [], [("p9", [])])
    assert len(page("t", [], [], [])) < 200_000  # without charts there is no drawing library in it
    assert pages.VERDICTS[-1] == "not run"


def test_figures_are_files_that_can_be_made_again(tmp_path: Path) -> None:
    def draw(folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        with drawing.style():
            figure, (axes,) = drawing.panels("Title", 1, 1)
            drawing.line(axes, [1, 2], [1, 2], label="l", number=0)
            return {path.name: path.read_bytes() for path in drawing.save(figure, folder, "f")}

    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert set(first) == {"f.png", "f.pdf"}
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["p3-nothing"], "unknown figure, claim or paper"),
        (["--list", "--check"], "choose one"),
        (["--files", "cifar10"], "--files takes NAME=FILE.npz"),
        (["--files", "cifar10=a.npz", "cifar10=b.npz"], "--files names a data set twice (cifar10=a.npz cifar10=b.npz)"),
        (["--files", "cifar10=none.npz", "--check"], "no such file"),
        (["--scale", "small", "--data-root", "."], "does not hold"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.rglob("claims.json"))


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["reproduce", "--check", "--scale", "tiny", "--out", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checking_an_empty_folder_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["reproduce", "p2-mnist-error", "--check", "--scale", "tiny", "--out", str(out)]) == 0
    assert "89 not run" in capsys.readouterr().out
    assert list((out / "runs").iterdir()) == []
    content = json.loads((out / "tiny" / "claims.json").read_text())
    alone = {c.id for s in choose("tiny", []).studies for c in s.claims if c.test and not c.jobs}  # need no runs
    assert {claim["id"] for claim in content["claims"] if claim["verdict"] != "not run"} == alone
    assert len(alone) == 44  # P1's 19 counts, two of P2's numbers, 23 checks of P3


def test_kept_runs_that_are_not_there_are_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, kept = tmp_path / "out", tmp_path / "kpet"
    arguments = ["reproduce", "p2-mnist-error", "--check", "--scale", "tiny", "--out", str(out), "--kept", str(kept)]
    assert main(arguments) == 2
    assert f"{kept} is not there, nor are runs in {out}: nothing can be checked" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_tiny_reproduction_runs_end_to_end(tmp_path: Path) -> None:
    mine = reproduced("p2", tmp_path)
    assert len(mine) == 91
    assert "not run" not in {claim["verdict"] for claim in mine}
    assert len(list((tmp_path / "out" / "tiny" / "p2").glob("*.png"))) == 10
    arguments = ["reproduce", "p2-mnist-error", "--scale", "tiny", "--out", str(tmp_path / "out"), "--workers", "2"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*") if path.is_file()}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing is run twice


def test_long_conclusions_are_broken_to_fit_their_figure() -> None:
    text = "Strength 1 changes accuracy by -0.6 points without a limit, in the mean of eight data sets.\nSecond line."
    with drawing.style():
        figure, _ = drawing.panels(text, 1, 1)
        drawing.fit_title(figure, "(3 of 5 runs are missing)")
        figure.canvas.draw()
        lines = figure.get_suptitle().splitlines()
        assert " ".join(lines[:-2]) + "\n" + lines[-2] == text
        assert lines[-1] == "(3 of 5 runs are missing)"
        extent = figure._suptitle.get_window_extent()
        assert 0 <= extent.x0 < extent.x1 <= figure.bbox.width
        empty, _ = drawing.panels("", 1, 1)
        drawing.fit_title(empty)
        assert empty.get_suptitle() == ""
