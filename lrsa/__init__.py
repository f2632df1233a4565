"""Lag-Relative Sparse Attention (LRSA): post-train language models so that they live with a compressed KV cache.

Importing the package registers the attention with transformers under the name "lrsa":
`AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lrsa")` works after `import lrsa`. Without that
argument transformers loads a dense model, whatever the checkpoint was trained with; `lrsa.models.load_model` does not.
"""

from lrsa.attention import huggingface as _huggingface  # noqa: F401  # registers

__version__ = "0.1.0"
