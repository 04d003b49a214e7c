"""From an image of any mode to the pixels of a model: upright RGB, then open_clip's evaluation transform.

Training, evaluation, `mcl_clip.load` and the processor for transformers all use `to_rgb`, so that a model sees the same
pixels of a file everywhere. This file is shipped inside exported models: it needs torch, open_clip and PIL only.
"""

from collections.abc import Callable, Mapping
from typing import Any

import open_clip
from PIL import Image
from torch import Tensor

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow looks for the orientation
BACKGROUND = "white"  # under transparent pixels, as on most web pages
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def make_image_transform(preprocess_cfg: Mapping[str, Any]) -> Callable[[Any], Tensor]:
    """Create a model's evaluation transform, from a PIL image of any mode to a float tensor [3, height, width]."""
    names = ("mean", "std", "interpolation", "resize_mode", "fill_color")
    options = {name: preprocess_cfg[name] for name in names if name in preprocess_cfg}
    transform = open_clip.image_transform(preprocess_cfg["size"], is_train=False, **options)
    # open_clip resizes before it converts to RGB, which mixes indices of palettes and clips 16 bits.
    transform.transforms.insert(0, to_rgb)
    return transform  # type: ignore[no-any-return]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, turned as its EXIF orientation says.

    Transparent pixels are laid on white. Grey of 16 bits (modes `I` and `I;16`) is scaled to 8, and opaque. An upright
    RGB image without transparency comes back as it is.

    Raises:
        ValueError: for mode `F`, whose range of values is not known.
    """
    if image.mode == "F":
        raise ValueError("an image of mode F (floats) has no known range of values; scale it to 0..255, convert to L")
    if (orientation := exif_orientation(image)) != 1:
        image = image.transpose(TURNS[orientation])
        for name in METADATA:
            image.info.pop(name, None)  # or it would be turned again
    if image.mode.startswith("I"):
        # Pillow has arithmetic for two of the 16-bit modes, and would clip at 255 when converting.
        image = image if image.mode in ("I", "I;16") else image.convert("I")
        image = image.point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)  # a value of 16 bits, which would be taken for one of 8
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow has no direct conversion
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, BACKGROUND)
        opaque.paste(image, mask=image.getchannel("A"))
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, from 1 (upright) to 8; 1 where there is none, or it is damaged."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises errors of a dozen types on damaged EXIF data
        return 1
    return orientation if orientation in TURNS else 1
