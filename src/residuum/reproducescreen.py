"""What `residuum reproduce` does and shows: what it will cost, the runs of the papers, what became of their claims."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from residuum.flags import Reproduce
from residuum.jobs import Job
from residuum.reproduce import check_data, choose, gather, listing, report, stand_ins, summary
from residuum.runfolders import prepare
from residuum.runs import Run
from residuum.sweepscreen import carried_out

screen = Console(highlight=False, soft_wrap=True, markup=False)


def reproduce(flags: Reproduce, command: str) -> None:
    """Carry out what is missing, draw figures and judge claims; or only list, or only read what is there.

    Args:
        flags: The command's options.
        command: The command as it was typed.

    Raises:
        ValueError: If a name is unknown, or runs are not complete in the end; the report is written all the same.
        FileNotFoundError: If data are not there; the message says how to get them.
        KeyboardInterrupt: If it was stopped; the message says how to go on.
    """
    if flags.list and flags.check:
        raise ValueError("--list says what would be done, --check reads what is there: choose one")
    choice, files = choose(flags.scale, flags.ids), _files(flags.files)
    jobs = stand_ins([job for study in choice.studies for job in study.jobs], files)
    asked = [jobs[job.key] for job in choice.jobs]
    results = gather(jobs, flags.out)
    if flags.list:
        screen.print(listing(choice, results))
        return
    prepare(flags.out)
    problem = ""
    if not flags.check and any(job.key not in results for job in choice.jobs):
        screen.print(listing(choice, results))
        check_data(asked, flags.carried.data_root)
        problem = _carry_out(asked, flags, command)
        results = gather(jobs, flags.out)
    notes = [f"{name} is read from {path.name}, SHA-256 {_sum(jobs, path)}." for name, path in files.items()]
    judged = report(choice, results, flags.out, notes=notes)
    for line in summary(judged, choice.parts):
        screen.print(line)
    folder = flags.out.resolve() / flags.scale
    screen.print(f"verdicts: {folder / 'claims.md'}")
    for study in choice.studies:
        asked = sum(figure in choice.parts for figure in study.figures)
        if asked:
            screen.print(f"figures: {folder / study.paper}{'.html' if asked == len(study.figures) else ''}")
    if problem:
        raise ValueError(problem)


def _sum(jobs: Mapping[str, Job], path: Path) -> str:
    """The checksum of a file, which the runs that read it know."""
    data = (job.data for job in jobs.values() if isinstance(job, Run))
    return next(given.sha256 for given in data if given.name == str(path.absolute()))


def _files(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE.npz as names and files."""
    wrong = [text for text in given if not text.partition("=")[2].endswith(".npz")]
    if wrong:
        raise ValueError(f"--files takes NAME=FILE.npz, such as cifar10=data/cifar10.npz; given {wrong[0]!r}")
    return {text.partition("=")[0]: Path(text.partition("=")[2]) for text in given}


def _carry_out(jobs: Sequence[Job], flags: Reproduce, command: str) -> str:
    """The sweep; what is wrong with it in the end."""
    outcome = carried_out(jobs, flags.out, flags.carried, command)
    rest = len(jobs) - outcome.counts.get("complete", 0)
    if not rest:
        return ""
    first = next(iter(outcome.reasons.values()), "")
    again = "; --retry-failed tries those that failed again" if "failed" in outcome.counts else ""
    return f"{rest} of {len(jobs)} runs are not complete ({first}){again}"
