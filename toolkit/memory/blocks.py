"""One block of each family over sizes, in the order in which ``models.flat`` calls it and lets go."""

from __future__ import annotations

from toolkit.memory.layers import Layers
from toolkit.memory.tape import Value


def gpt2_block(layers: Layers, hidden: Value, *, trained: bool, last: bool) -> Value:
    """Run a GPT-2 block; the ``last`` of a classifier answers for the pooled tokens alone."""
    tape, shape = layers.tape, layers.shape
    c_attn = shape.linears[0]
    tape.part = "attention"
    if last and layers.absorbs(hidden, trained=trained):
        rows = layers.pool(hidden)
        context = layers.attend_absorbed(rows, normed=True)
        parts = rows
        parts.storage.references += 1
        return _gpt2_rest(layers, rows, context, parts, trained=trained)
    normed = layers.norm(hidden, trained=trained)
    joined = layers.linear(normed, c_attn, trained=trained)
    tape.free(normed)
    parts = tape.view(joined, joined.size)
    tape.free(joined)
    rows = hidden
    rows.storage.references += 1
    if last:
        rows = layers.then(rows, layers.pool(hidden))
    context = layers.attend((parts,), single=last)
    return _gpt2_rest(layers, rows, context, parts, trained=trained)


def _gpt2_rest(layers: Layers, rows: Value, context: Value, parts: Value, *, trained: bool) -> Value:
    """Run what stands behind the attention."""
    tape, shape = layers.tape, layers.shape
    _, c_proj, c_fc, down = shape.linears
    projected = layers.linear(context, c_proj, trained=trained)
    projected = layers.dropout(projected, shape.dropout[0])
    middle = layers.residual(rows, projected)
    tape.free(rows, projected)
    tape.part = "mlp"
    out = layers.mlp(layers.norm(middle, trained=trained), c_fc, down, trained=trained, owned=True)
    # The block's locals live until it returns.
    result = layers.residual(middle, out)
    tape.free(out, middle, context, parts)
    return result


def distilbert_block(layers: Layers, hidden: Value, *, trained: bool, last: bool) -> Value:
    """Run a DistilBERT block; the ``last`` of a classifier answers for the pooled tokens alone."""
    tape, shape = layers.tape, layers.shape
    q_lin, k_lin, v_lin, out_lin, lin1, lin2 = shape.linears
    tape.part = "attention"
    rows = hidden
    rows.storage.references += 1
    if last and layers.absorbs(hidden, trained=trained):
        rows = layers.then(rows, layers.pool(hidden))
        context = layers.attend_absorbed(rows, normed=False)
        key = value = rows
        rows.storage.references += 2
    else:
        key, value = (layers.linear(hidden, layer, trained=trained) for layer in (k_lin, v_lin))
        if last:
            rows = layers.then(rows, layers.pool(hidden))
        query = layers.linear(rows, q_lin, trained=trained)
        context = layers.attend((query, key, value), single=last)
        tape.free(query)
    projected = layers.linear(context, out_lin, trained=trained)
    total = layers.residual(projected, rows)
    tape.free(projected, rows)
    middle = layers.norm(total, trained=trained)
    tape.free(total)
    tape.part = "mlp"
    out = layers.mlp(middle, lin1, lin2, trained=trained)
    total = layers.residual(out, middle)
    tape.free(out)
    result = layers.norm(total, trained=trained)
    tape.free(total, middle, context, key, value)
    return result
