"""What each operator of a graph does to the units of its tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from exitkit.analysis.permutations.labels import Ledger, Units, along, fixed, moves, varies, varying
from exitkit.analysis.permutations.values import (
    MOVING,
    POOLS,
    REDUCTIONS,
    SAME,
    Value,
    aligned,
    module_of,
    shape_of,
    shapes_of,
    unwrapped,
    values_in,
)
from exitkit.surgery.liveness import op_name


class Walk:
    """The rules, applied node by node to one graph."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.rules: dict[str, Callable[[Node, list[Any], dict[str, Any]], Any]] = {
            "linear": self._linear,
            "addmm": lambda node, args, kwargs: self._product(node, args[1], args[2], args[0], 0, 1),
            "matmul": self._matmul,
            "mm": self._matmul,
            "bmm": self._matmul,
            "conv1d": self._convolution,
            "conv2d": self._convolution,
            "conv3d": self._convolution,
            "batch_norm": self._batch_norm,
            "layer_norm": self._layer_norm,
            "rms_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "scaled_dot_product_attention": self._attention,
            "embedding": lambda node, args, kwargs: self._looked_up(node, args[0]),
            "index": lambda node, args, kwargs: self._looked_up(node, args[0]),
            "pad": self._pad,
            "constant_pad_nd": self._pad,
            "cat": self._joined,
            "stack": self._joined,
        }

    def result(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The value, or values, of a node, from those of its arguments (:class:`Value` in the place of tensors)."""
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple | list) else self._fixed(node)
        name = op_name(node)
        given = values_in([args, kwargs])
        if name in self.rules:
            return self.rules[name](node, args, kwargs)
        if not any(moves(value.units) for value in given):
            return self._fixed(node)
        if name in ("view", "_unsafe_view", "view_as", "reshape_as"):
            size = args[1].shape if isinstance(args[1], Value) else args[1]
            return Value(args[0].units.reshape(tuple(size)), leaf=args[0].leaf)
        if name in MOVING:
            return self._moved(node, args, kwargs)
        if name in SAME:
            return Value(args[0].units, leaf=args[0].leaf)
        if name in POOLS:
            return self._pooled(node, args[0], POOLS[name])
        if name in REDUCTIONS:
            return self._reduced(node, args, kwargs)
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            return self.elementwise(node, given)
        return self._not_understood(node, given)

    def elementwise(self, node: Node, given: Sequence[Value], shape: Sequence[int] | None = None) -> Any:
        """Tensors combined element by element, after broadcasting."""
        shape = shape_of(node) if shape is None else tuple(shape)
        known = [value for value in given if not value.leaf and moves(value.units)]
        leaves = [value for value in given if value.leaf and moves(value.units)]
        constant = [value for value in given if not moves(value.units)]
        if not known:
            alone = len(leaves) == 1 and all(value.units.numel() == 1 for value in constant)
            if alone and leaves[0].shape == torch.Size(shape):
                return Value(leaves[0].units, leaf=True)
            for value in leaves:
                self.ledger.fix(value.units)
            return Value(fixed(shape))
        main = max(known, key=lambda value: (len(varying(value.units)), value.units.numel()))
        axes = [axis + len(shape) - main.units.dim() for axis in varying(main.units)]
        units = main.units.broadcast_to(tuple(shape))
        for value in (*known, *leaves):
            if value is not main:
                self._relate(units, axes, value, shape)
        for value in constant:
            self._index_of(node, units, axes, value.shape, shape)
        return Value(units)

    def _relate(self, units: Units, axes: Sequence[int], other: Value, shape: Sequence[int]) -> None:
        """What stands at the same place has the same unit; what has one value for several places carries them along."""
        own = aligned(other.shape, shape)
        single = [axis for axis in axes if own[axis] == 1]
        if not single:
            self.ledger.tie(units, other.units.broadcast_to(tuple(shape)))
            return
        lowered = other.units.broadcast_to(tuple(shape))
        changing = varying(lowered)
        if changing and set(changing) <= set(axes):
            self.ledger.link(lowered, units)
            return
        self.ledger.fix(other.units)
        if changing and not other.leaf:
            self.ledger.fix(units)

    def _index_of(
        self, node: Node, units: Units, axes: Sequence[int], own: Sequence[int], shape: Sequence[int]
    ) -> None:
        """Beside a tensor that differs along an axis and does not move, the indices of the axis are not alike."""
        different = [axis for axis in axes if aligned(own, shape)[axis] > 1]
        if not different:
            return
        index = torch.zeros((), dtype=torch.int64)
        for axis in different:
            index = index * shape[axis] + along(torch.arange(shape[axis]), axis, shape)
        self.ledger.role_by(units, node.name, index)

    def _linear(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return self._product(node, args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias"), 1, 0)

    def _product(self, node: Node, data: Value, weight: Value, bias: Value | None, into: int, out: int) -> Any:
        """``data`` times a matrix whose axis ``into`` is multiplied and whose axis ``out`` is the result's last."""
        given = [value for value in (data, weight, bias) if value is not None]
        direct = weight.parameter is not None and (bias is None or bias.parameter is not None)
        if not direct or data.leaf or weight.units.dim() != 2:
            return self._not_understood(node, given, "a product with a computed matrix")
        read = self._axis(weight, into)
        written = self._axis(weight, out)
        if bias is not None:
            self.ledger.tie(self._axis(bias, 0), written)
        if moves(data.units) and not varies(data.units, -1):
            for units in (read, written):
                self.ledger.fix(units)
            return Value(data.units.narrow(-1, 0, 1).expand(shape_of(node)))
        self.ledger.tie(data.units, read)
        return Value(along(written, -1, shape_of(node)))

    def _matmul(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        first, second = args[:2]
        if second.parameter is not None and not first.leaf:
            return self._product(node, first, second, None, 0, 1)
        if not any(moves(value.units) for value in (first, second)):
            return self._fixed(node)
        return self._batched(node, first, second)

    def _batched(self, node: Node, first: Value, second: Value) -> Any:
        """(…, n, k) times (…, k, m): a sum over k for every place in the leading axes, such as attention's heads."""
        leaf = first.leaf or second.leaf
        if (
            leaf
            or first.units.dim() != second.units.dim()
            or first.units.dim() < 2
            or first.shape[:-2] != second.shape[:-2]
        ):
            return self._not_understood(node, [first, second], "a product of these shapes")
        shape = (*first.shape[:-1], second.shape[-1])
        rows, columns = varies(first.units, -2), varies(second.units, -1)
        summed = varies(first.units, -1) or varies(second.units, -2)
        if (rows and columns) or (summed and (rows or columns)):
            return self._not_understood(node, [first, second], "a product that mixes units in two ways")
        left, right = first.units.narrow(-2, 0, 1).squeeze(-2), second.units.narrow(-1, 0, 1).squeeze(-1)
        if summed:
            self.ledger.tie(left, right)
            return Value(self._owners(left, range(left.dim() - 1))[..., None].expand(shape))
        base, other = (first.units[..., :1], second.units) if columns else (second.units[..., :1, :], first.units)
        if rows or columns:
            kept = other.narrow(-2 if columns else -1, 0, 1)
            batch = [axis for axis in varying(base) if axis < base.dim() - 2]
            if batch and all(varies(other, axis) for axis in batch):
                self.ledger.link(*torch.broadcast_tensors(base.narrow(-2, 0, 1).narrow(-1, 0, 1), kept))
            elif batch:
                return self._not_understood(node, [first, second], "a product that mixes units in two ways")
            if not moves(base):
                self._index_of(
                    node, kept, [axis for axis in varying(kept) if axis < kept.dim() - 2], base.shape, kept.shape
                )
            return Value(kept.expand(shape))
        return self.elementwise(node, [Value(one[..., :1, :1]) for one in (first.units, second.units)], shape)

    def _owners(self, members: Units, kept: Sequence[int]) -> Units:
        """New units for the kept axes along which the members change, which carry these along; fixed where there is none."""
        changing = [axis for axis in kept if varies(members, axis)]
        size = [members.shape[axis] if axis in changing else 1 for axis in range(members.dim())]
        if not changing:
            return fixed(size)
        owners = self.ledger.fresh(int(torch.tensor(size).prod())).reshape(size)
        self.ledger.link(owners.expand(members.shape), members)
        return owners

    def _attention(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        scores = self._batched(node, query, Value(key.units.transpose(-1, -2)))
        if isinstance(mask, Value):
            scores = self.elementwise(node, [scores, mask], scores.shape)
        return self._batched(node, scores, value)

    def _convolution(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        data, weight, *rest = args
        bias = rest[0] if rest else kwargs.get("bias")
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        given = [value for value in (data, weight, bias) if value is not None]
        if weight.parameter is None or data.leaf or (bias is not None and bias.parameter is None):
            return self._not_understood(node, given, "a convolution with a computed kernel")
        depthwise = groups == data.shape[1] == weight.shape[0]
        if groups != 1 and not depthwise:
            return self._not_understood(node, given, "a grouped convolution")
        written = self._axis(weight, 0)
        if bias is not None:
            self.ledger.tie(self._axis(bias, 0), written)
        read = written if depthwise else self._axis(weight, 1)
        self.ledger.tie(data.units, along(read, 1, data.shape))
        return Value(along(written, 1, shape_of(node)))

    def _batch_norm(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        for parameter in values_in(args[1:5]):
            self.ledger.tie(args[0].units, along(self._axis(parameter, 0), 1, args[0].shape))
        return Value(args[0].units)

    def _layer_norm(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        return self.elementwise(node, [args[0], *values_in([args[2:], kwargs])])

    def _group_norm(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        data, groups = args[:2]
        if groups not in (1, data.shape[1]):
            return self._not_understood(node, values_in([args, kwargs]), "a normalisation of groups of channels")
        for parameter in values_in([args[2:], kwargs]):
            self.ledger.tie(data.units, along(self._axis(parameter, 0), 1, data.shape))
        return Value(data.units)

    def _looked_up(self, node: Node, table: Value) -> Any:
        """Rows of a table; which row it is depends on the input, so rows stay."""
        if table.parameter is None or table.units.dim() != 2 or shape_of(node)[-1] != table.shape[1]:
            return self._not_understood(node, [table], "looking up") if moves(table.units) else self._fixed(node)
        return Value(along(self._axis(table, 1), -1, shape_of(node)))

    def _pad(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Constants at the ends of an axis are units of their own there."""
        units, pad = args[0].units, args[1]
        mode = args[2] if len(args) > 2 and isinstance(args[2], str) else kwargs.get("mode", "constant")
        for at in range(len(pad) // 2):
            axis, ends = units.dim() - 1 - at, pad[2 * at : 2 * at + 2]
            if not varies(units, axis):
                size = list(units.shape)
                size[axis] += sum(ends)
                units = units.narrow(axis, 0, 1).expand(size)
            elif any(ends):
                if mode != "constant" or min(ends) < 0 or args[0].leaf:
                    return self._not_understood(node, [args[0]], "padding")
                sizes = [[*units.shape[:axis], end, *units.shape[axis + 1 :]] for end in ends]
                left, right = (
                    along(self.ledger.fresh(end), axis, size) for end, size in zip(ends, sizes, strict=True)
                )
                units = torch.cat([left, units, right], axis)
        return Value(units, leaf=args[0].leaf)

    def _pooled(self, node: Node, data: Value, spatial: int) -> Any:
        units = data.units
        for axis in range(units.dim() - spatial, units.dim()):
            if varies(units, axis):
                self.ledger.tie(units, units.narrow(axis, 0, 1))
            units = units.narrow(axis, 0, 1)
        shapes = shapes_of(node)
        made = tuple(Value(units.expand(shape)) for shape in shapes)
        return made if isinstance(node.meta["val"], tuple | list) else made[0]

    def _reduced(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Sums and extremes do not depend on the order of what they go over."""
        data: Value = args[0]
        name = op_name(node)
        if len(args) > 1 and isinstance(args[1], Value):  # the larger of two tensors
            return self.elementwise(node, values_in(args))
        if data.leaf or isinstance(node.meta["val"], tuple | list):
            return self._not_understood(node, [data], name)
        dims = (
            args[2] if name in ("norm", "linalg_vector_norm") and len(args) > 2 else args[1] if len(args) > 1 else None
        )
        dims = kwargs.get("dim", dims)
        chosen = range(data.units.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        over = {axis % data.units.dim() for axis in chosen}
        kept = [axis for axis in range(data.units.dim()) if axis not in over]
        units = data.units
        for axis in over:
            if not varies(units, axis):
                units = units.narrow(axis, 0, 1)
        units = self._owners(units, kept) if any(units.shape[axis] > 1 for axis in over) else units
        single = units.expand([1 if axis in over else data.shape[axis] for axis in range(units.dim())])
        return Value(single.reshape(shape_of(node)))

    def _moved(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        leaf = any(value.leaf for value in values_in([args, kwargs]))
        made = node.target(*unwrapped(args), **unwrapped(kwargs))  # type: ignore[operator]
        return (
            tuple(Value(one, leaf=leaf) for one in made) if isinstance(made, tuple | list) else Value(made, leaf=leaf)
        )

    def _joined(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Tensors side by side along an axis. Where no unit changes along it, it goes over positions, and the units agree."""
        parts: list[Value] = args[0]
        axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if op_name(node) == "stack":
            axis %= parts[0].units.dim() + 1
            parts = [Value(part.units.unsqueeze(axis), leaf=part.leaf) for part in parts]
        axis %= parts[0].units.dim()
        known = [part for part in parts if not part.leaf]
        leaf = bool(parts) and not known
        if leaf or any(varies(part.units, axis) for part in known) or not any(moves(part.units) for part in parts):
            return Value(torch.cat([part.units for part in parts], axis), leaf=leaf)
        first = next((part for part in known if moves(part.units)), None)
        if first is None:
            return self._not_understood(node, parts, "parameters beside values that do not move")
        row = first.units.narrow(axis, 0, 1)
        for part in parts:
            self.ledger.tie(part.units, row)
        return Value(row.expand(shape_of(node)))

    def _axis(self, value: Value, axis: int) -> Units:
        assert value.parameter is not None
        return self.ledger.axis(value.parameter, axis, value.shape[axis])

    def _fixed(self, node: Node) -> Any:
        made = tuple(Value(fixed(shape)) for shape in shapes_of(node))
        return made if isinstance(node.meta.get("val"), tuple | list) else made[0] if made else None

    def _not_understood(self, node: Node, given: Sequence[Value], what: str = "") -> Any:
        """Everything that goes in stays where it is, and so does what comes out."""
        for value in given:
            self.ledger.fix(value.units)
            if value.parameter is not None:
                for axis in range(value.units.dim()):
                    self.ledger.fix(self._axis(value, axis))
        if any(value.parameter is None and moves(value.units) for value in given):
            self.ledger.frozen.append(f"{what or op_name(node)} at {module_of(node)}")
        return self._fixed(node)
