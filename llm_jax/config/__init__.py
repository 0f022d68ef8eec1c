"""The configuration of a run: schema (all keys), resolve (files and overrides to dataclasses), checks (pairs)."""

from llm_jax.config.checks import check, check_vocab, run_steps
from llm_jax.config.mesh import check_devices
from llm_jax.config.resolve import (
    config_names,
    differences,
    find_config,
    from_dict,
    given,
    load,
    override,
    to_dict,
)
from llm_jax.config.schema import (
    CheckpointConfig,
    ColumnsConfig,
    Config,
    DataConfig,
    DecoderConfig,
    DropoutConfig,
    EncoderConfig,
    EvalConfig,
    GenerateConfig,
    LatentConfig,
    LogConfig,
    LoraConfig,
    MaskingConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    PrecisionConfig,
    RopeConfig,
    SourceConfig,
    TrainConfig,
    TransformerConfig,
)
