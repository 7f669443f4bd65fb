"""Runs `clean_process.py`: a process that has never heard of the package loads and uses a Hub folder."""

import json
import shutil
from pathlib import Path

from isolated import run_isolated


__all__ = ["run_clean"]


def run_clean(folder: Path, output_dir: Path, hub_id: str | None = None) -> dict:
    """The report of `clean_process.py` on `folder`, read as a folder or out of the cache of a Hub repository."""
    script = Path(__file__).with_name("clean_process.py")
    output_dir.mkdir()
    if hub_id is not None:
        repository = output_dir / "cache" / "hub" / f"models--{hub_id.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    run_isolated(script, hub_id or folder, output_dir, home=output_dir)
    return json.loads((output_dir / "report.json").read_text())
