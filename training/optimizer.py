"""AdamW over the right groups of parameters, its state from a checkpoint, and the learning rate of a step."""
import math

import torch


def make_optimizer(model, s, device):
    """AdamW. Weight decay is for the matrices of the layers only: not for embedding, output layer, vectors and numbers."""
    free = {id(p) for p in model.parameters() if p.dim() < 2} | {id(model.embed.weight), id(model.head.weight)}
    router = {id(p) for name, p in model.named_parameters() if s.router_lr != 1 and name.endswith("W_alpha.weight")}
    groups = [{"params": [p for p in model.parameters() if id(p) not in free | router], "weight_decay": s.weight_decay},
              {"params": [p for p in model.parameters() if id(p) in free], "weight_decay": 0.0}]
    if router:
        groups.append({"params": [p for p in model.parameters() if id(p) in router], "weight_decay": s.weight_decay})
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, s.beta2), fused=device.type in ("cuda", "cpu"))


def load_moments(optimizer, saved):
    """Restore AdamW's moments from its state_dict; rates and decays stay those of the settings. Raises ValueError and others."""
    groups = optimizer.state_dict()["param_groups"]
    if [list(g["params"]) for g in saved["param_groups"]] != [g["params"] for g in groups]:
        raise ValueError("its parameters are grouped differently (--router_lr)")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for p, state in optimizer.state.items():
        fits = all(state[name].shape == shape for name, shape in (("exp_avg", p.shape), ("exp_avg_sq", p.shape), ("step", ())))
        if not fits or not all((value >= 0).all() and value.isfinite().all() for value in (state["step"], state["exp_avg_sq"])):
            raise ValueError("the optimiser's moments do not fit the weights")


def learning_rate(s, step, progress):
    """Linear warm-up over s.warmup steps, cosine to s.min_lr; progress is the share of the run that is done, 0 to 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    return s.lr * min(1, (step + 1) / (s.warmup + 1)) * (s.min_lr + (1 - s.min_lr) * cosine)


def set_learning_rate(optimizer, s, step, progress):
    """Of all groups; returns that of the main one."""
    lr = learning_rate(s, step, progress)
    for group, times in zip(optimizer.param_groups, (1, 1, s.router_lr)):  # noqa: B905 (the third is optional)
        group["lr"] = lr * times
    return lr
