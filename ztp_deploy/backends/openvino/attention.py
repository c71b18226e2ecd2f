"""Attention that a stage reads, in the form that AMX multiplies fastest: divided late, sums in pairs.

OpenVINO fuses attention with its products where no stage reads it, and takes care of both there. AMX multiplies bf16
in pairs: a sum of 197 terms runs several times as long as one of 198.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

_FARTHEST = 64.0
"""Logits farther than this from their row's mean saturate; bf16 knows such differences to a quarter at best."""
_EXPONENTIALS = "_exponentials"
_TOKENS, _LAST = 2, 3
"""Axes of [B, H, N, d]."""


def divide_late(model: Any, fixed: bool) -> None:
    """Attention A that a stage reads becomes E / z, in place: exponentials, and row sums that divide what comes of them.

    (E V) / z, (s / z) E for a vote s: softmax's three passes over [B, H, N, N] become one. A row's largest logit need not
    be known: the mean key is taken off all keys instead, which shifts a row as a whole too, so that its logits are
    around 0, where bf16 has most digits, and z is never 0; nothing overflows. Attention that is computed or read in other
    ways stays as it is. `fixed`: whether all shapes are known, where OpenVINO compiles an exponential of its own; else it
    is one that it fuses with the product.
    """
    for softmax in model.get_ordered_ops():
        if softmax.get_type_name() != "Softmax" or not _is_read(softmax.output(0)) or not _is_of_keys(softmax):
            continue
        readers = [port.get_node() for port in softmax.output(0).get_target_inputs()]
        forms = [_form(reader, softmax.output(0)) for reader in readers]
        if None in forms:
            continue
        exponentials, sums = _exponentials(softmax.input_value(0).get_node(), fixed)
        for reader, form in zip(readers, forms, strict=True):
            assert form is not None
            _replace(reader.output(0), form(reader, exponentials, sums))


def even_sums(model: Any, scores: set[str]) -> None:
    """Products of an attention that a stage reads with the values get an even number of terms, in place."""
    for operation in model.get_ordered_ops():
        if operation.get_friendly_name() in scores or operation.get_type_name() != "MatMul":
            continue
        attention = operation.input_value(0)
        if is_attention(attention) and _is_read(attention):
            for port, axis in ((0, _LAST), (1, _TOKENS)):
                operation.input(port).replace_source_output(_even(operation.input_value(port), axis))


def is_attention(value: Any) -> bool:
    """Whether a value is the result of a softmax, or the exponentials in its place, turned or not."""
    operation = value.get_node()
    if operation.get_type_name() == "Transpose":
        operation = operation.input_value(0).get_node()
    name: str = operation.get_friendly_name()
    return operation.get_type_name() == "Softmax" or name.endswith(_EXPONENTIALS)


def _is_read(attention: Any) -> bool:
    """Whether an attention [B, H, N, N] has readers besides the product with the values."""
    return bool(attention.get_partial_shape().rank.get_length() == 4 and len(attention.get_target_inputs()) > 1)


def _is_of_keys(softmax: Any) -> bool:
    """Whether the logits are Q Kᵀ and read by nothing else."""
    logits = softmax.input_value(0)
    product = logits.get_node()
    if product.get_type_name() != "MatMul" or len(logits.get_target_inputs()) > 1:
        return False
    turned = product.get_attributes()
    return bool(turned["transpose_b"] and not turned["transpose_a"])


_Form = Callable[[Any, Any, Any], Any]


def _form(reader: Any, attention: Any) -> _Form | None:
    """What a reader of A becomes as one of E and z; None for one that does not go row by row."""
    if reader.get_type_name() == "Gather":
        axis = reader.input_value(2).get_node()
        return _rows if axis.get_type_name() == "Constant" and int(axis.get_data().item()) == _TOKENS else None
    if reader.get_type_name() != "MatMul" or reader.get_attributes()["transpose_a"]:
        return None
    turned = reader.get_attributes()["transpose_b"]
    if reader.input_value(0) == attention:
        return None if turned else _values
    if reader.input_value(0).get_partial_shape()[_TOKENS] != 1:
        return None
    return _given if turned else _votes


