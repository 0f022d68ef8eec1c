"""Which objective a config asks for."""

from llm_jax.config import Config
from llm_jax.data.labelled import texts_a_record
from llm_jax.objectives.base import Objective
from llm_jax.objectives.labelled import LabelledObjective
from llm_jax.objectives.language import LanguageObjective
from llm_jax.objectives.masked import MaskedObjective, ReplacedObjective


def make(cfg: Config) -> Objective:
    """The objective of `data.task`."""
    match cfg.data.task:
        case "language":
            return LanguageObjective.make(cfg)
        case "masked":
            return MaskedObjective.make(cfg)
        case "replaced":
            return ReplacedObjective.make(cfg)
    return LabelledObjective.make(cfg, texts_a_record(cfg.data))
