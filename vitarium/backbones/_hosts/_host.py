"""What all hosts share: parameters that are made for one size of images."""

from __future__ import annotations

from typing import Any

from timm.models._input import update_model_input_size

from vitarium.backbones._blocks import Backbone, checked_size


class Host(Backbone):
    """A network in which parameters, its own or its mixers', may depend on the size of images.

    Attributes:
        input_size: (H, W) of the images for which they are made, in pixels.
    """

    input_size: tuple[int, int]

    def _map_size(self, stage: int) -> tuple[int, int]:
        """(H, W) of a stage's map at ``input_size``, in tokens."""
        stride = 4 * 2**stage
        return -(-self.input_size[0] // stride), -(-self.input_size[1] // stride)

    def _resize_positions(self, before: list[tuple[int, int]]) -> None:
        """Resize the host's own parameters, from the sizes of the stages' maps ``before``."""

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Make position embeddings and the mixers' parameters ones for images of another size.

        Args:
            img_size: in pixels, an int or (H, W); None changes nothing.

        Raises:
            ValueError: not one or two sides, or one below the smallest.
        """
        if img_size is None:
            return
        stages = list(self.feature_stages)
        before = [self._map_size(i) for i in range(len(stages))]
        self.input_size = checked_size(img_size, self.min_size)
        self._resize_positions(before)
        for i, stage in enumerate(stages):
            for mixer in stage.modules():
                resize: Any = getattr(mixer, "set_input_size", None)
                if resize is not None:
                    resize(self._map_size(i))
        update_model_input_size(self, self.input_size)
