"""The exceptions that rooms raise for a caller to see; `backend/errors.py` gives each its gRPC status.

BackendError
├── InvalidRequest        a field of the request can't be used
├── Unsupported           this model, or this server, can't do what was asked
├── ModelNotLoaded        no model is loaded
├── IdentityMismatch      the request names another model than the one loaded
├── Overloaded            an admission limit is reached, or memory is exhausted
├── EngineGone            the engine died or is being shut down
└── LoadFailed            LoadModel could not load the model; the text is the root cause
    └── LoadCancelled     ... because its caller went away, or Free or a shutdown came first
"""

ENGINE_STOPPING = "the engine is being shut down"


class BackendError(Exception):
    """Base of all errors whose text is written for the caller."""


class InvalidRequest(BackendError):
    """A value that can't be used: names the field, the value and what is allowed.

    `field` is the wire's name, with an index or key where it helps: `Messages[2].role`.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class Unsupported(BackendError):
    """The request is sound, but this kind of model or this server can't serve it."""


class ModelNotLoaded(BackendError):
    """Raised by every RPC that needs a model while there is none."""

    def __init__(self) -> None:
        super().__init__("model not loaded")


class IdentityMismatch(BackendError):
    """`ModelIdentity` names another model. The orchestrator looks for the words in the text."""

    def __init__(self, asked: str, loaded: str) -> None:
        super().__init__(f"model identity mismatch: the request is for {asked[:200]!r}, {loaded!r} is loaded")


class Overloaded(BackendError):
    """The request would exceed a limit; the same request may pass later."""


class EngineGone(BackendError):
    """The engine stopped under the request: it died, or Free or a shutdown ended it."""


class LoadFailed(BackendError):
    """The model could not be loaded; the text is the root cause in one line or a few."""


class LoadCancelled(LoadFailed):
    """The load was given up before it ended."""
