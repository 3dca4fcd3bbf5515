"""What a head is made for: the shape and meaning of the feature at a boundary."""

from __future__ import annotations

from dataclasses import dataclass

from exitkit.exits.pooling import ReadoutKind


@dataclass(frozen=True)
class Feature:
    """What a head reads.

    Attributes:
        shape: of one sample, without the batch: (C, H, W), (H, W, C), (T, D), (C, T) or (D,).
        layout: what these dimensions are: ``"channels_first"``, ``"channels_last"``, ``"tokens"``, ``"sequence"`` or
            ``"vector"``.
        readout: how the backbone reads tokens itself: the first, the last, or their mean.
        skip: leading tokens (class, registers) that a mean leaves out.
        image_side: the shorter side of the model's input image; None where it reads no image.
    """

    shape: tuple[int, ...]
    layout: str
    readout: ReadoutKind = "mean"
    skip: int = 0
    image_side: int | None = None

    @property
    def is_map(self) -> bool:
        """Whether it is two-dimensional: an image of channels."""
        return self.layout in ("channels_first", "channels_last")

    @property
    def maps(self) -> tuple[int, int, int]:
        """Channels, height and width of a map."""
        channels, height, width = self.shape if self.layout == "channels_first" else (self.shape[2], *self.shape[:2])
        return channels, height, width
