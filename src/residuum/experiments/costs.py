"""What a run costs: minutes on one core, predicted from its network and its images before it starts."""

import math

from residuum.data.catalogue import FACTS
from residuum.jobs import Job
from residuum.probing import CHANGES
from residuum.runs import Run

# Measured with benchmarks/costs.py on one core of an AMD EPYC (Zen 4), torch 2.13, batches of 32 to 128,
# widths 4 to 64 at 28x28 and 32x32: milliseconds of forward and backward per image, block and pixel are A + B width^2.
# Predictions are within a factor of two of what was measured there; other machines differ by another factor.
A, B = 1.5e-4, 1.15e-6
FORWARD = 1 / 3  # part of a training step that a forward alone takes
STEP = 5e-3  # seconds per step beside the images' own: dispatch, per 10 blocks
PROBES = 3  # forwards of a measured image, as given and at initialisation, with the usual probes
BESIDE = {"gradients": 3, "unrolled_last": 15}  # forwards more of a measured image with these probes
# Images that are run through the network after every epoch by what a run watches, as forwards; and all test images.
LOOKS = {"readout": (1000, 0), "gradient_ratio": (1200, 0), "recalibration": (1000, 1)}
CHANGED = 0.7  # forwards beside these for each intervention and block of the network; for 3 to 5 blocks per section
LIMITED = 1.3  # cost of a training step with Lipschitz limits


def network_minutes(job: Job) -> float | None:
    """Predicted minutes of a training and its measurement on one core; None for other jobs.

    Predictions for interventions on networks of many blocks are too low.

    Args:
        job: The run.
    """
    if not isinstance(job, Run):
        return None
    named = FACTS.get(job.data.name, FACTS["cifar10"])  # files of images without a name are mostly of this size
    (train, test), side = (job.data.clutter_sizes, 32) if job.data.clutter else (named.counts, named.shape[1])
    train, test = job.data.train or train, job.data.test or test
    image = 1e-3 * sum(
        blocks * math.ceil(side / 2**section) ** 2 * (A + B * width**2)
        for section, (blocks, width) in enumerate(zip(job.model.blocks, job.model.widths, strict=True))
    )
    steps = math.ceil(train / job.training.batch) * STEP * sum(job.model.blocks) / 10
    factor = LIMITED if job.model.limit else 1.0
    looks = math.ceil(job.training.epochs / job.training.test_every)
    forwards = PROBES + CHANGED * sum(job.model.blocks) * len(CHANGES.keys() & set(job.probes)) if job.probes else 0.0
    forwards += sum(BESIDE.get(name, 0) for name in job.probes)
    measured = (2 + job.probe_train) * forwards * min(job.probe_limit or test, test)
    watched = job.training.epochs * sum(some + every * test for some, every in (LOOKS[name] for name in job.watch))
    trained = job.training.epochs * factor * (image * train + steps)
    return (trained + FORWARD * image * (looks * test + watched + measured)) / 60
