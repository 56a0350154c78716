"""A model whose every answer is known in closed form."""

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from biglearn_vae import BigLearnVAE, DiagGaussian, Patchify
from biglearn_vae.gaussian import generator

Z = 3


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(torch.device("cpu"), seed))


class LinearGaussian(nn.Module):
    """The exact network of x_l = w_l z_{l mod Z} + b_l + sigma eps with z ~ N(0, I).

    Each token depends on one latent dimension, so that p(z | x_S) is diagonal for every S. With `shift` and `widen`
    the encoding of the sets that `inexact` names, by default the full one, is made inexact: so many standard deviations
    off and so much wider.
    """

    grid, num_tokens, token_dim, z_dim = (2, 3), 6, 4, Z
    variance = 0.2

    def __init__(self, shift: float = 0.0, widen: float = 1.0, inexact=lambda S: S.all(-1)):
        super().__init__()
        self.shift, self.widen, self.inexact = shift, widen, inexact
        self.w = nn.Parameter(0.6 * noise(0, 6, 4).double())
        self.b = noise(1, 6, 4).double()
        self.of_dim = torch.eye(Z, dtype=torch.float64).repeat(2, 1)  # (L, Z): dimension l mod Z

    def forward(self, x: Tensor, S: Tensor, z: Tensor | None = None, T=None) -> DiagGaussian | Tensor:
        if z is not None:
            return (z @ self.of_dim.T).unsqueeze(-1) * self.w + self.b
        seen = S.double()
        precision = 1 + seen * self.w.square().sum(-1) @ self.of_dim / self.variance
        projection = (self.w * (x - self.b)).sum(-1).masked_fill(~S, 0) @ self.of_dim / self.variance
        mean, var = projection / precision, 1 / precision
        wrong = self.inexact(S).unsqueeze(-1)
        return DiagGaussian(
            torch.where(wrong, mean + self.shift * var.sqrt(), mean),
            torch.where(wrong, var * self.widen**2, var).log(),
        )

    def model(self, prior: str = "learned") -> BigLearnVAE:
        return BigLearnVAE(self, Patchify((4, 6), 2, 1), prior, self.variance, chunk=100_000)

    def data(self, count: int, seed: int = 2) -> Tensor:
        with torch.no_grad():
            x = self(None, None, noise(seed, count, Z).double())
        return x + self.variance**0.5 * noise(seed + 1, count, 6, 4).double()

    def log_prob(self, x: Tensor, T: Tensor, S: Tensor) -> Tensor:
        """The truth, log p(x_{S u T}) - log p(x_S) from the marginals of the joint normal distribution of x."""
        joint = self.joint()

        def marginal(one: Tensor, mask: Tensor) -> Tensor:
            kept = mask.repeat_interleave(4)
            if not kept.any():
                return torch.zeros((), dtype=torch.float64)
            part = MultivariateNormal(joint.loc[kept], joint.covariance_matrix[kept][:, kept])
            return part.log_prob(one.flatten()[kept])

        return torch.stack([marginal(x[i], S[i] | T[i]) - marginal(x[i], S[i]) for i in range(len(x))])

    @torch.no_grad()
    def joint(self) -> MultivariateNormal:
        """Of all numbers of x, (L D,)."""
        W = (self.w.unsqueeze(-1) * self.of_dim.unsqueeze(1)).flatten(0, 1)  # (L D, Z)
        return MultivariateNormal(self.b.flatten(), W @ W.T + self.variance * torch.eye(24).double())

    def conditional(self, x: Tensor, S: Tensor) -> MultivariateNormal:
        """The truth, p(x_hid | x_S) of one x (L, D), S (L,), over the hidden numbers in order."""
        joint, seen = self.joint(), S.repeat_interleave(4)
        mean, cov = joint.loc, joint.covariance_matrix
        gain = torch.linalg.solve(cov[seen][:, seen], cov[seen][:, ~seen]).T
        return MultivariateNormal(
            mean[~seen] + gain @ (x.flatten()[seen] - mean[seen]),
            cov[~seen][:, ~seen] - gain @ cov[seen][:, ~seen],
        )
