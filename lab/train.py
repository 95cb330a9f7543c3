"""Train another layer, or on a recall task: python -m lab.train --layer mamba2 --data mqar

    python -m lab.train --layer attention --conv 4            # every layer can have a convolution
    python -m lab.train --shared_row --shift --conv 4 --gate  # the memory with our extensions
    python -m lab.train --data passkey --context 256          # the paper's layer

It is train.py with additional options. Settings, loop and files are the same. Unless --d_mlp is
given, the width of the MLP is adjusted, so that all models have as many parameters as the paper's.
"""

from pathlib import Path

import fmem
import train
from fmem import FactorizationMemory
from lab.layers import Attention, ExtendedMemory, Mamba2, matched_d_mlp
from lab.tasks import TASKS

LAYERS = {
    "memory": (ExtendedMemory, ("conv", "gate", "shared_row", "shift")),
    "attention": (Attention, ("conv", "gate", "n_head", "positions")),
    "mamba2": (Mamba2, ("conv", "n_head", "d_state")),
}


def make_parser():
    parser = train.make_parser("lab.train")
    parser.add_argument("--layer", choices=LAYERS, help="layer of the blocks [memory]")
    parser.add_argument("--conv", type=int, help="width of a short convolution [mamba2: 4, else 0]")
    parser.add_argument("--gate", action="store_true", help="not mamba2: output gate and norm")
    parser.add_argument("--shared_row", action="store_true", help="memory: a row all tokens share")
    parser.add_argument("--shift", action="store_true", help="memory: shifted write")
    parser.add_argument("--n_head", type=int, help="heads [attention: width 32, mamba2: 64]")
    parser.add_argument("--positions", type=int, help="attention: learned positions [0: rotary]")
    parser.add_argument("--d_state", type=int, help="mamba2: state values per channel [64]")
    return parser


def pick_layer(name, arguments):
    """A layer's class and arguments. Raises ValueError for an argument that it does not have."""
    layer, known = LAYERS[name]
    for argument in arguments.keys() - set(known):
        raise ValueError(f"--{argument} is not an option of --layer {name}")
    if layer is ExtendedMemory and not any(arguments.values()):
        return FactorizationMemory, {}  # the paper's
    return layer, arguments


def main(argv=None):
    given = vars(make_parser().parse_args(argv))
    with train.one_line_errors("lab.train"):
        names = {name for _, known in LAYERS.values() for name in known}
        arguments = {name: given.pop(name) for name in names & given.keys()}
        name = given.pop("layer", None)
        data = given.get("data")
        last = Path(given.get("out", train.Settings.out)) / "last.pt"
        resumed = given.get("resume") and last.exists()
        if resumed:
            model, saved = fmem.load(last)
            data = data or saved["settings"]["data"]
        if resumed and name is None and not arguments:  # the layer that the run began with
            layer, arguments = type(model.blocks[0].memory), model.layer_arguments
        else:
            layer, arguments = pick_layer(name or "memory", arguments)
        if "d_mlp" not in given and not resumed:
            device, _ = train.pick_device(given.get("device", "auto"))
            config = train.model_config(train.resolve(given, {}, device), vocab_size=1)
            given["d_mlp"] = matched_d_mlp(config, layer, arguments)
        train.train(given, layer, arguments, TASKS.get(data, train.Corpus), "-m lab.train")


if __name__ == "__main__":
    main()
