"""What a trained model can do, one method each (Table 2).

B images, C channels, H x W pixels, L tokens, D token dimension, Z latent dimension, K draws.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from biglearn_vae import masks
from biglearn_vae.gaussian import DiagGaussian, normal
from biglearn_vae.patches import of_batch


class BigLearnVAE:
    """A trained network with its tokenizer.

    Wherever a method takes data `x`, it may be images (B, C, H, W) with values in [0, 1] (uint8 images are divided by
    255) or tokens (B, L, D), a batch or a single one; what comes back is images, a batch or a single one alike. Where
    it takes a mask `S`, that is boolean with True = observed: patches (B, L) or pixels (B, H, W), one for all or one
    for each; a patch counts as observed if all of its pixels are. What lies outside S has no influence. `seed` makes
    a result repeatable.

    Args:
        net: a network of `models`, unwrapped. It is put into evaluation mode.
        tokenizer: `Patchify`, or anything with its methods and sizes.
        prior: "learned", p(z | nothing observed) of the network, or "standard", N(0, I), for the ordinary VAE.
        chunk: most images that pass through the network at once, which bounds the memory.
    """

    def __init__(self, net: nn.Module, tokenizer: nn.Module, prior: str = "learned", chunk: int = 1024):
        self.net, self.prior, self.chunk = net.eval(), prior, chunk
        self.tokenizer = tokenizer.to(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def num_tokens(self) -> int:
        """L"""
        return self.net.num_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.net.grid

    @property
    def z_dim(self) -> int:
        """Z"""
        return self.net.z_dim

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.tokenizer.image_shape

    @torch.no_grad()
    def encode(self, x: Tensor, S: Tensor | None = None) -> DiagGaussian:
        """p(z | x_S), (B, Z): the posterior if everything is observed, the learned prior if nothing is.

        `.mean`, `.std` and `.sample(seed=0)` of the result are tensors.
        """
        tokens, single = self._tokens(x)
        q = self._encode(tokens, self._mask(S, len(tokens), default=True))
        return q[0] if single else q

    @torch.no_grad()
    def decode(self, z: Tensor, x: Tensor | None = None, S: Tensor | None = None) -> Tensor:
        """The mean of p(x | z), or with data of p(x_T | z, x_S), T being all that S is not.

        Observed patches come back as they are in x.

        Args:
            z: latent vectors (B, Z), or one (Z,).
            x, S: data and what is observed of it, both or neither.
        """
        if (x is None) != (S is None):
            raise ValueError("give both x and S, or neither")
        if z.ndim not in (1, 2) or z.shape[-1] != self.z_dim:
            raise ValueError(f"expected latents z of shape (B, {self.z_dim}) or ({self.z_dim},), got {tuple(z.shape)}")
        single = z.ndim == 1
        z = z.to(next(self.net.parameters())).reshape(-1, self.z_dim)
        tokens = z.new_zeros(1, self.num_tokens, self.net.token_dim) if x is None else self._tokens(x)[0]
        if len(tokens) not in (1, len(z)):
            raise ValueError(f"expected one image for each of the {len(z)} latents, or one for all, got {len(tokens)}")
        tokens = tokens.expand(len(z), -1, -1)
        images = self._complete(z, tokens, self._mask(S, len(z), default=False))
        return images[0] if single else images

    def sample(self, n: int, seed: int | None = None) -> Tensor:
        """n new images (n, C, H, W): z from the prior, then the mean of p(x | z)."""
        if n < 1:
            raise ValueError(f"the number of samples must be at least 1, got {n}")
        nothing = torch.zeros(1, *self.image_shape, device=self.device)
        prior = self.encode(nothing, torch.zeros(self.num_tokens, dtype=torch.bool))[0]
        if self.prior == "standard":
            prior = DiagGaussian.standard_like(prior)
        return self.decode(prior.sample(draws=n, seed=seed))

    def reconstruct(self, x: Tensor, S: Tensor | None = None, seed: int | None = None) -> Tensor:
        """x from its code alone: z ~ p(z | x_S) (S everything by default), then the mean of p(x | z), (B, C, H, W)."""
        return self.decode(self.encode(x, S).sample(seed=seed))

    @torch.no_grad()
    def inpaint(self, x: Tensor, S: Tensor, draws: int | None = None, seed: int | None = None) -> Tensor:
        """Complete what is missing: z ~ p(z | x_S), then the mean of p(x_T | z, x_S); observed patches are kept.

        Args:
            x: what is outside S may be anything.
            S: what is observed.
            draws: how many completions of each image, along a new leading axis: (K, B, C, H, W).
        """
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        tokens, single = self._tokens(x)
        mask = self._mask(S, len(tokens), default=True)
        q = self._encode(tokens, mask)
        count = draws or 1
        noise = normal((count, *q.mean.shape), like=q.mean, seed=seed)
        images = torch.stack([self._complete(q.sample(part), tokens, mask) for part in noise])  # (K, B, C, H, W)
        images = images[:, 0] if single else images
        return images if draws is not None else images[0]

    def _encode(self, tokens: Tensor, mask: Tensor) -> DiagGaussian:
        parts = [self.net(*part) for part in self._chunks(tokens, mask)]
        return DiagGaussian(torch.cat([q.mean for q in parts]), torch.cat([q.logvar for q in parts]))

    def _complete(self, z: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The mean of p(x_T | z, x_S) with x_S in its place, as images."""

        def complete(tokens: Tensor, mask: Tensor, z: Tensor) -> Tensor:
            return self.tokenizer.decode(torch.where(mask.unsqueeze(-1), tokens, self.net(tokens, mask, z)))

        return torch.cat([complete(*part) for part in self._chunks(tokens, mask, z)])

    def _chunks(self, *tensors: Tensor):
        return zip(*(tensor.split(self.chunk) for tensor in tensors), strict=True)

    def _tokens(self, x: Tensor) -> tuple[Tensor, bool]:
        """Images or tokens, a batch or one -> tokens (B, L, D) on the device, and whether there was no batch axis."""
        token_shape = (self.num_tokens, self.net.token_dim)
        x = x.to(self.device)
        if not x.is_floating_point() and x.dtype != torch.uint8:
            raise ValueError(
                f"expected images in [0, 1] or tokens as floating-point numbers, or uint8 images, got {x.dtype}"
            )
        x = x.float() / 255 if x.dtype == torch.uint8 else x.to(next(self.net.parameters()).dtype)
        encode: Callable[[Tensor], Tensor] = self.tokenizer.encode
        for shape, convert in ((self.image_shape, encode), (token_shape, lambda tokens: tokens)):
            if tuple(x.shape) == shape:
                return convert(x.unsqueeze(0)), True
            if x.ndim == len(shape) + 1 and tuple(x.shape[1:]) == shape and len(x):
                return convert(x), False
        raise ValueError(
            f"expected images {of_batch(self.image_shape)} or tokens {of_batch(token_shape)}, a batch or one, "
            f"got {tuple(x.shape)}"
        )

    def _mask(self, S: Tensor | None, batch: int, default: bool) -> Tensor:
        """A mask over patches or pixels, one for all or one each -> boolean (B, L); `default` everywhere without S."""
        if S is None:
            return torch.full((batch, self.num_tokens), default, device=self.device)
        if S.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask, True = observed, got {S.dtype}")
        # Patches are tried first: a mask (B, L) may look like one of pixels, (H, W).
        mask = S.to(self.device)
        if tuple(S.shape) != (batch, self.num_tokens) and tuple(S.shape[-2:]) == self.image_shape[1:]:
            mask = masks.from_pixels(mask, self.grid)
        if tuple(mask.shape) not in ((self.num_tokens,), (1, self.num_tokens), (batch, self.num_tokens)):
            raise ValueError(
                f"expected a mask of patches (L,) or (B, L), or of pixels (H, W) or (B, H, W), with B = {batch}, "
                f"L = {self.num_tokens} and H x W = {self.image_shape[1]} x {self.image_shape[2]}, got {tuple(S.shape)}"
            )
        return mask.expand(batch, -1)
