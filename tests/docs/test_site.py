"""The documentation as a site: it builds without a warning and without the network, and what it shows needs no network either."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import need

need("mkdocs", "material", "mkdocstrings", "latex2mathml")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # No address can be reached from within.
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", **unreachable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr, done.stderr[-3000:]
    return out


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")


def test_every_page_is_there_and_every_part_of_the_reference_has_content(site):
    sources = [path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages(site)) == len(sources) > 20
    for part in (ROOT / "docs" / "api").glob("*.md"):
        page = (site / "api" / part.stem / "index.html").read_text(encoding="utf-8")
        wanted = re.findall(r"^::: (.+)$", part.read_text(encoding="utf-8"), re.MULTILINE)
        for module in wanted:
            assert f'id="{module}"' in page and f'id="{module}.' in page, module


def test_nothing_is_fetched_to_show_a_page(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"([^\"]+)\"", text)
        loaded += [tag for tag in re.findall(r"<link[^>]+>", text) if "canonical" not in tag]
        assert not [one for one in loaded if "//" in one], page


def test_formulas_are_mathml(site):
    page = (site / "how-controlnet-works" / "index.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "how-controlnet-works.md").read_text(encoding="utf-8")
    displayed = source.count("$$") // 2
    assert displayed > 5 and page.count('display="block"') == displayed and page.count("<math") > 2 * displayed
    assert "arithmatex" not in page and "merror" not in page
