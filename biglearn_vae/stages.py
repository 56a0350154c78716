"""What `scripts/train.py` trains, measures and reports: a BigLearn-VAE, or the PatchAE that makes its tokens."""

import inspect
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from biglearn_vae import checkpoint, checks, config, evaluation, runs, samples
from biglearn_vae import figures as pictures
from biglearn_vae.capabilities import BigLearnVAE, check_calls, observations_of, variance_of
from biglearn_vae.data import Splits, parts
from biglearn_vae.files import read_json, write_text
from biglearn_vae.loggers import Pictures
from biglearn_vae.losses import BigLearnELBO, has_model, name_of
from biglearn_vae.observations import Observations, is_own
from biglearn_vae.patch_ae import PatchAE

if TYPE_CHECKING:
    from omegaconf import DictConfig

FIGURES_PAGE = Path("figures") / "index.html"
WHOLE_IMAGES = "This model was trained on whole images alone (method=vae): what it makes of parts it has not learned."
FIRST_FIGURES = ("inference", "inpainting")  # drawn at the end of each run


class Stage(Protocol):
    """What `commands.train` needs to know of what it trains.

    Attributes:
        cfg: the settings of the run.
        net, loss: what the Trainer takes, the network on the training device.
        monitor: the number of `validate` whose largest value makes the best checkpoint.
        metrics: the numbers that `validate` always gives.
        metadata: what else every checkpoint's metadata is to hold.
    """

    cfg: "DictConfig"
    net: nn.Module
    loss: Any
    monitor: str
    metrics: tuple[str, ...]
    metadata: dict[str, Any]

    def __init__(self, cfg: "DictConfig", run: Path, device: torch.device): ...

    def transform(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> what the loss takes as a batch."""

    def validate(self, net: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Numbers and pictures of the validation images, by name."""

    def finish(self, run: Path, splits: Splits) -> tuple[dict[str, Any], dict[str, Any]]:
        """Measure and draw the best checkpoint of a run; returns the checkpoint, and numbers for the summary."""

    @staticmethod
    def report(summary: dict[str, Any], run: Path) -> str:
        """The numbers of a summary as a small table, where everything is, and what to type next."""


def of(cfg: "DictConfig") -> type[Stage]:
    """The one of the two stages that these settings train."""
    return PatchAEStage if cfg.method.name == config.PATCH_AE else VAEStage


class VAEStage(Stage):
    """A BigLearn-VAE, on pixels or on the codes of a PatchAE, which then is part of every checkpoint."""

    monitor = "valid/elbo"
    metrics = ("valid/elbo", "valid/joint_elbo", "valid/joint_reconstruction", "valid/joint_kl", "valid/psnr_0.5")

    def __init__(self, cfg: "DictConfig", run: Path, device: torch.device):
        self.cfg, self.device = cfg, device
        self.tokens = config.tokenizer(cfg, _own_tokenizer(cfg, run)).to(device)
        self.net = config.network(cfg, self.tokens).to(device)
        check_calls(self.net)
        self.loss = config.objective(cfg)
        observed = observations_of(self.loss)
        if isinstance(self.tokens, PatchAE) and not observed.scaled:
            raise ValueError(
                f"codes of a PatchAE (tokens=patch_ae) are no {observed.name} observations: leave these out"
            )
        fresh = not checkpoint.is_resumable(run / "checkpoints")  # which have weights of its own
        if fresh and cfg.get("init_from") is not None:
            self._start_from(cfg.init_from, observed)
        self.metadata = {"tokenizer": self.tokens.state()} if isinstance(self.tokens, PatchAE) else {}
        self.metadata["has_model"] = has_model(self.loss)
        self.metadata["observations"] = runs.OWN_OBSERVATIONS if is_own(observed) else observed.name
        self.metadata["variance"] = float(variance_of(self.loss))  # an objective may have a beta of its own

    def _start_from(self, source: str, observed: Observations) -> None:
        """Take the weights of a trained model, which may be of another method and of images of another size."""
        other = runs.load(source, "cpu")
        checkpoint.load_weights(self.net, other.net.state_dict(), source)
        heads, own = (getattr(net, "sizes", {}).get("heads") for net in (other.net, self.net))
        if heads != own:  # of which the weights tell nothing
            raise ValueError(f"{source} has {heads} attention heads, these settings have {own}: model.heads={heads}")
        if not _same_codes(other.tokenizer, self.tokens):
            checks.warn(
                f"{source} was trained on tokens of another kind or another PatchAE than that of tokens=: its weights "
                "are of little use for these"
            )
        if other.observations.output != observed.output:
            checks.warn(
                f"{source} was trained for {other.observations.name} observations, these settings are for "
                f"{observed.name} ones, of which the last layer says something else: that has to be learned anew"
            )

    def transform(self, images: Tensor) -> Tensor:
        return self.tokens.encode(images)

    def validate(self, net: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        vae = BigLearnVAE.of(net, self.tokens, self.loss)
        return validate(vae, images, self.loss, self.cfg.evaluation.valid_draws)

    def finish(self, run: Path, splits: Splits) -> tuple[dict[str, Any], dict[str, Any]]:
        vae, state, path = runs.load_with_state(run, str(self.device), "best")
        measured = measure(vae, self.loss, splits, self.cfg.evaluation)
        if read_json(run / runs.FILES["train"]).get("best_step") != state["step"]:  # others are of an older network
            for older in (run / FIGURES_PAGE).parent.glob("*.png"):
                older.unlink()
        draw(vae, splits, run, FIRST_FIGURES, f"{path.name} of step {state['step']}")
        return state, measured

    @staticmethod
    def report(summary: dict[str, Any], run: Path) -> str:
        return report(summary, run)


def _same_codes(one: nn.Module, other: nn.Module) -> bool:
    """Whether two tokenizers make the same numbers of a patch."""
    weights, others = one.state_dict(), other.state_dict()
    alike = type(one) is type(other) and weights.keys() == others.keys()
    return alike and all(torch.equal(weights[name], value.to(weights[name])) for name, value in others.items())


def _own_tokenizer(cfg: "DictConfig", run: Path) -> dict[str, Any] | None:
    """The state of the PatchAE that a run was started with, if there is such a run: it needs no other then."""
    if not cfg.get("tokens") or cfg.tokens.name != config.PATCH_AE:
        return None
    state = checkpoint.load_latest(run / "checkpoints")
    return None if state is None else state["metadata"].get("tokenizer")


class PatchAEStage(Stage):
    """A PatchAE, stage 1 of the two-stage pipeline (Appendix B)."""

    monitor = "valid/psnr"
    metrics = ("valid/psnr",)

    def __init__(self, cfg: "DictConfig", run: Path, device: torch.device):
        self.cfg, self.device, self.metadata = cfg, device, {}
        self.net = config.patch_ae(cfg).to(device)
        self.loss = config.build(cfg.loss, "loss")

    def transform(self, images: Tensor) -> Tensor:
        return self.net.patches.cut(images)

    def validate(self, net: nn.Module, images: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        scores = evaluation.reconstruction(net, images)
        numbers = {f"valid/{name}": value for name, value in scores.items()}
        title = "Validation images and their reconstructions"
        return numbers, {"reconstruction": pictures.reconstruction(net, images[:6], title=title)}

    def finish(self, run: Path, splits: Splits) -> tuple[dict[str, Any], dict[str, Any]]:
        settings = self.cfg.evaluation
        state, path = runs.checkpoint_of(run, "best")
        net = config.patch_ae(self.cfg)
        checkpoint.load_weights(net, state["net"], path)
        net = net.to(self.device).requires_grad_(False).eval()
        net.fit_statistics(parts(splits.train.select(slice(settings.statistics_images)), self.device))
        checkpoint.save(run / config.PATCH_AE_FILE, net.state())
        scores = evaluation.reconstruction(net, splits.test.select(slice(settings.images)))
        page = run / FIGURES_PAGE
        page.parent.mkdir(parents=True, exist_ok=True)
        about = f"{path.name} of step {state['step']}, test images"
        Pictures.save(page.with_name("reconstruction.png"), pictures.reconstruction(net, splits.test[:6]), about)
        write_text(page, pictures.page(run.name, {"reconstruction": about}))
        return state, {f"test_{name}": value for name, value in scores.items()}

    @staticmethod
    def report(summary: dict[str, Any], run: Path) -> str:
        files = {
            str(FIGURES_PAGE): "test images and their reconstructions",
            config.PATCH_AE_FILE: "the auto-encoder with the statistics of its codes",
        }
        saved = config.saved(run)
        case = "case=celeba" if saved.data.name == "celeba" else "case=case1 tokens=patch_ae"
        seams = [summary.get(f"test_{name}") for name in ("seam_ratio", "seam_ratio_of_images")]
        code = config.shell_word("tokens.run", run)
        compared = "differences across patch borders over those inside: {:.3f} in reconstructions, {:.3f} in the images"
        return "\n".join(
            [
                *_head(summary),
                "",
                f"test reconstructions: PSNR {summary['test_psnr']:.2f} dB",
                *([compared.format(*seams)] if None not in seams else []),
                "",
                *_files(files, run),
                "",
                f"next: python scripts/train.py {case} {config.data_words(saved)} {code}",
            ]
        )


def validate(
    vae: BigLearnVAE, images: torch.Tensor, loss: BigLearnELBO, draws: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """What is reported on the validation images during training: ELBOs, half-hidden in-painting, and a picture."""
    joint = evaluation.elbo(vae, images, loss)
    numbers = {"valid/elbo": evaluation.elbo(vae, images, loss, joint=False)["elbo"]}
    numbers |= {f"valid/joint_{name}": joint[name] for name in ("elbo", "reconstruction", "kl")}
    numbers["valid/psnr_0.5"] = evaluation.inpainting_psnr(vae, images, [0.5], draws=draws)[0.5]
    title = "Validation images, half of the patches hidden"
    return numbers, {"inpainting": pictures.completions(vae, images[:8], title=title)}


def measure(
    vae: BigLearnVAE, loss: BigLearnELBO, splits: Splits, settings: "DictConfig", split: str = "test", seed: int = 0
) -> dict[str, Any]:
    """JointELBO on a split; in-painting beside the nearest training images, `settings.masks` masks for each image."""
    images = getattr(splits, split)
    some = images.select(torch.arange(min(settings.images, len(images))).repeat(settings.masks))
    joint = evaluation.elbo(vae, images, loss, seed=seed)
    options: dict[str, Any] = dict(ratios=list(settings.ratios), seed=seed)
    inpainting = evaluation.inpainting_psnr(vae, some, draws=settings.draws, **options)
    nearest = evaluation.nearest_psnr(vae, some, splits.train, **options)
    return {
        f"{split}_joint_elbo": joint["elbo"],
        f"{split}_reconstruction": joint["reconstruction"],
        f"{split}_kl": joint["kl"],
        **({} if has_model(loss) else {"objective": name_of(loss)}),
        **({} if vae.observations.name == "gaussian" else {"observations": vae.observations.name}),
        **({f"{split}_joint_bound_nats": joint["elbo_nats"]} if "elbo_nats" in joint else {}),
        "inpainting_psnr": {str(ratio): value for ratio, value in inpainting.items()},
        "nearest_psnr": {str(ratio): value for ratio, value in nearest.items()},
    }


def draw(
    vae: BigLearnVAE,
    splits: Splits,
    run: Path,
    names: Sequence[str],
    source: str,
    images: int | None = None,
    delta: float | None = None,
    dims: Sequence[int] | None = None,
    seed: int = 0,
) -> Path:
    """Draw figures of the test images as PNG files into run/figures, and the page that shows all that are there.

    Args:
        names: of `figures.FIGURES`.
        source: which weights these are, for the page.
        images: at most this many in each; the map of codes has its own number.
        delta, dims: of the decoding sensitivity.
    """
    some = splits.test.select(slice(1000))
    some = some.select(some.recorded_patches(vae.grid).any(-1))
    shown, labels = some[:], some.labels
    if labels is not None and labels.ndim > 1:  # attributes, not classes
        labels = None
    page = run / FIGURES_PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    given = {"rows": images, "delta": delta, "dims": dims, "names": splits.label_names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in names:
        drawn = pictures.FIGURES[name]
        own = {option: given[option] for option in given.keys() & inspect.signature(drawn).parameters.keys()}
        picture = drawn(vae, shown, labels=labels, seed=seed, **own)
        Pictures.save(page.with_name(f"{name}.png"), picture, f"{source}, test images, seed {seed}")
    files = {name: page.with_name(f"{name}.png") for name in pictures.FIGURES}
    there = {name: Pictures.about(path) for name, path in files.items() if path.exists()}
    note = WHOLE_IMAGES if config.saved(run).method.name == "vae" else ""
    write_text(page, pictures.page(run.name, there, note))
    return page


def report(result: dict[str, Any], run: Path, split: str = "test", file: str = "summary.json") -> str:
    """The numbers of a summary or an evaluation as a small table, where everything is, and what to type next."""
    passes = result.get("passes", {})
    elbo, reconstruction, kl = (result[f"{split}_{name}"] for name in ("joint_elbo", "reconstruction", "kl"))
    nats = result.get(f"{split}_joint_bound_nats")
    own = f" by {result['objective']}" if "objective" in result else ""
    under = _under(result) or "under N(mu, beta I)"
    rows = {
        "share of patches observed": [f"{float(ratio):g}" for ratio in result["inpainting_psnr"]],
        "mean of several completions": [f"{value:.2f}" for value in result["inpainting_psnr"].values()],
        "mean of the 10 nearest training images": [f"{value:.2f}" for value in result["nearest_psnr"].values()],
    }
    files = {
        str(FIGURES_PAGE): "pictures of what the model does with test images",
        file: "these numbers",
        "metrics.jsonl": "the course of training",
        "checkpoints/best.pt": "the model",
    }
    after = ("evaluate", "figures") if file == "summary.json" else ("complete", "probe", "figures")
    scripts = [f"python scripts/{name}.py {config.shell_word('run', run)}" for name in after]
    return "\n".join(
        [
            *_head(result),
            "",
            f"{split} JointELBO{own} {elbo:.3f} = reconstruction {reconstruction:.3f} - beta x KL {kl:.2f}"
            + ("" if nats is None else f"; {nats:.2f} nats {under}"),
            "",
            "in-painting: PSNR in dB over the missing pixels",
            *(f"  {name:<40}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in rows.items()),
            "",
            *_likelihood_lines(result),
            *samples.table(passes.get("scores", {}), passes.get("real")),
            *_files(files, run),
            "",
            f"next: {scripts[0]}",
            *(f"      {script}" for script in scripts[1:]),
            f"      tensorboard --logdir {shlex.quote(str(run.parent))}",
            f'      in Python: import biglearn_vae as blv; vae = blv.load("{run}")',
        ]
    )


def _under(result: dict[str, Any]) -> str:
    """Words on the observations of a measured run, if they are not Gaussian; else empty."""
    name = result.get("observations", "")
    return f"of {name.replace('_', ' ').title()} observations" if name else ""


def _likelihood_lines(result: dict[str, Any]) -> list[str]:
    """The log-likelihoods and the consistency of an evaluation, as a table; nothing if they were not measured."""
    if "likelihood" not in result:
        return []
    likelihood, agreement = result["likelihood"], result["consistency"]
    measured = [bounds for bounds in likelihood.values() if isinstance(bounds, dict)]
    tasks = [task for task in ("joint", "marginal", "conditional") if all(f"{task}_nats" in b for b in measured)]
    under = _under(result) or "under N(mu, variance I)"
    lines = [
        f"bounds on log p {under}, {likelihood['images']} images, {likelihood['samples']} samples each"
        + (f", annealed in {steps} steps" if (steps := likelihood.get("annealing_steps")) else ""),
        f"  {'':<45}" + "".join(f"{task:>13}" for task in tasks),
    ]
    for unit, words, digits in (("nats", "nats", 2), ("bits_per_dim", "bits per dimension", 3)):
        for name, origin in (("model", "beta"), ("fitted", "fitted")):
            if bounds := likelihood.get(name):
                cells = "".join(f"{bounds[f'{task}_{unit}']:>13.{digits}f}" for task in tasks)
                head = words + (f", variance {bounds['variance']:.4g} ({origin})" if "variance" in bounds else "")
                lines.append(f"  {head:<45}" + cells)
    if likelihood.get("prior") == "standard" and len(tasks) > 1:
        lines.append("  conditional and consistency: by an encoder and a decoder that never saw a part of an image")
    if agreement:
        of_variance = f", variance {agreement['variance']:.4g}" if "variance" in agreement else ""
        lines += [
            f"consistency{of_variance}: log p(a) + log p(b | a) and log p(b) + log p(a | b)",
            f"  differ by {agreement['order_gap']:.2f} nats, two estimates of the first by "
            f"{agreement['order_noise']:.2f};",
            f"  p(z | x_S) is at least {agreement['posterior_gap']:.2f} nats from the posterior of Bayes' rule "
            f"({agreement['effective_samples']:.0%} effective samples)",
        ]
    return [*lines, ""]


def _head(result: dict[str, Any]) -> list[str]:
    """Which run it is, and how long it took."""
    lines = [f"{result['name']}, {size_text(result['parameters'])}"]
    if "seconds" in result:
        lines += [f"{result['steps']} steps in {result['seconds']:.0f} s, {result['images_per_second']:,.0f} images/s"]
    return lines


def _files(files: dict[str, str], run: Path) -> list[str]:
    """Those files of a run that are there, and what they are."""
    return [f"{run / name!s:<60} {what}" for name, what in files.items() if (run / name).exists()]


def size_text(parameters: int) -> str:
    """A number of parameters, and in the unit of the paper's tables."""
    return f"{parameters:,} parameters ({parameters / 2**20:.4f} x 2^20)"
