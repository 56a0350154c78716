"""What the README and docs/ say to type in Python works as it is typed, and what they point at is there."""

import re
from pathlib import Path

import pytest
import torch
from programs import ROOT, SMALL, run_here

import biglearn_vae as blv

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results/choices.md"]


def blocks(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_python_of_the_readme(here, monkeypatch):
    assert run_here(monkeypatch, *SMALL, "name=digits-tiny-biglearn_u-seed0") == 0
    (first,) = blocks("README.md")
    names: dict = {}
    exec(first, names)
    table = re.findall(r"`((?:q|vae)\b.*?)`", (ROOT / "README.md").read_text().split("## In Python")[1])
    assert len(table) > 15
    for code in table:
        exec(code.replace("\\|", "|"), names)


def test_the_python_of_the_docs(here):
    found, names = blocks("docs/python.md"), {}
    assert len(found) == 6
    for code in found:  # a network as small as the other tests', and all else as typed
        exec(code.replace('["name=short"', f'[*{SMALL}, "name=short"'), names)
    net, tokens, x = names["net"].train(), names["tokens"], names["test"]
    weighted, joint = names["ImportanceWeighted"](beta=0.01), names["loss"]
    batches = blv.Batches(blv.ImageSet((255 * x).byte()), batch_size=16, transform=tokens.encode)
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    trainer = blv.Trainer(net, weighted, batches, names["FineTuning"](), steps=2, report_every=2)
    trainer.fit([names["Told"]()])
    same = {name for name, weight in net.state_dict().items() if weight.equal(before[name])}
    assert {"token_in.weight", "token_in.bias"} <= same < before.keys()
    S = torch.zeros(len(x), net.num_tokens, dtype=torch.bool)
    noise, given = torch.randn(len(x), net.z_dim), (tokens.encode(x), S, ~S)
    with torch.no_grad():
        assert weighted(net, *given, noise).elbo.mean() > joint(net, *given, noise).elbo.mean()


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page):
    text = page.read_text()
    links = [target.partition("#") for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    named = re.findall(r"`((?:results|docs|configs|notebooks|scripts|tests)/[\w./-]+)`", text)
    assert [path for path, _, _ in links if path and not (page.parent / path).exists()] == []
    assert [
        link for link in links if link[2] and link[2] not in anchors(page.parent / link[0] if link[0] else page)
    ] == []
    assert [path for path in named if not (ROOT / path).exists()] == []
