"""The pictures: what a trained model can do, as captioned sheets of images, uint8 (height, width, 3).

N images, n of them drawn, C channels, H x W pixels, L tokens, Z latent dimension, R panels.

The functions in `FIGURES` take a model and images (N, C, H, W) in [0, 1], of which they draw a few, from different
classes if there are labels (N,). What was never recorded (NaN) is never observed.
"""

import html
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from biglearn_vae import checks, data, masks
from biglearn_vae.capabilities import BigLearnVAE, check_model, checked_dims
from biglearn_vae.sheets import DPI, Block, Columns, drawable, rendered, sheet

HIDDEN = (0.80, 0.33, 0.27)  # the colour of what the model does not see
MISSING = (0.25, 0.50, 0.80)  # and of what was never recorded
PALE = 0.7  # how much lighter every other stripe of these is in images that have colours themselves
COLOURED = 0.1  # by how much channels of a grey image may differ
LESS, SAME, MORE = (0.60, 0.10, 0.60), (0.95, 0.95, 0.95), (0.10, 0.55, 0.15)  # of differences
MOST_NAMED = 20  # classes whose numbers the map of codes shows

TEXTS = {  # name: title, caption
    "inference": (
        "Inference with incomplete data",
        "First rows: images of which fewer and fewer patches are observed, hidden ones in red. Second rows: what the "
        "code alone holds of them, an image decoded from z ~ p(z | observed patches). Where it changes to the right, "
        "the patches that are left no longer tell the model which image it is. Third rows: the same code beside the "
        "observed patches, which are kept; what differs from the second rows they add.",
    ),
    "inpainting": (
        "In-painting of arbitrary parts",
        "Hidden patches are red. Each draw takes a code z ~ p(z | observed patches) and fills in the hidden ones by "
        "p(hidden | z, observed); observed patches are kept. Draws differ where the observed patches leave it open. "
        "The mean of many is the best guess in squared error.",
    ),
    "interpolation": (
        "Interpolation between codes",
        "The code moves in equal steps on the straight line from that of image A to that of image B (the means of "
        "p(z | image)), and every point of it is decoded. Hidden patches are red.",
    ),
    "combination": (
        "Combining observations",
        "What the model observes is a set of patches, so two observations are combined by taking both sets. Each "
        "completion is drawn given the patches to its left; hidden ones are red.",
    ),
    "decoding_sensitivity": (
        "What single dimensions of the code do",
        "One dimension of z, the mean of p(z | observed patches), is moved and the hidden patches (red) are decoded "
        "again. Beside each result is its difference from before: green is brighter, purple is darker. Where "
        "differences look alike from row to row, a dimension means the same however much is observed.",
    ),
    "encoding_sensitivity": (
        "What single patches do to the code",
        "The outlined patches are changed, those of the observed ones that move the code furthest. KL is that of "
        "p(z | changed patches) from p(z | observed patches). The hidden patches (red) are decoded by the mean of "
        "either, beside the unchanged observed ones. Difference: green is brighter, purple is darker.",
    ),
    "capabilities": (
        "One model, five tasks",
        "All by the same network; only what is given and what is asked for differs. Hidden patches are red. "
        "a: z ~ p(z), then p(x | z). b: z ~ p(z | observed), then p(x | z). c: z ~ p(z | image), then p(x | z). "
        "d: z ~ p(z | observed), then p(hidden | z, observed). e: the same, given some of the patches that differ most "
        "from the background, such as strokes. In b and d 0.3 of the patches are observed.",
    ),
    "passes": (
        "One pass or several",
        "In one pass a code is drawn and everything hidden (red) is decoded from it. Of several passes each keeps an "
        "equal share of the hidden patches, chosen at random, and the next one observes them, too. The first pass is "
        "the same in each row, so what changes to the right is what more passes do.",
    ),
    "latent_map": (
        "Codes of incomplete images",
        "Each point is the code of one image, the mean of p(z | observed patches), at one scale in all panels; the "
        "S-ratio is the share of the patches observed. The further to the right points of one colour stay together, "
        "the fewer patches the code needs to hold what the colour says.",
    ),
    "reconstruction": (
        "Patches and their codes",
        "Every patch is coded and decoded by itself. Where seams show between the patches of a reconstruction, its "
        "codes leave out too much. Difference: green is brighter, purple is darker.",
    ),
}


