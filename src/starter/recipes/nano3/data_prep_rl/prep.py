# /// script
# requires-python = ">=3.10"
# dependencies = ["PyYAML"]
#
# [tool.runspec]
# schema = "1"
# docs = "https://raw.githubusercontent.com/NVIDIA-NeMo/Nemotron/main/docs/runspec/v1/spec.md"
# name = "nano3/data/prep/rl"
# image = "anyscale/ray:2.49.2-py312"
# setup = "Needs PyYAML; pyarrow for source tables in Parquet."
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
# gpus_per_node = 0
# ///
"""Prompts for reinforcement learning, filled from their source tables, with rows held out.

python prep.py --config config/tiny.yaml [blend=/data/blend.json …]
"""

from pathlib import Path

from starter.rl_prep import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
