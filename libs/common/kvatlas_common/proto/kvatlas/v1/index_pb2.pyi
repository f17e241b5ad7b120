from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PromptKeys(_message.Message):
    __slots__ = ("profile", "keys")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    profile: str
    keys: bytes
    def __init__(self, profile: _Optional[str] = ..., keys: _Optional[bytes] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("model", "prompts", "engines", "estimate", "reads_plain")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    ESTIMATE_FIELD_NUMBER: _ClassVar[int]
    READS_PLAIN_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompts: _containers.RepeatedCompositeFieldContainer[PromptKeys]
    engines: _containers.RepeatedScalarFieldContainer[str]
    estimate: bool
    reads_plain: bool
    def __init__(self, model: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[PromptKeys, _Mapping]]] = ..., engines: _Optional[_Iterable[str]] = ..., estimate: _Optional[bool] = ..., reads_plain: _Optional[bool] = ...) -> None: ...

class MediumBlocks(_message.Message):
    __slots__ = ("medium", "blocks")
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    medium: str
    blocks: int
    def __init__(self, medium: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class EngineMatch(_message.Message):
    __slots__ = ("engine", "blocks", "media", "exact", "doubtful", "expected")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    DOUBTFUL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    engine: str
    blocks: int
    media: _containers.RepeatedCompositeFieldContainer[MediumBlocks]
    exact: bool
    doubtful: int
    expected: int
    def __init__(self, engine: _Optional[str] = ..., blocks: _Optional[int] = ..., media: _Optional[_Iterable[_Union[MediumBlocks, _Mapping]]] = ..., exact: _Optional[bool] = ..., doubtful: _Optional[int] = ..., expected: _Optional[int] = ...) -> None: ...

class PlainMatches(_message.Message):
    __slots__ = ("engines", "blocks", "inexact")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INEXACT_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedScalarFieldContainer[str]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    inexact: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, engines: _Optional[_Iterable[str]] = ..., blocks: _Optional[_Iterable[int]] = ..., inexact: _Optional[_Iterable[int]] = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("engines", "unknown", "plain")
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    PLAIN_FIELD_NUMBER: _ClassVar[int]
    engines: _containers.RepeatedCompositeFieldContainer[EngineMatch]
    unknown: _containers.RepeatedScalarFieldContainer[str]
    plain: PlainMatches
    def __init__(self, engines: _Optional[_Iterable[_Union[EngineMatch, _Mapping]]] = ..., unknown: _Optional[_Iterable[str]] = ..., plain: _Optional[_Union[PlainMatches, _Mapping]] = ...) -> None: ...

class StreamedMatch(_message.Message):
    __slots__ = ("id", "request")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: MatchRequest
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[MatchRequest, _Mapping]] = ...) -> None: ...