# --- What is drawn ---


def inference(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 4,
    seed: int = 0,
    ratios: Sequence[float] = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
) -> np.ndarray:
    """Inference with incomplete data and in-painting (Figures 3, 6, 7 and 8): x_S from left to right by S-ratio, each
    mask a part of the one before, and below it x ~ p(x | z) and x_T ~ p(x_T | z, x_S) for the same z ~ p(z | x_S).

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
        ratios: shares of the patches observed.
    """
    x, recorded = take(vae, images, labels, rows)
    cells, ratios = [], checks.several("ratios", ratios)
    for ratio in ratios:
        S = masks.random(len(x), vae.num_tokens, ratio, seed).to(x.device) & recorded
        # The same noise at every ratio, so that what changes from left to right is what is known.
        z = vae.encode(x, S).sample(seed=seed)
        cells.append(_by_image([see(vae, x, S), rgb(vae.decode(z)), rgb(vae.decode(z, x, S))]))  # (3 n, H, W, 3)
    block = Block(
        np.stack(cells, axis=1),
        "share of the patches observed",
        [f"{ratio:g}" for ratio in ratios],
        ["observed", "decoded", "completed"] * len(x),
        group=3,
    )
    return sheet(*text("inference", x), [block])


def inpainting(
    vae: BigLearnVAE, images: Tensor, labels: Tensor | None = None, rows: int = 4, seed: int = 0, draws: int = 4
) -> np.ndarray:
    """Arbitrary in-painting (Figures 3, 6, 7 and 8, b): a block for each shape of mask, with several draws.

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
    """
    x, recorded = take(vae, images, labels, rows)
    blocks = []
    for heading, S in shapes(vae, len(x), seed).items():
        S = S.to(x.device) & recorded
        blocks.append(Block.of([*_completions(vae, x, S, draws, seed), ("image", rgb(x))], heading))
    return sheet(*text("inpainting", x), blocks, cell=56)


def shapes(vae: BigLearnVAE, count: int, seed: int = 0) -> dict[str, Tensor]:
    """Masks (count, L) of several shapes, by what they are called."""
    box = masks.centre(vae.grid)
    result = {
        "a random half observed": masks.random(count, vae.num_tokens, 0.5, seed),
        "a random fifth observed": masks.random(count, vae.num_tokens, 0.2, seed),
        "the centre hidden": box,
        "only the centre observed": ~box,
        "the top half observed": masks.half(vae.grid, "top"),
        "the left half observed": masks.half(vae.grid, "left"),
    }
    return {name: mask.expand(count, -1) for name, mask in result.items()}


def completions(
    vae: BigLearnVAE, images: Tensor, ratio: float = 0.5, draws: int = 4, seed: int = 0, title: str = ""
) -> np.ndarray:
    """In-painting in short: all of the images (N, C, H, W), with a random `ratio` of their patches observed."""
    x, recorded = take(vae, images, None, len(images))
    S = masks.random(len(x), vae.num_tokens, ratio, seed).to(x.device) & recorded
    block = Block.of([("image", rgb(x)), *_completions(vae, x, S, draws, seed)])
    return sheet(title, text("inpainting", x)[1], [block])


def _completions(vae: BigLearnVAE, x: Tensor, S: Tensor, draws: int, seed: int) -> Columns:
    """Columns: what is observed, several draws, and the mean of at least 16."""
    draws = checks.whole_number("draws", draws, 0)
    drawn = vae.inpaint(x, S, draws=max(16, draws), seed=seed)
    several = [(f"draw {k + 1}", rgb(drawn[k])) for k in range(draws)]
    return [("observed", see(vae, x, S)), *several, (f"mean of {len(drawn)}", rgb(drawn.mean(0)))]


