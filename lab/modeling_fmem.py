"""The model for transformers: AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).

lab/hf.py copies this file into DIR, with those that it imports. The blocks are those of fmem.py.
This file adapts them to the library: config, state (the library's cache), padding, outputs.
"""

import dataclasses
import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel, __version__
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .fmem import EMBED_STD, Block, FMemConfig
from .layers import ExtendedMemory

if TYPE_CHECKING:  # makes transformers copy kernel.py, which fmem.py imports
    from .kernel import recurrence  # noqa: F401

FIELDS = [field for field in dataclasses.fields(FMemConfig) if field.name != "tie_embeddings"]

# The output that generate passes on to the next call. Versions before 5.24 call it
# past_key_values. With the wrong name, each new token would start from an empty memory.
OUTPUTS = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
STATE = "cache" if "cache" in OUTPUTS else "past_key_values"


class FMemHFConfig(PreTrainedConfig):
    """The fields of FMemConfig; layer_arguments: those of ExtendedMemory."""

    model_type = "fmem"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}  # noqa: RUF012

    def __init__(self, layer_arguments=None, use_cache=True, **kwargs):
        if __version__ not in kwargs.setdefault("tested_with", [__version__]):
            warnings.warn(f"tested with transformers {kwargs['tested_with']}", stacklevel=2)
        for field in FIELDS:
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        self.layer_arguments = layer_arguments or {}
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    def fmem_config(self):
        """The FMemConfig. Raises ValueError for an invalid field."""
        return FMemConfig(**{field.name: getattr(self, field.name) for field in FIELDS})


class State:
    """The memory of a batch of sequences after `length` tokens, padding included."""

    is_compileable = False  # generate reads these three from a cache
    is_croppable = False
    is_linear = (False,)

    def __init__(self, layers, length):
        self.layers = layers  # the states of the layers, as Block returns them
        self.length = length

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """For beam search: sequence i continues from the state of sequence beam_idx[i]."""
        self.layers = pytree.tree_map_only(Tensor, lambda part: part[beam_idx], self.layers)

    def batch_repeat_interleave(self, repeats):
        """A new State with each sequence `repeats` times, for as many continuations."""
        layers = [part.repeat_interleave(repeats, 0) for part in pytree.tree_leaves(self.layers)]
        return State(pytree.tree_unflatten(layers, pytree.tree_structure(self.layers)), self.length)


pytree.register_pytree_node(
    State, lambda state: ([state.layers], state.length), lambda parts, n: State(*parts, n)
)


class PaddedMemory(ExtendedMemory):
    """The memory with the config's extensions, or none, that skips padding: inputs of 0."""

    def scan_inputs(self, x, state=None):
        theta, phi, xbar = super().scan_inputs(x, state)
        real = x.any(-1, keepdim=True)
        return theta * real, phi * real, xbar


class FMemBlock(GradientCheckpointingLayer, Block):
    """fmem.Block with the library's gradient checkpointing."""


class FMemPreTrainedModel(PreTrainedModel):
    config_class = FMemHFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FMemBlock"]  # noqa: RUF012 (transformers reads the name)
    _is_stateful = True  # the state cannot be rolled back

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise weights that a checkpoint lacks; transformers guards the others. It calls this
        for modules that own weights, so a block is initialised when one of its parts is.
        """
        for block in self.modules():
            if isinstance(block, FMemBlock) and module in block.modules():
                block.init_weights(self.config.n_layer)
        if isinstance(module, nn.RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=EMBED_STD)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False


class FMemModel(FMemPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config):
        super().__init__(config)
        sizes = config.fmem_config()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.dropout = nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(
            FMemBlock(sizes, PaddedMemory, config.layer_arguments) for _ in range(sizes.n_layer)
        )
        self.norm = nn.RMSNorm(sizes.d_model, eps=sizes.norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        tokenizer=None,
        **unknown,
    ):
        """input_ids [B, T], or inputs_embeds [B, T, d_model] -> hidden states, and the state.

        attention_mask [B, T], or of all tokens so far, whose last T columns are used: 0 for
        padding, which is skipped. Only a convolution or a shift sees padding that follows text.
        cache, or past_key_values: the State that an earlier call returned; it is not changed.
        tokenizer, which generate passes on, is ignored. Raises ValueError for arguments that the
        model does not support.
        """
        refused = [k for k, value in unknown.items() if value is not None and value is not False]
        if refused:
            raise ValueError(f"{type(self).__name__} does not accept {', '.join(refused)}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3:
            raise ValueError("input_ids must be [B, T], inputs_embeds [B, T, d_model]")
        B, T = x.shape[:2]
        state = past_key_values if cache is None else cache
        if state is None:
            state = State([None] * len(self.blocks), 0)
        elif not isinstance(state, State):
            raise ValueError(f"the state must be one that this model returned, not {type(state)}")
        elif (known := len(pytree.tree_leaves(state.layers)[0])) != B:
            raise ValueError(f"state of {known}, input of {B}; see batch_repeat_interleave")
        if attention_mask is not None:
            if attention_mask.shape not in ((B, T), (B, state.length + T)):
                raise ValueError("attention_mask must be [B, T], or include all earlier tokens")
            x = x * attention_mask[:, -T:, None].bool()  # zeros stay zeros in every block
        x = self.dropout(x)
        hidden_states = []
        layers = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            hidden_states.append(x)
            x, after = block(x, before)
            layers.append(after)
        x = self.norm(x)
        output = BaseModelOutputWithPast(last_hidden_state=x)
        config = self.config
        if config.use_cache if use_cache is None else use_cache:
            output[STATE] = State(layers, state.length + T)
        if config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output["hidden_states"] = (*hidden_states, x)
        return output.to_tuple() if return_dict is False else output


class FMemForCausalLM(FMemPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = FMemModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        return_dict=None,
        **options,
    ):
        """Like FMemModel, with logits [B, T, vocab_size], and the loss if labels [B, T] are given.

        logits_to_keep: the number of last tokens that get logits, or the indices of tokens.
        labels: -100 for tokens without a loss.
        """
        shift_labels = options.pop("shift_labels", None)  # a parameter would count as labels
        base = self.model(input_ids, attention_mask, inputs_embeds=inputs_embeds, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(base.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            counted = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **counted)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=base.hidden_states)
        if STATE in base:
            output[STATE] = base[STATE]
        return output.to_tuple() if return_dict is False else output

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # generate reads its signature
    def prepare_inputs_for_generation(self, *args, **kwargs):
        count = kwargs.get("next_sequence_length")
        if count is not None and count < 1:
            raise ValueError("generate needs all tokens so far, at least one of them unread")
        return super().prepare_inputs_for_generation(*args, **kwargs)


AutoModel.register(FMemHFConfig, FMemModel, exist_ok=True)
