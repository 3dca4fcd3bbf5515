"""Finishing: the chosen exits are trained to the end, alone and as a cascade with an ensemble, and the better is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from exitkit.common.console import counted
from exitkit.common.errors import DivergedError
from exitkit.common.files import replacing
from exitkit.exits.classifiers import Head, InternalClassifier
from exitkit.multi_exit.assembly import assemble
from exitkit.multi_exit.attaching import with_exits
from exitkit.multi_exit.model import MultiExitModel
from exitkit.retrofitting.candidates import Effort, is_light
from exitkit.retrofitting.choice import cheapest, cheapest_threshold
from exitkit.retrofitting.rounds import Search, remove_run
from exitkit.retrofitting.samples import has_numbers

EPOCHS: dict[Effort, int] = {"quick": 5, "standard": 30, "thorough": 60}
"""At most so many, with early stopping."""

_LEAST_GAIN = 0.01
"""What a cascade must save more, as a share of the backbone: less would be chance."""


def finish(search: Search, chosen: Sequence[int]) -> tuple[MultiExitModel | None, tuple[int, ...]]:
    """The trained model, and the candidates that are its exits; None and none where they save nothing any more.

    After training the best subset is chosen again; of several exits a cascade with a geometric ensemble (Zero Time Waste)
    begins from the trained heads, and is kept where it saves more.
    """
    model = search.part(chosen)
    _train(search, model, "finish", EPOCHS[search.effort])
    table = search.table(search.collected(model, search.product("finish-outputs")), chosen)
    best = cheapest(table, search.limit)
    kept = tuple(chosen[slot] for slot in best.exits)
    if len(kept) < 2:
        return (search.part(kept), kept) if kept else (None, ())
    apart = search.part(kept)
    linked = linked_from(apart, [search.places[k].given for k in kept], search.seed)
    _train(search, linked, "finish-cascade", max(1, EPOCHS[search.effort] // 2))
    together = search.collected(linked, search.product("finish-cascade-outputs"))
    alone = torch.tensor([exit_.macs_fraction for exit_ in apart.exits]).numpy()
    costs = table.costs(best.exits) + together.costs - alone  # links and ensemble by their MACs
    scores = together.scores()[:, :-1].numpy()
    cost = cheapest_threshold(scores, search.losses(together), costs, search.limit, best.exits).cost
    better = cost <= best.cost - _LEAST_GAIN
    search.say(
        f"cascade and ensemble: {cost:.1%} of the backbone against {best.cost:.1%}; {'' if better else 'not '}kept"
    )
    return (linked if better else apart), kept


def _train(search: Search, model: MultiExitModel, name: str, epochs: int) -> None:
    """To the end, with early stopping where there are labels to stop by; where it diverges, heads stay as they were."""
    path = search.product(name)
    if path is not None and path.exists():
        _load(model, load_file(path))
        return
    search.say(
        f"{name.replace('-', ' ')}: {counted(len(model.classifiers), 'exit')}, at most {counted(epochs, 'epoch')}"
    )
    names = (model.head,) if isinstance(model.head, str) else model.head
    cache = has_numbers(search.split.train) and all(is_light(head) for head in names)
    val = search.split.search if search.labelled else None
    before = {key: value.clone() for key, value in _state(model).items()}
    try:
        search.fit(model, search.split.train, epochs, cache, name, val, None if val is None else max(3, epochs // 3))
    except DivergedError as error:
        search.say(f"{name.replace('-', ' ')}: {error}. The exits stay as the search left them")
        _load(model, before)
    if path is not None:
        with replacing(path) as temporary:
            save_file(_state(model), temporary)
        remove_run(path.with_suffix(""))


def linked_from(model: MultiExitModel, heads: Sequence[Head], seed: int) -> MultiExitModel:
    """The same exits with links and an ensemble, which begin as what they were without; ``heads`` are theirs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = model.example.spec.batch(model.example.tensors)
        at = [boundary.name for boundary in model.boundaries]
        linked = with_exits(assemble(model.backbone, inputs, {"at": at}, "ztw", heads, None))
    for new, old in zip(linked.classifiers, model.classifiers, strict=True):
        target, source = cast("InternalClassifier", new), cast("InternalClassifier", old)
        target.body.load_state_dict(source.body.state_dict())
        widened = target.linear.state_dict()
        for key, value in source.linear.state_dict().items():
            if widened[key].shape == value.shape:
                widened[key] = value
            else:  # the link's inputs come last, and weigh nothing yet
                widened[key][..., : value.shape[-1]] = value
                widened[key][..., value.shape[-1] :] *= 0 if key == "weight" else 1
        target.linear.load_state_dict(widened)
    return linked


def _state(model: MultiExitModel) -> dict[str, torch.Tensor]:
    parts: dict[str, Any] = {"classifiers": model.classifiers, "combiners": model.combiners}
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, modules in parts.items()
        for name, value in modules.state_dict().items()
    }


def _load(model: MultiExitModel, stored: dict[str, torch.Tensor]) -> None:
    for part in ("classifiers", "combiners"):
        own = {name.removeprefix(f"{part}."): v for name, v in stored.items() if name.startswith(f"{part}.")}
        getattr(model, part).load_state_dict(own)