class StreamedMatchAnswer(_message.Message):
    __slots__ = ("id", "response", "refusal")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: MatchResponse
    refusal: Refusal
    def __init__(self, id: _Optional[int] = ..., response: _Optional[_Union[MatchResponse, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    details: str
    def __init__(self, code: _Optional[int] = ..., details: _Optional[str] = ...) -> None: ...

class WatchFleetRequest(_message.Message):
    __slots__ = ("router",)
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    router: str
    def __init__(self, router: _Optional[str] = ...) -> None: ...

class Adapter(_message.Message):
    __slots__ = ("name", "path", "number")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    name: str
    path: str
    number: int
    def __init__(self, name: _Optional[str] = ..., path: _Optional[str] = ..., number: _Optional[int] = ...) -> None: ...

class InFlight(_message.Message):
    __slots__ = ("prefilling", "prefill_tokens", "decoding")
    PREFILLING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    prefilling: int
    prefill_tokens: int
    decoding: int
    def __init__(self, prefilling: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., decoding: _Optional[int] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("tokens", "age_s")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    age_s: float
    def __init__(self, tokens: _Optional[int] = ..., age_s: _Optional[float] = ...) -> None: ...

class EngineLoad(_message.Message):
    __slots__ = ("engine", "running", "waiting", "kv_usage", "scraped_at", "loras", "others", "head")
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    SCRAPED_AT_FIELD_NUMBER: _ClassVar[int]
    LORAS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    engine: str
    running: int
    waiting: int
    kv_usage: float
    scraped_at: float
    loras: _containers.RepeatedScalarFieldContainer[str]
    others: InFlight
    head: Head
    def __init__(self, engine: _Optional[str] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., scraped_at: _Optional[float] = ..., loras: _Optional[_Iterable[str]] = ..., others: _Optional[_Union[InFlight, _Mapping]] = ..., head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class Engine(_message.Message):
    __slots__ = ("id", "url", "models", "adapters", "root", "health", "profile", "profile_verified", "block_size", "sync", "inexact_reason", "max_model_len", "kv_tokens", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    INEXACT_REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    id: str
    url: str
    models: _containers.RepeatedScalarFieldContainer[str]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    root: str
    health: str
    profile: str
    profile_verified: bool
    block_size: int
    sync: str
    inexact_reason: str
    max_model_len: int
    kv_tokens: int
    labels: _containers.ScalarMap[str, str]
    def __init__(self, id: _Optional[str] = ..., url: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., root: _Optional[str] = ..., health: _Optional[str] = ..., profile: _Optional[str] = ..., profile_verified: _Optional[bool] = ..., block_size: _Optional[int] = ..., sync: _Optional[str] = ..., inexact_reason: _Optional[str] = ..., max_model_len: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class FleetUpdate(_message.Message):
    __slots__ = ("snapshot", "engines", "removed", "loads")
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    snapshot: bool
    engines: _containers.RepeatedCompositeFieldContainer[Engine]
    removed: _containers.RepeatedScalarFieldContainer[str]
    loads: _containers.RepeatedCompositeFieldContainer[EngineLoad]
    def __init__(self, snapshot: _Optional[bool] = ..., engines: _Optional[_Iterable[_Union[Engine, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ..., loads: _Optional[_Iterable[_Union[EngineLoad, _Mapping]]] = ...) -> None: ...

class Routed(_message.Message):
    __slots__ = ("prompt_tokens", "predicted_cached_tokens", "prompts", "again", "to_compute", "silent_s")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    TO_COMPUTE_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    predicted_cached_tokens: int
    prompts: _containers.RepeatedCompositeFieldContainer[PromptKeys]
    again: bool
    to_compute: int
    silent_s: float
    def __init__(self, prompt_tokens: _Optional[int] = ..., predicted_cached_tokens: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[PromptKeys, _Mapping]]] = ..., again: _Optional[bool] = ..., to_compute: _Optional[int] = ..., silent_s: _Optional[float] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("ttft_s",)
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    ttft_s: float
    def __init__(self, ttft_s: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("cached_tokens", "completion_tokens", "comparable", "outcome")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPARABLE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    completion_tokens: int
    comparable: bool
    outcome: str
    def __init__(self, cached_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., comparable: _Optional[bool] = ..., outcome: _Optional[str] = ...) -> None: ...

class Observation(_message.Message):
    __slots__ = ("request_id", "engine", "model", "routed", "first_token", "finished", "also")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ALSO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    engine: str
    model: str
    routed: Routed
    first_token: FirstToken
    finished: Finished
    also: _containers.RepeatedCompositeFieldContainer[Observation]
    def __init__(self, request_id: _Optional[str] = ..., engine: _Optional[str] = ..., model: _Optional[str] = ..., routed: _Optional[_Union[Routed, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., also: _Optional[_Iterable[_Union[Observation, _Mapping]]] = ...) -> None: ...

class ObserveSummary(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: int
    def __init__(self, received: _Optional[int] = ...) -> None: ...
