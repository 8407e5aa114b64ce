# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.3", "PyYAML"]
#
# [tool.runspec]
# schema = "1"
# docs = "https://raw.githubusercontent.com/NVIDIA-NeMo/Nemotron/main/docs/runspec/v1/spec.md"
# name = "super3/data/prep/sft"
# image = "nvcr.io/nvidia/nemo:26.02.nemotron_3_super"
# setup = "Needs torch, transformers 5.3 or newer and PyYAML, as in requirements-recipes.txt."
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
"""Chat data to packed token ids with loss masks.

python prep.py --config config/tiny.yaml [blend=/data/blend.json …]
"""

from pathlib import Path

from starter.sft_prep import main

if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
