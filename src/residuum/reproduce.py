"""Reproducing: the runs of papers carried out or found, their figures drawn, every claim given its verdict."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from residuum import experiments
from residuum.claims import FAULTS, NOT_RUN, Claim, Figure, Judged, Results, Study, judge, together
from residuum.data.archives import ARCHIVES
from residuum.data.fetching import find
from residuum.drawing import fit_title, save, style
from residuum.files import write_atomically, write_json
from residuum.jobs import Job
from residuum.kept import keep, unpack
from residuum.names import one_line, unknown
from residuum.pages import Shown, counts, flowing, markdown, page, shown
from residuum.runs import DataConfig, Finished, Run, finished
from residuum.toys.digits import NoisyDigits

FORMAT = 1  # of claims.json
UNDRAWN = "could not be drawn"


@dataclass(frozen=True)
class Choice:
    """What is reproduced.

    Attributes:
        scale: tiny, small or paper.
        studies: Of all papers, since the table of claims is always whole.
        parts: The figures and claims that were asked for.
    """

    scale: str
    studies: tuple[Study, ...]
    parts: tuple[Figure | Claim, ...]

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The runs that are needed, each once, in the order in which the studies want them."""
        wanted = {job.key for job in together(self.parts)}
        return tuple({job.key: job for study in self.studies for job in study.jobs if job.key in wanted}.values())


def choose(scale: str, ids: Sequence[str]) -> Choice:
    """Figures and claims by their names.

    Args:
        scale: tiny, small or paper.
        ids: Names of papers, figures or claims; none: all papers.

    Raises:
        ValueError: If a name or the scale is unknown; the nearest are offered.
    """
    studies = tuple(experiments.study(paper, scale) for paper in experiments.PAPERS)
    known: dict[str, tuple[Figure | Claim, ...]] = {}
    for study in studies:
        known[study.paper] = (*study.figures, *study.claims)
        known |= {part.id: (part,) for part in known[study.paper]}
    for name in ids:
        if name not in known:
            error = unknown("figure, claim or paper", name, known)
            raise ValueError(f"{error}; papers: {', '.join(experiments.PAPERS)}")
    wanted = [part for name in ids or [study.paper for study in studies] for part in known[name]]
    return Choice(scale, studies, tuple({part.id: part for part in wanted}.values()))


def stand_ins(jobs: Sequence[Job], files: Mapping[str, Path]) -> dict[str, Job]:
    """What is run for each job, by the key of the job: the same on a file in the place of a data set with a name.

    The runs have keys of their own, made of the file's content: they are other data.

    Args:
        jobs: What the studies ask for.
        files: A file FILE.npz by the name of the data set that it is read for.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If no run reads a data set of that name, or it is made and not read.
    """
    names = {job.data.name for job in jobs if isinstance(job, Run) and not job.data.clutter}  # those are made
    for name in files:
        if name not in names:
            raise unknown("data set to be read from a file", name, sorted(names))
    read = {name: DataConfig(str(path)) for name, path in files.items()}  # their content is looked at once
    found: dict[str, Job] = {}
    for job in jobs:
        given = read.get(job.data.name) if isinstance(job, Run) else None
        data = given and replace(job.data, name=given.name, sha256=given.sha256)
        found[job.key] = replace(job, data=data) if data else job
    return found


def check_data(jobs: Iterable[Job], root: Path | None) -> None:
    """Refuse a data root that lacks what the runs read, before any starts; without a root data are fetched.

    Args:
        jobs: The runs.
        root: The data root.

    Raises:
        FileNotFoundError: If official files are not there; the message says how to get them.
        ValueError: If one of them is not what was published.
    """
    if root is None:
        return
    jobs = list(jobs)
    networks = {job.data.name for job in jobs if isinstance(job, Run)}
    digits = {job.data for job in jobs if isinstance(job, NoisyDigits)}  # which read official files only
    for source in ARCHIVES:
        if source.name in networks | digits:
            try:
                find(source, root)
            except FileNotFoundError as error:
                advice = f"; or read other files with --files {source.name}=FILE.npz"
                raise FileNotFoundError(f"{error}{'' if source.name in digits else advice}") from None


