"""The forward pass of each family over sizes: the operations of ``models.flat``, in its order, on a tape.

A language model of running text runs stock transformers' forward instead; its rows are blocks of one length: nothing is
padding.
"""

from __future__ import annotations

from toolkit.memory.blocks import distilbert_block, gpt2_block
from toolkit.memory.layers import FULL, Layers
from toolkit.memory.microbatch import MicroBatch, Setting
from toolkit.memory.shape import ModelShape
from toolkit.memory.tape import Tape, Value


class DryRun:
    """One forward pass; ``tape`` then runs it backwards."""

    def __init__(self, shape: ModelShape, batch: MicroBatch, *, setting: Setting, tape: Tape) -> None:
        self.shape, self.batch, self.setting, self.tape = shape, batch, setting, tape
        self.layers = Layers(shape, batch, setting=setting, tape=tape)
        self.gpt2 = shape.family.tokenizer == "bpe"
        # A prefix is handed to the stock padded forward, which answers for every token, as does a mean over all.
        self.pools_last = shape.objective == "classification" and shape.prefix == 0 and shape.family.pools_one

    def forward(self) -> Value:
        """Run embeddings, blocks and head; return the loss."""
        tape = self.tape
        hidden = self._states() if self.setting.kept else self._embed()
        for index in range(self.setting.kept, self.shape.layers):
            tape.moment = f"block {index + 1} of {self.shape.layers}"

            def section(value: Value, index: int = index) -> Value:
                return self._block(value, index)

            checkpointed = index < self.setting.checkpointing and self.setting.training
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
            hidden = self.layers.then(hidden, self.layers.norm(hidden, trained=trained))
        return self.layers.dropout(hidden, shape.dropout[1])

    def _states(self) -> Value:
        """Read what the frozen blocks left, and widen it to float32."""
        tape, shape, batch = self.tape, self.shape, self.batch
        tape.moment, tape.part = "states", "embeddings"
        elements = (batch.rows if self.setting.kept == shape.layers else batch.tokens) * shape.width
        if self.setting.kept_bytes < FULL:
            tape.take(elements * self.setting.kept_bytes, "batch")
        states = tape.record(elements * FULL, ())
        if self.setting.kept_bytes == FULL:
            # The batch's own, which stays to the end of the step.
            states.storage.references += 1
        return states

    def _block(self, hidden: Value, index: int) -> Value:
        trained = self.setting.training and index >= self.shape.first_trained
        self.layers.adapted = index >= self.shape.first_adapted
        last = self.pools_last and index == self.shape.layers - 1
        return (gpt2_block if self.gpt2 else distilbert_block)(self.layers, hidden, trained=trained, last=last)

    def _head(self, hidden: Value) -> Value:
        tape, shape = self.tape, self.shape
        tape.part = "head"
        if self.setting.kept == shape.layers:
            return self._classify(hidden)
        if shape.family.final_norm:
            trained = self.setting.training and shape.norm_trains
            hidden = self.layers.then(hidden, self.layers.norm(hidden, trained=trained))
        if shape.objective != "classification":
            return self._token_loss(hidden)
        return self._classify(self.layers.then(hidden, self.layers.pool(hidden)))

    def _classify(self, hidden: Value) -> Value:
        tape, shape, batch = self.tape, self.shape, self.batch
        size = batch.rows * shape.labels * FULL
        own = (shape.head * FULL,) if self.setting.training else ()
        if shape.family.own_head:
            hidden = self._hidden_layers(hidden)
            own = ((shape.head_layers[-1][0] + 1) * shape.labels * FULL,) if self.setting.training else ()
        tape.part = "logits"
        logits = tape.record(size, (hidden,), saves=(hidden,), parameters=own)
        tape.free(hidden)
        return self.layers.then(logits, tape.record(FULL, (logits,), extra=size))

    def _hidden_layers(self, hidden: Value) -> Value:
        """Run what of a head of the toolkit's own stands before its last layer."""
        tape, shape, layers = self.tape, self.shape, self.layers
        for before, after in shape.head_layers[:-1]:
            own = (before * after * FULL, after * FULL) if self.setting.training else ()
            wide = tape.record(self.batch.rows * after * FULL, (hidden,), saves=(hidden,), parameters=own)
            hidden = layers.then(hidden, wide)
            hidden = layers.then(hidden, tape.record(hidden.size, (hidden,), saves_output=True))
            hidden = layers.dropout(hidden, shape.head_dropout)
        return hidden if shape.hidden else layers.dropout(hidden, shape.head_dropout)

    def _token_loss(self, hidden: Value) -> Value:
        """Project the predicted positions onto the classes: logits, their float copy and log-probabilities."""
        tape, shape, batch = self.tape, self.shape, self.batch
        chosen = tape.record(batch.targets * shape.width * FULL, (hidden,))
        own = (shape.head * FULL,) if self.setting.training and shape.head else ()
        tape.part = "logits"
        size = batch.targets * batch.classes * FULL
        trained = self.setting.training and shape.embeddings_train
        table = (batch.classes * shape.width * FULL,) if trained else ()
        logits = tape.record(size, (chosen,), saves=(chosen,) if trained else (), parameters=own + table)
        tape.free(chosen)
        if self.setting.low_precision:
            logits = self.layers.then(logits, tape.record(size, (logits,)))
        logs = tape.record(size, (logits,), saves_output=True)
        tape.free(logits, hidden)
        return self.layers.then(logs, tape.record(FULL, (logs,)))
