"""From a config to a model whose layers may be others than the paper's: `build(ModelConfig(mixer="mamba2"))`."""
from dataclasses import dataclass, replace

import torch
from torch import nn

from fmem import FactorizationMemory, FMem, FMemConfig
from variants.ablations import AblatedMemory
from variants.attention import Attention
from variants.extended import ExtendedMemory
from variants.mamba2 import Mamba2

PLAIN = dict(mixer="memory", conv=0, gate=False, shared_row=False, shift=False, read_rank=0, ablation="")
EXTENDED = "conv", "gate", "shared_row", "shift", "read_rank"


@dataclass
class ModelConfig(FMemConfig):
    """FMemConfig with the fields of the variants; with their defaults it is the paper's model.

    Where d_mlp is None, the parameters that a variant adds to the plain memory's are taken from the MLP, so that models of the
    same config can be compared.
    """
    conv: int = 0                   # tokens of a short convolution before the projections; 0: none
    gate: bool = False              # output gate
    shared_row: bool = False        # a row that every token writes and reads
    shift: bool = False             # the token before has a part in the write's routing
    read_rank: int = 0              # rank of a difference between the affinities of read and write; 0: none
    mixer: str = "memory"           # the layer: "memory", "attention" or "mamba2"
    n_head: int | None = None       # of attention (None: of width 32) and Mamba-2 (None: of width 64)
    n_kv_head: int | None = None    # key and value heads of attention; None: n_head
    d_state: int = 64               # numbers per channel in the state of Mamba-2
    ablation: str = ""              # one change to the memory, from ablations.py

    def __post_init__(self):
        matched = self.d_mlp is None
        super().__post_init__()
        for name in ("conv", "read_rank"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) <= 2**24:
                raise ValueError(f"{name} must be a whole number, 0 to 2**24, not {getattr(self, name)!r}")
        for name in ("gate", "shared_row", "shift"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.shared_row and (self.k_rows or 1) >= self.n_rows:
            raise ValueError(f"with shared_row, k_rows must be below n_rows ({self.n_rows}): one row is not routed to")
        if self.mixer not in ("memory", "attention", "mamba2"):
            raise ValueError(f'mixer must be "memory", "attention" or "mamba2", not {self.mixer!r}')
        if self.mixer != "memory" and (self.ablation or any(getattr(self, name) for name in EXTENDED)):
            raise ValueError(f"{', '.join(EXTENDED)} and ablation change the memory; they do not go with mixer {self.mixer}")
        if self.ablation not in ("", "conv=linear") and (self.shared_row or self.shift or self.read_rank):
            raise ValueError("an ablation other than conv=linear does not go with shared_row, shift or read_rank: both change "
                             "the routing")
        for name in ("n_head", "n_kv_head", "d_state"):
            value = getattr(self, name)
            if value is None and name != "d_state":
                continue
            if type(value) is not int or not 1 <= value <= 2**24:
                raise ValueError(f"{name} must be a whole number of at least 1 and at most 2**24"
                                 f"{'' if name == 'd_state' else ', or None'}, not {value!r}")
        if any(getattr(self, name) != value for name, value in PLAIN.items()):
            more = layer_parameters(self) - layer_parameters(replace(self, **PLAIN))
            if matched:
                self.d_mlp -= round(more / (3 * self.d_model) / 8) * 8
            if self.d_mlp < 1:
                raise ValueError(f"{self.mixer} adds {more:,} parameters to the memory's, more than the MLP has; set d_mlp")


def layer_of(config: ModelConfig) -> type[nn.Module]:
    """The layer that a config asks for."""
    if config.mixer != "memory":
        return {"attention": Attention, "mamba2": Mamba2}[config.mixer]
    if config.ablation:
        return AblatedMemory
    return ExtendedMemory if any(getattr(config, name) for name in EXTENDED) else FactorizationMemory


def build(config: ModelConfig) -> FMem:
    """The model. Raises ValueError where the layer cannot have the config's widths."""
    return FMem(config, layer_of(config))


def layer_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):                          # shapes without memory
        return sum(p.numel() for p in layer_of(config)(config).parameters())


def n_parameters(config: ModelConfig) -> int:
    """Parameters of the model, without building it."""
    layer = layer_parameters(config) + 3 * config.d_model * config.d_mlp + 2 * config.d_model
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.d_model
    return config.n_layer * layer + embeddings + config.d_model