def gather(jobs: Mapping[str, Job], out: Path) -> dict[str, Finished]:
    """The runs that are complete, by the key under which studies ask for them.

    Args:
        jobs: What was run for each, by that key.
        out: Folder of runs; one that is not there has none.
    """
    found = {key: finished(job, out) for key, job in jobs.items()}
    return {key: run for key, run in found.items() if run is not None}


def keep_runs(studies: Iterable[Study], results: Results, kept: Path) -> int:
    """Keep the finished runs that are not kept yet in KEPT/<paper>/<key>.zip, with what their study reads of them.

    Args:
        studies: Whose runs.
        results: Finished runs by the key under which studies ask for them.
        kept: The folder; it is made.

    Returns:
        How many were added.

    Raises:
        OSError: If it cannot be written.
    """
    added = 0
    for study in studies:
        for job in study.jobs:
            path = kept / study.paper / f"{job.key}.zip"
            if job.key in results and not path.is_file():
                keep(results[job.key], path, study.quantities)
                added += 1
    return added


def kept_runs(studies: Iterable[Study], jobs: Mapping[str, Job], kept: Path, place: Path) -> dict[str, Finished]:
    """The runs that are kept in a folder, by the key under which studies ask for them, whichever file they read.

    Args:
        studies: Whose runs.
        jobs: What is run here for each, as `stand_ins` has it. Where that reads a file, a kept run must have read it.
        kept: The folder, as `keep_runs` has it; one that is not there has none.
        place: A folder to unpack them into, which is made.

    Raises:
        ValueError: If a file is no kept run, or is damaged, is another run than its name says, or read other data than
            what is given here.
        NotADirectoryError: If `kept` is a file.
        OSError: If a file cannot be read.
    """
    if kept.exists() and not kept.is_dir():
        raise NotADirectoryError(f"{kept} is a file; --kept takes a folder")
    found = {}
    for study in studies:
        for job in study.jobs:
            path = kept / study.paper / f"{job.key}.zip"
            if path.is_file():
                found[job.key] = unpack(path, place / job.key, study.quantities)
                _check_kept(path, found[job.key].job, job, jobs[job.key])
    return found


def _check_kept(path: Path, job: Job, asked: Job, here: Job) -> None:
    """Refuse a kept run that is not what was asked for, or read another file than is read here."""
    stands_in = isinstance(job, Run) and isinstance(asked, Run) and job.data.sha256 and not asked.data.clutter
    named = replace(job, data=replace(job.data, name=asked.data.name, sha256=asked.data.sha256)) if stands_in else job
    if named.key != asked.key:
        raise ValueError(f"{path} is the run {job.key}, not {asked.key}; move it away")
    given = isinstance(here, Run) and here != asked  # a file in the place of a data set
    if given and here.data.sha256 != job.data.sha256:
        raise ValueError(
            f"{path} read {_which(job.data)}; {asked.data.name} is given as {_which(here.data)}: "
            f"give {'that file' if job.data.sha256 else 'no file for it'}, or another folder"
        )


def _which(data: DataConfig) -> str:
    """What was read: a file by its name and content, or a data set."""
    return f"{Path(data.name).name}, SHA-256 {data.sha256[:8]}.." if data.sha256 else f"the official {data.name}"


