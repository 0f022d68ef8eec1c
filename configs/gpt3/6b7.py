"""GPT-3 6.7B: 32 layers of 4,096, 32 heads of 128, 6.7B parameters (arXiv 2005.14165, table 2.1).

Command    llm-jax train --config=gpt3/6b7 --config.data.path='train_*.bin' --config.data.validation_path=val.bin
Data       token files with GPT-2's vocabulary; 300B tokens in the paper
Hardware   64 GPUs of 80 GB or the like; set mesh.fsdp and mesh.tensor to fit
Expected   no loss curve of this size was published on open data
"""

from ml_collections import ConfigDict

from configs.gpt3.common import gpt3


def get_config() -> ConfigDict:
    return gpt3("6b7", layers=32, width=4_096, heads=32, batch_tokens=2_097_152, learning_rate=0.00012)
