"""What a head is made for: the shape and meaning of the feature at a boundary."""

from __future__ import annotations

from dataclasses import dataclass

from exitkit.exits.pooling import ReadoutKind


@dataclass(frozen=True)
class Feature:
    """What a head reads.

    Attributes:
        shape: of one sample, without the batch: (C, H, W), (H, W, C), (T, D), (C, T) or (D,); of videos and volumes
            (C, T, H, W) or (T, H, W, C).
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
        """Whether it is an image of channels, or several behind one another."""
        return self.layout in ("channels_first", "channels_last")

    @property
    def is_volume(self) -> bool:
        """Whether it is maps that are behind one another in time or depth."""
        return self.is_map and len(self.shape) == 4

    @property
    def maps(self) -> tuple[int, int, int]:
        """Channels, height and width of a map."""
        first = self.layout == "channels_first"
        channels, *_, height, width = self.shape if first else (self.shape[-1], *self.shape[:-1])
        return channels, height, width
