"""The command line: one function for each command of flags.py. Heavy imports wait for the command."""

import shlex
import signal
import sys
import threading
from collections.abc import Sequence

import tyro

from residuum.flags import Command, DataCommand, Demo, Fold, Probe, Report, Reproduce, Runs, Stability, Sweep, Train

ABOUT = "Cut any torch model into its residual stream, and measure what each block does."
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's words; those of torch's CPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; None is that of the process.

    Returns:
        0; 2 after an error of the user's, which is said in one line; 130 if stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        flags = tyro.cli(Command, prog="residuum", description=ABOUT, args=arguments)
        from residuum import commands, reproducescreen, runscreen, sweepscreen
        from residuum.memory import keep_freed_memory

        keep_freed_memory()
        run = {
            Demo: commands.demo,
            Train: commands.train,
            Probe: commands.probe,
            Report: commands.report,
            Sweep: sweepscreen.sweep,
            Runs: runscreen.runs,
            Fold: commands.fold,
            Stability: commands.stability,
            Reproduce: reproducescreen.reproduce,
            DataCommand: commands.data,
        }
        run[type(flags)](flags, shlex.join(["residuum", *arguments]))
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"residuum: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from residuum.layers.reversible import DriftError
        from residuum.solve import ConvergenceError

        if isinstance(error, ConvergenceError | DriftError):
            print(f"residuum: {error}", file=sys.stderr)
            return 2
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        print(f"residuum: {str(error).splitlines()[0]}; try a smaller --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"residuum: stopped; {str(stop) or 'no result was written'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
