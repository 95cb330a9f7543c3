"""The model as transformers wants it: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

integrations/hf.py copies this file and those of the model into the folder DIR. Here is only what joins the two: tokens and
attention masks in, logits and loss out, the recurrent state in the place of a cache of keys and values.
"""
import dataclasses

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fmem import copy_state
from variants.build import ModelConfig, build


class FMemHFConfig(PreTrainedConfig):
    """model: the fields of ModelConfig. The names that other tools look for are worked out from them."""
    model_type = "fmem"

    def __init__(self, model: dict | None = None, **kwargs):
        self.model = dataclasses.asdict(ModelConfig(**(model or {})))       # raises ValueError for values that cannot work
        self.vocab_size, self.hidden_size = self.model["vocab_size"], self.model["d_model"]
        self.num_hidden_layers = self.model["n_layer"]
        kwargs["tie_word_embeddings"] = self.model["tie_embeddings"]
        super().__init__(**kwargs)


class State:
    """What the model keeps of a batch of texts, in the place of a cache. It is changed by every call that gets it.

    groups: [(numbers of the texts, their state)]. Texts that begin after different numbers of padding tokens are read apart,
    since padding must not be written to a memory; where a state has no positions in it they are one group from then on.
    """
    is_compileable = False

    def __init__(self, groups: list, length: int):
        self.groups, self.length = groups, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.length

    def one(self, axis: int) -> list:
        """The states of all texts in their order, layer by layer."""
        order = torch.cat([rows for rows, _ in self.groups]).argsort()
        return [select(joined(layers, axis), order, axis) for layers in zip(*(state for _, state in self.groups), strict=True)]


def joined(parts, axis):
    """Several states of a layer as one of all their texts."""
    first = parts[0]
    if isinstance(first, (list, tuple)):
        return type(first)(joined(part, axis) for part in zip(*parts, strict=True))
    return torch.cat(parts, axis) if isinstance(first, Tensor) else first


def select(state, rows, axis):
    """A layer's state of some texts."""
    if isinstance(state, (list, tuple)):
        return type(state)(select(part, rows, axis) for part in state)
    return state.index_select(axis, rows.to(state.device)) if isinstance(state, Tensor) else state


class FMemForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FMemHFConfig
    base_model_prefix = ""
    _is_stateful = True                                     # what was read cannot be taken back
    _no_split_modules = ["Block"]                           # noqa: RUF012 (a name that transformers reads)
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}      # noqa: RUF012

    def __init__(self, config: FMemHFConfig):
        super().__init__(config)
        self.model = build(ModelConfig(**config.model))
        self.post_init()

    def _init_weights(self, module: nn.Module):
        """FMem has drawn its weights already."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_input_embeddings(self, value: nn.Module):
        self.model.embed = value

    def set_output_embeddings(self, value: nn.Module):
        self.model.head = value

    @property
    def axis(self) -> int:
        """Which dimension of a layer's state counts the texts."""
        return 1 if self.config.model["mixer"] == "attention" else 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: State | None = None,
                labels: Tensor | None = None, use_cache: bool | None = None, logits_to_keep: int = 0,
                return_dict: bool | None = None, **kwargs) -> CausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, vocab_size]. attention_mask [B, all tokens so far]: 0 for padding on the left, which
        is left out; padding on the right changes no logits before it. labels [B, T]: -100 where there is no loss."""
        B, T = input_ids.shape
        if past_key_values is None:
            groups = [(rows, None) for rows in self.by_padding(attention_mask, B, input_ids.device)]
            past_key_values = State(groups, 0)
        logits, groups = None, []
        for rows, state in past_key_values.groups:
            some, skip = input_ids[rows], 0
            if state is None and attention_mask is not None:
                skip = min(int((attention_mask[rows[0]].cumsum(0) == 0).sum()), T - 1)
            y, state = self.read(some[:, skip:], state)
            if logits is None:
                logits = y.new_zeros(B, T, y.shape[-1])
            logits[rows, skip:] = y
            groups.append((rows, state))
        past_key_values.groups, past_key_values.length = groups, past_key_values.length + T
        if len(groups) > 1 and self.axis == 0:              # attention's states have positions
            past_key_values.groups = [(torch.arange(B, device=input_ids.device), past_key_values.one(self.axis))]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=None if use_cache is False else past_key_values)
        return out if return_dict is not False else out.to_tuple()

    def read(self, tokens: Tensor, state: list | None) -> tuple[Tensor, list]:
        if tokens.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            logits, state = self.model(tokens[:, 0], state)
            return logits[:, None], state
        return self.model(tokens, state if state is None else copy_state(state))

    @staticmethod
    def by_padding(mask: Tensor | None, B: int, device) -> list[Tensor]:
        """Numbers of the texts that have the same padding on the left, a tensor for each such group."""
        if mask is None or bool(mask[:, 0].all()):
            return [torch.arange(B, device=device)]
        skip = (mask.cumsum(1) == 0).sum(1)
        return [torch.nonzero(skip == n)[:, 0] for n in skip.unique()]

    def _reorder_cache(self, past_key_values: State, beam_idx: Tensor) -> State:
        """For beam search: text i is continued from what text beam_idx[i] was."""
        if len(past_key_values.groups) == 1:
            _, state = past_key_values.groups[0]
            rows = torch.arange(len(beam_idx), device=beam_idx.device)
            return State([(rows, [select(layer, beam_idx, self.axis) for layer in state])], past_key_values.length)
        groups = []
        for rows, state in past_key_values.groups:          # beams of a text have the same padding
            at = {int(row): i for i, row in enumerate(rows)}
            inside = torch.tensor([at[int(beam_idx[row])] for row in rows])
            groups.append((rows, [select(layer, inside, self.axis) for layer in state]))
        return State(groups, past_key_values.length)