def check_alike(choice: Choice, jobs: Mapping[str, Job], results: Results, kept: Results) -> None:
    """Refuse to carry out runs on a data set in whose place a study's kept runs read a file: they would be compared.

    Args:
        choice: What was asked for.
        jobs: What is run for each job of the studies, as `stand_ins` has it.
        results: Finished runs by the key under which studies ask for them, which are not carried out.
        kept: Those of them that are kept.

    Raises:
        ValueError: If a run would read something else than the kept ones.
    """
    left = {job.key for job in choice.jobs} - results.keys()
    for study in choice.studies:
        runs = [job for job in study.jobs if isinstance(job, Run)]
        read = {job.data.name: kept[job.key].job.data for job in runs if job.key in kept}
        for job in runs:
            mine, theirs = jobs[job.key].data, read.get(job.data.name)
            if job.key in left and theirs is not None and mine.sha256 != theirs.sha256:
                raise ValueError(
                    f"kept runs of {study.paper} read {_which(theirs)} in the place of {job.data.name}, another would "
                    f"read {_which(mine)}: give --files {job.data.name}=FILE.npz with that file, or another folder to "
                    "--kept"
                )


def files_read(jobs: Iterable[Job], results: Results) -> list[str]:
    """Which files were read in the place of data sets with a name, in words.

    Args:
        jobs: What the studies ask for.
        results: Finished runs by the key under which they do.
    """
    runs = {job.key: job.data.name for job in jobs if isinstance(job, Run) and job.key in results}
    of_each, read = Counter(runs.values()), Counter()
    for key, name in runs.items():
        data = results[key].job.data
        if data.sha256:
            read[name, f"{name} is read from {Path(data.name).name}, SHA-256 {data.sha256}"] += 1
    return sorted(
        f"{text}." if n == of_each[name] else f"{text}, in {n} of {of_each[name]} runs."
        for (name, text), n in read.items()
    )


def listing(choice: Choice, results: Results) -> str:
    """What is asked for as a table for the screen: runs, how many are complete, and predicted minutes of one core.

    Figures and claims that were named have a row each; of a whole paper its claims have one together.
    """
    rows = [("", "runs", "complete", "minutes left", "")]
    for study in choice.studies:
        cost = study.minutes
        figures = [part for part in study.figures if part in choice.parts]
        claims = [part for part in study.claims if part in choice.parts]
        rows += [(part.id, *_cost([part], cost, results), part.caption) for part in figures]
        if len(claims) == len(study.claims):
            rows.append((f"{study.paper} claims", *_cost(claims, cost, results), f"{len(claims)} claims"))
        else:
            rows += [(part.id, *_cost([part], cost, results), part.statement) for part in claims]
    minutes = {job.key: study.minutes(job) for study in choice.studies for job in study.jobs}
    rows.append(("together", *_cost(choice.parts, lambda job: minutes[job.key], results), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), _short(row[4])]).rstrip()
        for row in rows
    )


