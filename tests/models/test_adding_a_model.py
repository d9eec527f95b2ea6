"""What docs/adding-a-model.md quotes stands in the files it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_quotation_stands_in_its_file() -> None:
    text = (ROOT / "docs" / "adding-a-model.md").read_text()
    quotations = re.findall(r"```python\n# (\S+)\n(.*?)```", text, re.DOTALL)
    assert len(quotations) == text.count("```python") > 4
    for file, quotation in quotations:
        assert quotation in (ROOT / file).read_text(), f"{file}: {quotation}"


def test_every_fact_and_file_named_exists() -> None:
    text = (ROOT / "docs" / "adding-a-model.md").read_text()
    for path in re.findall(r"`((?:asyncllm|tests|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    config = (ROOT / "asyncllm/models/config.py").read_text()
    named = re.search(r"## Before you begin.*?StarCoder 2 is", text, re.DOTALL)
    assert named is not None
    for fact in set(re.findall(r"[(, ]`(?:LayerKind\.)?([a-z]+_[a-z_]+)`", named[0])):
        assert f"    {fact}: " in config, fact
