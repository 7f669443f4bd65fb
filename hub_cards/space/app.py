"""Chat about a picture, with all visual tokens and with those that FSR keeps. Written by `fsr-hf space`."""

from pathlib import Path

from fsr_hf.demo.web import build_app, launch


MODEL = "{{ model }}"
folder = Path(__file__).parent / MODEL
launch(build_app(str(folder) if folder.is_dir() else MODEL))
