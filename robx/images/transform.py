"""A model's preprocessing as a torchvision transform, for data loaders outside robx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from robx.images.decode import resize_and_crop, to_rgb
from robx.records import Preprocessing

if TYPE_CHECKING:
    from torchvision.transforms import Compose


class UprightRgb:
    """Apply the EXIF rotation and convert to RGB, as robx decodes an image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """A PIL image of any mode -> upright RGB."""
        return to_rgb(ImageOps.exif_transpose(image), file_format=image.format)

    def __repr__(self) -> str:
        return "UprightRgb()"


class ResizeAndCrop:
    """Resize, then crop the centre, as `preprocessing` says."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, image: Image.Image) -> Image.Image:
        """An RGB image -> an RGB image of the model's input size."""
        return resize_and_crop(image, self.preprocessing)

    def __repr__(self) -> str:
        wanted = self.preprocessing
        return f"ResizeAndCrop(size={wanted.size}, crop={wanted.shape}, interpolation={wanted.interpolation!r})"


def torchvision_transform(preprocessing: Preprocessing) -> Compose:
    """PIL image -> float32 tensor (3, H, W), with exactly the pixels that robx feeds to the model.

    It can be pickled, so it serves in the workers of a DataLoader.
    """
    from torchvision.transforms import Compose, Normalize, ToTensor

    steps = (UprightRgb(), ResizeAndCrop(preprocessing), ToTensor(), Normalize(preprocessing.mean, preprocessing.std))
    return Compose(list(steps))
