"""Requests and results as bytes, as the training protocol has them: protobuf for large ones, else JSON.

The messages are the SDK's own (``tinker.proto``). A call is kept as the bytes that came.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from lorica.errors import require
from lorica.service.engine.datum import Datum
from lorica.service.engine.drawing import Draw, Samples
from lorica.service.engine.engine import Output
from lorica.service.errors import UserError, reading

_EMPTY = -99999.0
_LARGEST = 1 << 26
"""Numbers of a tensor, unpacked."""
_REFUSED = (
    "target_prompt_logprobs",
    "prompt_alt_tokens_k",
    "prompt_logprobs_last_n",
    "record_stability_info",
)


def _messages() -> Any:
    return require("tinker.proto.tinker_public_pb2", extra="service")


class Learn:
    """A request of forward or forward_backward.

    Args:
        body: a ``ForwardBackwardRequest``.

    Raises:
        UserError: it is none.
    """

    def __init__(self, body: bytes) -> None:
        """Read the fields that name its tenant."""
        self._message = _messages().ForwardBackwardRequest()
        try:
            self._message.ParseFromString(body)
        except Exception as error:
            raise UserError(f"the body is no ForwardBackwardRequest: {error}") from None
        self.model_id: str = self._message.model_id
        self.seq_id: int = self._message.seq_id
        self.loss_fn: str = self._message.loss_fn
        self.backward: bool = not self._message.forward_only

    @property
    def tokens(self) -> int:
        """Number of its tokens."""
        return sum(
            len(chunk.encoded_text.tokens) // 4 for datum in self._message.data for chunk in datum.model_input
        )

    def settings(self) -> dict[str, Any]:
        """Settings of the loss."""
        newer = {
            name: value.text if value.HasField("text") else value.number
            for name, value in self._message.loss_fn_config_v2.items()
        }
        return newer or dict(self._message.loss_fn_config)

    def data(self) -> list[Datum]:
        """Its sequences.

        Raises:
            UserError: one holds something other than text, or a damaged tensor.
        """
        with reading("a datum"):
            return [self._datum(datum) for datum in self._message.data]

    def _datum(self, datum: Any) -> Datum:
        parts = []
        for chunk in datum.model_input:
            kind = next((name for name in ("image", "dmel") if chunk.HasField(name)), None)
            if kind is not None:
                raise UserError(f"model_input holds {kind}; this server carries text alone (encoded_text)")
            parts.append(numpy.frombuffer(chunk.encoded_text.tokens, numpy.int32))
        tokens = torch.from_numpy(
            numpy.concatenate([numpy.empty(0, numpy.int32), *parts]).astype(numpy.int64)
        )
        inputs = {name: _tensor(name, value) for name, value in datum.loss_fn_inputs.items()}
        return Datum.of(tokens, **inputs)


def _tensor(name: str, message: Any) -> Tensor:
    kinds = {1: numpy.float32, 2: numpy.int64, 3: numpy.int32}
    if message.dtype not in kinds:
        raise UserError(f"{name} has dtype {message.dtype}, which is none of float32, int64 and int32")
    kind, shape = kinds[message.dtype], list(message.shape)
    if any(size < 0 for size in shape) or math.prod(shape) > _LARGEST:
        raise UserError(f"{name} has the shape {shape}; it may have {_LARGEST:,} numbers")
    try:
        if not message.HasField("sparse_csr"):
            dense = numpy.frombuffer(message.dense, kind)
            return torch.from_numpy(dense.reshape(shape or [len(dense)]).copy())
        csr = message.sparse_csr
        crow, columns = (numpy.frombuffer(part, numpy.int64) for part in (csr.crow_indices, csr.col_indices))
        dense = numpy.zeros(shape, kind)
        if columns.size and columns.min() < 0:
            raise IndexError("a column below 0")
        dense[numpy.repeat(numpy.arange(shape[0]), numpy.diff(crow)), columns] = numpy.frombuffer(
            csr.values, kind
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"{name} is damaged: {error}") from None
    return torch.from_numpy(dense)


def learn_of(body: Mapping[str, Any], *, forward_only: bool) -> bytes:
    """A request of forward or forward_backward that came as JSON, as a message.

    Raises:
        UserError: it is none.
    """
    with reading("the body of forward_backward"):
        given = body.get("forward_backward_input") or body.get("forward_input") or {}
        message = _messages().ForwardBackwardRequest(
            model_id=body.get("model_id", ""),
            seq_id=body.get("seq_id") or 0,
            loss_fn=given.get("loss_fn", ""),
            forward_only=forward_only,
        )
        for name, value in (given.get("loss_fn_config") or {}).items():
            setattr(message.loss_fn_config_v2[name], "text" if isinstance(value, str) else "number", value)
        for datum in given.get("data") or []:
            _add_datum(message.data.add(), datum)
        return message.SerializeToString()


def _add_datum(message: Any, datum: Mapping[str, Any]) -> None:
    for chunk in datum["model_input"]["chunks"]:
        if chunk.get("type", "encoded_text") != "encoded_text":
            message.model_input.add().image.format = chunk["type"]
            continue
        tokens = _numbers("model_input", chunk["tokens"], numpy.int32).tobytes()
        message.model_input.add().encoded_text.tokens = tokens
    kinds = {"float32": (1, numpy.float32), "int64": (2, numpy.int64)}
    for name, tensor in datum.get("loss_fn_inputs", {}).items():
        into = message.loss_fn_inputs[name]
        into.dtype, kind = kinds[tensor["dtype"]]
        data = _numbers(name, tensor["data"], kind)
        into.shape.extend(tensor.get("shape") or [len(data)])
        if tensor.get("sparse_crow_indices") is None:
            into.dense = data.tobytes()
        else:
            into.sparse_csr.values = data.tobytes()
            for part in ("crow_indices", "col_indices"):
                indices = numpy.asarray(tensor[f"sparse_{part}"], numpy.int64)
                setattr(into.sparse_csr, part, indices.tobytes())


def _numbers(name: str, given: Any, kind: Any) -> Any:
    """An array of this kind, in which no fraction became a whole number."""
    found = numpy.asarray(given)
    numbers = numpy.asarray(given, kind)
    if found.dtype.kind == "f" and numbers.dtype.kind == "i" and not numpy.array_equal(found, numbers):
        raise UserError(f"{name} holds fractions; its numbers are whole")
    return numbers


def learned(output: Output) -> bytes:
    """The result of forward or forward_backward: log-probabilities per datum, and the loss."""
    pb = _messages()
    message = pb.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord",
        metrics={"loss:sum": output.loss, "num_sequences:sum": float(len(output.logprobs))},
    )
    for group in _alike(output.logprobs):
        flat = [tensor.contiguous().numpy().astype(numpy.float32).tobytes() for tensor in group]
        offsets = numpy.cumsum([0, *map(len, flat)], dtype=numpy.int64)
        batch = pb.BatchedTensor(
            data=b"".join(flat),
            offsets=offsets.tobytes(),
            dtype=pb.DTYPE_FLOAT32,
            trailing_shape=list(group[0].shape[1:]),
        )
        message.loss_fn_outputs.append(
            pb.ArrayRecord(type_tag="ArrayRecord", fields={"logprobs": batch}, num_datums=len(group))
        )
    return message.SerializeToString()


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Runs of tensors that differ in their first dimension alone."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and group[0].shape[1:] != tensor.shape[1:]:
            yield group
            group = []
        group.append(tensor)
    yield group


def sampled(samples: Samples, prompt: int) -> bytes:
    """The result of a request for samples.

    Args:
        samples: the samples.
        prompt: its tokens.
    """
    pb = _messages()
    message = pb.SampleResponse()
    for sample in samples.sequences:
        stop = pb.STOP_REASON_STOP if sample.stop_reason == "stop" else pb.STOP_REASON_LENGTH
        sequence = message.sequences.add(
            stop_reason=stop,
            tokens=numpy.asarray(sample.tokens, numpy.int32).tobytes(),
            logprobs=numpy.asarray(sample.logprobs, numpy.float32).tobytes(),
        )
        if sample.top:
            ids, values = zip(*sample.top, strict=True)
            sequence.topk_sampled_logprobs.CopyFrom(_top(numpy.asarray(ids), numpy.asarray(values)))
    if samples.prompt_logprobs is not None:
        scored = numpy.full(prompt, numpy.nan, numpy.float32)
        scored[1:] = samples.prompt_logprobs.numpy()
        message.prompt_logprobs = scored.tobytes()
    if samples.topk_prompt is not None:
        ids, values = (t.numpy() for t in samples.topk_prompt)
        k = ids.shape[1]
        ids = numpy.concatenate([numpy.zeros((1, k), ids.dtype), ids])
        values = numpy.concatenate([numpy.full((1, k), _EMPTY, values.dtype), values])
        message.topk_prompt_logprobs.CopyFrom(_top(ids, values))
    return message.SerializeToString()


def _top(ids: Any, values: Any) -> Any:
    return _messages().TopkLogprobs(
        token_ids=ids.astype(numpy.int32).tobytes(),
        logprobs=values.astype(numpy.float32).tobytes(),
        k=ids.shape[1],
        length=ids.shape[0],
    )


def prompt_of(body: Mapping[str, Any]) -> list[int]:
    """Token ids of a request's ``prompt``.

    Raises:
        UserError: it holds something other than text.
    """
    tokens: list[int] = []
    with reading("prompt"):
        for chunk in body.get("prompt", {}).get("chunks", []):
            if chunk.get("type", "encoded_text") != "encoded_text":
                raise UserError(
                    f"prompt holds {chunk['type']}; this server carries text alone (encoded_text)"
                )
            tokens += map(operator.index, chunk["tokens"])
    return tokens


def draw_of(body: Mapping[str, Any], otherwise: int) -> Draw:
    """The settings by which a request wants its samples drawn.

    Args:
        body: of ``asample``.
        otherwise: the seed, where it gives none.

    Raises:
        UserError: it asks for something that is not carried.
    """
    for name in _REFUSED:
        if body.get(name):
            raise UserError(f"{name} is not carried by this server")
    with reading("sampling_params"):
        given = body.get("sampling_params") or {}
        stop = given.get("stop")
        seed = given.get("seed")
        return Draw(
            max_tokens=None if given.get("max_tokens") is None else operator.index(given["max_tokens"]),
            temperature=float(given.get("temperature", 1.0)),
            top_k=operator.index(given.get("top_k", -1)),
            top_p=float(given.get("top_p", 1.0)),
            seed=otherwise if seed is None else operator.index(seed),
            stop=None if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
            num_samples=operator.index(body.get("num_samples", 1)),
            prompt_logprobs=bool(body.get("prompt_logprobs")),
            topk_prompt=operator.index(body.get("topk_prompt_logprobs", 0)),
            topk=operator.index(body.get("topk_sample_logprobs", 0)),
        )


def as_json(value: Any) -> bytes:
    """JSON, as bytes."""
    return json.dumps(value).encode()
