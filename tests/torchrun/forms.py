"""The same training in the forms of one launcher; each rank writes its weights to FOLDER.

forms.py FOLDER FORM ...
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "ddp"))
from training import data, mine, network, sgd

from aadl_hvd import AndersonConfig, AndersonOptimizer, DistributedAndersonOptimizer

METHODS = {  # settings and steps
    "residual": ({"method": "residual", "noise_gate": None, "history_depth": 4}, 20),
    "subspace": ({"method": "subspace"}, 100),
}


def horovod(model, anderson):
    import horovod.torch as hvd

    hvd.init()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    named = model.named_parameters()
    return (
        model,
        DistributedAndersonOptimizer(sgd(model), named, anderson=anderson),
        mine(hvd.rank(), hvd.size()),
    )


def ddp(model, anderson):
    model = torch.nn.parallel.DistributedDataParallel(model)
    return model, DistributedAndersonOptimizer(sgd(model), anderson=anderson), mine()


def fsdp2(model, anderson):
    from torch.distributed.fsdp import fully_shard

    for part in (model[0], model[2], model):
        fully_shard(part)
    return model, DistributedAndersonOptimizer(sgd(model), anderson=anderson), mine()


def one(model, anderson):
    opt = AndersonOptimizer(sgd(model), anderson=anderson, independent=True)
    return model, opt, slice(None)


FORMS = {form.__name__: form for form in (horovod, ddp, fsdp2, one)}


def train(form, method):
    """The weights after a training, and how many steps were accelerated."""
    settings, steps = METHODS[method]
    model, opt, part = FORMS[form](network(), AndersonConfig(**settings))
    for k in range(steps):
        x, y = data(k, part)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
    found = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return torch.cat([p.detach().reshape(-1) for p in found]), opt.anderson.stats.accelerated


def main():
    torch.set_num_threads(1)
    folder, *forms = sys.argv[1:]
    if forms == ["horovod"]:
        import horovod.torch as group

        group.init()
        rank = group.rank()
    else:
        import torch.distributed as group

        group.init_process_group("gloo")
        rank = group.get_rank()
    for form in forms:
        found = {method: train(form, method) for method in METHODS}
        torch.save(found, Path(folder) / f"{form}{rank}.pt")
    if group.__name__ == "torch.distributed":
        group.destroy_process_group()


if __name__ == "__main__":
    main()