def _exponentials(logits: Any, fixed: bool) -> tuple[Any, Any]:
    """E [B, H, N, N′] and z [B, H, N, 1] of a product Q Kᵀ; N′ is N or one more, which z leaves out."""
    from openvino import opset13 as opset

    queries, keys = logits.input_values()
    count = keys.get_partial_shape()[_TOKENS].get_length()

    def centred(value: Any, axis: int) -> Any:
        return _even(opset.subtract(value, opset.reduce_mean(value, np.array([axis]), True)).output(0), axis)

    products = opset.matmul(queries, _by_tokens(keys, centred), False, True)
    if fixed:
        exponentials = opset.exp(opset.clamp(products, -_FARTHEST, _FARTHEST))
    else:
        # Far on its left side a sigmoid is the exponential: to bf16's last digit up to 57 in place of 64.
        exponentials = opset.sigmoid(opset.subtract(products, opset.constant(np.float32(_FARTHEST))))
    exponentials.set_friendly_name(f"{logits.get_friendly_name()}{_EXPONENTIALS}")
    ones = (np.arange(count + count % 2) < count).astype(np.float32).reshape(1, 1, -1, 1)
    return exponentials.output(0), opset.matmul(exponentials, opset.constant(ones), False, False).output(0)


def _values(product: Any, exponentials: Any, sums: Any) -> Any:
    from openvino import opset13 as opset

    values = _by_tokens(product.input_value(1), _even)
    return opset.divide(opset.matmul(exponentials, values, False, False), sums)


def _votes(product: Any, exponentials: Any, sums: Any) -> Any:
    from openvino import opset13 as opset

    weights = opset.divide(product.input_value(0), _as_row(sums))
    return _first(opset.matmul(weights, exponentials, False, False), product)


def _given(product: Any, exponentials: Any, sums: Any) -> Any:
    """What each token gives to those that the first operand names."""
    from openvino import opset13 as opset

    given = opset.matmul(_even(product.input_value(0), _LAST), exponentials, False, True)
    return opset.divide(given, _as_row(sums))


def _rows(gather: Any, exponentials: Any, sums: Any) -> Any:
    from openvino import opset13 as opset

    rows, of_rows = (opset.gather(value, *gather.input_values()[1:]) for value in (exponentials, sums))
    return opset.divide(_first(rows, gather), of_rows)


def _first(value: Any, like: Any) -> Any:
    """The tokens of a value's last axis, without the one that was added."""
    from openvino import opset13 as opset

    count = like.output(0).get_partial_shape()[-1].get_length()
    if value.output(0).get_partial_shape()[-1] == count:
        return value
    return opset.slice(value, *(np.array([number]) for number in (0, count, 1, -1)))


def _as_row(sums: Any) -> Any:
    """[B, H, N, 1] → [B, H, 1, N]."""
    from openvino import opset13 as opset

    heads, count = (sums.get_partial_shape()[axis].get_length() for axis in (1, _TOKENS))
    return opset.reshape(sums, np.array([0, heads, 1, count]), True)


def _even(value: Any, axis: int) -> Any:
    """A zero more along an axis of odd length."""
    from openvino import opset13 as opset

    shape = value.get_partial_shape()
    if shape[axis].get_length() % 2 == 0:
        return value
    rank = shape.rank.get_length()
    more = [int(number == axis) for number in range(rank)]
    return opset.pad(value, [0] * rank, more, "constant", opset.constant(np.float32(0))).output(0)


def _by_tokens(value: Any, change: Callable[[Any, int], Any]) -> Any:
    """Changes [B, H, N, d] along its tokens: before it was split into heads where it was, which spares a copy."""
    from openvino import opset13 as opset

    heads, count, width = (value.get_partial_shape()[axis].get_length() for axis in (1, _TOKENS, _LAST))
    turn = value.get_node()
    if turn.get_type_name() != "Transpose" or list(turn.input_value(1).get_node().get_data()) != [0, 2, 1, 3]:
        return change(value, _TOKENS)
    split = turn.input_value(0).get_node()
    joint = split.input_value(0) if split.get_type_name() == "Reshape" else value
    sizes = joint.get_partial_shape()
    if sizes.rank.get_length() != 3 or sizes[1] != count or sizes[2] != heads * width:
        return change(value, _TOKENS)
    changed = change(joint, 1)
    shape = np.array([0, changed.get_partial_shape()[1].get_length(), heads, width])
    return opset.transpose(opset.reshape(changed, shape, True), turn.input_value(1)).output(0)


def _replace(output: Any, by: Any) -> None:
    names = output.get_names()
    for reader in list(output.get_target_inputs()):
        reader.replace_source_output(by.output(0))
    output.set_names(set())
    by.output(0).set_names(names)
