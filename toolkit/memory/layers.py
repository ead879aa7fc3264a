"""A block's operations over sizes: linear layers and their adapters, norms, dropout, activations, attention."""

from __future__ import annotations

from dataclasses import replace

from toolkit.memory.linears import Linear
from toolkit.memory.microbatch import MicroBatch, Setting
from toolkit.memory.shape import ModelShape
from toolkit.memory.tape import Tape, Value
from toolkit.models.cpu_kernels import WIDENED

FULL = 4  # bytes of a float32


class Layers:
    """The operations that the blocks of both families are made of, each as ``models.flat`` runs it."""

    def __init__(self, shape: ModelShape, batch: MicroBatch, *, setting: Setting, tape: Tape) -> None:
        self.shape, self.batch, self.setting, self.tape = shape, batch, setting, tape
        self.adapted = True
        self.low = 2 if setting.low_precision else FULL
        # PyTorch keeps a float mask on the CPU and a byte mask on CUDA.
        self.mask_bytes = 1 if setting.device == "cuda" else FULL

    def mlp(self, source: Value, up: Linear, down: Linear, *, trained: bool, owned: bool = False) -> Value:
        """Run both layers and the activation between them; an ``owned`` source ends with the first layer."""
        tape = self.tape
        wide = self.linear(source, up, trained=trained)
        if owned:
            tape.free(source)
        active = self._gelu_python(wide) if self.shape.activation == "python" else self._gelu(wide)
        tape.free(wide)
        out = self.linear(active, down, trained=trained)
        tape.free(active)
        return self.dropout(out, self.shape.dropout[0])

    def _gelu(self, wide: Value) -> Value:
        return self.tape.record(wide.size, (wide,), saves=(wide,))

    def _gelu_python(self, wide: Value) -> Value:
        """Run 0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3))) as transformers' NewGELUActivation spells it."""
        tape, size = self.tape, wide.size
        half = tape.record(size, (wide,))
        cubed = tape.record(size, (wide,), saves=(wide,))
        scaled = self.then(cubed, tape.record(size, (cubed,)))
        inner = self.then(scaled, tape.record(size, (wide, scaled), shared=True))
        inner = self.then(inner, tape.record(size, (inner,)))
        curve = self.then(inner, tape.record(size, (inner,), saves_output=True))
        curve = self.then(curve, tape.record(size, (curve,), shared=True))
        result = tape.record(size, (half, curve), saves=(half, curve))
        tape.free(half, curve)
        return result

    def attend(self, parts: tuple[Value, ...], *, single: bool) -> Value:
        """Run attention within each row; ``single`` with one query a row."""
        tape, shape, batch = self.tape, self.shape, self.batch
        if shape.prefix and self.setting.training:
            prefix = 2 * shape.prefix * shape.width * FULL
            parts = (*parts, tape.record(batch.rows * prefix, (), parameters=(prefix,)))
        if self._pads():
            return self._attend_padded(parts, single=single)
        queries = batch.rows if single else batch.tokens
        size = queries * shape.width * self.low
        training = self.setting.training
        if self._widens():
            kept = tape.record(size, parts, saves=parts, workspace=self._widened(parts, size, single=single))
        elif training and shape.dropout[2] > 0 and self.setting.device == "cpu":
            kept = self._attend_plainly(parts, size, single=single)
        else:
            statistics = queries * shape.heads * FULL
            kept = tape.record(size, parts, saves=parts, saves_output=True, extra=statistics)
        # The runs of equally long rows are put together again.
        return self.then(kept, tape.record(size, (kept,)))

    def _widens(self) -> bool:
        """Return whether attention runs in float32 under autocast (``packing.attend_widened``)."""
        return self.setting.device == "cpu" and self.setting.low_precision and self.batch.longest <= WIDENED

    def _widened(self, parts: tuple[Value, ...], size: int, *, single: bool) -> int:
        """Return the float32 copies and gradients, made for the backward pass, of which nothing is kept."""
        batch, inputs = self.batch, sum(part.size for part in parts)
        copies = 2 * (inputs + size)
        if not self.setting.training or not any(part.needs_grad for part in parts):
            return copies
        if self.shape.dropout[2] == 0:
            return copies + 2 * inputs
        pairs = batch.tokens if single else batch.squares
        return copies + 3 * pairs * self.shape.heads * FULL

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

    def _pads(self) -> bool:
        """Return whether ``packing.attend`` pads the rows again: on CUDA where its flash kernel does not serve."""
        plain = not self.setting.training or self.shape.dropout[2] == 0
        varlen = plain and self.setting.low_precision
        return self.setting.device == "cuda" and self.shape.objective != "language_modeling" and not varlen

    def _attend_padded(self, parts: tuple[Value, ...], *, single: bool) -> Value:
        """Attend in one call on padded copies of queries, keys and values; CUDA kernels draw dropout again instead."""
        tape, batch, row = self.tape, self.batch, self.shape.width * self.low
        places = batch.rows * batch.longest
        queries = batch.rows if single else places
        size = queries * row
        # A copy is made from as many zeros, which end with it.
        copies = (2 * places + (0 if single else places)) * row
        statistics = queries * self.shape.heads * FULL
        kept = tape.record(
            size,
            parts,
            saves=parts[:1] if single else (),
            saves_output=True,
            extra=copies + statistics,
            workspace=places * row,
        )
        if single:
            return kept
        return self.then(kept, tape.record(batch.tokens * row, (kept,), extra=batch.tokens * 8))

    def absorbs(self, hidden: Value, *, trained: bool) -> bool:
        """Return whether the last block's keys and values are never formed (``models.absorbed.only_trained``)."""
        return trained and not hidden.needs_grad

    def attend_absorbed(self, rows: Value, *, normed: bool) -> Value:
        """Attend with one query a row on padded hidden states; query, key and value layers train."""
        tape, batch, width = self.tape, self.batch, self.shape.width * FULL
        heads, places = self.shape.heads, batch.rows * batch.longest
        folded, scores = batch.rows * heads * width, places * heads * FULL
        own = (3 * self.shape.width * width, 3 * width)
        # GPT-2 keeps the three projections in one weight: their gradients are joined. DistilBERT's are transposed.
        copies = (3 if normed else 1) * self.shape.width * width
        query = tape.record(rows.size, (rows,), saves=(rows,), parameters=own, workspace=copies)
        # Kept: padded states, the query folded into the keys' weights (before and behind the norm's scale), the
        # weighted states (the same), and the weights behind softmax and dropout.
        kept = places * width + (4 if normed else 2) * folded + 2 * scores
        workspace = batch.tokens * width * normed + scores
        context = tape.record(rows.size, (query,), extra=kept, workspace=workspace)
        tape.free(query)
        return context

    def pool(self, hidden: Value) -> Value:
        """Take the one token of each row that it is classified by, or the mean or maximum of all."""
        size, largest = self.batch.rows * self.shape.width * FULL, self.shape.family.pooling == "max"
        return self.tape.record(size, (hidden,), saves=(hidden,) if largest else (), saves_output=largest)

    def norm(self, source: Value, *, trained: bool) -> Value:
        """Run a layer norm."""
        # Mean and reciprocal deviation of every row are kept beside the input.
        statistics = 2 * source.size // self.shape.width
        shape, training = self.shape, self.setting.training
        vectors = 2 if trained or (training and shape.norms_train) else int(training and shape.biases_train)
        own = (shape.width * FULL,) * vectors
        return self.tape.record(source.size, (source,), saves=(source,), extra=statistics, parameters=own)

    def linear(self, source: Value, layer: Linear, *, trained: bool) -> Value:
        """Run a linear layer, stored as the setting says, with its adapter if it has one."""
        tape = self.tape
        if self.adapted and layer.up and not layer.rank and layer.name == self.shape.family.mlp_out:
            # IA3 scales the input of this one layer.
            source.storage.references += 1
            scaled = self._scaled(source, layer)
            result = self.linear(scaled, replace(layer, up=0), trained=trained)
            tape.free(scaled)
            return result
        rows = self._rows(source, layer)
        size = rows * layer.fan_out * self.low
        weight = layer.weight
        cast = weight * self.low if self.setting.low_precision else 0
        if self.setting.bits is not None:
            # A CPU unpacks all weights into the same memory; elsewhere each product takes its own, and an 8-bit layer
            # holds on to its input.
            unpacked = 0 if self.setting.device == "cpu" else weight * self.low
            pinned = (source,) if self.setting.bits == 8 and unpacked else ()
            tape.widen(unpacked)
            result = tape.record(size, (source,), pinned=pinned, workspace=unpacked)
        elif trained:
            own = (weight * FULL, layer.fan_out * FULL)
            if self.setting.training:
                tape.widen(weight * FULL)
            # Autocast multiplies, and keeps, a copy in low precision of inputs that are float32.
            wide = self.setting.low_precision and source.size == rows * layer.fan_in * FULL
            saves, copy = ((), source.size // 2) if wide else ((source,), 0)
            result = tape.record(size, (source,), saves=saves, extra=cast + copy, cached=cast, parameters=own)
        else:
            bias = (layer.fan_out * FULL,) if self.setting.training and self.shape.biases_train else ()
            result = tape.record(size, (source,), extra=0 if self.setting.low_frozen else cast, parameters=bias)
        if not self.adapted:
            return result
        if layer.rank:
            return self._adapted(source, result, layer, rows=rows)
        return self._scaled(result, layer) if layer.up else result

    def _rows(self, source: Value, layer: Linear) -> int:
        full = self.batch.tokens * layer.fan_in
        return self.batch.tokens if source.size >= full * self.low else self.batch.rows

    def _scaled(self, result: Value, layer: Linear) -> Value:
        """Multiply a layer's output or input with IA3's vector."""
        own = (layer.up * FULL,) if self.setting.training else ()
        return self._times_vector(result, own)

    def _times_vector(self, source: Value, own: tuple[int, ...]) -> Value:
        """Multiply with a vector, whose gradient is a sum over what is as large as the source; the source ends."""
        scaled = self.tape.record(source.size, (source,), saves=(source,), parameters=own, workspace=source.size)
        return self.then(source, scaled)

    def _adapted(self, source: Value, result: Value, layer: Linear, *, rows: int) -> Value:
        tape, training = self.tape, self.setting.training
        seen = source
        seen.storage.references += 1
        seen = self.dropout(seen, self.shape.lora_dropout)
        down = tape.record(
            rows * layer.rank * self.low,
            (seen,),
            # Read by the gradient of a trained matrix alone: LoRA-FA and VeRA keep no input.
            saves=(seen,) if layer.down > layer.rank else (),
            parameters=(layer.down * FULL,) if training and layer.down else (),
        )
        up = tape.record(
            result.size,
            (down,),
            saves=(down,),
            parameters=((layer.up - layer.scaled) * FULL,) if training and layer.up > layer.scaled else (),
        )
        tape.free(down)
        own = (layer.scaled * FULL,) if training else ()
        if layer.normed:
            # DoRA: the base's part without its bias is scaled too. Norms take a unit matrix and four whole weights.
            tape.touch(FULL * (layer.fan_in**2 + 4 * layer.weight))
            plain = self._times_vector(tape.record(result.size, (result,)), own)
            up = self._times_vector(up, ())
            up = self.then(up, tape.record(up.size, (up, plain), shared=True))
            tape.free(plain)
        elif layer.scaled:
            up = self._times_vector(up, own)
        scaled = self.then(up, tape.record(up.size, (up,)))
        total = self.then(result, tape.record(result.size, (result, scaled), shared=True))
        tape.free(scaled, seen)
        return total

    def dropout(self, source: Value, probability: float) -> Value:
        """Drop in training; the source ends with it."""
        if not self.setting.training or probability == 0:
            return source
        mask = source.size // FULL * self.mask_bytes
        return self.then(source, self.tape.record(source.size, (source,), extra=mask))

    def residual(self, one: Value, other: Value) -> Value:
        """Add a branch to the stream."""
        # Under autocast a low-precision branch joins a float32 stream.
        return self.tape.record(max(one.size, other.size), (one, other), shared=True)

    def then(self, old: Value, new: Value) -> Value:
        """Rebind a local variable."""
        self.tape.free(old)
        return new
