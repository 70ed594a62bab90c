"""Causal language models: pretrained models of `transformers`, small models from scratch, and LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from bilevel.errors import DataError
from bilevel.tasks.online_lm.config import OnlineLM


def from_scratch(config: OnlineLM, tokenizer: Any) -> Any:
    """Return a small causal model with random weights. It uses torch's global random number generator.

    Input and output embeddings are not tied. With tied embeddings, the vectors of tokens that never occur in tuning,
    such as the names of new people, would all become equal, because these tokens are never predicted.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    end = tokenizer.eos_token_id
    if config.architecture == "llama":
        shape = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=3 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context + config.answer_tokens,
            tie_word_embeddings=False,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=None,
        )
        return LlamaForCausalLM(shape)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=config.context + config.answer_tokens,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=end,
            eos_token_id=end,
        )
    )


def load(name: str) -> tuple[Any, Any]:
    """Load a pretrained causal language model in float32, and its tokenizer.

    Raises:
        DataError: the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return _loaded(name, lambda: AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)), load_tokenizer(name)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a pretrained model. It must be a fast tokenizer, because spans of characters are needed.

    Raises:
        DataError: the tokenizer cannot be loaded.
        ValueError: the tokenizer is not a fast one.
    """
    from transformers import AutoTokenizer

    tokenizer = _loaded(name, lambda: AutoTokenizer.from_pretrained(name))
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {name} is not a fast one, so its tokens have no place in the text")
    return tokenizer


def _loaded(name: str, load: Any) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        place = Path(name)
        if place.exists():
            raise DataError(f"{name} is no folder that transformers can load: {_first_line(error)}") from error
        raise DataError(
            f"{name} is no local folder, and could not be had from the Hugging Face hub ({_first_line(error)}); where "
            "there is none, copy the model's folder (config.json, model.safetensors, tokenizer.json) and pass its path"
        ) from error


def with_lora(model: nn.Module, rank: int) -> Any:
    """Freeze the model's weights and add trainable low-rank matrices to the layers that `peft` selects by default."""
    from peft import LoraConfig, TaskType, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type=TaskType.CAUSAL_LM))  # pyright: ignore[reportArgumentType]
    return adapted.eval()


def device_of(config: OnlineLM) -> torch.device:
    """Return the device of a run.

    Raises:
        ValueError: the device cannot be used.
    """
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error)
        raise ValueError(f"device={config.device!r} cannot be used ({reason}); take auto, cpu or cuda") from error
    return torch.device(wanted)


def most_positions(model: Any) -> int | None:
    """Return the length of the longest sequence that the model accepts, or `None` if there is no limit."""
    return getattr(model.config, "max_position_embeddings", None)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
