"""Writes a tiny model with random weights and a tokenizer of its own, for tests of engines; nothing is downloaded.

    tiny_model.py DIRECTORY [--arch qwen3|gemma3] [--seed 7]

Four layers, 2 KV heads of 64, float32: 4,096 bytes of KV a token. The weights are wide (standard deviation 0.15): with
the usual 0.02 a random model hardly looks at its context, and would hide wrong KV. ``gemma3`` alternates layers that
see everything with layers that see a window of 128 tokens, which makes several groups of KV cache.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

END, PAD = "<|im_end|>", "<|endoftext|>"
VOCABULARY = 2048
LAYERS = 4


def words(seed: int, count: int) -> str:
    """Pseudo-words, the same for the same seed."""
    choose = random.Random(seed)
    syllables = [a + b for a in "b d f g k l m n p r s t v z".split() for b in "a e i o u ai ou".split()]
    return " ".join("".join(choose.choices(syllables, k=choose.randint(1, 4))) for _ in range(count))


def write_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, END], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator((words(seed, 16) for seed in range(4000)), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "model_max_length": 8192}
    about["chat_template"] = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return tokenizer


def write_model(folder: Path, arch: str, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    sizes = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "eos_token_id": end,
        "pad_token_id": pad,
        "bos_token_id": pad,
    }
    torch.manual_seed(seed)
    if arch == "gemma3":
        kinds = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(LAYERS)]
        config = Gemma3TextConfig(**sizes, sliding_window=128, query_pre_attn_scalar=64, layer_types=kinds)
        model = Gemma3ForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.to(torch.float32).save_pretrained(folder, safe_serialization=True)


def write_adapter(folder: Path, seed: int, rank: int = 8) -> Path:
    """A LoRA adapter for the queries and values of ``qwen3``, strong enough to change the text."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, outputs in (("q_proj", 256), ("v_proj", 128)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(rank, 256) * 0.3
            tensors[f"{at}.lora_B.weight"] = torch.randn(outputs, rank) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**about, "task_type": "CAUSAL_LM"}))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arch", choices=("qwen3", "gemma3"), default="qwen3")
    parser.add_argument("--seed", type=int, default=7)
    given = parser.parse_args()
    write_model(given.directory, given.arch, given.seed)
