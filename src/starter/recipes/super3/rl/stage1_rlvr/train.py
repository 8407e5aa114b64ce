# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.3", "ray>=2.9", "PyYAML"]
#
# [tool.runspec]
# schema = "1"
# docs = "https://raw.githubusercontent.com/NVIDIA-NeMo/Nemotron/main/docs/runspec/v1/spec.md"
# name = "super3/rl/stage1_rlvr"
# image = "nvcr.io/nvidia/nemo-rl:v0.5.0.nemotron_3_super"
# setup = "Needs Ray, torch, transformers 5.3 or newer and PyYAML, as in requirements.txt and requirements-recipes.txt."
#
# [tool.runspec.run]
# launch = "ray"
#
# [tool.runspec.config]
# dir = "./config"
# default = "tiny"
# format = "omegaconf"
#
# [tool.runspec.resources]
# nodes = 1
# gpus_per_node = 8
# ///
"""Reinforcement learning of a NemotronH model by GRPO on Ray: sums whose answers are checked.

python train.py --config config/tiny.yaml [train.steps=500 …]
"""

from pathlib import Path

from starter.rl import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
