"""The networks: p(z | x_S) and p(x_T | z, x_S) by one forward, with one stack of blocks or two.

    net(x, S)    -> DiagGaussian over z, (B, Z)       p(z | x_S)
    net(x, S, z) -> (B, L, D)                          the mean of p(x_T | z, x_S), with T all that is not in S
    net(x, S, z, T)                                    the same for another T

For Bernoulli observations the output is not the mean but its log-odds. Whether z is given is the paper's switch
"T = True/False" (Section 3.2.2). S is boolean, True = observed; what x holds where S is False has no influence, and no
gradient, whatever it is.

B batch, L tokens, D token dimension, d embedding dimension, Z latent dimension, r MLP ratio.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biglearn_vae import checks, masks
from biglearn_vae.gaussian import DiagGaussian
from biglearn_vae.layers import Block, Linear, init_weights, mlp, sincos_positions

# Log-variances are kept in [-LOGVAR_BOUND, LOGVAR_BOUND] by a smooth saturation, so that neither a variance nor its
# inverse overflows in float32, and so that gradients reach a saturated unit (a hard clamp would stop them).
LOGVAR_BOUND = 12.0
INITIAL_LOGVAR = -4.6  # a standard deviation of 0.11, once it is bounded
HIDDEN = ("mask", "drop")  # what becomes of positions that are not observed
# Far beyond any data: larger inputs are cut to this, since their squares would overflow in a LayerNorm.
INPUT_BOUND = 1e6


def _bounded(x: Tensor) -> Tensor:
    """Within INPUT_BOUND, or within what numbers of this type can be."""
    bound = min(INPUT_BOUND, torch.finfo(x.dtype).max)
    return x.clamp(-bound, bound)


class MaskedViT(nn.Module):
    """What both networks share: embeddings, positions, heads. A subclass says which blocks encode and which decode.

    The sequence is [z token, L x tokens]. A position that is not observed holds the mask token, and so does z while
    it is not given; type vectors distinguish z from x, and x tokens carry fixed 2-D sine-cosine positions. With
    hidden="drop", tokens that carry nothing are left out: encoding sees [z token, x_S], decoding [z, x_S, and a mask
    token for each position of T].
    """

    positions: Tensor

    if TYPE_CHECKING:  # attributes of one subclass, properties of the other

        @property
        def encoder(self) -> nn.ModuleList: ...

        @property
        def decoder(self) -> nn.ModuleList: ...

        @property
        def depth(self) -> int | tuple[int, int]: ...

    def __init__(self, grid, token_dim: int, dim: int, z_dim: int, mlp_ratio: int, hidden: str):
        super().__init__()
        token_dim, dim = checks.whole_number("token_dim", token_dim, 1), checks.whole_number("dim", dim, 1)
        z_dim, mlp_ratio = checks.whole_number("z_dim", z_dim, 1), checks.whole_number("mlp_ratio", mlp_ratio, 1)
        self.grid = checks.check_grid(grid)
        checks.check_choice("hidden", hidden, HIDDEN)
        self.token_dim, self.z_dim, self.hidden = token_dim, z_dim, hidden
        self.num_tokens = self.grid[0] * self.grid[1]
        self.token_in = Linear(token_dim, dim)
        self.latent_in = mlp(z_dim, 2 * dim, 2 * dim, dim)
        self.token_mask, self.latent_mask, self.token_type, self.latent_type = (
            nn.Parameter(0.02 * torch.randn(dim)) for _ in range(4)
        )
        self.latent_norm, self.token_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.latent_out = mlp(dim, mlp_ratio * dim, 2 * z_dim)
        self.token_out = mlp(dim, 2 * dim, token_dim)
        self.register_buffer("positions", sincos_positions(self.grid, dim), persistent=False)

    @property
    def fixed_shapes(self) -> bool:
        """Whether sequences are as long at every step, whatever is observed and asked for."""
        return self.hidden == "mask"

    @property
    def sizes(self) -> dict[str, Any]:
        """The arguments that make another such network."""
        dim = self.token_in.out_features
        block: Any = self.encoder[0]
        return dict(
            grid=self.grid,
            token_dim=self.token_dim,
            dim=dim,
            depth=self.depth,
            z_dim=self.z_dim,
            mlp_ratio=int(block.mlp[0].out_features // dim),  # of NumPy's numbers, too
            heads=block.attention.heads,
            hidden=self.hidden,
        )

    def forward(self, x: Tensor, S: Tensor, z: Tensor | None = None, T: Tensor | None = None) -> DiagGaussian | Tensor:
        """p(z | x_S), or, with z, the mean of p(x_T | z, x_S).

        Args:
            x: tokens (B, L, D).
            S: observed positions, boolean (B, L).
            z: latent vectors (B, Z), if they are given.
            T: positions asked for, boolean (B, L); by default all outside S. Only hidden="drop" uses it.

        Returns:
            p(z | x_S), or means (B, L, D). With hidden="mask" they do not depend on T: there is one at every position,
            from which those of T may be picked. With hidden="drop" there is one at each position of T, 0 elsewhere, and
            it depends on which other positions are in T.

        Raises:
            ValueError: on tensors of another shape or type. What they hold is not looked at: on a GPU that would wait
                for the device.
        """
        self._check(x, S, z, T)
        if z is None:
            return self._encode(x, S)
        return self._decode(x, S, z) if self.hidden == "mask" else self._decode_only(x, S, z, ~S if T is None else T)

    def _encode(self, x: Tensor, S: Tensor) -> DiagGaussian:
        """p(z | x_S)."""
        index, valid = masks.positions(S) if self.hidden == "drop" else (None, None)
        # Of the output of the last block only the z token is used.
        latent = _through(self.encoder, self._embed(x, S, None, index), 1, valid, self.fixed_shapes)[:, 0]
        # The code and its KL stay in full precision, whatever the blocks compute in.
        with torch.autocast(x.device.type, enabled=False):
            mean, logvar = self.latent_out(self.latent_norm(latent)).chunk(2, dim=-1)
        return DiagGaussian(mean, LOGVAR_BOUND * torch.tanh(logvar / LOGVAR_BOUND))

    def _decode(self, x: Tensor, S: Tensor, z: Tensor) -> Tensor:
        """Means at every position, (B, L, D)."""
        sequence = _through(self.decoder, self._embed(x, S, z))
        return self.token_out(self.token_norm(sequence[:, 1:])).to(x.dtype)

    def _decode_only(self, x: Tensor, S: Tensor, z: Tensor, T: Tensor) -> Tensor:
        """Means at T alone, (B, L, D), from a sequence of z, T and S."""
        index, valid = masks.positions(T, S)
        asked = int(T.sum(-1).max()) if len(T) else 0  # come first; the last block and the head compute these alone
        sequence = _through(self.decoder, self._embed(x, S, z, index), 1 + asked, valid, steady=False)
        mean = self.token_out(self.token_norm(sequence[:, 1:])).to(x.dtype)  # (B, asked, D)
        index = index[:, :asked]
        mean = mean.masked_fill(~T.gather(1, index).unsqueeze(-1), 0)
        return torch.zeros_like(x).scatter(1, index.unsqueeze(-1).expand_as(mean), mean)

    def _embed(self, x: Tensor, S: Tensor, z: Tensor | None, index: Tensor | None = None) -> Tensor:
        """The sequence (B, 1 + n, d) of z and the tokens of x (B, L, D) at the positions of `index` (B, n), or all."""
        positions = self.positions
        if index is not None:
            x = x.gather(1, index.unsqueeze(-1).expand(-1, -1, self.token_dim))
            S, positions = S.gather(1, index), positions[index]
        seen = S.unsqueeze(-1)  # (B, n, 1)
        # Hidden tokens are zeroed before the matrix as well: a NaN among them must not reach its gradient.
        x = _bounded(x.masked_fill(~seen, 0))
        tokens = torch.where(seen, self.token_in(x), self.token_mask)
        tokens = tokens + positions.to(tokens.dtype) + self.token_type
        latent = self.latent_mask.expand(len(x), -1) if z is None else self.latent_in(_bounded(z))
        return torch.cat([(latent + self.latent_type).unsqueeze(1), tokens], dim=1)

    def _init_weights(self) -> None:
        self.apply(init_weights)
        # Pixels in [0, 1] have a root mean square of about 1/2: with this gain a token enters with unit scale, like its
        # position. Xavier's would make it a fifth of that at D = 4, and content a small part of what attention sees.
        nn.init.normal_(self.token_in.weight, std=2 / math.sqrt(self.token_dim))
        # At first the mean of z varies by less than a tenth from image to image. Under unit noise nothing of that would
        # reach the decoder, which would learn to do without z before z says anything.
        last: Any = self.latent_out[-1]
        nn.init.constant_(last.bias[self.z_dim :], INITIAL_LOGVAR)

    def _check(self, x: Tensor, S: Tensor, z: Tensor | None, T: Tensor | None) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"expected floating-point tokens, pixels in [0, 1], got {checks.described(x)}")
        expected = (*x.shape[:1], self.num_tokens, self.token_dim)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"expected tokens x of shape (B, {self.num_tokens}, {self.token_dim}), got {tuple(x.shape)}"
            )
        for name, mask in (("S", S), ("T", S if T is None else T)):
            if not checks.is_mask(mask) or tuple(mask.shape) != expected[:2]:
                raise ValueError(
                    f"expected a boolean mask {name} of shape {expected[:2]}, got {checks.described(mask)}"
                )
        if z is not None and (not isinstance(z, Tensor) or tuple(z.shape) != (len(x), self.z_dim)):
            raise ValueError(f"expected latents z of shape {(len(x), self.z_dim)}, got {checks.described(z)}")
        dtype = self.token_in.weight.dtype
        for name, value in (("tokens x", x), ("latents z", z)):
            if value is not None and value.dtype != dtype and not torch.is_autocast_enabled(value.device.type):
                raise ValueError(f"expected {name} in the network's {dtype}, got {value.dtype}: {name[-1]}.to(...)")


class UniversalViT(MaskedViT):
    """One stack of blocks that encodes and decodes: the universal model p_Xi(x_T, z_T | z_-T, x_S) (Fig. 1b, Eq. 7).

    Args:
        grid: rows and columns of tokens; L is their product.
        token_dim: D.
        dim: d, a multiple of 4 and of `heads`.
        depth: number of blocks.
        z_dim: Z.
        mlp_ratio: r.
        heads: attention heads; by default one for each 64 dimensions, or fewer where that does not divide d. No
            parameter count depends on it.
        hidden: "mask", the paper's: a hidden position holds the mask token; or "drop": it is left out. That is less
            work, most of all if |S| and |T| are the same for a whole batch (`MaskSampler(ratios_per="step")`).

    Raises:
        ValueError: on sizes that do not fit each other.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        token_dim: int,
        dim: int,
        depth: int,
        z_dim: int,
        mlp_ratio: int = 2,
        heads: int | None = None,
        hidden: str = "mask",
    ):
        super().__init__(grid, token_dim, dim, z_dim, mlp_ratio, hidden)
        self.blocks = _stack(depth, dim, heads, mlp_ratio)
        self._init_weights()

    @property
    def encoder(self) -> nn.ModuleList:
        return self.blocks

    decoder = encoder

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


