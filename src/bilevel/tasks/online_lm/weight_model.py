"""The meta parameters: a model that computes a weight for every token of a document."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import gelu, softplus
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_BETA = 3.0


class WeightModelConfig(PretrainedConfig):
    """The configuration of a `WeightModel`: that of its language model, and the width of the layer on top."""

    model_type = "bilevel-weight-model"

    def __init__(self, body: dict[str, Any] | None = None, hidden: int = 128, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.body = body
        self.hidden = hidden


class WeightModel(PreTrainedModel):
    """A model that computes w_i = softplus₃(u · gelu(V h_i)) for every token i.

    h are the last hidden states of a language model, and softplus₃(x) = log(1 + e^{3x})/3. The last layer starts at
    zero, so all weights start at log(2)/3 = 0.23. A weight depends on its token and the tokens before it.
    `save_pretrained` and `from_pretrained` work as for every model of `transformers`.

    Reference: Hu et al., Meta-Learning Online Adaptation of Language Models, 2023 (CaMeLS).

    >>> import torch
    >>> from transformers import GPT2Config
    >>> sizes = {"vocab_size": 50, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1}
    >>> body = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0).to_dict()
    >>> model = WeightModel(WeightModelConfig(body=body))
    >>> model(torch.tensor([[3, 1, 4]]))
    tensor([[0.2310, 0.2310, 0.2310]], grad_fn=<SoftplusBackward0>)
    """

    config_class = WeightModelConfig
    config: WeightModelConfig
    _supports_sdpa = True
    base_model_prefix = "body"

    def __init__(self, config: WeightModelConfig) -> None:
        super().__init__(config)
        shape = dict(config.body or {})
        kind = shape.pop("model_type", None)
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"body is of model type {kind!r}, which this version of transformers does not know")
        body = CONFIG_MAPPING[kind](**shape)
        self.body = AutoModel.from_config(body)
        self.hidden = nn.Linear(body.hidden_size, config.hidden)
        self.weight = nn.Linear(config.hidden, 1)
        self.post_init()
        nn.init.zeros_(self.weight.weight)
        nn.init.zeros_(self.weight.bias)

    @classmethod
    def on_top_of(cls, language_model: Any, hidden: int = 128) -> WeightModel:
        """Return a weight model whose body is a copy of a causal language model without its head."""
        made = cls(WeightModelConfig(body=language_model.config.to_dict(), hidden=hidden))
        made.body.load_state_dict(copy.deepcopy(language_model.base_model.state_dict()))
        return made.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Compute the weights `[batch, length]`, which are positive."""
        states = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return softplus(self.weight(gelu(self.hidden(states))).squeeze(-1), beta=_BETA)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave modules unchanged, because the body initialises itself and PyTorch initialises the layer on top."""
