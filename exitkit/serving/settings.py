"""What a server is started with."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from exitkit.common.checks import Count, NonNegative, Positive, check_fields
from exitkit.common.errors import ArgumentError, FileError
from exitkit.common.schema import build


@dataclass(frozen=True)
class Settings:
    """A package and how it is served; the keys of ``serve.yaml``.

    Attributes:
        package: the file that :func:`exitkit.export` wrote; not a single ``.onnx``.
        name: of the model in addresses; by default the file's.
        threshold: τ, or one for each exit; None for the package's policy and its guarantee.
        device: where the stages run, as for :func:`exitkit.load`.
        trust: that the code in a ``.pt2`` or ``.pte`` is trusted, as for :func:`exitkit.load`.
        calibration: outputs of the calibration split (:meth:`exitkit.ExitOutputs.save`), for the shift monitor; or None.
        replicas: how many processes answer.
        threads: of each, for torch.
        batch_size: samples that a stage runs on at most.
        max_wait_ms: how long a sample may be held back for fuller batches.
        max_queued: samples under way in one replica; requests beyond them get status 503.
        max_body_mb: of a request.
        max_pixels: of an image.
        timeout_s: for reading a request, and again for answering it.

    Raises:
        ArgumentError: values out of range, or a name that no address can hold.
    """

    package: str
    name: str = ""
    threshold: float | tuple[float, ...] | None = None
    device: str | None = None
    trust: bool = False
    calibration: str | None = None
    replicas: Count = 1
    threads: Count = 1
    batch_size: Count = 64
    max_wait_ms: NonNegative = 2.0
    max_queued: Count = 1024
    max_body_mb: Positive = 16.0
    max_pixels: Count = 25_000_000
    timeout_s: Positive = 30.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name:
            stem = Path(self.package).name.partition(".")[0]
            object.__setattr__(self, "name", re.sub(r"[^\w.-]", "-", stem, flags=re.ASCII) or "model")
        if not re.fullmatch(r"[\w.-]{1,80}", self.name, re.ASCII):
            raise ArgumentError(
                f"name={self.name[:80]!r} must be of letters, digits, '_', '.' and '-', and at most 80 of them"
            )


def read_settings(path: Path, **given: Any) -> Settings:
    """A ``serve.yaml``; what is ``given`` and not None stands above it.

    Raises:
        FileError: no such file, no YAML, unknown keys, or values out of range.
    """
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FileError(f"{str(path)!r} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(document, dict):
        raise FileError(f"{str(path)!r} must hold keys and values, such as 'threshold: 0.8'")
    chosen = {key: value for key, value in given.items() if value is not None}
    defaults = {one.name: one.default for one in fields(Settings) if one.default is not MISSING}
    return build(Settings, {**defaults, **document, **chosen}, repr(str(path)))
