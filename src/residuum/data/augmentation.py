"""Training batches: all images in one tensor on the device, from which shuffled and augmented batches are gathered."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from residuum.data.images import ImageSet, Labels
from residuum.names import unknown

AUGMENTATIONS = ("none", "crop_flip")
PAD = 4  # pixels on each side


class TrainingImages:
    """The training images on a device as bytes, rows of whole pixels, and the batches of an epoch gathered from them.

    "crop_flip" pads every image by 4 pixels on each side with black (pixel value 0, before standardisation), takes a
    random window of the old size, and mirrors it left to right with probability 1/2. The padded images and their
    mirrored copies are stored once; a view with overlapping strides shows the windows at all positions, so that a batch
    is one gather of windows, standardised afterwards. Memory: 2 (rows + 8)(columns + 8) channels bytes for each image.

    Without augmentation the batches are those of `residuum.data.batches` in another order, bit for bit.

    Args:
        data: The images.
        augment: "none" or "crop_flip".
        device: Where the images are kept and the batches are made.
        dtype: Number format of the batches; they are standardised in float32.

    Raises:
        ValueError: If there are no images, the augmentation is not known, or the preparation resizes or repeats
            channels.

    Source: P2 (Hauser 2019), section 3: random horizontal flip, random crop after zero-padding 4 pixels on each side,
    on CIFAR-10 only. P1 (Jastrzebski et al. 2018): flip and translation, taken as the same.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        augment: str = "none",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise unknown("augmentation", augment, AUGMENTATIONS)
        count, channels, rows, columns = data.images.shape
        preparation = data.preparation
        if count == 0:
            raise ValueError(f"the {data.split} split of {data.name} has no images")
        if len(preparation.mean) != channels or preparation.size not in (None, (rows, columns)):
            raise ValueError(
                f"training reads the images of {data.name} as they are; their preparation may not resize them or "
                "repeat channels"
            )
        self._augmented, self._dtype, self._shape = augment == "crop_flip", dtype, (rows, columns, channels)
        pad = PAD if self._augmented else 0
        images = data.images.to(device).permute(0, 2, 3, 1)
        copies = (images, images.flip(2)) if self._augmented else (images,)
        pixels = images.new_zeros(len(copies) * count, rows + 2 * pad, columns + 2 * pad, channels)
        for part, copy in zip(pixels.split(count), copies, strict=True):
            part[:, pad : pad + rows, pad : pad + columns] = copy
        self._width, self._stride = pixels.shape[2], pixels.shape[1] * pixels.shape[2]  # of a row, of an image
        windows = (len(pixels) - 1) * self._stride + 2 * pad * (self._width + 1) + 1
        self._windows = pixels.as_strided((windows, rows, columns * channels), (channels, self._width * channels, 1))
        self._white = preparation.white
        # One value for each number of a row of pixels: three values for each pixel would make loops of length three.
        self._mean, self._std = (
            torch.tensor(v, device=device).repeat(columns) for v in (preparation.mean, preparation.std)
        )
        self._labels = data.labels.to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def batches(
        self, *, batch: int, generator: torch.Generator, skip: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Float[Tensor, "example channel row column"], Labels]]:
        """The batches of one epoch, in a new order with new windows, in channels-last memory.

        All that is random is drawn by this call, before the first batch: the order, then the windows. So the state of
        the generator before the call and the number of batches already used say where a training stands.

        Args:
            batch: Images in each batch; the last may have fewer.
            generator: Source of randomness, on the CPU whatever the device.
            skip: Batches to leave out at the beginning; the others are what they would have been.
            part: (i, n): of every batch only the i-th of n parts, for n processes that share each batch. Where the
                batch is no multiple of n, the first parts have one image more; a part can be empty.

        Raises:
            ValueError: If `batch` is below 1.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        order = torch.randperm(len(self), generator=generator)
        windows = order * self._stride
        if self._augmented:
            side = 2 * PAD + 1
            place = torch.randint(2 * side * side, (len(self),), generator=generator)
            mirrored, down, right = place // side**2, place // side % side, place % side
            windows += mirrored * len(self) * self._stride + down * self._width + right
        device, (index, parts) = self._labels.device, part
        batches = zip(order.to(device).split(batch), windows.to(device).split(batch), strict=True)
        return (
            (self._gather(w.tensor_split(parts)[index]), self._labels[o.tensor_split(parts)[index]])
            for number, (o, w) in enumerate(batches)
            if number >= skip
        )

    def _gather(self, windows: Int64[Tensor, " example"]) -> Float[Tensor, "example channel row column"]:
        """Windows as standardised images. The same operations as in `Preparation`, hence the same bits."""
        x = self._windows.index_select(0, windows).float()
        x = x.div_(self._white).sub_(self._mean).div_(self._std).to(self._dtype)
        return x.view(-1, *self._shape).permute(0, 3, 1, 2)
