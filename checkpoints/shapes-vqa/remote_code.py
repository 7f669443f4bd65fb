# Generated from fsr_hf 0.1.0 (fsr_hf.configuration.remote_code), do not edit.
"""What a config, a model or a processor does on top of the stock class when it is saved: its code goes along."""

import os
from collections.abc import Callable
from typing import Any, ClassVar


__all__ = ["RemoteCodeMixin"]


class RemoteCodeMixin:
    """
    Makes `save_pretrained` and `push_to_hub` write folders that load with `trust_remote_code=True`, nothing installed.

    Comes before the stock class: `class FSRLlavaConfig(RemoteCodeMixin, LlavaConfig)`. The installed package sets the
    writer. In a copy that was itself loaded from a Hub folder there is none: its modules are flat already, and
    transformers copies them.
    """

    _write_remote_code: ClassVar[Callable[[Any, str | os.PathLike], None] | None] = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As the stock method; the folder also receives the code, and `auto_map` names classes of this folder only."""
        references = getattr(self, "auto_map", None)
        if self._write_remote_code is not None:
            self._write_remote_code(save_directory)
        elif references:  # loaded by a Hub id: "org/name--file.Class"
            self.auto_map = {auto: reference.rpartition("--")[2] for auto, reference in references.items()}
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # What is newer than these times is uploaded. The code was written a moment before they are taken.
        times = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        written = (".py", "fsr_manifest.json")
        return {name: time for name, time in times.items() if not name.endswith(written)}
