"""Small, real training recipes: each is a runspec header, its configs and a call into the modules of this package."""

import os

# Models, tokenizers and data come from local paths only. huggingface_hub reads this once, when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
