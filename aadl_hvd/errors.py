"""Named exceptions. Every error names the parameter, its value, what is allowed, what to do."""

from __future__ import annotations


class AndersonError(Exception):
    """Base of all errors raised by aadl_hvd."""


class ConfigError(AndersonError, ValueError):
    """A parameter of `AndersonConfig` or of an optimizer's constructor is not allowed.

    Also: an optimizer is constructed too early, before `hvd.init()`.
    """


class UnsupportedError(AndersonError, TypeError):
    """The model, the optimizer or the combination of settings cannot be accelerated."""


class ReplicaMismatchError(AndersonError, RuntimeError):
    """The ranks that share one history disagree on the model, its weights or the configuration."""


class HistoryMemoryError(AndersonError, MemoryError):
    """The history of these settings does not fit into the memory that is free."""


class CheckpointError(AndersonError, ValueError):
    """A checkpoint is damaged, foreign, from a newer version, or of another model."""


class CommunicationError(AndersonError, RuntimeError):
    """A collective was called with arguments that it does not take."""


class HorovodMissingError(AndersonError, ImportError):
    """Horovod is not installed, was built without torch, or cannot be loaded."""

    @classmethod
    def because(cls, error: Exception) -> HorovodMissingError:
        """The error to raise where `horovod.torch` could not be imported.

        Args:
            error: What the import raised.
        """
        return cls(
            "DistributedAndersonOptimizer and aadl_hvd.elastic need Horovod, built for this torch "
            f"({type(error).__name__}: {error}). `make setup` or launch/setup_env.py in a checkout "
            "of aadl_hvd builds it (launch/README.md); on a cluster, load the centre's module. pip "
            "alone does not build it. Without Horovod: AndersonOptimizer in one process; torchrun "
            "and torch.distributed.init_process_group() before DistributedAndersonOptimizer."
        )