def interpolation(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 4,
    seed: int = 0,
    steps: int = 9,
    ratio: float = 0.25,
) -> np.ndarray:
    """Linear interpolation between codes (Figure 9), and the same with observed patches of A kept.

    Args:
        images: (N, C, H, W); `rows` pairs are drawn.
        labels: classes (N,).
        steps: points on the line, both ends among them.
        ratio: share of the patches observed in the second block.
    """
    x, recorded = take(vae, images, labels, rows, pairs=True)
    steps = checks.whole_number("steps", steps, 2)
    whole = vae.inpaint(x, recorded, seed=seed)  # x itself, unless a part of it was never recorded
    a, b = whole[0::2], whole[1::2]
    S = masks.random(len(a), vae.num_tokens, ratio, seed).to(x.device) & recorded[0::2]
    names = ["code of A", *(f"{k / (steps - 1):.3g}" for k in range(1, steps - 1)), "code of B"]
    blocks = []
    for heading, start, mask in (
        ("decoded from the code alone", rgb(x[0::2]), None),
        (f"decoded beside observed patches of A ({ratio:g} of all), which are kept all along", see(vae, x[0::2], S), S),
    ):
        path = vae.interpolate(a, b, steps, mask)
        cells = np.stack([start, *map(rgb, path), rgb(x[1::2])], axis=1)
        blocks.append(Block(cells, heading, ["A" if mask is None else "observed", *names, "B"]))
    return sheet(*text("interpolation", x), blocks)


def combination(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 4,
    seed: int = 0,
    ratio: float = 0.2,
) -> np.ndarray:
    """Combined observations (Figure 10): x_{S1}, x_{S2} and both, each with a completion; of one image and of two.

    Args:
        images: (N, C, H, W); `rows` of them are drawn, and as many pairs.
        labels: classes (N,).
        ratio: share of the patches in each part of one image.
    """
    x, recorded = take(vae, images, labels, rows, pairs=True)
    a, b, of_a, of_b = x[0::2], x[1::2], recorded[0::2], recorded[1::2]
    ratio = checks.real_number("ratio", ratio, "[0, 0.5]")
    upto = [masks.random(len(a), vae.num_tokens, share, seed).to(x.device) for share in (ratio, 2 * ratio, 0.7)]
    top, bottom = (masks.half(vae.grid, part).to(x.device) for part in ("top", "bottom"))
    names = ("part 1", "part 2", "both parts")
    one = _combined(vae, (a, upto[0] & of_a), (a, upto[1] & ~upto[0] & of_a), names, seed)
    names = ("top of A", "bottom of B", "both")
    two = _combined(vae, (a, upto[2] & top & of_a), (b, upto[2] & bottom & of_b), names, seed)
    blocks = [
        Block.of([*one, ("image", rgb(a))], "two parts of one image"),
        Block.of(
            [("A", rgb(a)), ("B", rgb(b)), *two], "0.7 of the top half of an image, of the bottom half of another"
        ),
    ]
    return sheet(*text("combination", x), blocks)


def _combined(vae: BigLearnVAE, first, second, names: Sequence[str], seed: int) -> Columns:
    """Columns: two observations (x, S) and both together, each with a completion."""
    columns = []
    x, S = vae.combine(first, second)
    both = torch.where(first[0].isnan() & second[0].isnan(), torch.nan, x), S
    for name, (x, S) in zip(names, (first, second, both), strict=True):
        columns += [(name, see(vae, x, S)), ("completed", rgb(vae.inpaint(x, S, seed=seed)))]
    return columns


