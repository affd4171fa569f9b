"""What acceleration goes on from, on disk and between machine sizes.

    save, load       files: `files`, of the values that `plain` lets through
    merge_shards     the full state from all ranks' shards: `reshard`
    ShardState       the state of one rank, with its check, its cut and its fit: `shard_state`

The other modules are the library's own: `transfer` moves states between ranks, `state_dict` checks
the entry "anderson" of a state_dict, `base_state` the base optimizer's part of it.
"""

from aadl_hvd.checkpoint.files import load, save
from aadl_hvd.checkpoint.reshard import merge_shards

__all__ = ["load", "merge_shards", "save"]
