"""Changes of color and sharpness of a view of an image by torchvision; all randomness is from the name of the draw."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional

from mcl_clip.core.distributed import Name, permutation, random_words

BLUR_SIGMA_PX = (0.1, 2.0)  # SimCLR, arXiv 2002.05709, appendix A
SOLARIZE_ABOVE = 128


def uniform_numbers(count: int, *name: Name) -> Float64[np.ndarray, "count"]:
    """Draw numbers from 0 to 1, named."""
    numbers: np.ndarray = (random_words(count, *name) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


@dataclass(frozen=True, kw_only=True)
class ColorChanges:
    """Random changes of brightness, contrast, saturation and hue, gray, blur and solarization, in this order.

    Attributes:
        jitter: Largest changes of brightness, contrast and saturation, as a share, and of the hue, as a share of the
            circle; they come in random order.
        jitter_probability: Probability of any of these changes.
        grayscale: Probability of gray.
        blur: Probability of a Gaussian blur.
        solarize: Probability that values of 128 and above are inverted.
    """

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    jitter_probability: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0

    def acts(self) -> bool:
        """Return whether any change has a probability above 0."""
        return bool((any(self.jitter) and self.jitter_probability) or self.grayscale or self.blur or self.solarize)

    def __call__(self, pixels: UInt8[Tensor, "3 height width"], *name: Name) -> UInt8[Tensor, "3 height width"]:
        """Change a view; `name` identifies the draw."""
        uniform = uniform_numbers(9, *name, "colors")
        if uniform[0] < self.jitter_probability:
            for change in permutation(4, *name, "order of colors").tolist():
                pixels = self._jitter(pixels, change, float(uniform[1 + change]))
        if uniform[5] < self.grayscale:
            pixels = functional.rgb_to_grayscale(pixels, num_output_channels=3)
        if uniform[6] < self.blur:
            pixels = _blur(pixels, float(uniform[7]))
        if uniform[8] < self.solarize:
            pixels = functional.solarize(pixels, threshold=SOLARIZE_ABOVE)
        return pixels

    def _jitter(self, pixels: Tensor, change: int, uniform: float) -> Tensor:
        strength = self.jitter[change]
        if not strength:
            return pixels
        amount = strength * (2 * uniform - 1)
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
        changed: Tensor = (
            functional.adjust_hue(pixels, amount) if change == 3 else adjust[change](pixels, max(0.0, 1 + amount))
        )
        return changed


def _blur(pixels: Tensor, uniform: float) -> Tensor:
    """Blur by a Gaussian, whose kernel is about a tenth of the image."""
    low, high = BLUR_SIGMA_PX
    sigma = low + (high - low) * uniform
    kernel = max(3, max(pixels.shape[-2:]) // 10 // 2 * 2 + 1)
    blurred: Tensor = functional.gaussian_blur(pixels, [kernel, kernel], [sigma, sigma])
    return blurred
