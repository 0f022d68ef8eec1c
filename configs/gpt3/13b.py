"""GPT-3 13B: 40 layers of 5,120, 40 heads of 128, 12.9B parameters (arXiv 2005.14165, table 2.1).

Command    llm-jax train --config=gpt3/13b --config.data.path='train_*.bin' --config.data.validation_path=val.bin
Data       token files with GPT-2's vocabulary; 300B tokens in the paper
Hardware   128 GPUs of 80 GB or the like; set mesh.fsdp and mesh.tensor to fit
Expected   no loss curve of this size was published on open data
Note       the paper prints a width of 5,140, which 40 heads of 128 do not fill; 5,120 gives the published 13B
"""

from ml_collections import ConfigDict

from configs.gpt3.common import gpt3


def get_config() -> ConfigDict:
    return gpt3("13b", layers=40, width=5_120, heads=40, batch_tokens=2_097_152, learning_rate=0.0001)
