# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.3", "PyYAML"]
#
# [tool.runspec]
# schema = "1"
# docs = "https://raw.githubusercontent.com/NVIDIA-NeMo/Nemotron/main/docs/runspec/v1/spec.md"
# name = "nano3/pretrain"
# image = "nvcr.io/nvidia/nemo:25.11.nemotron_3_nano"
# setup = "Needs torch, transformers 5.3 or newer and PyYAML, as in requirements-recipes.txt."
#
# [tool.runspec.run]
# launch = "torchrun"
#
# [tool.runspec.config]
# dir = "./config"
# default = "tiny"
# format = "omegaconf"
#
# [tool.runspec.resources]
# nodes = 2
# gpus_per_node = 8
# ///
"""Pretraining of a NemotronH model on the tokens of data/prep/pretrain.

torchrun … train.py --config config/tiny.yaml [train.steps=500 …]
"""

from pathlib import Path

from starter.pretrain import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
