"""What the README says to type in Python works as it is typed."""

import re

from programs import ROOT, SMALL, run_here

SECTION = (ROOT / "README.md").read_text().split("## In Python")[1]


def test_the_python_of_the_readme(here, monkeypatch):
    assert run_here(monkeypatch, *SMALL, "name=digits-tiny-biglearn_u-seed0") == 0
    first, *others = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    names: dict = {}
    exec(first, names)
    table = re.findall(r"`((?:q|vae)\b.*?)`", SECTION.split("```")[2])
    assert len(table) > 15
    for code in table:
        exec(code.replace("\\|", "|"), names)
    assert len(others) == 3
    for code in others:  # a network as small as the first one, and all else as typed
        exec(code.replace('["name=short"', f'[*{SMALL}, "name=short"'), {})
