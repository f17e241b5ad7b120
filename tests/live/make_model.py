"""Writes a tiny random model for vLLM to serve: make_model.py TOKENIZER_DIR OUT_DIR {full,hybrid} [TEMPLATE]

Run by the Python of vLLM's own virtual environment (it has torch and transformers; ours has neither). `full`: Qwen3,
every layer with full attention. `hybrid`: Gemma3 text, a window of 256 tokens on every other layer, so that the engine
has two cache groups. TEMPLATE replaces the tokenizer's own chat template.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

SEED = 20260
VOCABULARY = 8000
POSITIONS = 8192
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def config(kind: str) -> Any:
    from transformers import Gemma3TextConfig, Qwen3Config  # type: ignore[import-not-found]

    if kind == "full":
        return Qwen3Config(**SMALL, num_hidden_layers=2, tie_word_embeddings=True)
    if kind == "hybrid":
        layers = ["sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(
            **SMALL, num_hidden_layers=len(layers), layer_types=layers, sliding_window=256, query_pre_attn_scalar=32,
            pad_token_id=0,
        )  # fmt: skip
    raise SystemExit(f"{kind!r} is neither full nor hybrid")


def main(tokenizer: Path, out: Path, kind: str, template: Path | None) -> None:
    import torch  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    for file in tokenizer.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, out / file.name)
    if template is not None:
        shutil.copyfile(template, out / "chat_template.jinja")
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config(kind)).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) not in {4, 5}:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]) if len(sys.argv) == 5 else None)
