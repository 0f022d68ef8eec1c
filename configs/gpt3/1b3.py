"""GPT-3 XL: 24 layers of 2,048, 16 heads of 128, 1.3B parameters (arXiv 2005.14165, table 2.1).

Command    llm-jax train --config=gpt3/1b3 --config.data.path='train_*.bin' --config.data.validation_path=val.bin
Data       token files with GPT-2's vocabulary; 300B tokens in the paper
Hardware   16 GPUs of 80 GB or the like; set mesh.fsdp and mesh.tensor to fit
Expected   no loss curve of this size was published on open data
Note       the paper prints 24 heads of 128, which do not fit a width of 2,048; 16 give the published 1.3B
"""

from ml_collections import ConfigDict

from configs.gpt3.common import gpt3


def get_config() -> ConfigDict:
    return gpt3("1b3", layers=24, width=2_048, heads=16, batch_tokens=1_048_576, learning_rate=0.0002)
