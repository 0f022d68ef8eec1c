"""The parameters of a run's checkpoint read slice by slice, as conversions and their check need them."""

from pathlib import Path

import numpy as np

from llm_jax.config import Config
from llm_jax.convert.rules import Slot
from llm_jax.models import lora, registry
from llm_jax.precision import Precision
from llm_jax.sharding import Layout
from llm_jax.training.arrays import by_path
from llm_jax.training.slices import SavedArrays


class SavedParameters(SavedArrays):
    """Those that the run evaluates with (their running average where it keeps one), by their paths in the model.

    Args:
      path: folder of the checkpoint.
      cfg: of the run.

    Attributes:
      adapted: layers, as "stack/blocks/attention/query", that have an adapter.
    """

    def __init__(self, path: Path, cfg: Config):
        self._name, self._lora = "ema" if cfg.train.ema_decay else "params", cfg.model.lora
        model = registry.build(cfg.model, Layout(), Precision.make(cfg.precision))
        shapes = {f"{self._name}/{path}": leaf for path, leaf in by_path(model.shapes()).items()}
        if self._name == "ema":
            shapes = {p: leaf.update(dtype=np.promote_types(leaf.dtype, np.float32)) for p, leaf in shapes.items()}
        super().__init__(path, shapes)
        self.adapted = lora.layers(path.removeprefix(f"{self._name}/") for path in shapes)

    def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        return super().read(f"{self._name}/{path}", index)

    def merged(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The same, of a kernel with its adapter in it: in float32 then."""
        values, (layer, _, name) = self.read(path, index), path.rpartition("/")
        if name != "kernel" or layer not in self.adapted:
            return values
        a, b = (self.read(f"{layer}/{part}", index) for part in (lora.A, lora.B))
        return lora.merged(values, a, b, self._lora.scale)

    def slot(self, slot: Slot) -> np.ndarray:
        """What lies in a slot of a conversion, merged, without what fills the vocabulary up."""
        return self.merged(slot.path, slot.index)[tuple(slice(size) for size in slot.shape)]
