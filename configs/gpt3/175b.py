"""GPT-3 175B: 96 layers of 12,288, 96 heads of 128, 175B parameters (arXiv 2005.14165, table 2.1).

Command    llm-jax train --config=gpt3/175b --config.data.path='train_*.bin' --config.data.validation_path=val.bin
Data       token files with GPT-2's vocabulary; 300B tokens in the paper
Hardware   1,024 GPUs of 80 GB or the like; set mesh.fsdp and mesh.tensor to fit
Expected   no loss curve of this size was published on open data
"""

from ml_collections import ConfigDict

from configs.gpt3.common import gpt3


def get_config() -> ConfigDict:
    return gpt3("175b", layers=96, width=12_288, heads=96, batch_tokens=3_276_800, learning_rate=6e-05)
