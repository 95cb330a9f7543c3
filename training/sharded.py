"""Models too large for one GPU: `torchrun --nproc_per_node N train.py --fsdp`, on PyTorch's own engine.

Each process holds 1/N of the weights, gradients and optimiser (FSDP2, `fully_shard`); a block's weights are gathered while it
computes and freed afterwards. A checkpoint is a folder step-N: each process writes its part (PyTorch's distributed
checkpoint), so that any number of processes can resume from it. run.pt in it, settings and tokenizer, is written last: a folder
without it is incomplete and never read. docs/scaling.md has the arithmetic for 1.7 billion parameters.
"""
import pickle
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from data.token_files import file_hash

ROUTER = "W_alpha", "w_eta", "w_mu"                     # computed in float32 always


def shard(model, device, dtype=torch.float32):
    """Split a model that every process has built alike: each keeps its part, on `device`. Returns the same model.

    Under autocast to bf16 the matrices are gathered in bf16. Autocast's own copies would all be kept for the backward pass: the
    whole model in every process. Raises ValueError where this PyTorch cannot do it.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"--fsdp on a CPU needs a newer PyTorch than {torch.__version__}")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        for name, module in block.named_modules() if dtype != torch.float32 else ():
            if isinstance(module, nn.Linear) and name.split(".")[-1] not in ROUTER:
                fully_shard(module, mesh=mesh, mp_policy=narrow)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)                # what is left: embedding, last norm, output layer


def full_weights(model):
    """The whole state_dict in the first process's memory, on the CPU; an empty dict in the others. All must call it."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp_state.get_model_state_dict(model, options=options)
    return {name: weight.clone() for name, weight in weights.items()}


def tensors(model, optimizer):
    """Weights and moments under one name each: all of them tensors, so that nothing needs to be pickled.

    The rest of the optimiser's state, rates and decays, follows from the settings.
    """
    weights, moments = dcp_state.get_state_dict(model, optimizer)
    flat = {f"model.{name}": weight for name, weight in weights.items()}
    return flat | {f"optimizer.{name}.{what}": value for name, state in moments["state"].items() for what, value in state.items()}


def newest(out):
    """The newest complete step-N folder of a run, or None."""
    steps = [path.parent for path in Path(out).glob("step-*/run.pt") if path.parent.name[5:].isdigit()]
    return max(steps, key=lambda path: int(path.name[5:]), default=None)


def save(out, step, model, optimizer, write_run, keep=lambda step: False):
    """Write out/step-N; then older folders go, but for those with keep(step). All processes must call it.

    write_run(path): writes run.pt, called in the first process. Raises OSError in all of them.
    """
    folder, rank = Path(out) / f"step-{step}", dist.get_rank()

    def begin():
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
    everywhere(begin, f"cannot write {folder}")
    everywhere(lambda: dcp.save(tensors(model, optimizer), checkpoint_id=folder), f"cannot write {folder}")

    def sums():
        mine = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if rank == 0 else [])]
        (folder / f"sums-{rank}.txt").write_text("".join(f"{file_hash(path)}  {path.name}\n" for path in mine))
    everywhere(sums, f"cannot write {folder}")
    everywhere(lambda: rank or write_run(folder / "run.pt"), f"cannot write {folder}")
    if rank == 0:
        for path in Path(out).glob("step-*"):
            if path != folder and path.is_dir() and path.name[5:].isdigit() and not keep(int(path.name[5:])):
                (path / "run.pt").unlink(missing_ok=True)           # incomplete from here on
                shutil.rmtree(path, ignore_errors=True)


PATHS = {"PosixPath", "WindowsPath"}
CONTENTS = {"torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64"}, "torch.serialization": {"_get_layout"},
            "torch.distributed.checkpoint.filesystem": {"_StorageInfo"}, "pathlib": PATHS, "pathlib._local": PATHS,
            "torch.distributed.checkpoint.metadata": {"Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                                                      "TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"}}


class Metadata(pickle.Unpickler):
    """PyTorch keeps the table of contents as a pickle and would run what it names; here only the names of CONTENTS are known."""

    def find_class(self, module, name):
        if name not in CONTENTS.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours does")
        return super().find_class(module, name)


def contents(folder):
    with open(Path(folder) / ".metadata", "rb") as f:
        return Metadata(f).load()


class Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        metadata = contents(self.path)
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):             # PyTorch's own would unpickle them
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


def load(folder, model, optimizer):
    """Put what `save` wrote into the model and optimiser. All processes, of any number, call it. Raises OSError in all."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def check():
        lists = sorted(folder.glob("sums-*.txt"))
        if not lists:
            raise ValueError("it has no checksums")
        for lines in lists[rank::world]:
            for line in lines.read_text().splitlines():
                sha, name = line.split("  ")
                if file_hash(folder / name) != sha:
                    raise ValueError(f"{name} is damaged, its checksum differs")
        contents(folder)                                # DCP would write pages about what is wrong with it
    everywhere(check, f"{folder} cannot be read as a checkpoint")
    parts = tensors(model, optimizer)
    everywhere(lambda: dcp.load(parts, storage_reader=Reader(folder), planner=TensorsOnly()),
               f"{folder} cannot be read as a checkpoint")


def everywhere(work, what):
    """Do `work` in every process; raise OSError in all of them if it fails in any, so that none waits for another forever."""
    failed = None
    try:
        work()
    except Exception as e:                              # DCP wraps what happened in exceptions of its own
        failed = e
    flag = torch.tensor(float(failed is not None), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag)
    if flag.item():
        why = str(failed).strip().splitlines()[-1:] if failed else ["another process could not"]
        raise OSError(f"{what}: {''.join(why) or type(failed).__name__}")
