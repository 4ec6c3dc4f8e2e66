"""The site has the repository's pages, pictures and results where they lie in it, so that the links
between them hold there as here."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/*.md", "docs/pictures/*")
RESULTS = ("md", "png", "json", "txt", "log")


def on_files(files: Files, config: Any) -> Files:
    found = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    results = ROOT / "benchmarks" / "results"
    found += [path for ending in RESULTS for path in results.rglob(f"*.{ending}")]
    for path in sorted(found):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files