class TwoStackViT(MaskedViT):
    """An encoder stack p_Phi(z | x_S) and a decoder stack p_Theta(x_T | z, x_S) on shared embeddings (Fig. 1a, Eq. 6).

    It has as many parameters as a universal model with the same number of blocks in all.

    Args:
        depth: number of blocks of the encoder and of the decoder, such as (4, 4). The others: see `UniversalViT`.

    Raises:
        ValueError: on sizes that do not fit each other.
    """

    encoder: nn.ModuleList
    decoder: nn.ModuleList

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        token_dim: int,
        dim: int,
        depth: tuple[int, int],
        z_dim: int,
        mlp_ratio: int = 2,
        heads: int | None = None,
        hidden: str = "mask",
    ):
        super().__init__(grid, token_dim, dim, z_dim, mlp_ratio, hidden)
        if not isinstance(depth, Sequence) or len(depth) != 2:
            raise ValueError(f"depth must be two numbers, blocks of the encoder and of the decoder, got {depth}")
        self.encoder, self.decoder = (_stack(blocks, dim, heads, mlp_ratio) for blocks in depth)
        self._init_weights()

    @property
    def depth(self) -> tuple[int, int]:
        """Number of blocks of the encoder and of the decoder."""
        return len(self.encoder), len(self.decoder)


