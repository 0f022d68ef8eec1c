"""GPT-3 Large: 24 layers of 1,536, 16 heads of 96, 760M parameters (arXiv 2005.14165, table 2.1).

Command    llm-jax train --config=gpt3/760m --config.data.path='train_*.bin' --config.data.validation_path=val.bin
Data       token files with GPT-2's vocabulary; 300B tokens in the paper
Hardware   8 GPUs of 80 GB or the like; set mesh.fsdp and mesh.tensor to fit
Expected   no loss curve of this size was published on open data
"""

from ml_collections import ConfigDict

from configs.gpt3.common import gpt3


def get_config() -> ConfigDict:
    return gpt3("760m", layers=24, width=1_536, heads=16, batch_tokens=524_288, learning_rate=0.00025)
