"""What to follow over the epochs of a training: functions for `train(after_epoch=...)`, which add to its history."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from residuum.data import Splits
from residuum.models import ResNet
from residuum.nulls import recalibrated
from residuum.probes.passive import norm, ratio
from residuum.probes.readout import Reader
from residuum.readings import finite
from residuum.training import AfterEpoch, Row, batches_for, evaluate


def gradient_ratio(
    model: ResNet, x: Float[Tensor, "example channel row column"], y: Tensor
) -> Float[Tensor, " example"]:
    """By how much gradients grow on their way down: `|dL/dh| at the first section / |dL/dh| at the last`.

    Taken at the input of the first residual block of each, per example, of the loss of each example. With projections
    that is the state before the projection. 1: gradients keep their size; much above 1: they explode.

    Args:
        model: A network of at least two sections, in the mode in which it is to be looked at.
        x: Images.
        y: Their labels.

    Raises:
        ValueError: If there is only one section.

    Source: P1 (Jastrzebski et al. 2018), section 4.5 and figure 8.
    """
    stream = model.cut(x.detach().requires_grad_())  # so that states have gradients in a frozen network, too
    if len(stream.sections) < 2:
        raise ValueError("gradient_ratio compares the first section with the last; the network has only one")
    entered: list[Tensor] = []  # the state before a projection that the first section begins with
    begins = stream.sections[0].passed  # a 1x1 convolution that widens is no residual block
    handle = model.widen.register_forward_pre_hook(lambda _, given: entered.append(given[0])) if begins else None
    try:
        with torch.enable_grad():
            trace = stream.run()
    finally:
        if handle:
            handle.remove()
    with torch.enable_grad():
        first = entered[0] if entered else trace.states[0][0]
        last = trace.states[-2][-1] if stream.sections[-1].passed else trace.states[-1][0]
        loss = Reader.of(trace.output, y, None)(trace.output)[1]["loss"]
        down, up = torch.autograd.grad(loss.sum(), (first, last))
    return ratio(norm(down), norm(up))


def gradient_ratios(data: Splits, *, images: int = 500, batch: int = 100) -> AfterEpoch:
    """Follow `gradient_ratio` on training and test images.

    Args:
        data: Training and test split.
        images: At most so many of each are drawn.
        batch: Images at a time.

    Returns:
        A function for `after_epoch`, which gives "train_gradient_ratio" and "test_gradient_ratio": means over images;
        None where they are not finite.

    Source: P1 (Jastrzebski et al. 2018), figure 8; there on the batches of both splits.
    """
    parts = [part.take(images, seed=0) for part in data]

    def look(model: nn.Module) -> Row:
        row = {}
        for part in parts:
            prepared = batches_for(model, part, batch=batch, preparation=data.train.preparation)
            mean = torch.cat([gradient_ratio(model, x, y).double() for x, y in prepared]).mean().item()
            row[f"{part.split}_gradient_ratio"] = finite(mean)
        return row

    return look


def recalibration(data: Splits) -> AfterEpoch:
    """Follow what a shared network would reach with batch-norm statistics of each application: `recalibrated`.

    Args:
        data: Training and test split; the statistics are those of at most 1000 training images without augmentation,
            normalised 500 together.

    Returns:
        A function for `after_epoch`, which gives "recalibrated_test_loss" and "recalibrated_test_accuracy"; as they
        are without is in the row already.

    Source: as `recalibrated`.
    """
    chosen = data.train.take(1000, seed=0)

    def look(model: nn.Module) -> Row:
        again = recalibrated(model, batches_for(model, chosen))
        found = evaluate(again, data.test, preparation=data.train.preparation)
        return {f"recalibrated_test_{name}": value for name, value in found.items()}

    return look