def _through(
    blocks: nn.ModuleList,
    sequence: Tensor,
    queries: int | None = None,
    valid: Tensor | None = None,
    steady: bool = True,
) -> Tensor:
    """The sequence (B, 1 + n, d) after these blocks; with `queries`, only its first tokens, (B, queries, d).

    The last block then computes these alone. `valid` (B, n) says which of the tokens after z are seen; z always is.
    `steady`: see `Attention`.
    """
    valid = None if valid is None else F.pad(valid, (1, 0), value=True)
    update = None
    for block in blocks[:-1]:
        sequence, update = block(sequence, update=update, valid=valid, steady=steady)
    sequence, update = blocks[-1](sequence, update=update, queries=queries, valid=valid, steady=steady)
    return sequence + update


def _stack(depth: int, dim: int, heads: int | None, mlp_ratio: int) -> nn.ModuleList:
    if isinstance(depth, Sequence):
        raise ValueError(f"depth must be one number of blocks for each stack, got {depth!r}")
    checks.whole_number("depth", depth, 1)
    if heads is None:  # one for each 64 dimensions, as far as that divides them
        heads = max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)
    heads = checks.whole_number("heads", heads, 1)
    return nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))


def count_parameters(net: nn.Module) -> int:
    """Number of parameters; all of a network of this module are trained."""
    return sum(p.numel() for p in net.parameters())