def decoding_sensitivity(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 3,
    seed: int = 0,
    delta: float | None = None,
    dims: int | Sequence[int] = 4,
    ratios: Sequence[float] = (0.1, 0.3, 0.5),
) -> np.ndarray:
    """p(x_T | z + delta, x_S) beside p(x_T | z, x_S) (Figure 11) for some dimensions of z.

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
        delta: how far a dimension is moved; by default 3 times the standard deviation of its means over the images.
        dims: which dimensions, or how many of those with the largest effect.
        ratios: shares of the patches observed.
    """
    x, recorded = take(vae, images, labels, rows)
    ratios = checks.several("ratios", ratios)
    S = [masks.random(len(x), vae.num_tokens, ratio, seed).to(x.device) & recorded for ratio in ratios]
    moves = _moves(vae, images) if delta is None else torch.full((vae.z_dim,), float(delta), device=x.device)
    if isinstance(dims, int | np.integer):
        everything = vae.decoding_sensitivity(x, S[0], range(vae.z_dim), moves)
        effect = (everything.after - everything.before).square().mean(dim=(1, 2, 3, 4))  # (Z,)
        count = min(checks.whole_number("dims", dims, 1), vae.z_dim)
        chosen, which = effect.topk(count).indices.tolist(), " with the largest effect"
    else:
        chosen, which = checked_dims(vae, dims), ""
    results = [vae.decoding_sensitivity(x, mask, chosen, moves[chosen]) for mask in S]
    before = torch.stack([result.before for result in results], dim=1).flatten(0, 1)  # (n ratios, C, H, W)
    after = torch.stack([result.after for result in results], dim=2).flatten(1, 2)  # (dims, n ratios, C, H, W)
    observed = ("observed", _by_image([see(vae, x, mask) for mask in S]))
    columns = [("image", _by_image([rgb(x)] * len(S))), observed, ("before", rgb(before))]
    change, limit = signed(after - before)
    for k, dim in enumerate(chosen):
        columns += [(f"z{dim} {moves[dim]:+.2g}", rgb(after[k])), ("difference", change[k])]
    heading = f"{len(chosen)} of {vae.z_dim} dimensions{which}, moved by the number given; "
    heading += f"differences are in full colour at {limit:.2g} of the range of pixels"
    block = Block.of(columns, heading, [f"{ratio:g} observed" for ratio in ratios] * len(x), group=len(ratios))
    return sheet(*text("decoding_sensitivity", x), [block])


def _moves(vae: BigLearnVAE, images: Tensor) -> Tensor:
    """3 standard deviations of the means of p(z | x) over images, (Z,); 3 if there is only one image."""
    x, recorded = take(vae, images, None, 256)
    return 3 * (vae.encode(x, recorded).mean.std(0) if len(x) > 1 else torch.ones(vae.z_dim, device=x.device))


