"""Every exception that the four distributions raise on purpose.

::

    VllmError
    ├── InvalidRequestError            what the caller sent is wrong: nothing was queued     (ValueError)
    │   ├── ContextLengthError         prompt (or prompt + max_tokens) longer than the model's context
    │   └── RequestTooLargeError       can never fit into the KV cache of this engine
    ├── QueueFullError                 too many requests wait: try again later
    ├── RequestNotFoundError           no such request                                        (KeyError)
    ├── ConfigError                    a setting is wrong, alone or against the others        (ValueError)
    │   └── KvCacheTooSmallError       not one request of full length fits into the memory given
    ├── ModelLoadError                 the model cannot be read
    │   ├── UnsupportedModelError      readable, but an architecture, type or feature that is not there
    │   └── WeightsError               a tensor is missing, surplus or misshapen
    ├── BackendError                   a forward pass failed
    │   └── BackendOutOfMemoryError    the device ran out of memory in a step
    └── EngineDeadError                the engine stopped and will not answer
"""

__all__ = [
    "BackendError",
    "BackendOutOfMemoryError",
    "ConfigError",
    "ContextLengthError",
    "EngineDeadError",
    "InvalidRequestError",
    "KvCacheTooSmallError",
    "ModelLoadError",
    "QueueFullError",
    "RequestNotFoundError",
    "RequestTooLargeError",
    "UnsupportedModelError",
    "VllmError",
    "WeightsError",
]


class VllmError(Exception):
    """The root: ``except VllmError`` catches all that this library raises on purpose."""

    @property
    def message(self) -> str:
        """One readable sentence, fit to be shown to whoever made the mistake."""
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidRequestError(VllmError, ValueError):
    """A request that was refused before anything was queued.

    Args:
        message: One sentence that names the field and the limit.
        param: The field at fault, as the caller spelt it (``"temperature"``, ``"messages[2].role"``).
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and the tokens asked for, exceed ``max_model_len``."""


class RequestTooLargeError(InvalidRequestError):
    """A request that this engine's KV cache could not hold even alone."""


class QueueFullError(VllmError):
    """The waiting queue is at its bound; ``retry_after`` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestNotFoundError(VllmError, KeyError):
    """The request id is not known (never was, or its request has ended)."""

    def __str__(self) -> str:
        return self.message


class ConfigError(VllmError, ValueError):
    """A setting that cannot work; the message names the setting and what would."""


class KvCacheTooSmallError(ConfigError):
    """The memory given holds less than one request of ``max_model_len`` tokens."""


class ModelLoadError(VllmError):
    """The model's files cannot be found or read."""


class UnsupportedModelError(ModelLoadError):
    """An architecture, tensor type or feature that is not supported; the message lists those that are."""


class WeightsError(ModelLoadError):
    """A tensor is missing, surplus or misshapen; the message names it."""


class BackendError(VllmError):
    """A forward pass failed."""


class BackendOutOfMemoryError(BackendError):
    """The device had no memory left for a step; the engine may retry with less."""


class EngineDeadError(VllmError):
    """The engine has stopped; requests that it held were told so."""
