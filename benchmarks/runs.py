"""What reading the table of many finished runs costs: `make bench`.

Seconds of processor time and of wall time, one thread: anew from all folders, every byte being checked; from the index;
and with one run more than the index has. The limit is on reading from the index.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from residuum import runfolders
from residuum.descriptions import described
from residuum.models import ResNetConfig
from residuum.probing import USUAL
from residuum.runindex import INDEX, table
from residuum.runs import DataConfig, Run, execute
from residuum.training import TrainConfig

RUN = Run(
    ResNetConfig(blocks=(4, 4, 4), widths=(4, 8, 16), channels=1),
    DataConfig("digits", train=100, test=50),
    TrainConfig(epochs=2),
    USUAL,
)
LIMIT = 2.0  # seconds for 1,000 runs


def copies(out: Path, count: int) -> None:
    """So many runs with the results of one, for other seeds."""
    first = execute(RUN, out).folder
    results = [path for path in first.iterdir() if path.name not in ("run.json", "done.json", "log.txt")]
    for seed in range(1, count):
        run = replace(RUN, seed=seed)
        folder = out / "runs" / run.key
        runfolders.begin(folder, run.key, run.describe(), described(run))
        for path in results:
            shutil.copyfile(path, folder / path.name)
        runfolders.finish(folder, 1.0)


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall time of work, the smaller of three."""
    found = []
    for _ in range(3):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        found.append((time.process_time() - processor, time.perf_counter() - wall))
    return min(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    count = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        copies(out, count)

        def one_more() -> None:
            (out / INDEX).write_bytes(older)
            table(out)

        table(out)
        older = (out / INDEX).read_bytes()
        execute(replace(RUN, seed=count), out)
        late = timed(one_more)
        anew, index = timed(lambda: table(out, rebuild=True)), timed(lambda: table(out))
        print(f"{count} finished runs, {table(out).shape[1]} columns    processor s   wall s")
        over = " **over**" if index[0] > LIMIT else ""
        print(f"from the index [{LIMIT}]                   {index[0]:8.2f}   {index[1]:8.2f}{over}")
        print(f"one run is new                         {late[0]:8.2f}   {late[1]:8.2f}")
        print(f"anew, every byte checked               {anew[0]:8.2f}   {anew[1]:8.2f}")


if __name__ == "__main__":
    main()