def _cost(
    parts: Sequence[Figure | Claim], minutes: Callable[[Job], float | None], results: Results
) -> tuple[str, str, str]:
    """Runs, how many are complete, and predicted minutes of the others."""
    jobs = together(parts)
    left = [minutes(job) for job in jobs if job.key not in results]
    known = [cost for cost in left if cost is not None]
    open_ends = f" + {len(left) - len(known)} unknown" if len(known) < len(left) else ""
    return str(len(jobs)), str(len(jobs) - len(left)), f"{sum(known):,.1f}{open_ends}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes:
        judged: The claims with their verdicts, by paper.
        undrawn: Which figures could not be drawn, and why.
    """

    judged: Mapping[str, Sequence[Judged]]
    undrawn: tuple[str, ...] = ()


def report(choice: Choice, results: Results, out: Path, *, notes: Sequence[str] = ()) -> Report:
    """Draw the figures that were asked for, judge every claim, and write OUT/<scale>/.

    Figures are in p2/, for paper p2; p2.html shows all of a paper, if all were asked for. claims.json, claims.md and
    claims.html hold all claims of all papers. A figure that cannot be drawn says why in its place. Each file appears
    complete or not at all, claims.json last: a report that was interrupted is written again by the same command with
    --check.

    Args:
        choice: What was asked for.
        results: Finished runs by the key under which studies ask for them.
        out: Folder of runs.
        notes: What a reader must know besides, such as which files were read.

    Raises:
        OSError: If a file cannot be written.
    """
    folder, undrawn = Path(out) / choice.scale, []
    judged = {study.paper: [judge(claim, results) for claim in study.claims] for study in choice.studies}
    versions = _versions(results)
    for study in choice.studies:
        asked = [figure for figure in study.figures if figure in choice.parts]
        figures = [_drawn(figure, results, folder / study.paper) for figure in asked]
        undrawn += [f"{one.figure.id}: {one.title}" for one in figures if one.title.startswith(UNDRAWN)]
        if len(asked) == len(study.figures):
            heading = f"{study.paper.upper()}: {study.title}"
            about = [f"Scale {study.scale}: {study.about}", *notes, *versions]
            text = page(heading, about, figures, [("Claims of this paper", judged[study.paper])])
            _write(folder / f"{study.paper}.html", text)
    tables = [(f"{study.paper.upper()}, {study.title}", judged[study.paper]) for study in choice.studies]
    about = [f"{study.paper.upper()}, scale {study.scale}: {study.about}" for study in choice.studies]
    title = f"Claims of the papers at scale {choice.scale}"
    _write(folder / "claims.md", markdown(title, [*about, *notes, *versions], tables))
    _write(folder / "claims.html", page(title, [*about, *notes, *versions], [], tables))
    content = {"format": FORMAT, "scale": choice.scale, "notes": [*about, *notes, *versions]}
    claims = [
        {"paper": paper} | one.describe() | {"runs": _keys(one.claim, results)}
        for paper, found in judged.items()
        for one in found
    ]
    write_json(folder / "claims.json", content | {"claims": claims})
    return Report(judged, tuple(undrawn))


def _keys(claim: Claim, results: Results) -> list[str]:
    """The folders of a claim's runs that are complete."""
    return [results[job.key].job.key for job in together([claim]) if job.key in results]


def _drawn(figure: Figure, results: Results, folder: Path) -> Shown:
    """A figure as a page shows it, drawn and written; or why it could not be."""
    try:
        return _draw(figure, results, folder)
    except FAULTS as error:
        return Shown(figure, f"{UNDRAWN}: {type(error).__name__}: {one_line(error)}")


def _draw(figure: Figure, results: Results, folder: Path) -> Shown:
    runs = {job.key for job in figure.jobs}
    missing = len(runs - results.keys())
    with style():
        drawn = figure.draw(results)
        if drawn is None:
            return Shown(figure, f"not drawn, {missing} of {len(runs)} runs missing")
        note = f"({missing} of {len(runs)} runs are missing)" if missing else ""
        title = f"{flowing(drawn.get_suptitle())} {note}".strip()
        fit_title(drawn, note)
        folder.mkdir(parents=True, exist_ok=True)
        save(drawn, folder, figure.id)
        return replace(shown(figure, drawn), title=title)


def _versions(results: Results) -> list[str]:
    """Which versions made the runs, where there are several."""
    found = Counter(run.provenance["versions"]["residuum"] for run in results.values() if _has_provenance(run))
    if len(found) < 2:
        return []
    return ["Runs were made by " + ", ".join(f"residuum {v} ({n})" for v, n in sorted(found.items())) + "."]


def _has_provenance(run: Finished) -> bool:
    return (run.folder / "provenance.json").is_file()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8") and None)


def summary(written: Report, asked: Sequence[Figure | Claim]) -> list[str]:
    """Lines for the screen: the verdicts of each paper, and what was obtained for the claims that were asked for.

    Args:
        written: What `report` wrote.
        asked: Figures and claims.
    """
    wanted = {part.id for part in asked}
    lines = list(written.undrawn)
    for paper, claims in written.judged.items():
        here = [one for one in claims if one.claim.id in wanted]
        lines.append(f"{paper}: {counts(claims)}")
        if len(here) < len(claims):
            lines += [f"  {one.claim.id}: {one.verdict}; {one.obtained}" for one in here]
        else:
            lines += [f"  failed: {one.claim.statement}: {one.obtained}" for one in here if one.verdict == "fail"]
            if all(one.verdict == NOT_RUN for one in here) and here:
                lines.append("  without --check the command carries the runs out")
    return lines
