"""`python -m fsr_hf`, which is `fsr-hf`; `accelerate launch -m fsr_hf` needs a module."""

from .cli import app


if __name__ == "__main__":
    app(prog_name="fsr-hf")
