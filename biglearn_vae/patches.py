"""Images as sequences of patches, one token each.

B batch, C channels, H x W pixels, P patch size, L = (H/P)(W/P) tokens, D = P P C numbers per token.
"""

from einops import rearrange
from torch import Tensor, nn

from biglearn_vae import checks


class Patchify(nn.Module):
    """Cut images into square patches and put them back; `decode` is the exact inverse of `encode`.

    Tokens run row by row from the top left. Within a token the order is (row, column, channel).

    Args:
        image_size: height and width in pixels, or one number for both.
        patch_size: side of a patch in pixels; it must divide both sides of the image.
        channels: channels per pixel.

    Attributes:
        sizes: the arguments that make another such tokenizer.

    Raises:
        ValueError: if the sizes are not whole numbers, or the patch size does not divide the image.
    """

    def __init__(self, image_size: int | tuple[int, int], patch_size: int, channels: int = 3):
        super().__init__()
        height, width = checks.height_and_width("image_size", image_size)
        patch_size = checks.whole_number("patch_size", patch_size)
        channels = checks.whole_number("channels", channels, 1)
        if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size must divide the image: a {height} x {width} image cannot be cut into "
                f"patches of {patch_size} x {patch_size}"
            )
        self.patch_size = patch_size
        self.sizes = dict(image_size=(height, width), patch_size=patch_size, channels=channels)
        self.image_shape = (channels, height, width)
        self.grid = (height // patch_size, width // patch_size)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.token_dim = patch_size * patch_size * channels

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, L, D)."""
        return rearrange(self.cut(images), "b l c p1 p2 -> b l (p1 p2 c)")

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, D) -> images (B, C, H, W)."""
        _check_shape("tokens", tokens, (self.num_tokens, self.token_dim))
        p = self.patch_size
        return self.join(rearrange(tokens, "b l (p1 p2 c) -> b l c p1 p2", p1=p, p2=p))

    def cut(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> patches (B, L, C, P, P)."""
        _check_shape("images", images, self.image_shape)
        p = self.patch_size
        return rearrange(images, "b c (h p1) (w p2) -> b (h w) c p1 p2", p1=p, p2=p)

    def join(self, patches: Tensor) -> Tensor:
        """Patches (B, L, C, P, P) -> images (B, C, H, W)."""
        _check_shape("patches", patches, (self.num_tokens, self.image_shape[0], self.patch_size, self.patch_size))
        return rearrange(patches, "b (h w) c p1 p2 -> b c (h p1) (w p2)", h=self.grid[0])


def _check_shape(name: str, batch: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless each of the batch is of this shape."""
    if not hasattr(batch, "shape") or tuple(batch.shape[1:]) != shape:  # NumPy arrays will do
        raise ValueError(f"expected {name} of shape {of_batch(shape)}, got {checks.described(batch)}")


def of_batch(shape: tuple[int, ...]) -> str:
    """(3, 32, 32) -> "(B, 3, 32, 32)", for messages."""
    return f"(B, {', '.join(map(str, shape))})"
