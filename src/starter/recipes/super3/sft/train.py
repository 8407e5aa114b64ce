# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.3", "PyYAML"]
#
# [tool.runspec]
# schema = "1"
# docs = "https://raw.githubusercontent.com/NVIDIA-NeMo/Nemotron/main/docs/runspec/v1/spec.md"
# name = "super3/sft"
# image = "nvcr.io/nvidia/nemo:26.02.nemotron_3_super"
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
"""Supervised fine-tuning of a NemotronH model on chat data.

torchrun … train.py --config config/tiny.yaml [train.steps=500 …]
"""

from pathlib import Path

from starter.sft import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
