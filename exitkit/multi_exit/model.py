"""The multi-exit model: the user's backbone, untouched, and the exits that read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exitkit.common.checks import Bounds, checked_each
from exitkit.common.errors import ArgumentError
from exitkit.exits.classifiers import Head, HeadOutput
from exitkit.exits.gpf import Classifier, imitation_losses
from exitkit.methods.criteria import Criterion
from exitkit.methods.policy import ExitPolicy, Threshold, as_policy, check_same_scores
from exitkit.methods.presets import check_task
from exitkit.multi_exit.assembly import Parts
from exitkit.multi_exit.cost import exit_costs
from exitkit.multi_exit.loss import summed_loss
from exitkit.multi_exit.output import MultiExitOutput
from exitkit.multi_exit.saving import load_exits, push_exits, save_exits
from exitkit.surgery.boundaries import Boundary, find_boundaries
from exitkit.surgery.capturing import capture, logits_of
from exitkit.surgery.hooks import alone, recording
from exitkit.surgery.inputs import argument
from exitkit.surgery.mistakes import explained, mistaken_input
from exitkit.surgery.partition import Partition, partition_at
from exitkit.surgery.placement import place

if TYPE_CHECKING:
    from exitkit.evaluation.outputs import ExitOutputs


class MultiExitModel(nn.Module):
    """A backbone with exits; made by :func:`exitkit.attach`.

    Exits are counted 0 … M−1; exit M is the backbone's own classifier. Calling the model runs the user's own modules,
    so dropout, autocast, hooks and gradient settings of the backbone keep their meaning. A backbone without any
    trainable parameter runs without gradients. Several threads may call it, and models that share a backbone, at once.

    Attributes:
        exits: name and cost of each exit, the backbone's own classifier last.
        new_head: state-dict names of the backbone's last layer, where ``attach`` replaced it; it needs training too.
    """

    accepts_loss_kwargs = False
    """Told to transformers.Trainer, which would pass the backbone a number of samples to divide its loss by."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.backbone = parts.backbone
        self.classifiers = nn.ModuleList(parts.classifiers)
        self.combiners = nn.ModuleList(parts.combiners)
        self.specs = parts.specs
        self.anatomy = parts.anatomy
        self.method = parts.method
        self.head = parts.head
        self.num_classes = parts.num_classes
        self.example = parts.example
        self.new_head = parts.new_head
        self._policy: ExitPolicy | None = None
        like = _reference(self.backbone)
        self.classifiers.to(like.device, like.dtype)
        self.combiners.to(like.device)  # float32: they add up logarithms
        self.exits = exit_costs(
            parts.classifiers, self.combiners, self.specs, self.anatomy, self.example, self.num_classes
        )

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> MultiExitOutput:
        """Run every exit. Takes what the backbone takes, and ``labels``, of which the backbone is not told.

        Args:
            args: for the backbone.
            labels: class indices (B,), -1 for none; probabilities (B, C); or values (B,) to regress. With them the output has
                a ``loss``.
            kwargs: for the backbone.

        Raises:
            ArgumentError: labels that do not fit, or inputs that do not run and differ from those attached with.
        """
        with explained(self._mistake_in, args, kwargs):
            features, steps, final = self._steps(args, kwargs)
        heads = (*(step.logits for step in steps), *final)
        auxiliary = imitation_losses(steps) if torch.is_grad_enabled() else None
        loss = None if labels is None else summed_loss(heads, auxiliary, labels, self.num_classes)
        return MultiExitOutput(self.combine(heads), features, heads, auxiliary, loss)

    def run_heads(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The features at the boundaries and every head's logits (the backbone's last), without the ensemble."""
        features, steps, final = self._steps(args, kwargs)
        return features, (*(step.logits for step in steps), *final)

    def run_until(self, last: int, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """Every head's logits up to exit ``last``, and their auxiliary losses; the backbone stops where that exit reads."""
        _, steps, final = self._steps(args, kwargs, last)
        return (*(step.logits for step in steps), *final), imitation_losses(steps) if torch.is_grad_enabled() else None

    def _steps(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], last: int | None = None
    ) -> tuple[tuple[Tensor, ...], list[HeadOutput], tuple[Tensor, ...]]:
        """Features and heads up to exit ``last``, and the backbone's logits where it ran to its end."""
        specs = self.specs if last is None else self.specs[: last + 1]
        stop = last is not None and last < len(self.specs)
        final: tuple[Tensor, ...] = ()
        with recording(self.backbone, [spec.hook for spec in specs], stop) as read:
            trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
                final = (logits_of(self.backbone(*args, **kwargs)),)
        features = tuple(self._found(slot, feature) for slot, feature in enumerate(read))
        steps: list[HeadOutput] = []
        for feature, spec in zip(features, specs, strict=True):
            inputs = [argument(self.backbone.forward, key, args, kwargs) for key in spec.inputs]
            steps.append(self._step(len(steps), feature, steps[-1].carried if steps else None, inputs))
        return features, steps, final

    def combine(self, heads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Each exit's answer from its own and all earlier heads' logits (B, C): the method's ensemble, if it has one."""
        if not self.combiners:
            return tuple(heads)
        log_probs = torch.stack([F.log_softmax(logits.float(), dim=-1) for logits in heads], dim=1)
        combined = [combiner(log_probs[:, : m + 1]) for m, combiner in enumerate(self.combiners)]
        return (*combined, *heads[len(combined) :])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """The example follows where ``to``, ``half``, ``cuda`` bring the weights; its values stay, on meta too."""
        with alone():  # parameters are fake ones while another thread captures the backbone
            before = _reference(self.backbone).dtype
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            like = _reference(self.backbone)
        self.example = self.example.to(
            None if like.is_meta else like.device, like.dtype if like.dtype != before else None
        )
        return self

    def added_parameters(self) -> list[nn.Parameter]:
        """The parameters that exitkit added: heads, links, combiners, and the backbone's last layer if it was replaced."""
        replaced = (value for name, value in self.backbone.named_parameters() if name in self.new_head)
        return [*self.classifiers.parameters(), *self.combiners.parameters(), *replaced]

    def partition(self) -> Partition:
        """The inference view: the backbone captured anew and split at the exits, its parameters shared."""
        if (apart := self._apart()) is not None:
            raise ArgumentError(apart)
        captured = capture(self.backbone, self.example.spec.batch(self.example.tensors))
        return partition_at(
            captured, place(find_boundaries(captured), at=[boundary.name for boundary in self.boundaries])
        )

    def save_pretrained(
        self,
        directory: str | PathLike[str],
        *,
        threshold: Threshold | None = None,
        outputs: ExitOutputs | None = None,
    ) -> None:
        """Write what was added, and nothing else of the backbone: safetensors, ``config.json``, a model card (``README.md``).

        An older save there is replaced as a whole; when writing is interrupted, it stays.

        Args:
            directory: made where it does not exist.
            threshold: the τ chosen for these exits, or a policy, whose guarantee is kept with it; comes back as ``policy``.
                By default the one there is.
            outputs: what :func:`exitkit.collect` returned for held-out samples with labels; then the card tells accuracies.

        Raises:
            ExitkitError: a threshold that is not finite or not for these exits, outputs without labels or of another model,
                a folder that cannot be written, or that holds somebody else's ``config.json`` or ``README.md``.
        """
        save_exits(self, directory, threshold, outputs)

    @classmethod
    def from_pretrained(
        cls,
        backbone: nn.Module,
        source: str | PathLike[str],
        example_inputs: Any = None,
        *,
        head: Head | Sequence[Head] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> MultiExitModel:
        """Attach saved exits to the backbone they were trained on.

        The backbone may be in another precision or on another device than it was; the exits follow it.

        Args:
            backbone: the model they were trained on, with its weights.
            source: a folder that :meth:`save_pretrained` wrote, or the name of a model on the Hugging Face Hub.
            example_inputs: as for :func:`exitkit.attach`; by default made up, in the shapes that were saved.
            head: the function of exits that have a head of their own (``attach(head=function)``), or a list with one for each;
                by default found by the name that was saved, in modules that are imported: a file never imports one.
            revision: on the Hub, a branch, tag or commit.
            token: for the Hub; by default the one of ``hf auth login``.

        Raises:
            ExitkitError: a missing, damaged or foreign file, or another backbone; the message shows the first difference.
        """
        if isinstance(backbone, MultiExitModel):
            raise ArgumentError(
                "backbone is a MultiExitModel, which has exits; give the nn.Module exitkit.detach(backbone)"
            )
        return load_exits(cls, backbone, source, example_inputs, head, revision, token)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        threshold: Threshold | None = None,
        outputs: ExitOutputs | None = None,
        private: bool | None = None,
        commit_message: str = "Upload early exits",
        token: str | bool | None = None,
    ) -> str:
        """Save to the Hugging Face Hub, in one commit.

        Args:
            repo_id: ``"user/name"``; made where it does not exist, its ``README.md`` replaced where it does.
            threshold: as for :meth:`save_pretrained`.
            outputs: as for :meth:`save_pretrained`.
            private: whether a repository that is made here is private; by default as its owner set it.
            commit_message: the commit's title.
            token: a token that may write; by default the one of ``hf auth login``.

        Returns:
            The commit's address.

        Raises:
            ExitkitError: as for :meth:`save_pretrained`, or the Hub cannot be reached or refuses.
        """
        return push_exits(self, repo_id, threshold, outputs, private, commit_message, token)

    def prune_exits(self, exits: Collection[int]) -> MultiExitModel:
        """The same model without the exits of these numbers, which then cost nothing; weights are shared.

        Args:
            exits: such as :func:`exitkit.evaluation.exits_that_do_not_pay` names. The others are counted from 0 again, and
                a threshold must be chosen anew.

        Raises:
            ExitkitError: a number that is not an exit, all exits, or exits that read one another (cascade, ensemble).
        """
        last = len(self.classifiers) - 1
        remedy = f"give some, not all, of the exits 0 to {last}; exitkit.detach removes all of them"
        left_out = checked_each("exits", exits, Annotated[int, Bounds(least=0, most=last)], remedy)
        kept = [m for m in range(last + 1) if m not in left_out]
        if not kept:
            raise ArgumentError(f"exits={left_out}: {remedy}")
        if self.method.cascade or self.method.past_future or self.combiners:
            raise ArgumentError(
                f"the exits of method={self.method.name!r} read one another, so none can be left out; attach again with "
                "at= naming the others, and train"
            )
        parts = Parts(
            self.backbone,
            tuple(cast("Classifier", self.classifiers[m]) for m in kept),
            (),
            tuple(self.specs[m] for m in kept),
            self.anatomy,
            self.method,
            self.head if isinstance(self.head, str) else tuple(self.head[m] for m in kept),
            self.num_classes,
            self.example,
            self.new_head,
        )
        pruned = MultiExitModel(parts)
        pruned.training = self.training  # of the model alone: its parts are shared, and keep their modes
        return pruned

    def __repr__(self) -> str:
        places = ", ".join(f"{exit_.name} {exit_.macs_fraction:.0%}" for exit_ in self.exits)
        return f"MultiExitModel({type(self.backbone).__name__}, method={self.method.name!r}, exits: {places})"

    @property
    def policy(self) -> ExitPolicy | None:
        """When a sample leaves, as it was chosen for these exits; saved and loaded with them. None where none was.

        Raises:
            ArgumentError: on setting, as :meth:`policy_for`.
        """
        return self._policy

    @policy.setter
    def policy(self, threshold: Threshold | None) -> None:
        self._policy = None if threshold is None else self.policy_for(threshold)

    @property
    def threshold(self) -> float | tuple[float, ...] | ExitPolicy | None:
        """The policy as it is written shortest: one τ for all exits as a number, several as a tuple, and the policy itself
        where it has temperatures, a guarantee or another criterion than the method's, which numbers would lose.

        Raises:
            ArgumentError: on setting, as :meth:`policy_for`.
        """
        policy = self.policy
        if policy is None or policy != replace(self.policy_for(policy.thresholds), dtype=policy.dtype):
            return policy
        return policy.threshold

    @threshold.setter
    def threshold(self, threshold: Threshold | None) -> None:
        self.policy = threshold

    @property
    def dtype(self) -> torch.dtype:
        """What the exits compute in."""
        return next(self.classifiers.parameters()).dtype

    def policy_for(self, threshold: Threshold | None = None, criterion: str | Criterion | None = None) -> ExitPolicy:
        """What a threshold means for these exits: for scores of their own criterion and dtype, unless it is a policy.

        Args:
            threshold: τ, one for each exit, or a policy; by default the one saved with the model.
            criterion: another score for plain numbers.

        Raises:
            ArgumentError: no threshold, one of another number of exits, an unknown criterion or one for another task, a
                guarantee for another precision, temperatures for a regression.
        """
        threshold = self.policy if threshold is None else threshold
        if threshold is None:
            raise ArgumentError(
                "threshold=None, and none was saved with the model; choose one on held-out samples: "
                "exitkit.collect(ee, loader).curve().at_budget(0.5)"
            )
        exits, dtype = len(self.classifiers), str(self.dtype).removeprefix("torch.")
        policy = as_policy(threshold, ExitPolicy((0.0,) * exits, self.method.score.name, dtype=dtype), criterion)
        check_task(policy.score, self.num_classes)
        if policy.temperatures is not None and self.regression:
            raise ArgumentError(
                "threshold has temperatures, which predictions of a regression have not; give a plain τ"
            )
        check_same_scores(policy, replace(policy, dtype=dtype))
        return replace(policy, dtype=dtype)

    @property
    def regression(self) -> bool:
        """Whether the model has one output, a prediction, instead of one per class."""
        return self.num_classes == 1

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Where the internal classifiers read, in order."""
        return tuple(spec.boundary for spec in self.specs)

    def _mistake_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return self._apart() or mistaken_input(args, kwargs, self.example)

    def _apart(self) -> str | None:
        """What is said where the backbone alone was converted or moved."""
        backbone, exits = _reference(self.backbone), next(self.classifiers.parameters())
        if (backbone.dtype, backbone.device) == (exits.dtype, exits.device):
            return None
        return (
            f"the backbone is {backbone.dtype} on {backbone.device}, and its exits are {exits.dtype} on {exits.device}; "
            "convert or move the multi-exit model as a whole, not its backbone"
        )

    def _step(self, m: int, feature: Tensor, carried: Tensor | None, inputs: list[Tensor | None]) -> HeadOutput:
        try:
            return cast("Classifier", self.classifiers[m]).step(feature, carried, inputs)
        except RuntimeError as error:
            boundary = self.boundaries[m]
            if tuple(feature.shape[1:]) == boundary.shape:
                raise
            raise ArgumentError(
                f"exit {m} reads features of shape {boundary.shape}, but {boundary.name!r} gives "
                f"{tuple(feature.shape[1:])}; attach again with example_inputs of the size in use"
            ) from error

    def _found(self, slot: int, feature: Tensor | None) -> Tensor:
        if feature is None:
            raise ArgumentError(
                f"module {self.boundaries[slot].name!r} was not called in this forward, so exit {slot} has no feature: "
                "the backbone took another path than when it was attached"
            )
        return feature


def _reference(backbone: nn.Module) -> Tensor:
    """The parameter whose device and dtype the exits and the example have."""
    return next(parameter for parameter in backbone.parameters() if parameter.is_floating_point())
