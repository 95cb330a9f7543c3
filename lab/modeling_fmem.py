"""The model for transformers: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

lab/hf.py copies this file into the folder DIR, beside the files that it imports. Here is only what
joins the two sides: tokens and attention masks in, logits and loss out, the state of the memory
where other models have a cache of keys and values.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .fmem import FactorizationMemory, FMem, FMemConfig
from .layers import ExtendedMemory

if TYPE_CHECKING:  # transformers brings along the files named here; fmem.py imports this one
    from .kernel import recurrence  # noqa: F401

LAYERS = {"FactorizationMemory": FactorizationMemory, "ExtendedMemory": ExtendedMemory}

# The output that generate hands back to the next call: versions before 5.24 name it
# past_key_values. Under another name each new token would be read into an empty memory.
OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
STATE = "cache" if "cache" in OUTPUTS else "past_key_values"


class FMemHFConfig(PreTrainedConfig):
    """model: the fields of FMemConfig; layer: the class in each block, with its arguments."""

    model_type = "fmem"

    def __init__(self, model=None, layer="FactorizationMemory", layer_arguments=None, **kwargs):
        self.model = dataclasses.asdict(FMemConfig(**(model or {})))
        self.layer = layer
        self.layer_arguments = layer_arguments or {}
        # The names under which other tools look for them.
        self.vocab_size = self.model["vocab_size"]
        self.hidden_size = self.model["d_model"]
        self.num_hidden_layers = self.model["n_layer"]
        kwargs["tie_word_embeddings"] = self.model["tie_embeddings"]
        super().__init__(**kwargs)


class State:
    """The memory of a batch of sequences. A call that gets it changes it; copy.deepcopy first."""

    is_compileable = False
    is_croppable = False

    def __init__(self, layers, batch, length, padded_right=False):
        self.layers = layers  # the states of the layers, as FMem.forward returns them
        self.batch = batch  # sequences
        self.length = length  # tokens read so far, padding included
        self.padded_right = padded_right  # padding was read after the tokens of a sequence

    def get_seq_length(self, layer_idx=0):
        return self.length


def combine(states, function):
    """One state out of several of the same structure: `function` of each list of tensors."""
    first = states[0]
    if isinstance(first, (list, tuple)):
        return type(first)(combine(parts, function) for parts in zip(*states, strict=True))
    return function(states) if isinstance(first, Tensor) else first


class FMemForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = FMemHFConfig
    base_model_prefix = ""
    _input_embed_layer = "embed"
    _is_stateful = True  # what was read cannot be taken back
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers reads the name)
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        layer = LAYERS[config.layer]
        self.model = FMem(FMemConfig(**config.model), layer, config.layer_arguments)
        self.post_init()

    def _init_weights(self, module):
        """FMem has drawn its weights already."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, value):
        self.model.head = value

    def forward(
        self,
        input_ids,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        return_dict=None,
        **unknown,
    ):
        """input_ids [B, T] -> logits [B, T, vocab_size], the state, and with labels the loss.

        attention_mask [B, all tokens so far]: 0 for padding. On the left, in the first call, it is
        not read into the memory; on the right it comes too late to change the logits of the text.
        cache, or past_key_values: the State that an earlier call returned. labels [B, T]: -100
        where there is no loss. Raises ValueError for what it cannot do.
        """
        asked = [
            name for name, value in unknown.items() if value is not None and value is not False
        ]
        if asked:
            raise ValueError(f"FMemForCausalLM does not accept {', '.join(asked)}")
        state = past_key_values if cache is None else cache
        if state is not None and not isinstance(state, State):
            raise ValueError(f"the state must be one that this model returned, not {type(state)}")
        if state is not None and state.batch != len(input_ids):
            raise ValueError(f"the state has {state.batch} sequences, input_ids {len(input_ids)}")
        hidden, state = self.read(input_ids, attention_mask, state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits)
        if use_cache is not False:
            output[STATE] = state
        return output.to_tuple() if return_dict is False else output

    def read(self, input_ids, mask, state):
        """input_ids [B, T] -> the last hidden states [B, T, d_model], and the state after them."""
        T = input_ids.shape[1]
        before = 0 if state is None else state.length
        if mask is not None:
            if mask.shape != (len(input_ids), before + T):
                expected = f"{[len(input_ids), before + T]}, a number for every token so far"
                raise ValueError(f"attention_mask must be {expected}, not {[*mask.shape]}")
            mask = mask[:, before:].bool()
        if state is None:
            if mask is not None and not mask.all():
                return self.read_padded(input_ids, mask)
            hidden, layers = self.model.hidden(input_ids)
            return hidden, State(layers, len(input_ids), T)
        if state.padded_right:
            raise ValueError("padding was read after the tokens; texts to continue are padded left")
        if mask is not None and not mask.all():
            raise ValueError("padding after the first call would be read into the memory")
        steps = T == 1 and not torch.is_grad_enabled()  # faster
        tokens = input_ids[:, 0] if steps else input_ids
        hidden, state.layers = self.model.hidden(tokens, state.layers)
        state.length += T
        return hidden.view(len(input_ids), T, -1), state

    def read_padded(self, input_ids, mask):
        """`read` at the start. Sequences with equal padding on the left are read together,
        without it; their hidden states there are zero.
        """
        if not mask.any(1).all():
            raise ValueError("attention_mask has a sequence without a token")
        first = mask.int().argmax(1)  # of each sequence, its first token that is not padding
        rows = []
        outputs = []
        states = []
        for n in first.unique().tolist():
            rows.append((first == n).nonzero()[:, 0])
            hidden, layers = self.model.hidden(input_ids[rows[-1], n:])
            outputs.append(F.pad(hidden, (0, 0, n, 0)))
            states.append(layers)
        order = torch.cat(rows).argsort()
        layers = combine(states, lambda parts: torch.cat(parts)[order])
        padded_right = bool((mask.sum(1) < mask.shape[1] - first).any())
        state = State(layers, len(mask), mask.shape[1], padded_right)
        return torch.cat(outputs)[order], state

    def _reorder_cache(self, state, beam_idx):
        """For beam search: sequence i is continued from what sequence beam_idx[i] was."""
        layers = combine([state.layers], lambda parts: parts[0].index_select(0, beam_idx))
        return State(layers, len(beam_idx), state.length, state.padded_right)
