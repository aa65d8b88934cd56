"""Training batches: equal to a slow and obvious twin, seeded, resumable, shared, in channels-last memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from residuum.data import ImageSet, Preparation, TrainingImages, batches
from residuum.data.augmentation import AUGMENTATIONS


def images(count: int = 23, channels: int = 3, rows: int = 6, columns: int = 5) -> ImageSet:
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, channels, rows, columns), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 4, (count,), generator=draw)
    preparation = Preparation(255, (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels])
    return ImageSet("drawn", "train", pixels, labels, ("a", "b", "c", "d"), preparation, "")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slow(data: ImageSet, augment: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An epoch in one piece, image by image."""
    order = torch.randperm(len(data), generator=generator)
    pixels = data.images[order]
    if augment == "crop_flip":
        places = torch.randint(2 * 9 * 9, (len(data),), generator=generator).tolist()
        rows, columns = pixels.shape[2:]
        changed = []
        for image, place in zip(pixels, places, strict=True):
            mirrored, place = divmod(place, 81)
            down, right = divmod(place, 9)
            image = image.flip(2) if mirrored else image
            changed.append(F.pad(image, (4, 4, 4, 4))[:, down : down + rows, right : right + columns])
        pixels = torch.stack(changed)
    return data.preparation(pixels), data.labels[order]


@settings(max_examples=30)
@given(
    count=st.integers(1, 20),
    channels=st.sampled_from([1, 3]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    batch=st.integers(1, 25),
    augment=st.sampled_from(AUGMENTATIONS),
    seed=st.integers(0, 99),
)
def test_batches_are_those_of_the_slow_twin(
    count: int, channels: int, rows: int, columns: int, batch: int, augment: str, seed: int
) -> None:
    data = images(count, channels, rows, columns)
    given = list(TrainingImages(data, augment=augment).batches(batch=batch, generator=seeded(seed)))
    x, y = slow(data, augment, seeded(seed))
    assert [len(part) for part, _ in given] == [len(part) for part in x.split(batch)]
    assert torch.equal(torch.cat([part for part, _ in given]), x), "bit for bit"
    assert torch.equal(torch.cat([part for _, part in given]), y)
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part, _ in given)


def test_without_augmentation_they_are_the_batches_of_evaluation_in_another_order() -> None:
    data = images()
    order = torch.randperm(len(data), generator=seeded())
    expected = list(batches(replace(data, images=data.images[order]), batch=8, dtype=torch.float32))
    for (x, _), (wanted, _) in zip(TrainingImages(data).batches(batch=8, generator=seeded()), expected, strict=True):
        assert torch.equal(x, wanted)


def test_every_window_and_its_mirror_image_occur_equally_often() -> None:
    image, count = torch.arange(1, 10, dtype=torch.uint8).view(3, 3), 50 * 2 * 9 * 9
    data = replace(images(1, 1), images=image.expand(count, 1, 3, 3), labels=torch.zeros(count, dtype=torch.int64))
    x, _ = next(TrainingImages(data, augment="crop_flip").batches(batch=count, generator=seeded()))
    seen = []
    for kind in (image, image.flip(1)):
        padded = data.preparation(F.pad(kind, (4, 4, 4, 4))[None, None])
        # Windows without any pixel of the image are all alike.
        windows = padded.unfold(2, 3, 1).unfold(3, 3, 1)[0, 0, 2:7, 2:7].flatten(0, 1)
        seen += [int((x[:, 0] == window).flatten(1).all(1).sum()) for window in windows]
    assert len(seen) == 50
    assert 20 < min(seen) <= max(seen) < 90, "50 on average"


def test_skipping_resumes_an_epoch() -> None:
    source, generator = TrainingImages(images(), augment="crop_flip"), seeded(3)
    next(source.batches(batch=5, generator=generator))
    state = generator.get_state()
    whole = list(source.batches(batch=5, generator=generator))
    after = generator.get_state()
    resumed = torch.Generator()
    resumed.set_state(state)
    rest = list(source.batches(batch=5, generator=resumed, skip=2))
    assert len(rest) == len(whole) - 2
    for (x, y), (wanted_x, wanted_y) in zip(rest, whole[2:], strict=True):
        assert torch.equal(x, wanted_x)
        assert torch.equal(y, wanted_y)
    assert torch.equal(resumed.get_state(), after), "the next epoch is the same, too"


def test_all_is_drawn_by_the_call_and_from_nowhere_else() -> None:
    source, generator = TrainingImages(images(), augment="crop_flip"), seeded()
    torch.manual_seed(0)
    globally = torch.get_rng_state()
    epoch = source.batches(batch=5, generator=generator)
    state = generator.get_state()
    first = next(epoch)[0]
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), globally)
    assert not torch.equal(first, next(source.batches(batch=5, generator=generator))[0])
    assert torch.equal(first, next(source.batches(batch=5, generator=seeded()))[0])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_make_up_every_batch(parts: int) -> None:
    source = TrainingImages(images(), augment="crop_flip")
    whole = list(source.batches(batch=7, generator=seeded()))
    shares = [list(source.batches(batch=7, generator=seeded(), part=(i, parts))) for i in range(parts)]
    for number, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([share[number][0] for share in shares]), x)
        assert torch.equal(torch.cat([share[number][1] for share in shares]), y)
        sizes = [len(share[number][1]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_number_formats_are_rounded_at_the_end(dtype: torch.dtype) -> None:
    source = TrainingImages(images(), augment="crop_flip", dtype=dtype)
    x, _ = next(source.batches(batch=23, generator=seeded()))
    assert torch.equal(x, slow(images(), "crop_flip", seeded())[0].to(dtype))


def test_several_classes_per_image() -> None:
    data = replace(images(), labels=torch.eye(4, dtype=torch.uint8)[images().labels])
    _, y = next(TrainingImages(data).batches(batch=23, generator=seeded()))
    assert torch.equal(y, data.labels[torch.randperm(23, generator=seeded())])


def test_what_cannot_be_is_refused() -> None:
    data = images()
    with pytest.raises(ValueError, match="unknown augmentation 'crop'; did you mean 'crop_flip'"):
        TrainingImages(data, augment="crop")
    with pytest.raises(ValueError, match="the train split of drawn has no images"):
        TrainingImages(replace(data, images=data.images[:0], labels=data.labels[:0]))
    prepared = data.preparation
    for other in (replace(prepared, size=(8, 8)), replace(prepared, mean=prepared.mean * 2, std=prepared.std * 2)):
        with pytest.raises(ValueError, match="may not resize them or repeat channels"):
            TrainingImages(replace(data, preparation=other))
    with pytest.raises(ValueError, match="batch is 0; it must be at least 1"):
        TrainingImages(data).batches(batch=0, generator=seeded())
