"""The forward pass of each family over sizes: the operations of ``models.flat``, in its order, on a tape.

A language model runs stock transformers' forward instead; its rows are blocks of one length: nothing is padding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.memory.shape import Linear, ModelShape
from toolkit.memory.tape import Tape, Value

FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class MicroBatch:
    """Sizes of one micro-batch.

    Attributes:
        rows: Texts.
        tokens: Real tokens of all rows.
        squares: Sum over the rows of squared lengths: entries of one head's attention weights.
        largest_run: The same sum over the largest run of equally long rows, which one attention call serves.
        repeated: Tokens of rows that share their length with another one.
        targets: Tokens that a language model predicts; 0 for a classifier.
        classes: Tokens its softmax runs over.
    """

    rows: int
    tokens: int
    squares: int
    largest_run: int
    repeated: int
    targets: int = 0
    classes: int = 0

    @staticmethod
    def of(lengths: Sequence[int], *, targets: int = 0, classes: int = 0) -> MicroBatch:
        """Return the sizes of a batch of rows of these lengths."""
        counts = Counter(lengths)
        return MicroBatch(
            rows=len(lengths),
            tokens=sum(lengths),
            squares=sum(length * length for length in lengths),
            largest_run=max(count * length * length for length, count in counts.items()),
            repeated=sum(count * length for length, count in counts.items() if count > 1),
            targets=targets,
            classes=classes,
        )


@dataclass(frozen=True)
class Setting:
    """What decides bytes beside the model.

    Attributes:
        device: ``cpu`` or ``cuda``.
        low_precision: Autocast to 2 bytes.
        checkpointing: Recompute each block in the backward pass.
        bits: 4, 8, or None for full-precision frozen weights.
        training: False runs without gradients and dropout.
    """

    device: str = "cpu"
    low_precision: bool = False
    checkpointing: bool = False
    bits: int | None = None
    training: bool = True


class DryRun:
    """One forward pass; ``tape`` then runs it backwards."""

    def __init__(self, shape: ModelShape, batch: MicroBatch, *, setting: Setting, tape: Tape) -> None:
        self.shape, self.batch, self.setting, self.tape = shape, batch, setting, tape
        self.low = 2 if setting.low_precision else FULL
        # PyTorch keeps a float mask on the CPU and a byte mask on CUDA.
        self.mask_bytes = 1 if setting.device == "cuda" else FULL
        self.gpt2 = shape.family.tokenizer == "bpe"
        self.pools_last = shape.objective == "classification"

    def forward(self) -> Value:
        """Run embeddings, blocks and head; return the loss."""
        tape = self.tape
        hidden = self._embed()
        for index in range(self.shape.layers):
            tape.moment = f"block {index + 1} of {self.shape.layers}"

            def section(value: Value, index: int = index) -> Value:
                return self._block(value, index)

            checkpointed = self.setting.checkpointing and self.setting.training
            result = tape.checkpointed(section, hidden) if checkpointed else section(hidden)
            tape.free(hidden)
            hidden = result
        tape.moment = "head"
        return self._head(hidden)

    def _embed(self) -> Value:
        tape, shape, batch = self.tape, self.shape, self.batch
        tape.moment = tape.part = "embeddings"
        size = batch.tokens * shape.width * FULL
        trained = self.setting.training and shape.embeddings_train
        tables = [count * FULL for count in shape.embedding_tensors[:2]]
        # Ids, mask and positions are int64, padded and packed.
        tape.take(batch.tokens * 8 * 4, "batch")
        found = [tape.record(size, (), parameters=(table,) if trained else ()) for table in tables]
        hidden = tape.record(size, tuple(found), shared=True)
        tape.free(*found)
        if not self.gpt2:
            hidden = self._then(hidden, self._norm(hidden, trained=trained))
        return self._dropout(hidden, shape.dropout[1])

    def _block(self, hidden: Value, index: int) -> Value:
        trained = self.setting.training and index >= self.shape.first_trained
        last = self.pools_last and index == self.shape.layers - 1
        return (self._gpt2_block if self.gpt2 else self._distilbert_block)(hidden, trained=trained, last=last)

    def _gpt2_block(self, hidden: Value, *, trained: bool, last: bool) -> Value:
        tape, shape = self.tape, self.shape
        c_attn, c_proj, c_fc, down = shape.linears
        tape.part = "attention"
        normed = self._norm(hidden, trained=trained)
        joined = self._linear(normed, c_attn, trained=trained)
        tape.free(normed)
        parts = tape.view(joined, joined.size)
        tape.free(joined)
        rows = hidden
        rows.storage.references += 1
        if last:
            rows = self._then(rows, self._pool(hidden))
        context = self._attend((parts,), single=last)
        projected = self._linear(context, c_proj, trained=trained)
        projected = self._dropout(projected, shape.dropout[0])
        middle = self._residual(rows, projected)
        tape.free(rows, projected)
        tape.part = "mlp"
        normed = self._norm(middle, trained=trained)
        out = self._mlp(normed, c_fc, down, trained=trained)
        # The block's locals live until it returns.
        result = self._residual(middle, out)
        tape.free(normed, out, middle, context, parts)
        return result

    def _distilbert_block(self, hidden: Value, *, trained: bool, last: bool) -> Value:
        tape, shape = self.tape, self.shape
        q_lin, k_lin, v_lin, out_lin, lin1, lin2 = shape.linears
        tape.part = "attention"
        key, value = (self._linear(hidden, layer, trained=trained) for layer in (k_lin, v_lin))
        rows = hidden
        rows.storage.references += 1
        if last:
            rows = self._then(rows, self._pool(hidden))
        query = self._linear(rows, q_lin, trained=trained)
        context = self._attend((query, key, value), single=last)
        tape.free(query)
        projected = self._linear(context, out_lin, trained=trained)
        total = self._residual(projected, rows)
        tape.free(projected, rows)
        middle = self._norm(total, trained=trained)
        tape.free(total)
        tape.part = "mlp"
        out = self._mlp(middle, lin1, lin2, trained=trained)
        total = self._residual(out, middle)
        tape.free(out)
        result = self._norm(total, trained=trained)
        tape.free(total, middle, context, key, value)
        return result

    def _mlp(self, source: Value, up: Linear, down: Linear, *, trained: bool) -> Value:
        tape = self.tape
        wide = self._linear(source, up, trained=trained)
        active = self._gelu_python(wide) if self.shape.activation == "python" else self._gelu(wide)
        tape.free(wide)
        out = self._linear(active, down, trained=trained)
        tape.free(active)
        return self._dropout(out, self.shape.dropout[0])

    def _gelu(self, wide: Value) -> Value:
        return self.tape.record(wide.size, (wide,), saves=(wide,))

    def _gelu_python(self, wide: Value) -> Value:
        """Run 0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3))) as transformers' NewGELUActivation spells it."""
        tape, size = self.tape, wide.size
        half = tape.record(size, (wide,))
        cubed = tape.record(size, (wide,), saves=(wide,))
        scaled = self._then(cubed, tape.record(size, (cubed,)))
        inner = self._then(scaled, tape.record(size, (wide, scaled), shared=True))
        inner = self._then(inner, tape.record(size, (inner,)))
        curve = self._then(inner, tape.record(size, (inner,), saves_output=True))
        curve = self._then(curve, tape.record(size, (curve,), shared=True))
        result = tape.record(size, (half, curve), saves=(half, curve))
        tape.free(half, curve)
        return result

    def _attend(self, parts: tuple[Value, ...], *, single: bool) -> Value:
        tape, shape, batch = self.tape, self.shape, self.batch
        queries = batch.rows if single else batch.tokens
        size = queries * shape.width * self.low
        training = self.setting.training
        if training and shape.dropout[2] > 0 and self.setting.device == "cpu":
            kept = self._attend_plainly(parts, size, single=single)
        else:
            statistics = queries * shape.heads * FULL
            kept = tape.record(size, parts, saves=parts, saves_output=True, extra=statistics)
        # The runs of equally long rows are put together again.
        return self._then(kept, tape.record(size, (kept,)))

    def _attend_plainly(self, parts: tuple[Value, ...], size: int, *, single: bool) -> Value:
        """Attend with the weights spelled out: no flash kernel of the CPU drops weights.

        Weights, mask and dropped weights of every head are kept, the scaled queries and keys, and the values: for runs
        of several rows as a copy, for single rows where they lie.
        """
        batch, width = self.batch, self.shape.width * FULL
        heads = self.shape.heads * FULL
        pairs, largest = (batch.tokens, 0) if single else (batch.squares, batch.largest_run)
        flows = any(part.needs_grad for part in parts)
        copies = size + batch.tokens * width + batch.repeated * width
        if not flows:
            return self.tape.record(size, parts, workspace=3 * largest * heads)
        return self.tape.record(
            size, parts, saves=parts[-1:], extra=3 * pairs * heads + copies, workspace=largest * heads
        )

    def _pool(self, hidden: Value) -> Value:
        size = self.batch.rows * self.shape.width * FULL
        return self.tape.record(size, (hidden,))

    def _norm(self, source: Value, *, trained: bool) -> Value:
        # Mean and reciprocal deviation of every row are kept beside the input.
        statistics = 2 * source.size // self.shape.width
        own = (self.shape.width * FULL,) * 2 if trained else ()
        return self.tape.record(source.size, (source,), saves=(source,), extra=statistics, parameters=own)

    def _linear(self, source: Value, layer: Linear, *, trained: bool) -> Value:
        tape = self.tape
        rows = self._rows(source, layer)
        size = rows * layer.fan_out * self.low
        weight = layer.weight
        cast = weight * self.low if self.setting.low_precision else 0
        if self.setting.bits is not None:
            # Weights are unpacked for each multiplication and thrown away; the 8-bit layer holds on to its input.
            pinned = (source,) if self.setting.bits == 8 else ()
            result = tape.record(size, (source,), pinned=pinned, workspace=weight * self.low)
        elif trained:
            own = (weight * FULL, layer.fan_out * FULL)
            # Autocast multiplies, and keeps, a copy in low precision of inputs that are float32.
            wide = self.setting.low_precision and source.size == rows * layer.fan_in * FULL
            saves, copy = ((), source.size // 2) if wide else ((source,), 0)
            result = tape.record(size, (source,), saves=saves, extra=cast + copy, parameters=own)
        else:
            result = tape.record(size, (source,), extra=cast)
        return self._adapted(source, result, layer, rows=rows) if layer.rank else result

    def _rows(self, source: Value, layer: Linear) -> int:
        full = self.batch.tokens * layer.fan_in
        return self.batch.tokens if source.size >= full * self.low else self.batch.rows

    def _adapted(self, source: Value, result: Value, layer: Linear, *, rows: int) -> Value:
        tape, training = self.tape, self.setting.training
        seen = source
        seen.storage.references += 1
        seen = self._dropout(seen, self.shape.lora_dropout)
        down = tape.record(
            rows * layer.rank * self.low,
            (seen,),
            saves=(seen,),
            parameters=(layer.rank * layer.fan_in * FULL,) if training else (),
        )
        up = tape.record(
            result.size,
            (down,),
            saves=(down,),
            parameters=(layer.rank * layer.fan_out * FULL,) if training else (),
        )
        tape.free(down)
        scaled = self._then(up, tape.record(up.size, (up,)))
        total = self._then(result, tape.record(result.size, (result, scaled), shared=True))
        tape.free(scaled, seen)
        return total

    def _dropout(self, source: Value, probability: float) -> Value:
        if not self.setting.training or probability == 0:
            return source
        mask = source.size // FULL * self.mask_bytes
        return self._then(source, self.tape.record(source.size, (source,), extra=mask))

    def _residual(self, one: Value, other: Value) -> Value:
        # Under autocast a low-precision branch joins a float32 stream.
        return self.tape.record(max(one.size, other.size), (one, other), shared=True)

    def _then(self, old: Value, new: Value) -> Value:
        """Rebind a local variable."""
        self.tape.free(old)
        return new

    def _head(self, hidden: Value) -> Value:
        tape, shape, batch = self.tape, self.shape, self.batch
        tape.part = "head"
        if shape.family.final_norm:
            trained = self.setting.training and shape.norm_trains
            hidden = self._then(hidden, self._norm(hidden, trained=trained))
        if shape.objective == "language_modeling":
            return self._token_loss(hidden)
        hidden = self._then(hidden, self._pool(hidden))
        size = batch.rows * shape.labels * FULL
        own = (shape.head * FULL,) if self.setting.training else ()
        tape.part = "logits"
        logits = tape.record(size, (hidden,), saves=(hidden,), parameters=own)
        tape.free(hidden)
        return self._then(logits, tape.record(FULL, (logits,), extra=size))

    def _token_loss(self, hidden: Value) -> Value:
        """Project the predicted positions onto the classes: logits, their float copy and log-probabilities."""
        tape, shape, batch = self.tape, self.shape, self.batch
        chosen = tape.record(batch.targets * shape.width * FULL, (hidden,))
        own = (shape.head * FULL,) if self.setting.training and shape.head else ()
        tape.part = "logits"
        size = batch.targets * batch.classes * FULL
        table = (batch.classes * shape.width * FULL,) if self.setting.training else ()
        logits = tape.record(size, (chosen,), saves=(chosen,), parameters=own + table)
        tape.free(chosen)
        if self.setting.low_precision:
            logits = self._then(logits, tape.record(size, (logits,)))
        logs = tape.record(size, (logits,), saves_output=True)
        tape.free(logits, hidden)
        return self._then(logs, tape.record(FULL, (logs,)))
