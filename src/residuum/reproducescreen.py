"""What `residuum reproduce` does and shows: what it will cost, the runs of the papers, what became of their claims."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from residuum.claims import Results
from residuum.flags import Reproduce
from residuum.progress import console
from residuum.reproduce import (
    Choice,
    check_alike,
    check_data,
    choose,
    files_read,
    gather,
    keep_runs,
    kept_runs,
    listing,
    report,
    stand_ins,
    summary,
)
from residuum.runfolders import prepare
from residuum.sweepscreen import carried_out, unfinished

screen = console()


def reproduce(flags: Reproduce, command: str) -> None:
    """Carry out what is missing, draw figures and judge claims; or only list, or only read what is there.

    Args:
        flags: The command's options.
        command: The command as it was typed.

    Raises:
        ValueError: If a name is unknown, a kept run is damaged or read other data, or others would read other data than
            the kept ones; or if runs are not complete in the end: the report is written all the same.
        OSError: If something cannot be read or written.
        FileNotFoundError: If data are not there; the message says how to get them. If kept runs are to be checked and
            there are neither these nor others.
        KeyboardInterrupt: If it was stopped; the message says how to go on.
    """
    if flags.list and flags.check:
        raise ValueError("--list says what would be done, --check reads what is there: choose one")
    choice, files = choose(flags.scale, flags.ids), _files(flags.files)
    jobs = stand_ins([job for study in choice.studies for job in study.jobs], files)
    with TemporaryDirectory() as place:
        kept = kept_runs(choice.studies, jobs, flags.kept, Path(place) / "before") if flags.kept else {}
        results = gather(jobs, flags.out) | kept
        if flags.list:
            screen.print(listing(choice, results))
            return
        if flags.check and flags.kept and not (results or flags.kept.exists()):
            raise FileNotFoundError(f"{flags.kept} is not there, nor are runs in {flags.out}: nothing can be checked")
        prepare(flags.out)
        problem = ""
        if not flags.check and any(job.key not in results for job in choice.jobs):
            screen.print(listing(choice, results))
            asked = [jobs[job.key] for job in choice.jobs if job.key not in kept]
            left = [jobs[job.key] for job in choice.jobs if job.key not in results]
            check_alike(choice, jobs, results, kept)
            check_data(left, flags.carried.data_root)
            outcome = carried_out(asked, flags.out, flags.carried, command)
            problem = unfinished(outcome, next(iter(outcome.reasons.values()), ""))
            results = gather(jobs, flags.out) | kept
        if flags.kept:
            added = keep_runs(choice.studies, results, flags.kept)
            # Judged by what is kept, so that anybody who has it comes to the same verdicts.
            results |= kept_runs(choice.studies, jobs, flags.kept, Path(place) / "after")
            screen.print(f"kept: {flags.kept.resolve()} ({len(kept) + added} runs, {added} of them new)")
        _report(choice, results, flags.out)
    if problem:
        raise ValueError(problem)


def _report(choice: Choice, results: Results, out: Path) -> None:
    """Write the report and say what is in it."""
    asked = [job for study in choice.studies for job in study.jobs]
    judged = report(choice, results, out, notes=files_read(asked, results))
    for line in summary(judged, choice.parts):
        screen.print(line)
    folder = out.resolve() / choice.scale
    screen.print(f"verdicts: {folder / 'claims.md'}")
    for study in choice.studies:
        drawn = sum(figure in choice.parts for figure in study.figures)
        if drawn:
            screen.print(f"figures: {folder / study.paper}{'.html' if drawn == len(study.figures) else ''}")


def _files(given: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE.npz as names and files."""
    wrong = [text for text in given if not text.partition("=")[2].endswith(".npz")]
    if wrong:
        raise ValueError(f"--files takes NAME=FILE.npz, such as cifar10=data/cifar10.npz; given {wrong[0]!r}")
    files = {text.partition("=")[0]: Path(text.partition("=")[2]) for text in given}
    if len(files) < len(given):
        raise ValueError(f"--files names a data set twice ({' '.join(given)}); give one file for each")
    return files
