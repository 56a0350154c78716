"""Big-learning variational auto-encoders: one vision transformer that samples, encodes, reconstructs and completes.

>>> import biglearn_vae as blv
>>> vae = blv.load("outputs/digits-tiny-biglearn_u-seed0")
>>> x = blv.images("digits", split="test")[:8]
>>> S = blv.masks.random(8, vae.num_tokens, ratio=0.5, seed=0)
>>> completed = vae.inpaint(x, S, seed=0)
"""

from biglearn_vae import data, evaluation, figures, masks, observations, probe
from biglearn_vae.capabilities import BigLearnVAE
from biglearn_vae.commands import run_script
from biglearn_vae.config import compose
from biglearn_vae.data import Batches, ImageSet, images
from biglearn_vae.distributed import StepRandom, World
from biglearn_vae.gaussian import DiagGaussian
from biglearn_vae.losses import ELBO, BigLearnELBO, PatchAELoss
from biglearn_vae.masks import MaskSampler
from biglearn_vae.models import TwoStackViT, UniversalViT, count_parameters
from biglearn_vae.optim import Optim
from biglearn_vae.patch_ae import PatchAE
from biglearn_vae.patches import Patchify
from biglearn_vae.runs import load, summaries
from biglearn_vae.trainer import Trainer, TrainingError

__version__ = "0.1.0"
__all__ = [
    "ELBO",
    "Batches",
    "BigLearnELBO",
    "BigLearnVAE",
    "DiagGaussian",
    "ImageSet",
    "MaskSampler",
    "Optim",
    "PatchAE",
    "PatchAELoss",
    "Patchify",
    "StepRandom",
    "Trainer",
    "TrainingError",
    "TwoStackViT",
    "UniversalViT",
    "World",
    "compose",
    "count_parameters",
    "data",
    "evaluation",
    "figures",
    "images",
    "load",
    "masks",
    "observations",
    "probe",
    "run_script",
    "summaries",
]
