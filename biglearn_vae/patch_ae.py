"""PatchAE: an auto-encoder of single patches, the tokenizer of the two-stage pipeline (Appendix B).

B batch, C channels, H x W pixels, P patch size, L = (H/P)(W/P) tokens, D numbers per token, N patches.

The paper gives its parameter count, 2.3193 x 2^20; that this is the architecture behind it is inferred from the count.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from biglearn_vae import checks, states
from biglearn_vae.patches import Patchify

PATCHES_AT_ONCE = 2**13  # that pass through the layers at once, which bounds the memory
ON_CPU = 2**9  # the same on CPUs: intermediate results then stay in the cache


class Residual(nn.Sequential):
    """x + conv(ReLU(conv(ReLU(x)))), without biases."""

    def __init__(self, width: int):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PatchAE(nn.Module):
    """Auto-encoder of single patches; `encode` and `decode` are used like those of `Patchify`, with codes as tokens.

    With patches of 16 x 16 x 3 and a width of 128 it has 2,432,003 parameters, and a code is 128 x 2 x 2 = 512 numbers.
    A patch size that can be halved fewer than three times takes fewer strided layers. Codes are standardised with
    statistics that `fit_statistics` takes from training images; they are kept with the weights.

    Args:
        image_size: height and width in pixels, or one number for both.
        patch_size: side of a patch in pixels; an even number that divides both sides of the image.
        channels: channels per pixel.
        width: channels of the convolutions, an even number; D is `width` times the cells of the smallest map.

    Raises:
        ValueError: on sizes outside these.
    """

    code_mean: Tensor
    code_std: Tensor

    def __init__(
        self, *, image_size: int | tuple[int, int] = 128, patch_size: int = 16, channels: int = 3, width: int = 128
    ):
        super().__init__()
        self.patches = Patchify(image_size, patch_size, channels)
        if patch_size % 2:
            raise ValueError(f"patch_size must be even for a PatchAE, got {patch_size}")
        width = checks.whole_number("width", width, 2)
        if width % 2:
            raise ValueError(f"width must be an even number from 2 on, got {width}")
        self.sizes = self.patches.sizes | {"width": width}
        self.image_shape, self.grid = self.patches.image_shape, self.patches.grid
        self.patch_size, self.num_tokens = self.patches.patch_size, self.patches.num_tokens
        halvings = next(n for n in (3, 2, 1) if patch_size % 2**n == 0)
        self.map_shape = (width, patch_size // 2**halvings, patch_size // 2**halvings)  # of a code, before it is flat
        self.token_dim = width * self.map_shape[1] ** 2
        widths = [*[channels, width // 2, width][:halvings], width]  # of the maps, from the pixels to the smallest
        self.encoder = nn.Sequential(
            *_strided(nn.Conv2d, widths),
            nn.Conv2d(width, width, 3, padding=1),
            Residual(width),
            Residual(width),
            nn.Conv2d(width, width, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1),
            Residual(width),
            Residual(width),
            *_strided(nn.ConvTranspose2d, widths[::-1]),
        )
        self.apply(_init)
        last: Any = self.decoder[-1]
        nn.init.constant_(last.bias, 0.5)  # pixels are in [0, 1]
        self.register_buffer("code_mean", torch.zeros(self.token_dim))
        self.register_buffer("code_std", torch.ones(self.token_dim))

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (N, C, P, P) -> their reconstructions (N, C, P, P), which training compares with them."""
        return self.decoder(self.encoder(patches))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) with values in [0, 1] -> standardised codes (B, L, D)."""
        pixels = images.to(self.code_std)  # the network's precision may be another; codes are returned in it
        codes = self._codes(self.patches.cut(pixels).flatten(0, 1))
        codes = ((codes - self.code_mean) / self.code_std).view(len(images), self.num_tokens, self.token_dim)
        return codes.to(images) if images.is_floating_point() else codes

    def decode(self, tokens: Tensor) -> Tensor:
        """Standardised codes (B, L, D) -> images (B, C, H, W) in [0, 1]."""
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != (self.num_tokens, self.token_dim):
            raise ValueError(
                f"expected tokens of shape (B, {self.num_tokens}, {self.token_dim}), got {tuple(tokens.shape)}"
            )
        codes = (tokens.to(self.code_std) * self.code_std + self.code_mean).view(-1, *self.map_shape)
        patches = torch.cat([self.decoder(part) for part in _split(codes)])
        return self.patches.join(patches.unflatten(0, (len(tokens), self.num_tokens))).clamp(0, 1).to(tokens)

    def _codes(self, patches: Tensor) -> Tensor:
        """Patches (N, C, P, P) -> codes (N, D), not standardised."""
        return torch.cat([self.encoder(part).flatten(1) for part in _split(patches)])

    @torch.no_grad()
    def fit_statistics(self, images: Iterable[Tensor]) -> None:
        """Take the mean and the standard deviation of each number of a code over all patches of these images.

        Args:
            images: batches (B, C, H, W). Patches with a NaN are left out; a number of the code that never varies is
                only centred.

        Raises:
            ValueError: if there is no patch.
        """
        device = self.code_mean.device
        total, squares = (torch.zeros(self.token_dim, dtype=torch.float64, device=device) for _ in range(2))
        count = 0
        for batch in images:
            codes = self._codes(self.patches.cut(batch.to(device)).flatten(0, 1)).double()
            codes = codes[~codes.isnan().any(-1)]
            total, squares, count = total + codes.sum(0), squares + codes.square().sum(0), count + len(codes)
        if not count:
            raise ValueError("expected images with at least one patch to take statistics of, got none")
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.code_mean.copy_(mean)
        self.code_std.copy_(torch.where(std > 1e-6 * mean.abs().clamp(min=1), std, 1))

    def state(self) -> dict[str, Any]:
        """Sizes, weights and statistics, for `from_state`: tensors and plain values."""
        return states.of(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], image_size: int | tuple[int, int] | None = None) -> "PatchAE":
        """Make the PatchAE that `state` described, frozen, for images of its size or another.

        Raises:
            ValueError: if it is not such a description.
        """
        return states.rebuilt(cls, state, **({} if image_size is None else {"image_size": image_size}))


def _split(patches: Tensor) -> tuple[Tensor, ...]:
    """Parts of patches, or codes, that pass through the layers at once."""
    return patches.split(ON_CPU if patches.device.type == "cpu" else PATCHES_AT_ONCE)


def _init(module: nn.Module) -> None:
    """Normal weights that keep the variance from layer to layer, and blocks that at first do nothing.

    With PyTorch's own it shrinks in every layer, and the first 500 steps reach 20 dB instead of 24.
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        inputs: float = module.in_channels * module.kernel_size[0] ** 2
        if isinstance(module, nn.ConvTranspose2d):
            inputs /= module.stride[0] ** 2  # so many inputs meet in a pixel
        nn.init.normal_(module.weight, std=inputs**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Residual):
        last: Any = module[-1]
        nn.init.zeros_(last.weight)


def _strided(layer: type[nn.Module], widths: list[int]) -> list[nn.Module]:
    """4 x 4 layers of stride 2 from width to width, with ReLUs between."""
    result: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        result += [layer(before, after, 4, stride=2, padding=1), nn.ReLU()]
    return result[:-1]