def _by_image(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Several (n, H, W, 3) -> (n times their number, H, W, 3), those of an image one after the other."""
    return np.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:])


def encoding_sensitivity(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 4,
    seed: int = 0,
    ratio: float = 0.3,
    share: float = 0.1,
) -> np.ndarray:
    """p(z | x_S + change) beside p(z | x_S) (Figure 12), through p(x_T | z, x_S), for patches made black or white.

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
        ratio: share of the patches observed.
        share: at most this share of all patches is changed, at least one patch; fewer if some have that colour already.
    """
    x, recorded = take(vae, images, labels, rows)
    S = masks.random(len(x), vae.num_tokens, ratio, seed).to(x.device) & recorded
    S = torch.where(S.any(-1, keepdim=True), S, recorded)
    x, S = x[S.any(-1)], S[S.any(-1)]  # something must be there to be changed
    count = max(1, round(share * vae.num_tokens))
    parts = {name: _changed(vae, x, S, value, count) for name, value in (("black", 0.0), ("white", 1.0))}
    _, limit = signed(torch.stack([part.after - part.before for part in parts.values()]))
    each = masks.to_pixels(torch.eye(vae.num_tokens, dtype=torch.bool), vae.grid, vae.image_shape[1:])  # (L, H, W)
    numbers = 1 + each.int().argmax(0)  # (H, W), of the patches
    blocks = []
    for name, part in parts.items():
        columns = [
            ("image", rgb(x)),
            ("observed", see(vae, x, S)),
            ("changed", see(vae, part.x, S)),
            ("before", rgb(part.before)),
            ("after", rgb(part.after)),
            ("difference", signed(part.after - part.before, limit)[0]),
        ]
        patches = "a patch" if count == 1 else f"up to {count} patches"
        heading = f"{patches} made {name}; differences are in full colour at {limit:.2g} of the range of pixels"
        block = Block.of(columns, heading, [f"KL {kl:.3g} nats" for kl in part.kl.tolist()])
        block.outlined[:, 2] = (vae.pixel_mask(part.patches)[:, 0].cpu() * numbers).numpy()
        blocks.append(block)
    return sheet(*text("encoding_sensitivity", x), blocks)


class _Change(NamedTuple):
    """Changed images (n, C, H, W), where (n, L), KL of the codes (n,), and both codes decoded (n, C, H, W)."""

    x: Tensor
    patches: Tensor
    kl: Tensor
    before: Tensor
    after: Tensor


def _changed(vae: BigLearnVAE, x: Tensor, S: Tensor, value: float, count: int) -> _Change:
    """Set to `value` those observed patches of each image that, one by one, move its code furthest, at most `count`."""
    each = torch.eye(vae.num_tokens, dtype=torch.bool, device=x.device).repeat(len(x), 1).unsqueeze(-1)  # (n L, L, 1)
    tokens, flat = (vae.tokenizer.encode(images) for images in (x, torch.full_like(x[:1], value)))
    many, observed = (part.repeat_interleave(vae.num_tokens, 0) for part in (tokens, S))
    codes = vae.encoding_sensitivity(many, observed, torch.where(each, flat - many, 0))
    kl = codes.after.kl(codes.before).view_as(S).masked_fill(~S, -1)
    patches = torch.zeros_like(S).scatter(1, kl.topk(min(count, vae.num_tokens)).indices, True) & (kl > 0)
    change = torch.where(vae.pixel_mask(patches), value - x, 0)
    codes = vae.encoding_sensitivity(x, S, change)
    decoded = (vae.decode(q.mean, x, S) for q in (codes.before, codes.after))
    return _Change(x + change, patches, codes.after.kl(codes.before), *decoded)


def capabilities(
    vae: BigLearnVAE, images: Tensor, labels: Tensor | None = None, rows: int = 8, seed: int = 0
) -> np.ndarray:
    """A block for each capability (Figure 14): sample, inference, reconstruction, in-painting, strokes to images.

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
    """
    x, recorded = take(vae, images, labels, rows)
    S = masks.random(len(x), vae.num_tokens, 0.3, seed).to(x.device) & recorded
    ink = strokes(vae, x, seed) & recorded
    image, observed, samples = ("image", rgb(x)), ("observed", see(vae, x, S)), vae.sample(3 * len(x), seed=seed)
    draws = enumerate(vae.inpaint(x, ink, draws=4, seed=seed), 1)
    blocks = [
        Block.of([(f"draw {k + 1}", rgb(samples[k::3])) for k in range(3)], "a. sampling"),
        Block.of([image, observed, ("decoded", rgb(vae.reconstruct(x, S, seed=seed)))], "b. inference"),
        Block.of([image, ("decoded", rgb(vae.reconstruct(x, recorded, seed=seed)))], "c. reconstruction"),
        Block.of([image, observed, ("completed", rgb(vae.inpaint(x, S, seed=seed)))], "d. in-painting"),
        Block.of(
            [image, ("strokes", see(vae, x, ink)), *((f"draw {k}", rgb(part)) for k, part in draws)], "e. generation"
        ),
    ]
    return sheet(*text("capabilities", x), blocks, cell=56)


def passes(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    rows: int = 8,
    seed: int = 0,
    counts: Sequence[int] = (1, 4, 16, 64),
) -> np.ndarray:
    """Samples, and completions of a fifth of the patches, in one pass and in several.

    Args:
        images: (N, C, H, W); `rows` of them are drawn.
        labels: classes (N,).
        counts: numbers of passes; those above the number of patches are left out.
    """
    x, recorded = take(vae, images, labels, rows)
    counts = [checks.whole_number("each of counts", count, 1) for count in checks.several("counts", counts)]
    counts = [count for count in counts if count <= vae.num_tokens]
    if not counts:
        raise ValueError(f"counts must hold one that is at most {vae.num_tokens}, the number of patches")
    S = masks.random(len(x), vae.num_tokens, 0.2, seed).to(x.device) & recorded
    names = [f"{count} pass{'es' if count > 1 else ''}" for count in counts]
    drawn = [rgb(vae.sample(len(x), seed=seed, passes=count)) for count in counts]
    completed = [rgb(vae.inpaint(x, S, seed=seed, passes=count)) for count in counts]
    of_part = [("observed", see(vae, x, S)), *zip(names, completed, strict=True), ("image", rgb(x))]
    blocks = [
        Block.of(list(zip(names, drawn, strict=True)), "samples"),
        Block.of(of_part, "completions, a random fifth observed"),
    ]
    return sheet(*text("passes", x), blocks, cell=56)


def strokes(vae: BigLearnVAE, x: Tensor, seed: int = 0, share: float = 0.4) -> Tensor:
    """Masks (n, L): a random share of the patches with ink, those that differ much from the image's median colour."""
    background = x.flatten(2).nanmedian(dim=2).values[..., None, None]
    cell = tuple(size // count for size, count in zip(vae.image_shape[1:], vae.grid, strict=True))
    ink = avg_pool2d((x - background).abs().nan_to_num(0), cell).mean(1).flatten(1)  # (n, L)
    inked = ink > 0.5 * ink.max(dim=1, keepdim=True).values
    generator = torch.Generator("cpu").manual_seed(checks.seed_or_drawn(seed))
    order = masks.uniform_numbers(ink.shape, generator).to(x.device)
    return inked & (masks.rank_among(inked, order) < (share * inked.sum(-1, keepdim=True)).ceil())


def latent_map(
    vae: BigLearnVAE,
    images: Tensor,
    labels: Tensor | None = None,
    count: int = 300,
    seed: int = 0,
    ratios: Sequence[float] = (1, 0.5, 0.25, 0.1),
    names: Sequence[str] = (),
) -> np.ndarray:
    """The means of p(z | x_S) at several S-ratios in one plane (t-SNE of all of them together), coloured by class.

    Args:
        images: (N, C, H, W); `count` of them are drawn.
        labels: classes (N,); without them a point has the colour of its place in the first panel.
        ratios: shares of the patches observed, a panel each.
        names: of the classes, in the order of their numbers.
    """
    count = _checked_count(vae, images, labels, count, "count")
    names = list(map(str, checks.several("names", names, 0)))
    order = choose(len(images), labels, count)
    x, recorded = take(vae, images[order], None, count)
    ratios, seed = checks.several("ratios", ratios), checks.seed_or_drawn(seed)
    classes = None if labels is None else labels.cpu()[order].numpy()
    S = [masks.random(len(x), vae.num_tokens, ratio, seed).to(x.device) & recorded for ratio in ratios]
    codes = torch.stack([vae.encode(x, mask).mean for mask in S]).double().cpu()  # (R, n, Z)
    places = _plane(codes.flatten(0, 1).numpy(), seed).reshape(*codes.shape[:2], 2)
    heading = f"codes of {len(x)} images by t-SNE, all panels together; {_colours(classes, names)}"
    block = Block(_panels(places, classes)[None], heading, [f"S-ratio {ratio:g}" for ratio in ratios])
    return sheet(*text("latent_map", x), [block])


def _colours(classes: np.ndarray | None, names: Sequence[str]) -> str:
    """What the colours of the map are, in words."""
    if classes is None:
        return "a point has the colour of its place in the first panel, from left to right"
    numbers = np.unique(classes).tolist()
    if len(numbers) > MOST_NAMED:
        return "colours are classes"
    listed = ", ".join(f"{number} {drawable(names[int(number)])}" for number in numbers if 0 <= number < len(names))
    middle = "numbers stand, in all panels, where the middle of each is in the first panel"
    return f"colours are classes, {middle}" + (listed and f": {listed}")


def _plane(points: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE of points (M, Z) from their principal components: (M, 2)."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    points = points - points.mean(0)
    axes = np.linalg.svd(points, full_matrices=False)[2][:2]
    start = np.zeros((len(points), 2))
    start[:, : len(axes)] = points @ axes.T
    start *= 1e-4 / max(start.std(), 1e-12)
    perplexity = min(30, (len(points) - 1) / 3)
    with threadpool_limits(1):  # several threads add up in any order
        seed %= 2**32  # scikit-learn takes no other
        return TSNE(init=start, perplexity=perplexity, max_iter=400, random_state=seed).fit_transform(points)


def _panels(places: np.ndarray, classes: np.ndarray | None, size: int = 300) -> np.ndarray:
    """Points (R, n, 2) as scatter plots with equal limits: (R, size, size, 3).

    Colours are classes (n,), or else places from left to right in the first.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    named = classes is not None
    classes = places[0, :, 0].argsort().argsort() if classes is None else classes
    names, index = np.unique(classes, return_inverse=True)
    named = named and len(names) <= MOST_NAMED
    few = named and len(names) <= 10  # whose colours have no order
    palette = colormaps["tab10" if few else "turbo"]
    colours = palette(np.arange(len(names)) if few else np.linspace(0.05, 0.95, len(names)))
    middles = [_middle(places[0][index == k]) for k in range(len(names))] if named else []
    low, high = places.min((0, 1)), places.max((0, 1))
    room = 0.05 * (high - low) + 1e-6
    pictures = []
    for panel, points in enumerate(places):
        figure = Figure(figsize=(size / DPI, size / DPI), dpi=DPI, facecolor="white")
        axes = figure.add_axes((0.005, 0.005, 0.99, 0.99), xticks=[], yticks=[], facecolor="white")
        axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
        axes.scatter(points[:, 0], points[:, 1], s=10 if len(points) > 50 else 40, color=colours[index], linewidths=0)
        for name, middle, colour in zip(names, middles, colours, strict=False):  # there may be none
            style = dict(size=8 if panel else 13, weight="bold", ha="center", va="center", color=colour)
            effects = [withStroke(linewidth=3, foreground="white")]
            axes.text(float(middle[0]), float(middle[1]), str(name), **style, path_effects=effects)
        pictures.append(rendered(figure) / 255)
    return np.stack(pictures)


def _middle(points: np.ndarray) -> np.ndarray:
    """The one of points (n, 2) that is nearest to their median, which itself may lie where there is none."""
    return points[np.abs(points - np.median(points, axis=0)).sum(1).argmin()]


def reconstruction(tokenizer: Any, images: Tensor, title: str = "") -> np.ndarray:
    """Images (N, C, H, W), all of them drawn, beside what a tokenizer such as a `PatchAE` decodes of its codes."""
    x = images.to(next(tokenizer.parameters()).device)
    with torch.no_grad():
        y = tokenizer.decode(tokenizer.encode(x))
    change, limit = signed(y - x)
    columns = [("image", rgb(x)), ("reconstruction", rgb(y)), ("difference", change)]
    heading = f"differences are in full colour at {limit:.2g} of the range of pixels"
    default, caption = text("reconstruction", x)
    return sheet(title or default, caption, [Block.of(columns, heading)])


FIGURES: dict[str, Callable[..., np.ndarray]] = {
    "inference": inference,
    "inpainting": inpainting,
    "interpolation": interpolation,
    "combination": combination,
    "decoding_sensitivity": decoding_sensitivity,
    "encoding_sensitivity": encoding_sensitivity,
    "capabilities": capabilities,
    "passes": passes,
    "latent_map": latent_map,
}


def page(name: str, drawn: Mapping[str, str], note: str = "") -> str:
    """The HTML page of a run that shows figures, PNG files beside it.

    Args:
        drawn: what each figure shows, by the names of the figures.
        note: about all of them.
    """
    figures = "\n".join(
        f'<figure id="{key}"><img src="{key}.png" alt="{html.escape(". ".join(TEXTS[key]))}">'
        f'<figcaption><a href="{key}.png">{key}.png</a> {html.escape(about)}</figcaption></figure>'
        for key, about in drawn.items()
    )
    links = " &middot; ".join(f'<a href="#{key}">{html.escape(TEXTS[key][0])}</a>' for key in drawn)
    return PAGE.format(name=html.escape(name), links=links, note=html.escape(note), figures=figures)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{name}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; padding: 0 1em; max-width: 1400px; color: #222; background: #fff }}
figure {{ margin: 2em 0; border-top: 1px solid #ccc; padding-top: 1em }}
img {{ max-width: 100%; height: auto }}
figcaption {{ font-size: small }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{links}</p>
<p>{note}</p>
{figures}
</body>
</html>
"""


# --- Images as colours ---


def choose(total: int, labels: Tensor | None, count: int, repeat: bool = False) -> Tensor:
    """Positions of images, (n,): the first of each class, the second of each, ...; without labels simply the first.

    There are `count`, or `total` if that is less; with `repeat` they start again until there are `count`.
    """
    order = torch.arange(total)
    if labels is not None:
        labels = labels.cpu()
        earlier = (labels[:, None] == labels).tril(-1).sum(1)  # how many of its class come before an image
        order = order[np.lexsort((labels.numpy(), earlier.numpy()))]
    return order[torch.arange(count) % total] if repeat else order[:count]


def _checked_count(vae: Any, images: Any, labels: Any, count: Any, name: str) -> int:
    """How many images are drawn; a ValueError unless this is a number of them, with a model and images and perhaps
    their classes."""
    check_model(vae)
    data.check_images(images)
    ordered = isinstance(labels, Tensor) and not labels.is_complex()
    if labels is not None and not (ordered and labels.shape == (len(images),)):
        raise ValueError(f"labels must be classes of the {len(images)} images, (N,), got {checks.described(labels)}")
    return checks.whole_number(name, count, 1)


def take(
    vae: BigLearnVAE, images: Tensor, labels: Tensor | None, count: int, pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """The chosen images (n, C, H, W) on the model's device, and which patches of them were recorded (n, L).

    There are `count`, or all if there are fewer; with `pairs` there are twice as many, of which some may be the same.

    Raises:
        ValueError: for images that are neither grey nor in colours, for what is no images, labels of them or number of
            them, and for what is no model.
    """
    count = _checked_count(vae, images, labels, count, "rows")
    if vae.image_shape[0] not in (1, 3):
        raise ValueError(f"pictures are of images of 1 or 3 channels, got {vae.image_shape[0]}: draw them one by one")
    x = data.take(images, choose(len(images), labels, 2 * count if pairs else count, pairs), vae.device).detach()
    return x, masks.recorded(vae.tokenizer.encode(x))


def rgb(images: Tensor) -> np.ndarray:
    """(N, C, H, W) -> float (N, H, W, 3) in [0, 1]; what was never recorded (NaN) in a colour of its own."""
    return hide(images, torch.ones_like(images[:, :1], dtype=torch.bool))


def hide(images: Tensor, observed: Tensor) -> np.ndarray:
    """Images (N, C, H, W) with what is not in `observed`, a mask (N, 1, H, W), in the colour of hidden parts, which is
    striped in images that have colours themselves."""
    missing, striped = images.isnan(), _is_coloured(images)
    images = torch.where(observed | missing, images.clamp(0, 1), _tone(HIDDEN, images, striped))
    return torch.where(missing, _tone(MISSING, images, striped), images).permute(0, 2, 3, 1).cpu().numpy()


def _is_coloured(images: Tensor) -> bool:
    """Whether some pixel of images (N, C, H, W) is not grey."""
    low, high = images.nan_to_num(0).clamp(0, 1).aminmax(dim=1)
    return bool((high - low > COLOURED).any())


def _tone(colour: tuple[float, float, float], images: Tensor, striped: bool) -> Tensor:
    """A colour as an image (1, 3, H, W) of the size of others, plain or with every other diagonal stripe paler."""
    plain = torch.tensor(colour, device=images.device).view(1, 3, 1, 1)
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    stripe = (rows.unsqueeze(-1) + columns) // max(1, len(rows) // 16) % 2 == 1
    return torch.where(stripe & striped, PALE + (1 - PALE) * plain, plain)


def see(vae: BigLearnVAE, x: Tensor, S: Tensor) -> np.ndarray:
    """x (n, C, H, W) as the model sees it through S (n, L): float (n, H, W, 3)."""
    return hide(x, vae.pixel_mask(S))


def signed(change: Tensor, limit: float | None = None) -> tuple[np.ndarray, float]:
    """Differences (..., C, H, W) as colours (..., H, W, 3), in full colour at `limit`, by default the largest."""
    change = change.mean(-3).nan_to_num(0).cpu()  # over the channels; NaN was never recorded
    limit = limit or change.abs().max().item() or 1.0
    share = (change / limit).clamp(-1, 1).unsqueeze(-1).numpy()
    same, less, more = (np.array(colour, np.float32) for colour in (SAME, LESS, MORE))
    return same + share.clip(0) * (more - same) + (-share).clip(0) * (less - same), limit


def text(name: str, x: Tensor) -> tuple[str, str]:
    """Title and caption of a figure of images x; a line does not break inside a formula."""
    title, caption = TEXTS[name]
    caption = re.sub(r"(z ~ )?p\([^()]*\)", lambda formula: formula[0].replace(" ", "\N{NO-BREAK SPACE}"), caption)
    return title, caption + " Blue: never recorded." * bool(x.isnan().any())
