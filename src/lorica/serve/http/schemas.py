"""The fields of requests: OpenAI's, and vLLM's beside them. What nobody knows is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lorica.errors import nearest


def _whole(text: str) -> str:
    """Refuse halves of characters, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a character") from None
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_whole)]
Id = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Ids = Annotated[
    list[Id], Field(fail_fast=True)
]  # of a million wrong ones the first is told, and no list made of all
Texts = Annotated[list[Text], Field(fail_fast=True)]
Lists = Annotated[list[Ids], Field(fail_fast=True)]
Name = Annotated[Text, StringConstraints(min_length=1, max_length=512)]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Flag = Annotated[bool, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, ge=-2, le=2, allow_inf_nan=False)]

# What clients send along and no answer depends on.
_IGNORED = {
    *("metadata", "parallel_tool_calls", "priority", "prompt_cache_key", "request_id", "safety_identifier"),
    *("service_tier", "store", "user"),
}


class Request(BaseModel):
    """A request's body; a field that nobody knows is an error, and not silently without effect."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _known(self) -> Request:
        names = type(self).model_fields
        for name in self.model_extra or {}:
            if name not in _IGNORED:
                raise ValueError(f"there is no field {name[:100]!r} here{nearest(name[:100], names)}")
        return self


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore")

    include_usage: Flag | None = None
    continuous_usage_stats: Flag | None = None


class ResponseFormat(BaseModel):
    """The form of an answer; text is the only one."""

    model_config = ConfigDict(extra="ignore")

    type: Text


class Drawn(Request):
    """Sampling: the fields that completions and conversations share."""

    model: Name | None = None
    n: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Texts | None = None
    stop_token_ids: Ids | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(strict=True, ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(strict=True, gt=0, le=10, allow_inf_nan=False)] | None = None
    logit_bias: (
        dict[str, Annotated[float, Field(strict=True, ge=-100, le=100, allow_inf_nan=False)]] | None
    ) = None
    ignore_eos: Flag | None = None
    add_special_tokens: Flag | None = None
    response_format: ResponseFormat | None = None


class Completion(Drawn):
    """`/v1/completions`."""

    prompt: Text | Ids | Texts | Lists
    max_tokens: Count | None = None
    echo: Flag | None = None
    logprobs: Count | None = None
    best_of: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    suffix: Text | None = None


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="ignore")

    type: Text
    text: Text | None = None


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64)]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None


class Chat(Drawn):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: Texts | None = None


class Embedding(Request):
    """`/v1/embeddings`."""

    model: Name | None = None
    input: Text | Ids | Texts | Lists
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(strict=True, ge=1, lt=2**31)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None


Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


class Classification(Request):
    """`/classify`: texts, or pairs of texts."""

    model: Name | None = None
    input: Text | Ids | Texts | Lists | Annotated[list[Pair], Field(fail_fast=True)]
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None


class Score(Request):
    """`/score`: one text with each of several, or texts with as many others."""

    model: Name | None = None
    text_1: Text | Texts
    text_2: Text | Texts
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None


class Rerank(Request):
    """`/rerank`: documents by how well they answer a query."""

    model: Name | None = None
    query: Text
    documents: Texts
    top_n: Annotated[int, Field(strict=True, ge=0, lt=2**31)] | None = None
    return_documents: Flag | None = None
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] | None = None


class Tokenize(Request):
    """`/tokenize`: a text, or a conversation as its template lays it out."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: Flag | None = None
    return_token_strs: Flag | None = None


class Detokenize(Request):
    """`/detokenize`: the text of tokens."""

    model: Name | None = None
    tokens: Ids


class LoadAdapter(Request):
    """`/v1/load_lora_adapter`, with vLLM's names; `pinned` is ours."""

    lora_name: Name
    lora_path: Annotated[str, StringConstraints(strict=True, min_length=1, max_length=4096)] | None = None
    load_inplace: Flag | None = None
    pinned: Flag | None = None


class UnloadAdapter(Request):
    """`/v1/unload_lora_adapter`, with vLLM's names."""

    lora_name: Name
    lora_int_id: Annotated[int, Field(strict=True)] | None = None
